"""The Evaluate page: panels, gates and their proposal, forms that start jobs, tables, empty states."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app import data
from app.components import side_by_side
from sleb.errors import StorageError
from sleb.evaluation import request
from sleb.records import (
    BenchmarkSpec,
    EvaluateSpec,
    ExportJob,
    GenerateSpec,
    Generation,
    HealSpec,
    Job,
    JobState,
    JobStatus,
    Measured,
    Permissions,
    Progress,
    QuantizeSpec,
    Run,
    RunSpec,
    TextPerplexity,
)
from sleb.report.figures import evaluate
from sleb.report.summaries import list_curves
from sleb.runtime import findings_folder, job_folder, origin, run_folder, run_index
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes import job_processes
from tests.support.builders import make_stack
from tests.support.dashboard import ROOT, charts, press, words
from tests.support.runs import judged
from tests.support.runs.stores import write_run


@pytest.fixture
def full(runs: Path) -> Run:
    """A search of 4 of 12 blocks with all kinds of findings."""
    run = write_run(runs / "full", 12, 4, analysis=False)
    judged.keep(run, judged.everything(run))
    return run


def opened(**query: str) -> AppTest:
    """The page, as a link opens it."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=120)
    app.switch_page("../pages/evaluate.py")
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def button(app: Any, label: str) -> Any:
    return next(each for each in app.button if each.label == label)


def show(app: Any, tab: str) -> Any:
    app.session_state["show"] = tab
    return app.run()


def judging_job(run: Run, state: JobState, message: str = "", **ask: Any) -> Job:
    """A job as its process left it."""
    spec = request.job_of(request.ask_of(EvaluateSpec, **({"lists": judged.lists_of(run)[:1]} | ask)))
    job = job_folder.create_job(run.run_dir, spec)
    status = JobStatus(state=state, message=message, heartbeat=time.time(), started=time.time())
    job_folder.write_status(job.directory, status)
    return job


def traces(app: Any) -> dict[str, dict[str, Any]]:
    """Of the panels, by the name in the legend."""
    (chart,) = charts(app)
    return {each.get("name", ""): each for each in chart["data"]}


def test_everything_that_was_found_is_in_the_panels(full: Run) -> None:
    app = opened(run="full")
    assert not app.exception
    result = traces(app)
    assert list(result) == [
        "wikitext2", "c4 ≈", "held-out", "calibration", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge",
        "mean", "prompt", "generation", "predicted", "weights", "int8", "int4", "with KV cache",
    ]  # fmt: skip
    assert all(each.get("xaxis", "x") == "x" for each in result.values())  # one axis for all panels
    assert {each["yaxis"] for each in result.values()} == {"y", "y2", "y3", "y4"}
    own = [
        each
        for each in findings_folder.of_kind(data.findings_of(full), TextPerplexity)
        if each.text.name == "wikitext2"
    ]
    drawn = dict(zip(result["wikitext2"]["x"], result["wikitext2"]["y"], strict=True))
    assert drawn == {len(each.removal_list): each.measured.perplexity for each in own}
    last = result["wikitext2"]["y"][4]
    assert result["wikitext2"]["error_y"]["array"][4] == pytest.approx(last * math.expm1(0.016))
    assert result["calibration"]["line"]["dash"] == result["held-out"]["line"]["dash"] == "dot"
    assert "too good" in result["calibration"]["customdata"][2]
    assert result["c4 ≈"]["marker"]["symbol"].endswith("-open")
    assert result["predicted"]["y"] == [12 / (12 - each) for each in range(5)]
    assert result["predicted"]["line"]["dash"] == "dash"
    shown = words(app)
    assert "estimates from a part" in shown
    assert "too good" in shown


