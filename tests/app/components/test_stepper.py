"""What the stepper is given to draw, and the page around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app import data
from app.components import stepper
from sleb.methods import step_evidence
from sleb.records import JobState, Method, Run
from sleb.report import build
from sleb.report.figures import step_animation
from sleb.report.figures import steps as step_charts
from tests.support.dashboard import charts, open_page, words
from tests.support.runs.stores import write_run


def payload(run: Run) -> dict:  # type: ignore[type-arg]
    assert run.trace is not None
    return stepper.payload(run, [step_evidence.of(run, step) for step in run.trace.steps])


def given(app) -> dict:  # type: ignore[no-untyped-def,type-arg]
    """The data of the component on a page."""
    (sent,) = steppers(app)
    return json.loads(sent.proto.json)


def steppers(app) -> list:  # type: ignore[no-untyped-def,type-arg]
    return [each for each in app.get("bidi_component") if each.proto.component_name == "sleb_stepper"]


@pytest.mark.parametrize("method", list(Method))
def test_every_step_is_drawn_with_its_evidence(method: Method, runs: Path) -> None:
    run = write_run(runs / "run", 12, 4, method=method)
    sent = payload(run)
    assert run.trace is not None
    assert sent["blocks"] == 12
    assert len(sent["steps"]) == 4
    assert len(sent["curve"]) == 5
    json.dumps(sent, allow_nan=False)
    for shown, step in zip(sent["steps"], run.trace.steps, strict=True):
        assert shown["blocks"] == [each.block for each in step.candidates]
        assert shown["scores"] == pytest.approx([each.score for each in step.candidates], rel=1e-5)
        assert step.candidates[shown["chosen"]].skipped in (step.removal_list, step.removed)
        assert shown["differences"][shown["chosen"]] == 0
        assert {shown["blocks"][index] for index in shown["tied"]} == set(step.tied)
        assert sorted(shown["removed_at"]) == sorted(step.removal_list)
        assert shown["list"] == list(step.removal_list)
        low, high = sent["axis"]["rises"]
        ends = [shown["rises"][shown["chosen"]], *(shown["rises"][index] for index in shown["tied"])]
        assert all(low <= end <= high for end in ends)  # what the decision was between is never cut off


def test_intervals_are_those_of_the_recorded_scores(runs: Path) -> None:
    run = write_run(runs / "run", 12, 2)
    shown = payload(run)["steps"][0]
    with np.load(run.run_dir / "scores" / "step-0001.npz") as arrays:
        nats = arrays["nats"] / 31
    winner = nats.mean(axis=1).argmin()
    assert shown["chosen"] == winner
    other = (winner + 3) % len(nats)
    difference = nats[other] - nats[winner]
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    from scipy.stats import t

    assert shown["differences"][other] == pytest.approx(difference.mean(), rel=1e-4)
    assert shown["half_widths"][other] == pytest.approx(t.ppf(0.975, 15) * error, rel=1e-4)


def test_without_the_scores_there_are_bars_and_no_intervals(runs: Path) -> None:
    run = write_run(runs / "run", 12, 2)
    for path in (run.run_dir / "scores").glob("step-*"):
        path.unlink()
    shown = payload(run)["steps"][0]
    assert None not in shown["scores"]
    assert [each for index, each in enumerate(shown["half_widths"]) if index != shown["chosen"]] == [None] * 9


def test_words_say_what_was_removed_and_how_sure_it_is(runs: Path) -> None:
    chunk = payload(write_run(runs / "chunk", 12, 3, method=Method.BEST_CHUNK))
    assert chunk["steps"][2]["words"].startswith("Step 3 removed blocks 4–6")
    alone = payload(write_run(runs / "exit", 12, 2, method=Method.EARLY_EXIT))
    assert alone["steps"][0]["words"] == "Step 1 removed block 11, the only candidate."
    greedy = write_run(runs / "greedy", 12, 4)
    assert greedy.trace is not None
    for step, shown in zip(greedy.trace.steps, payload(greedy)["steps"], strict=True):
        assert ("tied with" in shown["words"]) == bool(step.tied)
        behind = sorted(shown["differences"])[1]
        half_width = shown["half_widths"][shown["differences"].index(behind)]  # half of the interval that calls it tied
        assert f"{step.margin:.4f} nats per token (± {half_width:.4f} at 95%)" in shown["words"]
        assert ("significantly different" in shown["words"]) == (not step.tied)


def test_frames_of_the_report_hold_every_step(runs: Path) -> None:
    run = write_run(runs / "run", 12, 4)
    assert run.trace is not None
    compared = [step_evidence.of(run, step) for step in run.trace.steps]
    figure = step_animation.animated(run, compared)
    assert [frame.name for frame in figure.frames] == ["1", "2", "3", "4"]
    for frame, step in zip(figure.frames, run.trace.steps, strict=True):
        kinds = [{block for block, height in enumerate(trace.y) if height} for trace in frame.data[:4]]
        candidates, tied, chosen, earlier = kinds
        assert chosen == set(step.removed)
        assert tied == set(step.tied)
        assert earlier == set(step.removal_list) - set(step.removed)
        assert candidates | tied | chosen == {each.block for each in step.candidates}
        assert len(frame.data) == len(figure.data)  # Plotly takes away what a frame leaves out


def test_one_block_far_above_all_others_does_not_flatten_them() -> None:
    costs = np.array([0.1, 0.11, 0.12, 0.2, 3.0])
    reaches = np.array([0.0, 0.3, 0.01, 0.01, 0.5])
    top = step_animation.extent_of_axis(costs, reaches, contenders=(0, 1), quantile=0.75)
    assert 0.41 <= top < 1.0  # the tied one with its whole interval; the outlier is cut off
    assert step_animation.extent_of_axis(costs[:4], reaches[:4], (0,), 0.75) == pytest.approx(0.2)
    assert step_animation.extent_of_axis(np.array([np.nan]), np.array([np.nan]), (0,), 0.75) == 1.0


def test_one_sequence_distinguishes_no_candidates(runs: Path) -> None:
    run = write_run(runs / "run", 12, 1)
    assert run.trace is not None
    everyone = tuple(each.block for each in run.trace.steps[0].candidates if each.block not in run.removal_list)
    step = run.trace.steps[0].model_copy(update={"tied": everyone, "margin_standard_error": None})
    alone = run.model_copy(update={"trace": run.trace.model_copy(update={"steps": (step,)})})
    sent = stepper.payload(alone, [None])
    assert "one sequence distinguishes none" in sent["steps"][0]["words"]
    assert sent["interval"] == ""
    assert payload(run)["interval"] == "95% interval of the difference"


def test_rises_stay_readable(runs: Path) -> None:
    run = write_run(runs / "run", 80, 40)
    assert run.trace is not None
    curve = payload(run)["curve"]
    first, last = run.trace.baseline.perplexity, run.trace.steps[-1].perplexity
    assert first is not None
    assert last is not None
    assert last / first > 100
    assert curve[1]["calibration_rise"].endswith("%")
    assert curve[40]["calibration_rise"] == f"× {last / first:,.0f}"


def test_the_page_shows_the_sample_and_follows_the_address(runs: Path) -> None:
    app = open_page("steps", step="3")
    assert not app.exception
    assert given(app)["run"] == data.SAMPLE
    assert given(app)["step"] == 3
    assert any("step 3" in each.label for each in app.expander)
    table = app.dataframe[0].value
    assert (table["verdict"] == "removed").sum() == 1
    assert list(table["score"]) == sorted(table["score"])
    (curves,) = charts(app)
    assert {"Metric3 (SLEB)", "Metric2", "Metric1", "Early exit", "Best chunk"} <= {
        trace.get("name") for trace in curves["data"]
    }


@pytest.mark.parametrize(("wanted", "step"), [("99", 12), ("-1", 12), ("x", 12), ("0", 0), ("１", 12), ("9" * 99, 12)])
def test_a_step_from_the_address_is_brought_into_range(wanted: str, step: int, runs: Path) -> None:
    app = open_page("steps", step=wanted)
    assert not app.exception
    assert given(app)["step"] == step


def test_a_failed_run_shows_the_steps_it_has(runs: Path) -> None:
    write_run(runs / "failed", 12, 4, done=2, state=JobState.FAILED, message="The disk is full.", analysis=False)
    app = open_page("steps", run="failed")
    assert not app.exception
    assert len(given(app)["steps"]) == 2
    assert "This search failed; its finished steps are below" in words(app)
    assert "The disk is full" in words(app)
    write_run(runs / "none", 12, 4, done=0, state=JobState.FAILED, message="The disk is full.", analysis=False)
    app = open_page("steps", run="none")
    assert steppers(app) == []
    assert "No step finished" in words(app)
    assert "The disk is full" in words(app)


def test_a_swap_shows_one_block_coming_back_and_another_going(runs: Path) -> None:
    run = write_run(runs / "run", 12, 4, swap=True)
    assert run.trace is not None
    sent = payload(run)
    json.dumps(sent, allow_nan=False)
    assert [shown["swap"] for shown in sent["steps"]] == [False] * 4 + [True] * 2
    assert len(sent["curve"]) == 7
    for step, shown in list(zip(run.trace.steps, sent["steps"], strict=True))[4:]:
        (block,), (back,) = step.removed, step.restored
        assert (shown["removed"], shown["restored"]) == ([block], [back])
        assert shown["names"][shown["chosen"]] == f"{back} back, {block} out"
        assert shown["words"].startswith(
            f"Step {step.number}, a swap: {back} back, {block} out, {step.improvement:.4f}"
        )
        assert shown["removed_at"][block] == step.number
        assert back not in shown["removed_at"]
        assert set(shown["removed_at"]) == set(step.removal_list)
        # One bar a block: of all swaps that remove it, the best.
        best = {each: min(c.score or 0 for c in step.candidates if c.block == each) for each in shown["blocks"]}
        assert shown["blocks"] == sorted({each.block for each in step.candidates})
        assert shown["scores"] == pytest.approx(list(best.values()), rel=1e-5)
        assert shown["rises"][shown["chosen"]] == pytest.approx(-(step.improvement or 0), rel=1e-3)
        low, high = sent["axis"]["rises"]
        assert low < shown["rises"][shown["chosen"]] < high


def test_the_page_and_the_report_show_a_run_with_swaps(runs: Path) -> None:
    run = write_run(runs / "refined", 12, 4, swap=True)
    write_run(runs / "plain", 12, 4)
    assert run.trace is not None
    app = open_page("steps", run="refined", step="5")
    assert not app.exception
    swap = run.trace.steps[4]
    table = app.dataframe[0].value
    assert len(table) == len(swap.candidates) == 4 * 6
    assert list(table["verdict"]).count("swapped") == 1
    assert table["block"].iloc[0] == f"{swap.restored[0]} back, {swap.removed[0]} out"
    assert table["block"].is_unique
    assert (table["verdict"] == "statistically tied").sum() == len(swap.tied)
    (curves,) = charts(app)
    assert {"Metric3 (SLEB)", "Metric3 (SLEB), refined"} <= {trace.get("name") for trace in curves["data"]}
    (line,) = step_charts.methods([run], held_out=False, logarithmic=True).data
    assert list(line.x) == [0, 1, 2, 3, 4]
    assert line.y[-1] == pytest.approx(run.trace.steps[-1].perplexity)  # of several lists of a length the last
    figure = step_animation.animated(run, [step_evidence.of(run, step) for step in run.trace.steps])
    candidates, tied, chosen, earlier = (
        {block for block, height in enumerate(trace.y) if height} for trace in figure.frames[4].data[:4]
    )
    assert chosen == set(swap.removed)
    assert earlier == set(swap.before)
    assert candidates | tied | chosen == {each.block for each in swap.candidates}
    html = build.of(run)
    assert f"{swap.removed[0]} (back: {swap.restored[0]})" in html
    assert "Metric3 (SLEB), refined" in html
    assert "After the last removal, swaps" in html
    assert "After the last removal, swaps" not in build.of(data.load("plain"))
