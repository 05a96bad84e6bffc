"""The Compare page, and the figures of several lists side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from app import data
from sleb.formats.published_lists import published
from sleb.records import JobState, Method, RunSpec
from sleb.report.figures import compare, stack_strips, style
from sleb.report.figures.compare import CurveView
from sleb.report.summaries import compared_lists
from sleb.runtime import run_folder
from tests.support.dashboard import charts, open_page, words
from tests.support.runs.stores import write_run

SAMPLES = [method.value for method in Method]


def removed_cells(chart: dict) -> dict[str, list[int]]:  # type: ignore[type-arg]
    """Row -> blocks drawn as removed, in the order of the numbers in them."""
    cells_of: dict[str, list[int]] = {}
    for trace in chart["data"][1:]:
        cells = sorted(zip(trace["text"], trace["base"], trace["y"], strict=True), key=lambda cell: int(cell[0] or 0))
        for _, base, row in cells:
            cells_of.setdefault(row, []).append(round(base + 0.5))
    return cells_of


def chosen(app) -> list[str]:  # type: ignore[no-untyped-def]
    return list(app.multiselect(key="compare-runs").value)


def test_it_opens_on_the_sample_and_its_kin(runs: Path) -> None:
    app = open_page("compare")
    assert not app.exception
    assert chosen(app) == [f"sample-smollm2-135m-{name}" for name in SAMPLES]
    assert app.query_params["runs"] in (",".join(chosen(app)), [",".join(chosen(app))])
    places, costs, agreement = charts(app)
    cells = removed_cells(places)
    for letter, run_id in zip("ABCDE", chosen(app), strict=True):
        run = data.load(run_id)
        (row,) = [name for name in cells if name.startswith(f"{letter}  ")]
        in_one_piece = run.spec.method is Method.BEST_CHUNK  # a chunk's blocks have no order
        assert cells[row] == (sorted(run.removal_list) if in_one_piece else list(run.removal_list))
    assert [trace["name"] for trace in costs["data"] if trace.get("showlegend", True)] == [
        f"{letter}  {style.METHOD_NAMES[name]}" for letter, name in zip("ABCDE", SAMPLES, strict=True)
    ]
    assert costs["layout"]["yaxis"]["type"] == "log"
    metric3, metric2 = data.load(chosen(app)[0]), data.load(chosen(app)[1])
    both = set(metric3.removal_list) & set(metric2.removal_list)
    assert agreement["data"][0]["text"][0][1] == str(len(both)) == agreement["data"][0]["text"][1][0]
    shown = words(app)
    assert "All on the same tokens" in shown
    assert "Beyond the upper edge of the chart: D" in shown  # early exit breaks the model at once
    table = app.dataframe[0].value
    assert list(table["Removed"]) == [12] * 5
    assert table["Removal list"].iloc[0] == ", ".join(map(str, metric3.removal_list))


def test_runs_of_the_address_in_their_order_and_a_word_on_those_that_are_not_there(runs: Path) -> None:
    write_run(runs / "one", 12, 3)
    write_run(runs / "two", 12, 3, method=Method.METRIC2)
    write_run(runs / "three", 12, 3, method=Method.METRIC1)
    app = open_page("compare", runs="three,<b>missing</b>,one")
    assert not app.exception
    assert chosen(app) == ["three", "one"]
    (warning,) = [each.value for each in app.warning]
    assert "\\<b\\>missing" in warning
    assert chosen(open_page("compare", runs="../../etc")) == chosen(open_page("compare"))  # no run of these exists


def test_the_choice_is_kept_in_the_address(runs: Path) -> None:
    write_run(runs / "one", 12, 3)
    write_run(runs / "two", 12, 3, method=Method.METRIC2)
    app = open_page("compare", runs="one,two")
    app.multiselect(key="compare-runs").set_value(["two"]).run()
    assert app.query_params["runs"] in ("two", ["two"])
    app.multiselect(key="compare-published").set_value(["opt-13b"]).run()
    assert app.query_params["published"] in ("opt-13b", ["opt-13b"])
    assert "OPT-13B" in json.dumps(charts(app)[0])
    app.multiselect(key="compare-runs").set_value([]).run()
    app.multiselect(key="compare-published").set_value([]).run()
    assert not app.exception
    assert "Nothing chosen" in words(app)


def test_the_papers_list_for_the_same_model_stands_beside_ours(runs: Path) -> None:
    run = write_run(runs / "llama", 32, 7, model="meta-llama/Llama-2-7b-hf")
    app = open_page("compare", runs="llama")
    assert app.multiselect(key="compare-published").value == ["llama-2-7b"]
    theirs = published("llama-2-7b")
    assert theirs is not None
    places, _, agreement = charts(app)
    assert list(removed_cells(places)["B  LLaMA-2-7B (paper, Table 4)"]) == list(theirs.removal_list)
    assert agreement["data"][0]["text"][0][1] == str(len(set(run.removal_list) & set(theirs.removal_list)))
    app.slider(key="after").set_value(2).run()
    text = charts(app)[2]["data"][0]["text"]
    assert text[0][1] == str(len(set(run.removal_list[:2]) & set(theirs.removal_list[:2])))
    write_run(runs / "short", 32, 1, model="meta-llama/Llama-2-7b-hf")
    app.multiselect(key="compare-runs").set_value(["llama", "short"]).run()
    assert not app.exception  # the slider had 2, and the shortest list has 1
    assert open_page("compare", runs="llama", after="99").exception == []


def test_a_list_with_a_block_that_the_model_does_not_have(runs: Path) -> None:
    write_run(runs / "one", 12, 2)
    app = open_page("compare", runs="one", published="opt-66b,nonsense")
    assert not app.exception
    assert "prints block 65" in words(app)
    assert max(removed_cells_share(charts(app)[0])) < 100


def removed_cells_share(chart: dict) -> list[float]:  # type: ignore[type-arg]
    """With stacks of different height the axis is the depth in per cent."""
    assert chart["layout"]["xaxis"]["ticksuffix"] == " %"
    return [base + width for trace in chart["data"][1:] for base, width in zip(trace["base"], trace["x"], strict=True)]


def test_different_texts_have_different_dashes(runs: Path) -> None:
    write_run(runs / "one", 12, 3)
    write_run(runs / "two", 12, 3, method=Method.METRIC2)
    path = runs / "two" / "stack.json"
    path.write_text(path.read_text().replace('"cafe"', '"beef"'))
    app = open_page("compare", runs="one,two")
    (warning,) = [each.value for each in app.warning]
    assert "A; B" in warning
    lines = [trace for trace in charts(app)[1]["data"] if "markers" in trace["mode"]]
    assert {trace["line"]["dash"] for trace in lines} == {"solid", "dash"}
    app.segmented_control(key="as").set_value("times").run()
    lines = [trace for trace in charts(app)[1]["data"] if "markers" in trace["mode"]]
    assert [trace["y"][0] for trace in lines] == [1.0, 1.0]


def test_runs_without_steps_without_a_model_and_with_foreign_names(runs: Path) -> None:
    write_run(runs / "none", 12, 3, done=0, state=JobState.FAILED, message="It broke.")
    write_run(runs / "named", 12, 3, model="<script>alert(1)</script>/x_*y*$z$")
    run_folder.create(RunSpec(model="just/created"), runs / "new")
    run_folder.create(RunSpec(model="an/analysis", kind="analyze"), runs / "analysis")
    app = open_page("compare", runs="none,named,new,analysis")
    assert not app.exception
    assert chosen(app) == ["none", "named", "new"]
    shown = words(app)
    assert "new is not shown: it has not opened its model yet" in shown
    assert "Only one list" in shown
    assert all("<script>" not in json.dumps(chart) for chart in charts(app))
    assert "analysis" not in app.multiselect(key="compare-runs").options


def test_an_empty_store_says_what_to_do(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "SAMPLES", tmp_path)
    run_folder.create(RunSpec(model="an/analysis", kind="analyze"), runs / "analysis")
    app = open_page("compare")
    assert not app.exception
    assert "Nothing to compare yet" in words(app)
    assert charts(app) == []


def test_the_band_is_one_standard_error_of_the_rise(runs: Path) -> None:
    run = write_run(runs / "one", 12, 3)
    assert run.trace is not None
    rows = compared_lists.listed([run])
    points = compared_lists.curve_table([run], rows)
    figure = compare.perplexity(points, rows, CurveView(log=False))
    band, line = figure.data
    last = run.trace.steps[-1]
    assert last.held_out.perplexity is not None
    count = len(points)
    assert line.y[-1] == pytest.approx(last.held_out.perplexity)
    assert band.y[count - 1] == pytest.approx(last.held_out.perplexity * math.exp(0.01))  # stores.py: error 0.01
    assert band.y[count] == pytest.approx(last.held_out.perplexity / math.exp(0.01))
    assert band.y[0] == band.y[-1] == pytest.approx(run.trace.baseline.held_out.perplexity)
    assert len(compare.perplexity(points, rows, CurveView(held_out=False)).data) == 1


def test_a_steep_line_leaves_the_chart(runs: Path) -> None:
    gentle = write_run(runs / "one", 12, 2)
    rows = compared_lists.listed([gentle])
    points = compared_lists.curve_table([gentle], rows)
    points.loc[2, "held_out"] = 1e9
    figure = compare.perplexity(points, rows, CurveView(cut=30))
    assert figure.layout.yaxis.range[1] < math.log10(40 * points["held_out"].min())
    assert compare.perplexity(points, rows, CurveView()).layout.yaxis.range[1] > 9


@pytest.mark.parametrize(("lowest", "highest"), [(10, 12), (20, 150), (3, 4e3), (20, 1e10), (1, 1), (0.5, 1e300)])
def test_log_ticks_are_inside_and_few(lowest: float, highest: float) -> None:
    ticks = style.log_ticks(lowest, highest)
    low, high = ticks["range"]
    assert 1 <= len(ticks["tickvals"]) <= 12 or highest > 1e12
    assert all(low <= math.log10(value) <= high for value in ticks["tickvals"])
    assert low <= math.log10(lowest) <= math.log10(highest) <= high


def test_names_say_what_differs_and_no_two_are_alike(runs: Path) -> None:
    one = write_run(runs / "one", 12, 2, model="org/a")
    two = write_run(runs / "two", 12, 2, model="org/a", method=Method.METRIC2)
    three = write_run(runs / "three", 12, 2, model="/home/me/b" * 9)
    four = write_run(runs / "a-run-with-a-long-name-four", 12, 2, model="org/a", seed=0)
    assert compared_lists.names_of([one, two]) == ["Metric3 (SLEB)", "Metric2"]
    assert compared_lists.names_of([one]) == ["Metric3 (SLEB)"]
    assert compared_lists.names_of([]) == []
    names = compared_lists.names_of([one, two, three, four])
    assert len(set(names)) == 4
    assert names[1] == "a, Metric2"
    assert all(len(name) <= 48 for name in names)
    assert "home" not in names[2]


def test_best_chunks_are_compared_as_they_were_then(runs: Path) -> None:
    """They are not nested: the list after two removals is not the beginning of the last one."""
    run = write_run(runs / "chunk", 12, 4, method=Method.BEST_CHUNK)
    assert run.trace is not None
    (row,) = compared_lists.listed([run])
    assert row.prefixes == tuple(step.removal_list for step in run.trace.steps)
    assert [len(each) for each in row.prefixes] == [1, 2, 3, 4]


def test_every_block_has_one_cell_at_any_height() -> None:
    theirs = [published(key) for key in ("llama-2-70b", "opt-6.7b")]
    rows = compared_lists.listed([], [each for each in theirs if each is not None])
    for relative in (False, True):
        figure = stack_strips.strips(rows, relative=relative)
        widths = {row.label: 0.0 for row in rows}
        for trace in figure.data:
            for label, width in zip(trace.y, trace.x, strict=True):
                widths[label] += width
        expected = [100, 100] if relative else [80, 32]
        assert np.allclose(list(widths.values()), expected)
    assert {trace.marker.pattern.shape for trace in figure.data} == {None, "\\"}


def test_votes_count_the_lists_that_remove_a_block() -> None:
    llama = published("llama-2-7b")
    opt = published("opt-6.7b")
    assert llama is not None
    assert opt is not None
    figure = stack_strips.strips(compared_lists.listed([], [llama, opt, llama]))
    votes = figure.data[-1]
    assert dict(zip([round(base + 0.5) for base in votes.base], votes.text, strict=True)) == {
        block: str(2 * (block in llama.removal_list) + (block in opt.removal_list))
        for block in sorted({*llama.removal_list, *opt.removal_list})
    }


def test_a_refined_run_counts_blocks_and_not_steps(runs: Path) -> None:
    refined, plain = write_run(runs / "refined", 12, 4, swap=True), write_run(runs / "plain", 12, 4)
    assert refined.trace is not None
    assert len(refined.trace.steps) == 6
    app = open_page("compare", runs="refined,plain")
    assert not app.exception
    assert app.slider(key="after").max == 4
    places, costs, agreement = charts(app)
    rows = removed_cells(places)
    assert list(rows) == ["A  Metric3 (SLEB), refined", "B  Metric3 (SLEB)"]
    assert rows["A  Metric3 (SLEB), refined"] == list(refined.removal_list)
    line = next(trace for trace in costs["data"] if "markers" in trace["mode"])
    assert line["x"] == [0, 1, 2, 3, 4]
    assert line["y"][-1] == pytest.approx(refined.trace.steps[-1].held_out.perplexity)
    assert agreement["data"][0]["text"][0][1] == str(len(set(refined.removal_list) & set(plain.removal_list)))
    assert list(app.dataframe[0].value["Removed"]) == [4, 4]
    app.slider(key="after").set_value(3).run()
    text = charts(app)[2]["data"][0]["text"]
    assert text[0][1] == str(len(set(refined.trace.steps[2].removal_list) & set(plain.removal_list[:3])))


def test_runs_of_one_name_and_other_weights_are_told_apart(runs: Path) -> None:
    one, other = write_run(runs / "one", 12, 3), write_run(runs / "other", 12, 3, method=Method.METRIC2)
    app = open_page("compare", runs=f"{one.run_id},{other.run_id}")
    assert "name the same model" not in words(app)
    stack = other.run_dir / "stack.json"
    stack.write_text(json.dumps(json.loads(stack.read_text()) | {"weights_hash": "another"}))
    app = open_page("compare", runs=f"{one.run_id},{other.run_id}")
    assert "A and B name the same model, with other weights" in words(app)
