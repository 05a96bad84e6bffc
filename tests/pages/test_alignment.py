"""The Prediction alignment page: its figures, its numbers, its choices and its empty states; the token view's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from app import data
from app.components import token_view
from sleb.analysis.prediction_alignment import exit_statistics, half_decided
from sleb.records import Alignment, ExitStatistics, JobState, Passage, PassageToken, Run
from sleb.report.figures import alignment
from sleb.runtime import record_files
from tests.support.dashboard import array, charts, open_page, words
from tests.support.runs.stores import write_run

PREDICTIONS = np.array([[7, 1, 2, 9], [5, 1, 3, 9], [5, 1, 2, 4], [5, 1, 2, 3]])  # 4 blocks, 4 tokens
"""Token 0 is decided after block 1, token 1 after 0, token 2 after 0 and settles after 2, token 3 at the end."""


def exits() -> ExitStatistics:
    return exit_statistics(PREDICTIONS, "4 tokens")


def rewrite(run: Run, **parts: Any) -> None:
    """Other parts of a run's analyses."""
    assert run.analysis is not None
    record_files.write_analysis(run.run_dir, run.analysis.model_copy(update=parts))


def test_agreement_is_drawn_per_block_and_removed_blocks_get_cells_of_their_own() -> None:
    line, strip = alignment.agreement(exits(), "Calibration text", removed=(3, 1)).data
    assert list(line.y) == [50, 50, 75, 100]
    assert list(strip.x) == [1, 3]
    assert strip.marker.pattern.shape == "/"
    assert strip.base[0] + strip.y[0] < 0  # below the axis, away from the shares
    table = alignment.agreement_table(exits(), (3, 1))
    assert list(table["removed"]) == [False, True, False, True]
    (alone,) = alignment.agreement(exits(), "Calibration text").data
    assert alone.name == "Calibration text"


def test_ideal_exits_are_counted_per_block_and_summed() -> None:
    first, settled = alignment.distribution(exits()).data
    assert list(first.y) == [50, 25, 0, 25]
    assert list(settled.y) == [25, 25, 25, 25]
    first, settled = alignment.distribution(exits(), cumulative=True).data
    assert list(first.y) == [50, 75, 75, 100]
    assert first.line.dash != settled.line.dash
    assert list(alignment.distribution_table(exits())["settles_tokens"]) == [1, 1, 1, 1]


def test_a_batch_skips_what_its_slowest_token_leaves() -> None:
    first, settled, removal = alignment.skipping(exits(), 0.25).data
    assert list(first.x) == ["1", "2", "4"]  # four tokens make no batch of eight
    assert first.y[0] == pytest.approx(100 * (3 + 3 + 2 + 0) / 4 / 4)
    assert first.y[-1] == 0  # one token needs the last block
    assert list(removal.y) == [25, 25, 25]
    assert removal.customdata[0] == pytest.approx(4 / 3)
    assert (np.asarray(settled.y) <= np.asarray(first.y)).all()
    assert len(alignment.skipping(exits()).data) == 2  # an analysis removes nothing
    table = alignment.skipping_table(exits())
    assert table["first_speedup"][0] == pytest.approx(2.0)


def test_half_of_the_tokens_are_decided() -> None:
    assert half_decided((2, 1, 0, 1)) == 0
    assert half_decided((0, 1, 2, 1)) == 2
    assert half_decided((0, 0, 0, 3)) == 3
    assert half_decided((0, 0)) is None


def test_block_colours_go_from_dark_to_light_and_can_be_read() -> None:
    for num_blocks in (1, 2, 30, 80):
        colours = token_view.block_colours(num_blocks)
        assert len(colours) == num_blocks
        for background, ink in colours:
            one, other = sorted((luminance(background), luminance(ink)))
            assert (other + 0.05) / (one + 0.05) >= 4.5
    assert luminance(colours[0][0]) < luminance(colours[-1][0])


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def token(final: str, first: int, settled: int) -> PassageToken:
    return PassageToken(token="x", top=tuple(((final, 0.5),) for _ in range(6)), first_exit=first, settled_exit=settled)