def test_times_the_baseline_divides_each_line_by_its_own(full: Run) -> None:
    app = opened(run="full")
    app.segmented_control(key="as").set_value("times").run()
    result = traces(app)
    assert [result[name]["y"][0] for name in ("wikitext2", "c4 ≈", "held-out", "calibration")] == [1.0] * 4
    assert result["wikitext2"]["y"][4] == pytest.approx(math.exp(0.035 * 4 * 1.48))
    (chart,) = charts(app)
    assert [each["y0"] for each in chart["layout"]["shapes"] if each["type"] == "line"] == [1.1]


def test_what_was_not_measured_says_with_which_button(runs: Path) -> None:
    write_run(runs / "bare", 12, 4, analysis=False)
    app = opened(run="bare")
    assert not app.exception
    (chart,) = charts(app)
    expected = " ".join(each["text"] for each in chart["layout"]["annotations"])
    labels = [each.label for each in app.button]
    for name in ("Evaluate", "Time it"):
        assert f"<b>{name}</b>" in expected
        assert name in labels
    assert list(traces(app)) == ["held-out", "calibration", "predicted", "weights", ""]
    assert app.toggle(key="lost-gate").disabled
    judged.keep(run_folder.load("bare"), [judged.perplexity(run_folder.load("bare"), (), 0.0)])
    app.run()
    assert "wikitext2" in traces(app)  # a finding that came since is noticed


def test_the_gates_shade_what_passes_and_propose_one_list(full: Run) -> None:
    app = opened(run="full")
    app.number_input(key="worse").set_value(20.0).run()
    assert "Remove 3 of 12 blocks" in words(app)
    (chart,) = charts(app)
    shaded = {
        (each["x0"], each["x1"]) for each in chart["layout"]["shapes"] if each.get("fillcolor") == evaluate.PASSES
    }
    assert shaded == {(-0.5, 3.5)}
    framed = {(each["x0"], each["x1"]) for each in chart["layout"]["shapes"] if each["line"].get("dash") == "dash"}
    assert framed == {(2.5, 3.5)}
    app.toggle(key="faster-gate").set_value(True).run()
    app.number_input(key="faster").set_value(1.05).run()
    (chart,) = charts(app)
    shaded = {
        (each["x0"], each["x1"]) for each in chart["layout"]["shapes"] if each.get("fillcolor") == evaluate.PASSES
    }
    assert shaded == {(1.5, 3.5)}
    expected = words(app).replace("\\", "")
    assert "The speed of prompt: 1.09×" in expected
    app.toggle(key="lost-gate").set_value(True).run()
    app.number_input(key="lost").set_value(0.5).run()
    warning = app.warning[0].value.replace("\\", "")
    assert "the mean accuracy lost" in warning
    assert "No list passes" in warning
    assert "Take this list" not in [each.label for each in app.button]
    for key in ("worse", "faster", "lost"):
        app.toggle(key=f"{key}-gate").set_value(False)
    app.run()
    assert "Switch a gate on" in words(app)
    (chart,) = charts(app)
    assert not chart["layout"].get("shapes")


def test_the_cost_gate_goes_by_the_text_that_was_chosen(full: Run) -> None:
    app = opened(run="full")
    choice = next(each for each in app.selectbox if each.label == "At most … % worse: measured on")
    assert choice.options == ["on wikitext2", "on c4 ≈", "on held-out"]
    choice.set_value("c4").run()
    assert "the perplexity on c4 (an estimate)" in words(app).replace("\\", "").replace(
        "The perplexity", "the perplexity"
    )


def test_a_size_gate_says_what_is_counted(full: Run) -> None:
    app = opened(run="full")
    app.toggle(key="fits-gate").set_value(True).run()
    assert "KV cache of 1 × 32 tokens" in app.toggle(key="fits-gate").help
    assert "The size: 62.9 MB (at most 24 GB)" in words(app).replace("\\", "")


def test_the_proposed_list_leads_to_its_export(full: Run) -> None:
    app = opened(run="full")
    app.number_input(key="worse").set_value(20.0).run()
    press(app, "Take this list")
    assert not app.exception
    assert app.title[0].value == "Export"
    assert app.slider(key="steps").value == 3
    assert {each.label: each.value for each in app.metric}["Blocks kept"] == "9 of 12"


