"""The methods over tables of made-up scores: no model is needed to test a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from sleb.errors import NotNumbers, OptionError
from sleb.methods.problem import Problem, number_to_remove, require_possible
from sleb.methods.race import looks_of, race
from sleb.methods.statistics import compare
from sleb.methods.strategies import baseline, search
from sleb.records import Baseline, Measured, Method, RunSpec, Step

Table = Callable[[tuple[int, ...]], Sequence[float]]
LENGTH = 9  # predicted tokens of every sequence


def problem(num_blocks: int = 6, num_remove: int = 2, protected: tuple[int, ...] = (), **more: object) -> Problem:
    settings: dict = {
        "calibration": np.arange(3),
        "held_out": np.arange(3, 4),
        "token_counts": np.full(4, LENGTH),
    }
    return Problem(num_blocks=num_blocks, num_remove=num_remove, protected=protected, **(settings | more))


def scored(table: Callable[[tuple[int, ...], int], float], requests: list | None = None):
    def score(skip_sets: Sequence[tuple[int, ...]], sequences: np.ndarray) -> np.ndarray:
        if requests is not None:
            requests.extend((tuple(skipped), tuple(sequences)) for skipped in skip_sets)
        return np.array([[table(tuple(skipped), int(s)) for s in sequences] for skipped in skip_sets], dtype=float)

    return score


def first(held_out: float = 10.0) -> Baseline:
    return Baseline(
        calibration=Measured(nll_sum=10.0, token_count=LENGTH * 3),
        held_out=Measured(nll_sum=held_out, token_count=LENGTH),
        block_evaluations=0,
        head_evaluations=0,
        seconds=0,
    )


def run(method: Method, made: Problem, table, steps: Sequence[Step] = (), **more):
    return [decision.step for decision in search(method, made, scored(table), first(), steps, **more)]


def interacting(skipped: tuple[int, ...], sequence: int) -> float:
    """Blocks 1 and 2 are cheap alone and dear together; 4 is between; sequences differ a little."""
    alone = {0: 9.0, 1: 1.0, 2: 1.5, 3: 6.0, 4: 2.0, 5: 9.0}
    together = 8.0 if {1, 2} <= set(skipped) else 0.0
    return 20.0 + sum(alone[block] for block in skipped) + together + 0.01 * sequence * len(skipped)


def test_metric3_sees_the_model_as_streamlined_so_far_and_metric2_does_not() -> None:
    assert run(Method.METRIC3, problem(), interacting)[-1].removal_list == (1, 4)
    assert run(Method.METRIC2, problem(), interacting)[-1].removal_list == (1, 2)


def test_metric2_scores_candidates_once_and_measures_what_it_leaves() -> None:
    requests: list = []
    decisions = list(search(Method.METRIC2, problem(), scored(interacting, requests), first()))
    singles = [skipped for skipped, sequence in requests if len(skipped) == 1 and 0 in sequence]
    assert len(singles) == 6
    second = decisions[1].step
    assert second.calibration.nll_sum == pytest.approx(sum(interacting((1, 2), s) for s in range(3)))
    assert [candidate.skipped for candidate in second.candidates] == [(0,), (2,), (3,), (4,), (5,)]


def test_metric1_removes_by_influence_without_running_candidates() -> None:
    requests: list = []
    influence = np.array([[3.0], [1.0], [0.5], [2.0], [4.0], [9.0]]).repeat(3, axis=1)
    made = problem()
    steps = [
        d.step for d in search(Method.METRIC1, made, scored(interacting, requests), first(), (), lambda: influence)
    ]
    assert steps[-1].removal_list == (2, 1)
    assert {skipped for skipped, _ in requests} == {(2,), (2, 1)}
    assert steps[0].candidates[2].score == pytest.approx(0.5 * 3 / (3 * (LENGTH + 1)))
    assert steps[0].candidates[2].nll_sum is None
    assert steps[0].perplexity == pytest.approx(math.exp(sum(interacting((2,), s) for s in range(3)) / (3 * LENGTH)))


def test_early_exit_takes_the_last_blocks() -> None:
    steps = run(Method.EARLY_EXIT, problem(num_remove=3), interacting)
    assert [step.removed for step in steps] == [(5,), (4,), (3,)]
    assert steps[0].margin is None
    assert steps[0].tied == ()
    with pytest.raises(OptionError, match="block 4 is protected"):
        require_possible(Method.EARLY_EXIT, 6, 3, (4,))
    with pytest.raises(OptionError, match="No 3 neighbouring"):
        require_possible(Method.BEST_CHUNK, 6, 3, (2, 4))
    require_possible(Method.BEST_CHUNK, 6, 2, (2, 5))


def test_best_chunks_are_contiguous_and_not_nested() -> None:
    costs = {(1,): 1.0, (3, 4): 2.0, (1, 2, 3): 3.0}

    def table(skipped: tuple[int, ...], _sequence: int) -> float:
        return costs.get(skipped, 10.0 + len(skipped))

    steps = run(Method.BEST_CHUNK, problem(num_remove=3), table)
    assert [step.removal_list for step in steps] == [(1,), (3, 4), (1, 2, 3)]
    assert [step.restored for step in steps] == [(), (1,), (4,)]
    assert [step.removed for step in steps] == [(1,), (3, 4), (1, 2)]
    assert [len(step.candidates) for step in steps] == [6, 5, 4]
    assert all(c.skipped == tuple(range(c.block, c.block + 2)) for c in steps[1].candidates)


def test_equal_scores_go_to_the_earliest_block_and_are_tied() -> None:
    step = run(Method.METRIC3, problem(num_remove=1, protected=(0, 5)), lambda skipped, sequence: 5.0)[0]
    assert step.removed == (1,)
    assert step.margin == 0.0
    assert step.tied == (2, 3, 4)


def test_protected_blocks_are_never_candidates() -> None:
    steps = run(Method.METRIC3, problem(num_remove=3, protected=(1, 2)), interacting)
    assert {c.block for step in steps for c in step.candidates}.isdisjoint({1, 2})


@pytest.mark.parametrize(
    "method", [Method.METRIC3, Method.METRIC2, Method.METRIC1, Method.EARLY_EXIT, Method.BEST_CHUNK]
)
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_search_resumed_after_any_step_ends_the_same(method: Method, after: int) -> None:
    influence = np.random.default_rng(1).random((6, 3))
    whole = run(method, problem(num_remove=4), interacting, influence=lambda: influence)
    resumed = run(method, problem(num_remove=4), interacting, whole[:after], influence=lambda: influence)
    assert whole[after:] == resumed


def test_margin_standard_error_and_ties_are_those_of_paired_differences() -> None:
    draw = np.random.default_rng(0)
    counts = np.full(12, 50)
    common = draw.normal(150, 30, 12)  # a hard sequence is hard for all: pairing takes it out
    scores = np.stack([common, common + 4 + draw.normal(0, 1, 12), common + 0.1 + draw.normal(0, 1, 12)])
    result = compare(scores, counts, 0.95)
    differences = (scores[2] - scores[0]) / 50
    assert result.winner == 0
    assert result.margin == pytest.approx(differences.mean())
    assert result.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(12))
    assert result.tied == (2,)
    assert compare(scores[:, :1], counts[:1], 0.95).standard_error is None
    assert compare(scores[:, :1], counts[:1], 0.95).tied == (1, 2)  # with one sequence all are tied
    scipy = pytest.importorskip("scipy.stats")
    interval = scipy.t.interval(0.95, 11, loc=differences.mean(), scale=result.standard_error)
    assert interval[0] <= 0 <= interval[1]


def test_a_tie_label_is_right_as_often_as_it_says() -> None:
    """Two candidates that are equal on average are significantly different in about 5 % of draws."""
    draw = np.random.default_rng(7)
    told_apart = 0
    for _ in range(2000):
        scores = draw.normal(0, 1, (2, 8))
        told_apart += compare(scores, np.full(8, 10), 0.95).tied == ()
    assert 0.03 < told_apart / 2000 < 0.07


def test_candidates_whose_predictions_are_not_numbers_never_win() -> None:
    def table(skipped: tuple[int, ...], sequence: int) -> float:
        return math.nan if 1 in skipped and sequence == 1 else interacting(skipped, sequence)

    step = run(Method.METRIC3, problem(num_remove=1), table)[0]
    assert step.removed == (2,)
    assert step.candidates[1].nll_sum is None
    assert step.candidates[1].perplexity is None
    with pytest.raises(NotNumbers, match=r"^Every candidate of step 1 .* not numbers in float16\. Use `dtype=bfloat"):
        run(Method.METRIC3, problem(dtype="float16"), lambda skipped, sequence: math.nan)


def test_how_far_a_perplexity_rose_that_is_no_number_is_not_told() -> None:
    def table(skipped: tuple[int, ...], sequence: int) -> float:
        return math.nan if len(skipped) == 2 and sequence == 3 else interacting(skipped, sequence)

    limited = problem(until_perplexity=1e6, dtype="float16")
    with pytest.raises(NotNumbers, match=r"^The model without blocks \[\d, \d\] gives .* not numbers in float16\."):
        run(Method.METRIC3, limited, table)
    assert len(run(Method.METRIC3, problem(), table)) == 2  # a search without a limit shows the step, without a number


def test_held_out_sequences_take_no_part_in_any_choice() -> None:
    def table(skipped: tuple[int, ...], sequence: int) -> float:
        return -1000.0 * skipped[-1] if sequence == 3 else interacting(skipped, sequence)

    assert run(Method.METRIC3, problem(), table)[-1].removal_list == (1, 4)


def test_until_perplexity_stops_before_the_rise() -> None:
    limit = 3 * (20 + 1.0) / (3 * LENGTH)

    def table(skipped: tuple[int, ...], sequence: int) -> float:
        return interacting(skipped, 0)

    rises = problem(num_remove=5, until_perplexity=math.exp(limit) / math.exp(20 / LENGTH) - 1 + 1e-9)
    steps = [d.step for d in search(Method.METRIC3, rises, scored(table), first(held_out=20.0))]
    assert [step.removed for step in steps] == [(1,)]
    none = problem(num_remove=5, until_perplexity=0.0)
    assert list(search(Method.METRIC3, none, scored(table), first(held_out=20.0))) == []


def test_baseline_separates_calibration_and_held_out() -> None:
    on_calibration, held_out, nats = baseline(problem(), scored(lambda skipped, s: 10.0 + s))
    assert on_calibration == Measured(nll_sum=33.0, token_count=27)
    assert held_out == Measured(nll_sum=13.0, token_count=9)
    assert nats.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("blocks", "ratio", "expected"),
    [(30, 0.1, 3), (32, 0.2, 7), (32, 0.1, 4), (40, 0.2, 8), (80, 0.1, 8), (48, 0.1, 5)],
)
def test_ratios_are_rounded_up_as_in_the_paper(blocks: int, ratio: float, expected: int) -> None:
    assert number_to_remove(blocks, blocks - 2, None, ratio) == expected


def test_numbers_out_of_range_are_sentences() -> None:
    with pytest.raises(OptionError, match="Lower `remove`"):
        number_to_remove(30, 28, 29, None)
    with pytest.raises(OptionError, match="Lower `remove`"):
        number_to_remove(3, 3, 3, None)
    with pytest.raises(OptionError, match="protected"):
        number_to_remove(30, 0, 1, None)


def races(sequences: int = 64, seed: int = 0, **more) -> Problem:
    return problem(
        num_blocks=12,
        protected=(0, 11),
        calibration=np.arange(sequences),
        held_out=np.arange(sequences, sequences + 2),
        token_counts=np.full(sequences + 2, LENGTH),
        racing=True,
        seed=seed,
        **more,
    )


def noisy(sequences: int, seed: int = 0):
    """Blocks farther from 5 cost more; sequences differ much, and blocks on them a little."""
    draw = np.random.default_rng(seed)
    hard, own = draw.normal(30, 10, sequences), draw.normal(0, 1, (12, sequences))

    def table(skipped: tuple[int, ...], sequence: int) -> float:
        return hard[sequence] + sum(0.8 * abs(block - 5) + own[block, sequence] for block in skipped)

    return table


def test_a_race_chooses_as_the_full_search_and_asks_for_less() -> None:
    table = noisy(66)
    made = races(num_remove=3)
    requests: list = []
    decisions = list(search(Method.METRIC3, made, scored(table, requests), first()))
    full = run(Method.METRIC3, replace(made, racing=False), table)
    assert [each.step.removal_list for each in decisions] == [each.removal_list for each in full]
    evaluations = sum(len(sequences) for _, sequences in requests)
    assert evaluations < 0.6 * sum(len(step.candidates) * 64 for step in full)
    for decision, step in zip(decisions, full, strict=True):
        winner = next(each for each in decision.step.candidates if each.block == decision.step.removed[0])
        assert winner.sequences == 64  # the winner has seen everything
        assert decision.step.calibration == step.calibration
        assert decision.seen is not None
        for candidate, seen in zip(decision.step.candidates, decision.seen, strict=True):
            assert candidate.sequences == seen.sum()
            assert candidate.token_count == seen.sum() * LENGTH
        assert any(candidate.sequences == 8 for candidate in decision.step.candidates)


def test_what_a_candidate_is_behind_is_measured_on_the_sequences_it_saw() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, np.nan, np.nan], [2.0, 3.0, 4.0, np.inf]]) * 10
    result = compare(scores, np.full(4, 10), 0.95, ~np.isnan(scores))
    assert result.winner == 0
    assert result.differences.tolist() == [0.0, 1.5, math.inf]
    assert result.margin == 1.5
    assert result.standard_error == pytest.approx(0.5)  # of 1 and 2
    assert result.tied == (1,)


def test_a_race_resumes_to_the_same_decisions() -> None:
    table = noisy(66, seed=1)
    made = races(num_remove=4)
    whole = run(Method.METRIC3, made, table)
    for after in range(4):
        assert run(Method.METRIC3, made, table, whole[:after]) == whole[after:]


def test_a_candidate_without_numbers_leaves_the_race_and_never_wins() -> None:
    table = noisy(66)
    made = races(num_remove=1)
    best = run(Method.METRIC3, made, table)[0].removed[0]
    broken = lambda skipped, sequence: math.nan if best in skipped and sequence % 2 else table(skipped, sequence)  # noqa: E731
    step = run(Method.METRIC3, made, broken)[0]
    assert step.removed[0] != best
    lost = next(each for each in step.candidates if each.block == best)
    assert lost.score_sum is None
    assert lost.sequences == 8


def test_a_race_loses_the_best_no_more_often_than_it_says() -> None:
    """Ten equal candidates and one barely better on this very set: lost in at most 5 % of the orders."""
    draw = np.random.default_rng(3)
    sequences = 64
    scores = draw.normal(50, 5, (1, sequences)) + draw.normal(0, 1, (11, sequences))
    best = int(scores.sum(axis=1).argmin())
    lost = 0
    for seed in range(300):
        made = races(sequences, seed)
        score = lambda sets, chosen: scores[np.ix_([each[0] for each in sets], chosen)]  # noqa: E731
        _, seen = race(made, score, [(block,) for block in range(11)], 1)
        assert seen is not None
        lost += not seen[best].all()
    assert lost <= 0.05 * 300


def test_looks_are_few() -> None:
    assert looks_of(128) == (8, 12, 16, 24, 32, 48, 64, 96)
    assert looks_of(8) == ()
    assert len(looks_of(4096)) < 20


def test_a_race_is_the_default_where_it_pays() -> None:
    def spec(sequences: int, **more) -> RunSpec:
        return RunSpec(model="x", calibration={"sequences": sequences}, **more)

    assert spec(32).races
    assert not spec(31).races
    assert spec(8, search="race").races
    assert not spec(128, search="full").races
    assert not spec(128, method="metric2").races  # it needs all ranks, not only the best