def test_the_token_of_the_address_is_checked_and_one_worth_a_look_is_picked() -> None:
    passage = Passage(tokens=(token("a", 0, 5), token("a", 3, 4), token("b", 1, 4), token(".", 0, 4)))
    assert token_view.wanted_token("3", passage) == 3
    for bad in (None, "", "4", "-1", "1e3", "٣", "9" * 5000, "<b>"):
        assert token_view.wanted_token(bad, passage) == 2, bad
    assert token_view.wanted_token(None, Passage(tokens=())) == 0


def test_predictions_travel_as_numbers_with_every_text_once(runs: Path) -> None:
    run = write_run(runs / "one", 80, 4)
    assert run.analysis is not None
    passage = run.analysis.passage
    view = token_view.view_data(passage, 80, run.removal_list)
    assert len(view["words"]) == len(set(view["words"])) == 7
    for place, shown in enumerate(view["tokens"]):
        predictions = [[(view["words"][word], mille / 1000) for word, mille in block] for block in shown["top"]]
        assert [[text for text, _ in block] for block in predictions] == [
            [text for text, _ in block] for block in passage.tokens[place].top
        ]
    assert len(json.dumps(view)) < 200_000


def test_tokens_that_look_the_same_stay_different_ones(runs: Path) -> None:
    """Two parts of characters, which an earlier version wrote down as the same sign."""
    run = write_run(runs / "one", 12, 4, words=("<0xE2>", "a", "<0xE2>", "b", "c", "d", "e"))
    assert run.analysis is not None
    view = token_view.view_data(run.analysis.passage, 12, run.removal_list)
    assert sorted(view["words"]) == ["<0xE2>", "<0xE2>", "a", "b", "c", "d", "e"]
    assert view["known"] is True
    assert view["tokens"][0]["word"] != view["tokens"][2]["word"]
    assert view["tokens"][0]["word"] == view["tokens"][7]["word"]
    first = view["tokens"][0]["top"][0]
    assert len({word for word, _ in first}) == 5
    assert [view["words"][word] for word, _ in first] == ["<0xE2>", "a", "<0xE2>", "b", "c"]