def test_after_swaps_the_step_that_ends_with_the_list_is_taken(runs: Path) -> None:
    write_run(runs / "refined", 12, 4, swap=True, analysis=False)
    app = opened(run="refined")
    app.number_input(key="worse").set_value(1000.0).run()
    press(app, "Take this list")
    assert app.slider(key="steps").value == 6


def test_evaluate_starts_what_was_chosen(full: Run, started: list[Job], tmp_path: Path) -> None:
    app = opened(run="full")
    app.multiselect(key="evaluate-texts-full").set_value(["wikitext2", str(tmp_path / "my text.txt")]).run()
    app.multiselect(key="evaluate-tasks").set_value(["piqa", "my_task"]).run()
    app.selectbox(key="evaluate-limit").set_value(16).run()
    app.number_input(key="evaluate-window").set_value(512).run()
    press(app, "Evaluate")
    assert not app.exception
    (job,) = started
    assert isinstance(job.spec.ask, EvaluateSpec)
    assert job.spec.ask.lists == tuple(judged.lists_of(full))
    assert job.spec.ask.texts == ("wikitext2", str(tmp_path / "my text.txt"))
    assert (job.spec.ask.tasks, job.spec.ask.limit, job.spec.ask.window) == (("piqa", "my_task"), 16, 512)
    assert (job.spec.device, job.spec.allow_pickle, job.spec.trust_remote_code) == ("auto", False, False)


