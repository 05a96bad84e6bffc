"""The Similarity page: what it shows, over which tokens, and how it counts what lies between two outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app import data
from app.data import TokenChoice
from sleb.analysis.similarity import TokenSimilarity
from sleb.records import JobState, RunSpec
from sleb.report.figures import block_turns, similarity
from sleb.report.summaries import block_pair
from sleb.runtime import record_files, run_folder
from tests.support.dashboard import array, charts, open_page, words
from tests.support.runs.stores import write_run


def line(num_blocks: int = 6) -> TokenSimilarity:
    """Outputs that turn by one degree a block, and by ten in block 2."""
    turns = np.array([10.0 if block == 2 else 1.0 for block in range(num_blocks)])
    angles = np.concatenate([[0.0], np.cumsum(turns)])
    between = np.abs(angles[:, None] - angles[None, :])
    return TokenSimilarity(1, np.cos(np.radians(between)), between / 180)


# The facts of a pair, and its counting


def test_between_two_outputs_lie_the_blocks_after_the_earlier_up_to_the_later() -> None:
    similarities = line()
    facts = block_pair.pair(similarities, (4, 1), removed=(4, 5))
    assert (facts.earlier, facts.later, facts.between) == (1, 4, range(2, 5))
    assert facts.angular == pytest.approx(12 / 180)
    assert facts.mean_metric1 == pytest.approx(np.mean([1 - np.cos(np.radians(turn)) for turn in (10, 1, 1)]))
    assert facts.removed == 1
    assert (facts.chunks, facts.rank, facts.best_start) == (4, 2, 3)  # 0-2, 1-3 and 2-4 turn as far; 3-5 least
    text = block_pair.between_words(facts, True)
    assert "3 blocks, 2 to 4**, both included" in text
    assert "`[2,\N{NO-BREAK SPACE}5)`" in text
    assert "number 2; the first is 3 to 5" in text


def test_a_block_alone_the_embedding_and_the_diagonal() -> None:
    alone = block_pair.pair(line(), (block_pair.EMBEDDING, 0))
    assert alone.between == range(0, 1)
    assert "block 0 alone" in block_pair.between_words(alone, True)
    assert "This run" not in block_pair.between_words(alone, False)
    everything = block_pair.pair(line(), (block_pair.EMBEDDING, 5))
    assert everything.between == range(0, 6)
    same = block_pair.pair(line(), (3, 3))
    assert (len(same.between), same.mean_metric1, same.rank) == (0, None, None)
    assert "nothing lies between" in block_pair.between_words(same, True)


def test_cells_of_an_address() -> None:
    for cell in ((3, 5), (block_pair.EMBEDDING, 5), (0, block_pair.EMBEDDING)):
        assert block_pair.parse(block_pair.address(cell), 6) == cell
    for text in (None, "", "3", "3-6", "6-3", "in", "-1-3", "3-5-", "٣-٤", "1e3-2", "<b>-3"):
        assert block_pair.parse(text, 6) is None


# Figures


def test_colours_are_spread_over_pairs_of_different_blocks() -> None:
    similarities = line()
    low, high = similarity.colour_range(similarities.mean, "cosine")
    others = similarities.mean[1:, 1:][~np.eye(6, dtype=bool)]
    assert others.min() <= low < high == others.max() < 1
    assert similarity.colour_range(similarities.angular, "angular")[0] == pytest.approx(1 / 180)
    whole = similarity.heatmap(similarities, "cosine", colours="whole").data[0]
    assert (whole.zmin, whole.zmax) == (0.0, 1.0)
    for flat in (np.ones((4, 4)), np.ones((2, 2))):  # no spread; one block
        low, high = similarity.colour_range(flat, "cosine")
        assert low < high


def test_colours_by_rank_give_every_pair_its_place() -> None:
    similarities = line(4)
    shown = similarity.heatmap(similarities, "angular", colours="ranks").data[0]
    ranks = shown.z
    assert ranks[0, 4] == pytest.approx(9 / 10)  # of ten pairs, nine are nearer
    assert ranks[2, 2] == 0
    assert list(shown.colorbar.ticktext) == [block_pair.number(each / 180) for each in (1, 1.25, 10.5, 11.75, 13)]
    chunks = block_turns.chunks(similarities, colours="ranks").data[0].z
    assert chunks[3, 0] == pytest.approx(9 / 10)
    assert np.isnan(chunks[3, 1])


def test_numbers_have_the_digits_that_tell_them_from_0_and_1() -> None:
    expected = {0.7365: "0.7365", 0.99998: "0.999980", 1.0: "1.0000", 0.0: "0.0000", 2e-5: "0.000020", -0.5: "-0.5000"}
    assert {value: block_pair.number(value) for value in expected} == expected


def test_a_metric1_of_nothing_lies_at_the_foot_of_a_log_axis() -> None:
    metric1 = np.array([0.9, 0.0, 1e-4, 0.02])
    matrix = np.ones((5, 5))
    matrix[np.arange(4), np.arange(1, 5)] = 1 - metric1
    figure = block_turns.neighbours(TokenSimilarity(1, matrix, 1 - matrix))
    axis = figure.layout.yaxis
    assert axis.type == "log"
    assert axis.ticktext[0] == "≤ 10<sup>-6</sup>"
    assert figure.data[1].y[1] == axis.tickvals[0] == pytest.approx(1e-6)
    assert figure.data[1].customdata[1] == 0.0
    assert axis.range[0] < -6


def test_the_overlay_that_catches_clicks_lies_on_every_cell() -> None:
    similarities = line()
    figure = similarity.heatmap(similarities, "cosine", removed=(2, 4), pick=(1, 4))
    cells = figure.data[-1]
    assert cells.type == "scattergl"
    assert cells.marker.opacity == cells.selected.marker.opacity == cells.unselected.marker.opacity == 0
    assert len(cells.x) == 49
    place = list(zip(cells.y, cells.x, strict=True)).index((1, 4))
    assert cells.customdata[place] == pytest.approx([similarities.mean[2, 5], similarities.angular[2, 5]])
    assert cells.hoverinfo != "skip"  # or it would hear no click
    rows, columns = figure.data[1:3]
    assert list(rows.y) == list(columns.x) == [2, 4]
    outline = figure.layout.shapes[0].path
    assert outline.count("M") == 2
    assert outline.startswith("M1.5,1.5 ")
    frame = figure.layout.shapes[-1]
    assert ((frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2) == (4, 1)


def test_the_least_five_are_labelled_and_near_labels_hang_apart() -> None:
    similarities = line(12)
    figure = block_turns.neighbours(similarities, removed=(1,))
    assert [each.text for each in figure.layout.annotations] == [f"<b>{block}</b>" for block in (0, 1, 3, 4, 5)]
    assert [trace.name for trace in figure.data[1:]] == ["kept", "removed by this run"]
    assert list(figure.data[2].x) == [1]
    assert figure.layout.yaxis.type == "log"
    crowded = block_turns.neighbours(line(80))
    assert len({each.ay for each in crowded.layout.annotations}) > 1
    assert crowded.layout.showlegend is False  # nothing was removed


def test_numbers_that_no_scale_expects_still_give_figures() -> None:
    for turn in (0.0, 1e-9):
        matrix = np.full((4, 4), 1.0 - turn)
        similarities = TokenSimilarity(1, matrix, 1.0 - matrix)
        for figure in (
            similarity.heatmap(similarities, "cosine"),
            similarity.heatmap(similarities, "angular", pick=(0, 2)),
            block_turns.neighbours(similarities),
            block_turns.chunks(similarities, pick=(0, 2)),
        ):
            assert figure.to_json()
    one = TokenSimilarity(1, np.ones((2, 2)), np.zeros((2, 2)))
    assert similarity.heatmap(one, "cosine").data
    assert block_turns.chunks(one).data
    assert block_turns.neighbours(one).data


def test_the_chunk_map_marks_the_best_of_each_length_and_the_picked_one() -> None:
    similarities = line()
    figure = block_turns.chunks(similarities, pick=(4, 1))
    best = figure.data[1]
    assert list(best.y) == [1, 2, 3, 4, 5, 6]
    assert list(best.x[:3]) == [0, 0, 3]
    clicks = figure.data[-1]
    assert len(clicks.x) == 21
    frame = figure.layout.shapes[-1]
    assert ((frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2) == (2, 3)  # blocks 2 to 4
    table = block_turns.chunks_table(similarities)
    row = table[(table["start"] == 3) & (table["length"] == 3)].iloc[0]
    assert row["stop"] == 6
    assert row["best_of_length"]
    assert row["angular_distance"] == pytest.approx(3 / 180)


# The page


def test_it_opens_on_the_sample_and_says_what_to_click(runs: Path) -> None:
    app = open_page("similarity")
    assert not app.exception
    run = data.load(data.SAMPLE)
    assert run.analysis is not None
    heatmap, neighbours, chunks = charts(app)
    assert array(heatmap["data"][0]["z"]) == pytest.approx(np.array(run.analysis.similarity.mean), abs=1e-6)
    assert array(neighbours["data"][0]["y"]) == pytest.approx(np.array(run.analysis.similarity.metric1), abs=1e-5)
    assert sorted(array(neighbours["data"][2]["x"])) == sorted(run.removal_list)
    assert chunks["data"][1]["name"] == "best chunk of its length"
    shown = words(app)
    assert "Click a cell" in shown
    assert "all 4,096 tokens analysed, of 16 calibration sequences" in shown
    assert "the model is never run without the block" in shown
    assert "the 12 blocks that this run removed" in shown


def test_a_cell_of_the_address_is_shown_and_the_lists_choose_another(runs: Path) -> None:
    app = open_page("similarity", cell="3-17")
    shown = words(app)
    assert "Block 3 and block 17" in shown
    assert "14 blocks, 4 to 17" in shown
    run = data.load(data.SAMPLE)
    since = run.trace.removed_at if run.trace else {}
    assert f"| removed at step {since[3]} | removed at step {since[17]} |" in shown
    assert app.selectbox(key="cell-row").value == 3
    app.selectbox(key="cell-row").select(block_pair.EMBEDDING).run()
    assert app.query_params["cell"] in ("in-17", ["in-17"])
    shown = words(app)
    assert "The embedding and block 17" in shown
    assert "18 blocks, 0 to 17" in shown
    assert "Click a cell" in words(open_page("similarity", cell="3-99"))


def test_other_tokens_and_the_other_measure(runs: Path) -> None:
    run = write_run(runs / "one", 12, 3)
    assert run.analysis is not None
    app = open_page("similarity", run="one")
    app.toggle(key="skip-first").set_value(True).run()
    assert "Mean over 124 of the 128 analysed tokens" in words(app)
    expected = data.similarity_over(run, TokenChoice(without_first=True))
    assert expected is not None
    assert array(charts(app)[0]["data"][0]["z"]) == pytest.approx(expected.mean, abs=1e-6)
    app.selectbox(key="sequence").select("2").run()
    app.slider(key="positions").set_value((4, 11)).run()
    app.segmented_control(key="measure").set_value("angular").run()
    assert "Mean over 8 of the 128 analysed tokens" in words(app)
    expected = data.similarity_over(run, TokenChoice((2,), 4, 12, True))
    assert expected is not None
    heatmap, _, chunks = charts(app)
    assert heatmap["data"][0]["reversescale"] is True
    assert array(heatmap["data"][0]["z"]) == pytest.approx(expected.angular, abs=1e-6)
    assert array(chunks["data"][0]["z"])[2, 4] == pytest.approx(expected.angular[4, 7], abs=1e-6)
    app.segmented_control(key="tokens").set_value("random").run()
    assert "Over 1 token, fed alone: entry 17" in words(app)
    assert app.slider(key="positions").disabled
    cosine = np.array(run.analysis.similarity.random_token)
    assert array(charts(app)[0]["data"][0]["z"]) == pytest.approx(np.arccos(np.clip(cosine, -1, 1)) / np.pi, abs=1e-6)
    assert not app.exception


def test_a_choice_without_tokens_says_so(runs: Path) -> None:
    write_run(runs / "one", 12, 3)
    app = open_page("similarity", run="one")
    app.slider(key="positions").set_value((0, 0)).run()
    assert "Mean over 4 of the 128" in words(app)
    app.toggle(key="skip-first").set_value(True).run()
    assert "No tokens chosen" in words(app)
    assert not charts(app)
    assert not app.exception


def test_without_its_tokens_a_run_falls_back_on_what_it_recorded(runs: Path) -> None:
    run = write_run(runs / "one", 12, 3)
    (run.run_dir / "analysis" / "tokens.npz").unlink()
    app = open_page("similarity", run="one")
    assert "all 128 tokens analysed" in words(app)
    assert app.slider(key="positions").disabled
    assert app.selectbox(key="sequence").disabled
    app.toggle(key="skip-first").set_value(True).run()
    assert "can be chosen only where the tokens are" in words(app)
    assert run.analysis is not None
    expected = np.array(run.analysis.similarity.mean_without_first)
    assert array(charts(app)[0]["data"][0]["z"]) == pytest.approx(expected, abs=1e-6)


def test_runs_that_have_nothing_to_show_say_what_to_do(runs: Path) -> None:
    write_run(runs / "bare", 12, 3, analysis=False)
    write_run(runs / "failed", 12, 3, done=1, state=JobState.FAILED, message="Out of <b>memory</b>.", analysis=False)
    run_folder.create(RunSpec(model="x"), runs / "waiting")
    strange = write_run(runs / "strange", 12, 3, analysis=False)
    record_files.write_no_analysis(strange.run_dir, "Its blocks hand on <b>two</b> tensors.")
    for run_id, expected in (
        ("bare", "searched without analyses"),
        ("failed", "Out of \\<b\\>memory"),
        ("waiting", "Start this run on the"),
        ("strange", "Its blocks hand on \\<b\\>two\\</b\\> tensors."),
    ):
        app = open_page("similarity", run=run_id)
        assert not app.exception
        assert not charts(app)
        assert expected in words(app)


def test_no_run_at_all(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "SAMPLES", tmp_path / "none")
    assert "No runs yet" in words(open_page("similarity"))


def test_a_run_of_analyses_alone_removes_nothing(runs: Path) -> None:
    run = write_run(runs / "one", 12, 3)
    (run.run_dir / "trace.jsonl").unlink()
    spec = run.spec.model_copy(update={"kind": "analyze"})
    (run.run_dir / "spec.json").write_text(spec.model_dump_json())
    app = open_page("similarity", run="one", cell="0-5")
    assert not app.exception
    shown = words(app)
    assert "5 blocks, 1 to 5" in shown
    assert "| not searched | not searched |" in shown
    assert "his run removed" not in shown
    assert charts(app)[1]["layout"]["showlegend"] is False


def test_a_tall_stack_is_drawn_whole(runs: Path) -> None:
    write_run(runs / "tall", 80, 2)
    app = open_page("similarity", run="tall", cell="40-60")
    assert not app.exception
    assert array(charts(app)[0]["data"][0]["z"]).shape == (81, 81)
    assert "20 blocks, 41 to 60" in words(app)