def test_what_earlier_analyses_cannot_tell_is_said(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    remark = "Recorded without token ids"
    assert remark not in words(open_page("alignment", run="one"))
    path = run.run_dir / "analysis" / "analysis.json"
    kept = json.loads(path.read_text())
    for each in kept["passage"]["tokens"]:
        del each["id"], each["top_ids"]
    path.write_text(json.dumps(kept))
    app = open_page("alignment", run="one")
    assert not app.exception
    assert remark in words(app)
    view = token_view.view_data(Passage.model_validate(kept["passage"]), 12, ())
    assert view["known"] is False
    assert len(view["words"]) == 7


def test_ids_that_do_not_fit_their_predictions_are_refused() -> None:
    fields: dict[str, Any] = dict(token="x", top=((("a", 0.5),),), first_exit=0, settled_exit=0)
    assert PassageToken(**fields, id=3, top_ids=((4,),)).top_ids == ((4,),)
    for own in ({"id": 3}, {"id": 3, "top_ids": ((4, 5),)}, {"top_ids": ((4,),)}):
        with pytest.raises(ValidationError, match="one id each, or none"):
            PassageToken(**fields, **own)


def test_the_sample_shows_its_numbers(runs: Path) -> None:
    app = open_page("alignment")
    assert not app.exception
    run = data.load(data.SAMPLE)
    assert run.analysis is not None
    view = run.analysis.alignment.calibration
    first, second, third = charts(app)
    line = next(trace for trace in first["data"] if trace["name"] == "Calibration text")
    assert array(line["y"]) == pytest.approx([100 * share for share in view.agreement], abs=1e-3)
    strip = next(trace for trace in first["data"] if trace["name"] == "Removed")
    assert list(array(strip["x"])) == sorted(run.removal_list)
    assert [trace["name"] for trace in second["data"]] == ["First agreement", "Settles"]
    assert array(third["data"][2]["y"])[0] == pytest.approx(40)  # 12 of 30
    assert [each.value for each in app.metric] == ["26.3%", "0.0%", "block 26", "35.7%"]
    assert list(app.dataframe[0].value["batch"]) == [1, 2, 4, 8, 16, 32, 64]
    assert "On 4,096 tokens of the calibration text" in words(app)


def test_generated_text_and_a_choice_of_tokens_change_the_numbers(runs: Path) -> None:
    app = open_page("alignment")
    before = [each.value for each in app.metric]
    app.toggle(key="skip-first").set_value(True).run()
    assert not app.exception
    kept = data.tokens_of(data.load(data.SAMPLE))
    assert kept is not None
    later = int((kept.position > 0).sum())
    assert f"{later:,} chosen tokens of the {len(kept):,} tokens" in words(app)
    assert [each.value for each in app.metric] != before
    app.slider(key="positions").set_value((0, 0)).run()
    assert "No tokens chosen" in words(app)
    assert not charts(app)
    app.slider(key="positions").set_value((0, 255)).run()
    app.segmented_control(key="source").set_value("generated").run()
    assert "1,536 tokens that the model generated" in words(app)
    assert app.metric[0].value == "28.3%"
    assert [trace["name"] for trace in charts(app)[0]["data"]][:2] == ["Calibration text", "Generated text"]


def test_exits_are_summed_and_the_passage_coloured_by_the_other_exit(runs: Path) -> None:
    app = open_page("alignment")
    app.segmented_control(key="exits").set_value("up-to").run()
    assert array(charts(app)[1]["data"][0]["y"])[-1] == pytest.approx(100)
    app.segmented_control(key="colour").set_value("first").run()
    assert not app.exception
    assert sent(app)["exit"] == "first"


def sent(app: Any) -> dict[str, Any]:
    """What the token view was sent."""
    (view,) = [each.proto for each in app.get("bidi_component") if each.proto.component_name == "sleb_token_view"]
    return json.loads(view.json)


def test_the_token_view_gets_texts_as_they_are_and_the_token_of_the_address(runs: Path) -> None:
    write_run(runs / "one", 12, 4)
    app = open_page("alignment", run="one", token="5")
    assert not app.exception
    shown = sent(app)
    assert shown["token"] == 5
    assert shown["tokens"][3]["text"] == "<script>alert(1)</script>"
    assert shown["exit"] == "settled"
    assert "No generated text: It cannot generate" in words(app)
    assert not [each for each in app.segmented_control if each.key == "source"]


def test_without_tokens_one_by_one_the_recorded_statistics_are_shown(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    (run.run_dir / "analysis" / "tokens.npz").unlink()
    app = open_page("alignment", run="one")
    assert not app.exception
    assert app.slider(key="positions").disabled
    assert app.toggle(key="skip-first").disabled
    assert "On 128 tokens of the calibration text" in words(app)


def test_few_tokens_and_one_block_are_no_error(runs: Path) -> None:
    run = write_run(runs / "one", 12, 1)
    few = exit_statistics(np.array([[1, 2]] * 12), "2 tokens")
    rewrite(run, alignment=Alignment(calibration=few, generated=None), passage=Passage(tokens=()))
    app = open_page("alignment", run="one")
    assert not app.exception
    assert [each.value for each in app.metric] == ["91.7%", "–", "block 0", "0.0%"]
    assert "No passage" in words(app)


def test_runs_without_analyses_say_why_and_what_to_do(runs: Path) -> None:
    write_run(runs / "plain", 12, 2, analysis=False)
    write_run(runs / "failed", 12, 4, done=2, state=JobState.FAILED, message="The disk is full.", analysis=False)
    for name, sentence in {"plain": "sleb analyze", "failed": "The disk is full"}.items():
        app = open_page("alignment", run=name)
        assert not app.exception
        assert sentence in words(app)
        assert not charts(app)


def test_a_model_that_cannot_be_analysed_says_why(runs: Path) -> None:
    run = write_run(runs / "one", 12, 2, analysis=False)
    record_files.write_no_analysis(run.run_dir, "Its <b>head</b> is of another kind.")
    app = open_page("alignment", run="one")
    assert not app.exception
    assert "Its \\<b\\>head" in words(app)