def test_what_the_server_permits_goes_with_the_job(
    full: Run, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEB_DASHBOARD_TRUST_REMOTE_CODE", "1")
    app = opened(run="full")
    app.selectbox(key="evaluate-limit").set_value(0).run()
    app.selectbox(key="evaluate-lists-full").set_value(2).run()
    press(app, "Evaluate")
    assert isinstance(started[0].spec.ask, EvaluateSpec)
    assert (started[0].spec.trust_remote_code, started[0].spec.allow_pickle) == (True, False)
    assert started[0].spec.ask.limit is None
    assert started[0].spec.ask.lists == (judged.lists_of(full)[1],)


def test_a_file_that_was_measured_before_is_found_again_by_its_name(full: Run, started: list[Job]) -> None:
    judging_job(full, JobState.FINISHED, texts=("/some/where/news.txt",))
    app = opened(run="full")
    assert app.multiselect(key="evaluate-texts-full").value == ["news.txt"]
    press(app, "Evaluate")
    assert isinstance(started[0].spec.ask, EvaluateSpec)
    assert started[0].spec.ask.texts == ("/some/where/news.txt",)


def test_timing_starts_a_look_or_the_papers_shapes(full: Run, started: list[Job]) -> None:
    app = opened(run="full")
    app.segmented_control(key="benchmark-what").set_value(["generation"]).run()
    press(app, "Time it")
    ask = started[0].spec.ask
    assert isinstance(ask, BenchmarkSpec)
    assert (ask.prompt, ask.generation, ask.generation_repetitions) == (None, (1, 32), 3)
    assert ask.lists == tuple(judged.lists_of(full))
    app.segmented_control(key="benchmark-shape").set_value("paper").run()
    app.segmented_control(key="benchmark-what").set_value(["prompt", "generation"]).run()
    press(app, "Time it")
    ask = started[1].spec.ask
    assert isinstance(ask, BenchmarkSpec)
    assert (ask.prompt, ask.generation, ask.prompt_repetitions) == ((1, 2048), (64, 128), 50)


def test_generate_quantise_and_heal_start_with_the_chosen_list(full: Run, started: list[Job]) -> None:
    lists = judged.lists_of(full)
    app = show(opened(run="full"), "Side by side")
    app.selectbox(key="list-said").set_value(3).run()
    app.text_area(key="prompt").set_value("Once upon *a* time").run()
    app.toggle(key="prompt-chat").set_value(True).run()
    press(app, "Generate")
    assert started[0].spec.ask == GenerateSpec(lists=(lists[2],), prompt="Once upon *a* time", tokens=32, chat=True)
    show(app, "Quantise")
    assert app.selectbox(key="list-quantized").value == 4  # the newest that was quantised
    app.selectbox(key="list-quantized").set_value(2).run()
    app.segmented_control(key="quantize-schemes").set_value(["int8", "int4"]).run()
    press(app, "Quantise")
    assert started[1].spec.ask == QuantizeSpec(lists=(lists[1],), schemes=("int8", "int4"), limit=4)
    show(app, "Heal")
    app.selectbox(key="list-healed").set_value(3).run()
    app.segmented_control(key="heal-how").set_value("linear").run()
    press(app, "Heal")
    ask = started[2].spec.ask
    assert isinstance(ask, HealSpec)
    assert (ask.how, ask.lists, ask.source, ask.sequences, ask.limit) == ("linear", (lists[2],), "demo", 32, 4)


def test_a_sample_is_judged_in_a_copy(runs: Path, started: list[Job]) -> None:
    before = sorted(path for path in data.SAMPLES.rglob("*") if path.name != ".lock")
    app = opened(run=data.SAMPLE)
    assert not app.exception
    press(app, "Time it")
    assert not app.exception
    assert started[0].directory.is_relative_to(runs / data.SAMPLE)
    assert sorted(path for path in data.SAMPLES.rglob("*") if path.name != ".lock") == before


def test_a_process_that_cannot_be_started_leaves_no_job(full: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Job, permissions: Permissions) -> None:
        raise StorageError("The disk is *full*.")

    monkeypatch.setattr(job_processes, "start", refuse)
    app = press(opened(run="full"), "Evaluate")
    assert [each.value for each in app.error] == ["The disk is \\*full\\*."]
    assert [job.spec.kind for job in run_folder.load("full").jobs] == ["search"]


def test_a_running_job_is_watched_stopped_and_keeps_the_buttons_away(
    full: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = judging_job(full, JobState.RUNNING)
    status = job_folder.load_job(job.directory).status
    progress = Progress(phase="Perplexity on *news*", fraction=0.4, message="block 3", eta_seconds=12)
    job_folder.write_status(job.directory, status.model_copy(update={"host": "elsewhere", "progress": progress}))
    stopped: list[str] = []
    monkeypatch.setattr(job_processes, "stop", lambda run: stopped.append(run.run_id))
    app = opened(run="full")
    assert not app.exception
    assert "Measuring what lists cost" in words(app)
    assert [button(app, name).disabled for name in ("Evaluate", "Time it")] == [True, True]
    for tab, name in [("Side by side", "Generate"), ("Quantise", "Quantise"), ("Heal", "Heal")]:
        assert button(show(app, tab), name).disabled
    press(app, "Stop")
    assert stopped == ["full"]


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        (JobState.FAILED, "Accuracy needs *lm-eval*: pip install 'sleb[tasks]'.", "pip install 'sleb[tasks]'"),
        (JobState.STOPPED, "Stopped on request.", "Results until then are kept"),
        (JobState.QUEUED, "", "did not start"),
    ],
)
def test_how_the_last_job_ended_is_said(full: Run, state: JobState, message: str, expected: str) -> None:
    job = judging_job(full, state, message)
    old = {"heartbeat": time.time() - 999}
    job_folder.write_status(job.directory, job_folder.load_job(job.directory).status.model_copy(update=old))
    (job.directory / "log.txt").write_text("INFO it began\nERROR it ended")
    app = opened(run="full")
    shown = [*(each.value for each in app.error), *(each.value for each in app.warning)]
    assert any(expected in each.replace("\\", "") for each in shown)
    assert any("ERROR it ended" in each.value for each in app.code)
    assert not button(app, "Evaluate").disabled


