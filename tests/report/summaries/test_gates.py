"""Gates: which numbers of blocks pass, what is proposed, and what is said about how sure that is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sleb.records import Run, RunSpec, TaskAccuracy, TextPerplexity
from sleb.report.summaries import line_gates, list_curves
from sleb.report.summaries.gates import Gate, Reading, Unit, in_words, judge
from sleb.report.summaries.numbers import as_bytes, span
from sleb.runtime import findings_folder, origin, run_folder
from tests.support.runs.judged import (
    accuracy,
    everything,
    facts,
    keep,
    lists_of,
    perplexity,
    quantization,
    text,
    timing,
)
from tests.support.runs.stores import write_run


def gate(
    values: list[float | None],
    limit: float,
    *,
    error: float | None = 0.0,
    unit: Unit = "rise",
    name: str = "the cost",
    predicted: bool = False,
) -> Gate:
    """A gate over 0, 1, ... blocks removed; None is not known."""
    error = None if unit != "rise" and not error else error  # a cost without an error is a doubt of its own
    readings = {
        number: Reading(
            value, None if error is None else value - error, None if error is None else value + error, predicted
        )
        for number, value in enumerate(values)
        if value is not None
    }
    return Gate(name, unit, limit, readings)


def test_the_most_blocks_that_pass_every_gate_are_proposed() -> None:
    cost = gate([0, 0.03, 0.06, 0.09, 0.2], 0.1)
    speed = gate([1, 1.1, 1.2, 1.3, 1.4], 1.2, unit="speedup", name="the speed")
    judgement = judge([cost, speed], range(5))
    assert (judgement.admissible, judgement.proposal) == ((2, 3), 3)
    assert judgement.reasons == (
        f"the cost: +{math.expm1(0.09):.1%} (at most {100 * math.expm1(0.1):.3g}%)",
        "the speed: 1.30× (at least 1.20×)",
    )
    assert judgement.doubts == ()
    assert judge([cost], range(5)).admissible == (0, 1, 2, 3)


def test_a_limit_counts_as_passed_and_the_baseline_is_no_proposal() -> None:
    assert judge([gate([0, 0.1, 0.2], 0.1)], range(3)).proposal == 1
    judgement = judge([gate([0, 0.2, 0.3], 0.1)], range(3))
    assert (judgement.admissible, judgement.proposal) == ((0,), None)


def test_no_gate_proposes_nothing() -> None:
    judgement = judge([], range(4))
    assert judgement.proposal is None
    assert judgement.admissible == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("value", "above", "expected"),
    [
        (0.095, 0.2, ["With 1 removed, the cost passes, but within its standard error"]),
        (0.05, 0.105, ["With 2 removed, the cost fails, but within its standard error"]),
        (0.095, 0.105, ["With 1 removed, the cost passes, but within", "With 2 removed, the cost fails, but within"]),
        (0.05, 0.2, []),
    ],
)
def test_what_lies_within_the_error_is_said(value: float, above: float, expected: list[str]) -> None:
    judgement = judge([gate([0, value, above], 0.1, error=0.01)], range(3))
    assert judgement.proposal == 1
    assert [words in doubt for words, doubt in zip(expected, judgement.doubts, strict=True)] == [True] * len(expected)


def test_a_cost_measured_on_one_piece_of_text_is_said_to_be_unsure() -> None:
    judgement = judge([gate([0, 0.05, 0.2], 0.1, error=None)], range(3))
    assert judgement.proposal == 1
    assert "measured on a single piece of text" in judgement.doubts[0]


def test_a_clear_failure_of_another_gate_silences_the_close_one() -> None:
    close, clear = gate([0, 0.05, 0.105], 0.1, error=0.01), gate([0, 1, 9], 5, unit="bytes", name="the size")
    assert judge([close, clear], range(3)).doubts == ()


def test_predictions_unknown_numbers_and_the_end_of_the_list_are_said() -> None:
    speed = gate([1, 1.1, 1.2], 1.05, unit="speedup", name="the speed", predicted=True)
    cost = gate([0, 0.01, None], 0.1)
    judgement = judge([speed, cost], range(3))
    assert (judgement.admissible, judgement.proposal) == ((1,), 1)
    assert judgement.doubts[0].startswith("The speed is predicted from the number of blocks, not timed")
    assert judgement.doubts[1] == "With 2 removed, the cost is not known yet."
    assert judge([speed], range(3)).doubts[-1].startswith("No longer list exists")


def test_fewer_blocks_that_fail_are_said() -> None:
    judgement = judge([gate([0, 0.2, 0.3, 0.05, 0.5], 0.1)], range(5))
    assert judgement.proposal == 3
    assert judgement.doubts == ("Fewer blocks do not always pass: 1 and 2 removed do not.",)


def test_the_gate_that_excludes_everything_is_named_with_the_nearest_list() -> None:
    cost = gate([0, 0.2, 0.3], 0.1, error=0.15)
    speed = gate([1, 1.1, 1.2], 1.15, unit="speedup", name="the speed")
    refusal = judge([cost, speed], range(3)).refusal
    assert "the cost is at best +22.1% ± 18.3%, with 1 removed, where at most 10.5% is required" in refusal
    assert "it might as well pass" in refusal
    assert "the speed" not in refusal


def test_gates_that_exclude_each_other_are_named() -> None:
    cost = gate([0, 0.05, 0.2, 0.3], 0.1)
    speed = gate([1, 1.1, 1.2, 1.3], 1.15, unit="speedup", name="the speed")
    refusal = judge([cost, speed], range(4)).refusal
    assert refusal == "No number of blocks passes all gates: the cost passes with 1; the speed passes with 2 and 3."


def test_nothing_known_and_no_list() -> None:
    assert judge([gate([0, None, None], 0.1)], range(3)).refusal == "No list passes: the cost is not known yet."
    assert judge([gate([0], 0.1)], [0]).refusal == "No list exists yet."


def test_a_perplexity_that_is_not_a_number_fails() -> None:
    judgement = judge([gate([0, math.inf], 0.1)], range(2))
    assert judgement.proposal is None
    assert "the cost is at best no number, with 1 removed" in judgement.refusal


def test_numbers_in_words() -> None:
    assert in_words("rise", Reading(math.log(1.081), math.log(1.081) - 0.01, math.log(1.081) + 0.01)) == "+8.1% ± 1.1%"
    assert in_words("rise", Reading(math.log(0.98))) == "−2.0%"
    assert in_words("rise", Reading(math.log(3.5))) == "+250%"
    assert in_words("rise", Reading(20.0)) == "× 4.85e+08"
    assert in_words("points", Reading(0.018, 0.011, 0.025)) == "+1.8 ± 0.7 points"
    assert in_words("speedup", Reading(1.32, 1.3, 1.35)) == "1.32× (1.30 to 1.35)"
    assert [as_bytes(each) for each in (13.5e9, 269e6, 70e3)] == ["13.5 GB", "269 MB", "70 kB"]
    assert span([1, 2, 3, 5, 7, 8]) == "1 to 3, 5, 7 and 8"
    assert span([]) == "none"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", 12, 4, analysis=False)


def test_lines_hold_what_was_found_of_the_searchs_own_lists(run: Run) -> None:
    findings = everything(run)
    foreign = perplexity(run, (1, 2, 3), 0.5)
    curves = list_curves.curves(run, [*findings, foreign])
    assert list(curves.lists) == [0, 1, 2, 3, 4]
    assert curves.elsewhere == 1
    assert [(line.kind, line.name, line.is_estimate) for line in curves.cost] == [
        ("text", "wikitext2", False), ("text", "c4", True), ("held-out", "held-out", False),
        ("calibration", "calibration", False),
    ]  # fmt: skip
    assert [line.kind for line in curves.texts] == ["text", "text", "held-out"]
    wikitext = curves.cost[0]
    last = next(each for each in findings if isinstance(each, TextPerplexity) and each.removal_list == curves.lists[4])
    point = wikitext.at(4)
    assert point is not None
    assert point.value == last.measured.perplexity
    assert (point.low, point.high) == pytest.approx((point.value * math.exp(-0.016), point.value * math.exp(0.016)))
    assert (point.change, point.change_error) == (last.rise, 0.016)
    assert [line.name for line in curves.speed] == ["prompt", "generation"]
    assert [each.removed for each in curves.speed[0].points] == [0, 1, 2, 3, 4]
    table = list_curves.table(curves)
    assert set(table["what"]) == {"perplexity", "accuracy", "speedup", "bytes"}
    assert len(table) == sum(
        len(line.points) for group in (curves.cost, curves.accuracy, curves.speed, curves.size) for line in group
    )


def test_the_searchs_own_texts_are_there_without_a_finding(run: Run) -> None:
    curves = list_curves.curves(run, [])
    assert run.trace is not None
    step = run.trace.steps[-1]
    held_out = curves.cost[0].at(4)
    assert held_out is not None
    assert held_out.value == step.held_out.perplexity
    assert held_out.change == pytest.approx(
        math.log(step.held_out.perplexity / run.trace.baseline.held_out.perplexity)  # type: ignore[operator]
    )
    assert judge([line_gates.cost_gate(curves.cost[0], 0.1)], curves.lists).proposal is not None


def test_a_text_is_drawn_from_the_way_that_covers_most_lists(run: Run) -> None:
    lists = [(), *lists_of(run)]
    whole = [perplexity(run, each, 0.1 * len(each)) for each in lists[:2]]
    part = [perplexity(run, each, 0.2 * len(each), windows=4) for each in lists]
    (line, *_) = list_curves.curves(run, [*whole, *part]).cost
    assert (line.name, line.is_estimate, len(line.points)) == ("wikitext2", True, 5)
    more = [perplexity(run, each, 0.1 * len(each)) for each in lists]
    (line, other, *_) = list_curves.curves(run, [*part, *more]).cost
    assert (line.is_estimate, len(line.points), other.kind) == (False, 5, "held-out")


def test_texts_of_one_name_are_told_apart(run: Run) -> None:
    findings = [
        perplexity(run, (), 0.0),
        perplexity(run, (), 0.0, window=512),
        perplexity(run, (), 0.0, of_windows=99, windows=99),
    ]
    names = [line.name for line in list_curves.curves(run, findings).cost if line.kind == "text"]
    assert len(set(names)) == 3
    assert "wikitext2 512" in names


def test_the_mean_of_tasks_is_over_all_of_them_and_uses_paired_errors_where_there_are_any(run: Run) -> None:
    one, two = lists_of(run)[:2]
    findings = [
        accuracy(run, (), "piqa", 0.7, 0.03), accuracy(run, (), "winogrande", 0.5, 0.04),
        accuracy(run, one, "piqa", 0.6, 0.03), accuracy(run, one, "winogrande", 0.48, 0.04),
        accuracy(run, two, "piqa", 0.5, 0.03),
    ]  # fmt: skip
    lines = {line.name: line for line in list_curves.curves(run, findings).accuracy}
    mean = lines["mean"]
    assert [each.removed for each in mean.points] == [0, 1]
    point = mean.at(1)
    assert point is not None
    assert point.value == pytest.approx(0.54)
    assert point.high == pytest.approx(0.54 + math.hypot(0.03, 0.04) / 2)
    assert point.change == pytest.approx(0.06)
    assert lines["piqa"].at(2).change_error == pytest.approx(math.hypot(0.03, 0.03))  # type: ignore[union-attr]
    paired = accuracy(run, one, "piqa", 0.6, 0.03).model_copy(
        update={"changes": {"acc_norm": -0.1}, "change_standard_errors": {"acc_norm": 0.005}}
    )
    (line, *_) = list_curves.curves(run, [findings[0], paired]).accuracy
    assert (line.at(1).change, line.at(1).change_error) == (0.1, 0.005)  # type: ignore[union-attr]
    assert judge([line_gates.accuracy_gate(line, 0.02)], [0, 1]).refusal.startswith(
        "No list passes: the accuracy lost on"
    )


def test_a_task_is_shown_by_its_normalised_accuracy_and_other_measures_are_left_out(run: Run) -> None:
    def of(metrics: dict[str, float], **higher: bool) -> str | None:
        accuracy = TaskAccuracy(
            **facts(run, ()), task="t", metrics=metrics, standard_errors={}, higher_is_better=higher, examples=1,
            shots=0, limit=None, version="",
        )  # fmt: skip
        return list_curves.main_metric(accuracy)

    assert of({"acc": 0.5, "acc_norm": 0.6}) == "acc_norm"
    assert of({"exact_match,strict-match": 0.5, "other": 0.4}) == "exact_match,strict-match"
    assert of({"word_perplexity": 12.0}) is None
    assert of({"loss": 0.5}, loss=False) is None


def test_speed_is_measured_where_it_was_timed_and_predicted_elsewhere(run: Run) -> None:
    one = lists_of(run)[0]
    curves = list_curves.curves(run, [timing(run, one, times=1.5)])
    gate = line_gates.speed_gate(curves, curves.speed[0], 1.1)
    assert gate.readings[1].value == pytest.approx(1.5, rel=0.02)
    assert not gate.readings[1].predicted
    assert gate.readings[2] == Reading(12 / 10, predicted=True)
    assert gate.readings[0].value == 1.0


def test_size_counts_weights_and_a_measured_cache(run: Run) -> None:
    lists = lists_of(run)
    bare = list_curves.curves(run, [])
    weights = line_gates.whole_size(bare)
    assert weights is not None
    assert weights.at(2).value == 2 * (17000 - 2 * 1000)  # type: ignore[union-attr]
    curves = list_curves.curves(run, [timing(run, lists[1], "generation"), quantization(run, lists[1])])
    cache = timing(run, lists[1], "generation")
    whole = line_gates.size_gate(curves, 1e6)
    assert whole.readings[0].value == 2 * 17000 + cache.baseline_cache_bytes
    assert whole.readings[2].value == 2 * 15000 + cache.cache_bytes
    assert whole.readings[1].value == 2 * 16000 + cache.baseline_cache_bytes * 11 / 12
    assert [line.kind for line in curves.size] == ["weights", "quantized", "whole"]


def test_a_given_list_is_its_own_way(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    run = run_folder.create(RunSpec(model="m", kind="evaluate", given=(5, 2), held_out=0, analysis=False), folder)
    assert list_curves.lists_of(run, []) == {0: (), 2: (2, 5)}
    source = write_run(tmp_path / "run", 12, 2, analysis=False)
    origin.write_stack(folder, source.stack)  # type: ignore[arg-type]
    run = run_folder.load(folder)
    keep(run, [perplexity(run, (2, 5), 0.1), perplexity(run, (1, 5, 7), 0.2), perplexity(run, (3, 4), 0.3)])
    curves = list_curves.curves(run, findings_folder.findings(folder))
    assert dict(curves.lists) == {0: (), 2: (2, 5), 3: (1, 5, 7)}
    assert curves.elsewhere == 1


def test_after_swaps_the_last_list_of_a_length_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "refined", 12, 4, swap=True, analysis=False)
    assert run.trace is not None
    assert list_curves.lists_of(run, [])[4] == tuple(sorted(run.trace.removal_list))
    assert text().is_whole