def test_an_export_that_failed_is_told_on_its_own_page(full: Run) -> None:
    job = job_folder.create_job(full.run_dir, ExportJob(out="/nowhere"))
    job_folder.write_status(job.directory, JobStatus(state=JobState.FAILED, message="The export broke."))
    assert opened(run="full").error.len == 0


def test_texts_are_laid_side_by_side_with_what_differs_and_what_flipped(full: Run) -> None:
    result = of_kind(data.findings_of(full), Generation)[-1]
    shown = side_by_side.payload(result)
    before, after = shown["texts"]
    assert [before["tokens"][each] for each in before["differs"]][:2] == [",", " a"]
    assert [after["tokens"][each] for each in after["differs"]][:1] == ["."]
    same = [each for place, each in enumerate(before["tokens"]) if place not in before["differs"]]
    assert same == [each for place, each in enumerate(after["tokens"]) if place not in after["differs"]]
    assert shown["flips"][0] == {"place": 6, "before": ",", "after": ".", "before_share": 0.41, "after_share": 0.33}
    whole = [*shown["prompt"], *before["tokens"]]
    assert [whole[each["place"]] for each in shown["flips"]] == [",", " <b>", "\n"]
    assert side_by_side.differing(["a", "b"], ["a", "b"]) == ([], [])
    assert side_by_side.differing([], ["a"]) == ([], [0])


def test_earlier_prompts_can_be_read_again(full: Run) -> None:
    app = show(opened(run="full"), "Side by side")
    assert not app.exception
    assert app.selectbox(key="list-said").value == 4  # that something was said about
    earlier = app.selectbox(key="earlier")
    assert earlier.options == [
        "The capital of France is (16 tokens)",
        "Write a list of <i>five</i> fruits. (16 tokens)",
    ]
    app.selectbox(key="list-said").set_value(1).run()
    assert "Answers exist for 4 removed" in words(app)


def test_quantisation_and_healing_are_tables(full: Run) -> None:
    app = show(opened(run="full"), "Quantise")
    (table,) = [each.value for each in app.dataframe]
    assert list(table["Removed"]) == [0, 0, 4, 4]
    assert list(table["Scheme"]) == ["int4, groups of 128", "int8"] * 2
    assert list(table["Rise"]) == ["+9.0%", "+0.4%"] * 2
    assert table["Weights"][1] == "269 MB → 163 MB"
    app = show(app, "Heal")
    (table,) = [each.value for each in app.dataframe]
    assert list(table["Method"]) == ["LoRA, rank 8", "least-squares refit"]
    assert table["Change, nats"][0] == "−0.1193 ± 0.0041"
    assert list(table["Healed"]) == pytest.approx([14.2, 15.4])


def test_what_has_no_number_and_what_was_cut_is_said_with_its_cause(full: Run, other: Run) -> None:
    blocks = judged.lists_of(full)[2]
    nothing = Measured(nll_sum=None, token_count=10)
    unknown = {"rise": None, "rise_standard_error": None}
    judged.keep(
        full,
        [
            judged.perplexity(full, blocks, 0.0).model_copy(update={"measured": nothing} | unknown),
            judged.accuracy(full, (), "piqa", 0.6, truncated=7),
            judged.accuracy(full, blocks, "piqa", 0.6, truncated=7, metrics={}, not_numbers=True),
            judged.quantization(full, blocks).model_copy(update={"measured": nothing, "change": None}),
        ],
    )
    sentence = f"The model without blocks {list(blocks)} gives predictions that are not numbers in bfloat16."
    app = opened(run="full")
    shown = words(app).replace("\\", "")
    assert "7 of 1,838 examples of piqa are longer than the model" in shown
    assert sentence in shown
    assert "Beyond the upper edge" not in shown
    app = show(app, "Quantise")
    assert "without blocks [" in words(app).replace("\\", "")
    assert ", quantised to int8, gives predictions" in words(app).replace("\\", "")
    app = show(app, "Another calibration set")
    assert app.table[0].value["wikitext2"].iloc[1].startswith("no number")
    assert words(app).replace("\\", "").count(sentence) == 2  # beside the panels, and here


@pytest.fixture
def other(runs: Path, full: Run) -> Run:
    """The same model, searched on another text; shorter by one block."""
    run = write_run(runs / "other", 12, 3, seed=3, analysis=False)
    (run.run_dir / "stack.json").unlink()
    assert run.stack is not None
    origin.write_stack(run.run_dir, run.stack.model_copy(update={"tokens_hash": "another"}))
    run = run_folder.load(run.run_dir)
    lists = [(), *judged.lists_of(run)]
    judged.keep(run, [judged.perplexity(run, each, 0.02 * len(each), 0.001) for each in lists])
    return run


def test_another_calibration_set_is_compared_text_by_text(full: Run, other: Run) -> None:
    app = show(opened(run="full"), "Another calibration set")
    assert not app.exception
    (table,) = [each.value for each in app.table]
    assert list(table.columns) == ["Removed", "wikitext2", "c4 ≈ 8 of 256"]
    ours, theirs = (judged.lists_of(each)[2] for each in (full, other))
    assert list(table["Removed"])[1:] == [", ".join(map(str, each)) for each in (ours, theirs)]
    assert table["wikitext2"].iloc[2].startswith("**13.49** (+6.2% ± 0.1%)")
    assert not table["wikitext2"].iloc[1].startswith("**")
    assert table["c4 ≈ 8 of 256"].iloc[2] == "not measured"
    app.select_slider(key="other-after").set_value(1).run()
    (table,) = [each.value for each in app.table]
    assert table["wikitext2"].iloc[1].startswith("13.2")


def test_what_is_missing_is_measured_on_both_runs(full: Run, other: Run, started: list[Job]) -> None:
    app = show(opened(run="full"), "Another calibration set")
    limit = next(each for each in app.selectbox if each.label == "How much of each")
    assert limit.value == 8  # of the column that is a part of a text
    next(each for each in app.multiselect if "both" in each.label).set_value(["c4"]).run()
    press(app, "Measure both")
    assert [job.directory.parent.parent.name for job in started] == ["other"]  # the first run has it
    ask = started[0].spec.ask
    assert isinstance(ask, EvaluateSpec)
    assert (ask.lists, ask.texts, ask.limit) == ((judged.lists_of(other)[2],), ("c4",), 8)
    for job in started:
        job_folder.withdraw_job(job)
    app = show(opened(run="full"), "Another calibration set")
    next(each for each in app.multiselect if "both" in each.label).set_value(["c4", "/some/new.txt"]).run()
    press(app, "Measure both")
    assert [job.directory.parent.parent.name for job in started[1:]] == ["full", "other"]
    assert {job.spec.ask.texts for job in started[1:]} == {("c4", "/some/new.txt")}  # type: ignore[union-attr]


def test_only_the_same_weights_on_another_text_are_compared(full: Run, runs: Path) -> None:
    write_run(runs / "same-text", 12, 3, seed=5, analysis=False)
    weights = write_run(runs / "weights", 12, 3, analysis=False)
    (weights.run_dir / "stack.json").unlink()
    origin.write_stack(weights.run_dir, make_stack(12, weights_hash="other", tokens_hash="other"))
    assert data.rivals_of(full) == []
    app = show(opened(run="full"), "Another calibration set")
    assert "No other calibration set yet" in words(app)


def test_hostile_names_are_text(runs: Path) -> None:
    run = write_run(runs / "x", 12, 2, analysis=False)
    name = "<b>x</b> *y* $z$.txt"
    lists = [(), *judged.lists_of(run)]
    judged.keep(run, [judged.perplexity(run, each, 0.1 * len(each), name=name) for each in lists])
    judged.keep(run, [judged.accuracy(run, each, "<i>t</i>", 0.5) for each in lists])
    app = opened(run="x")
    assert not app.exception
    assert all("<" not in each for each in traces(app))
    assert "*y*" not in words(app)


@pytest.mark.parametrize(
    ("run_id", "expected"),
    [
        ("none", "Resume it on the"),
        ("new", "Model not opened yet"),
        ("analysis", "removed no block"),
        ("searching", "after the first step"),
        ("given-new", "Nothing measured yet"),
    ],
)
def test_where_there_is_nothing_it_says_what_to_do(run_id: str, expected: str, runs: Path) -> None:
    write_run(runs / "none", 12, 3, done=0, state=JobState.FAILED, message="It broke.", analysis=False)
    run_folder.create(RunSpec(model="just/created"), runs / "new")
    analysis = run_folder.create(RunSpec(model="an/analysis", kind="analyze"), runs / "analysis")
    origin.write_stack(analysis.run_dir, make_stack(12))
    going = write_run(runs / "searching", 12, 3, done=0, state=JobState.RUNNING, analysis=False)
    status = job_folder.load_job(going.jobs[0].directory).status
    job_folder.write_status(
        going.jobs[0].directory, status.model_copy(update={"host": "elsewhere", "heartbeat": time.time()})
    )
    run_folder.create(RunSpec(model="m", kind="evaluate", given=(2, 1), held_out=0, analysis=False), runs / "given-new")
    app = opened(run=run_id)
    assert not app.exception
    assert expected in words(app)
    assert charts(app) == []
    assert ("Evaluate" in [each.label for each in app.button]) == (run_id == "given-new")


def test_a_given_list_shows_its_findings(runs: Path, started: list[Job]) -> None:
    run = run_folder.create(
        RunSpec(model="m", kind="evaluate", given=(5, 2), held_out=0, analysis=False), runs / "given"
    )
    origin.write_stack(run.run_dir, make_stack(12))
    run = run_folder.load(run.run_dir)
    judged.keep(run, [judged.perplexity(run, (), 0.0), judged.perplexity(run, (2, 5), 0.05)])
    app = opened(run="given")
    assert not app.exception
    assert traces(app)["wikitext2"]["x"] == [0, 2]
    assert "Remove 2 of 12 blocks" in words(app)
    assert "`5, 2`" in words(app)
    assert "Take this list" not in [each.label for each in app.button]  # Export takes the lists of a search
    press(app, "Time it")
    assert started[0].spec.ask is not None
    assert started[0].spec.ask.lists == ((2, 5),)
    assert next(each for each in data.outlines() if getattr(each, "run_id", "") == "given").removal_list == (5, 2)  # type: ignore[union-attr]


def test_many_blocks_leave_the_chart_at_its_edge(runs: Path) -> None:
    run = write_run(runs / "many", 40, 30, analysis=False)
    lists = [(), *judged.lists_of(run)]
    judged.keep(run, [judged.perplexity(run, each, 0.01 * len(each) ** 2) for each in lists])
    app = opened(run="many")
    assert "Beyond the upper edge: wikitext2" in words(app)
    (chart,) = charts(app)
    assert chart["layout"]["yaxis"]["range"][1] < math.log10(60 * 12.7)


def test_a_finding_changes_the_signature_of_its_run(full: Run) -> None:
    before = run_index.signature(full.run_dir)
    (full.run_dir / findings_folder.FOLDER / "windows-x.npz").write_bytes(b"x")  # no page reads it
    assert run_index.signature(full.run_dir) == before
    judged.keep(full, [judged.perplexity(full, (), 0.0, name="new.txt")])
    assert run_index.signature(full.run_dir) != before
    path = next((full.run_dir / findings_folder.FOLDER).glob("perplexity-*.json"))
    os.utime(path, (1, 1))
    assert "new.txt" in {line.name for line in list_curves.curves(full, data.findings_of(full)).cost}
