"""The race on the recorded scores of a full search of the demo model (benchmarks/race.py makes the table again)."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from sleb.methods.cost_forecast import cost_of_search
from sleb.methods.problem import Problem
from sleb.methods.race import _beaten, _shares, looks_of, race
from sleb.methods.statistics import mean_and_error
from sleb.records import Method
from sleb.scoring.sweep_plan import Cost, cost_of
from tests.support.paths import DATA, ROOT


@pytest.fixture(scope="module")
def benchmark():  # type: ignore[no-untyped-def]
    """The benchmark's own replay."""
    spec = importlib.util.spec_from_file_location("race_benchmark", ROOT / "benchmarks" / "race.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(benchmark):  # type: ignore[no-untyped-def]
    """Per step: blocks removed before it, its candidates, and their scores."""
    return benchmark.steps_of(DATA / "race_table.npz")


@pytest.fixture(scope="module")
def raced(benchmark, table):  # type: ignore[no-untyped-def]
    """Per order of the sequences: whether the list is the full search's, and what it took."""
    return [benchmark.replay(table, seed) for seed in range(100)]


def evaluations(runs: list[tuple[bool, Cost]]) -> float:
    return sum(cost.block_evaluations for _, cost in runs) / len(runs)


def test_a_race_finds_the_full_list_with_a_seventh_of_the_plain_loops_evaluations(table, raced) -> None:  # type: ignore[no-untyped-def]
    plain = Cost(0, 0)
    for removed, blocks, nats in table:
        plain += cost_of([(*removed, int(block)) for block in blocks], 30, nats.shape[1], plain=True)
    assert len(table) == 6
    assert sum(same for same, _ in raced) >= 99
    assert plain.block_evaluations / evaluations(raced) >= 7


def test_what_the_step_before_showed_makes_the_next_one_shorter(benchmark, table, raced) -> None:  # type: ignore[no-untyped-def]
    even = [benchmark.replay(table, seed, even=True) for seed in range(100)]
    assert sum(same for same, _ in even) >= 99
    assert evaluations(raced) < 0.95 * evaluations(even)


def test_a_race_is_forecast(raced) -> None:  # type: ignore[no-untyped-def]
    problem = Problem(
        num_blocks=30,
        num_remove=6,
        protected=(0, 29),
        calibration=np.arange(128),
        held_out=np.arange(0),
        token_counts=np.full(128, 127),
        racing=True,
    )
    ahead = cost_of_search(Method.METRIC3, problem, with_baseline=False)
    assert ahead.block_evaluations == pytest.approx(evaluations(raced), rel=0.15)


@pytest.mark.parametrize("lasted", [None, np.array([8.0, 8, 12, 96, 128, 128, 24])])
def test_shares_of_the_doubt_add_up_for_every_candidate(lasted: np.ndarray | None) -> None:
    """Bonferroni's bound for the best candidate: over its rivals and the looks no more doubt is spent than there is."""
    by_rival, by_look = _shares(7, looks_of(128), lasted)
    np.fill_diagonal(by_rival, 0.0)  # nobody beats itself
    np.testing.assert_allclose(by_rival.sum(axis=1), 1.0)
    np.testing.assert_allclose(by_look.sum(axis=1), 1.0)
    assert (by_look > 0).all()
    if lasted is not None:
        assert by_look[0].argmax() == 0  # left at 8: likely to again
        assert by_rival[0, 4] == 16 * by_rival[0, 1]


def test_who_is_beaten_is_what_every_paired_interval_says() -> None:
    from scipy.special import stdtrit

    draw = np.random.default_rng(5)
    overtaken = 0
    for _ in range(20):
        counts = draw.integers(20, 60, 12)
        rates = np.linspace(0, 0.5, 9)[:, None] + draw.normal(0, 0.2, (9, 12)) + draw.normal(3, 1, 12)
        scores, doubt = rates * counts, draw.uniform(1e-4, 0.05, (9, 9))
        expected = np.zeros(9, dtype=bool)
        for one in range(9):
            for other in range(9):
                mean, error = mean_and_error(scores[one] - scores[other], counts)
                expected[one] |= one != other and mean > stdtrit(11, 1 - doubt[one, other]) * error * np.sqrt(0.75)
        np.testing.assert_array_equal(_beaten(scores, counts, 48, doubt), expected)
        leader = scores.sum(axis=1).argmin()
        mean, error = mean_and_error(scores - scores[leader], counts)
        overtaken += int((expected & ~(mean > stdtrit(11, 1 - doubt[:, leader]) * error * np.sqrt(0.75))).sum())
    assert overtaken > 0  # some leave by another than the leader


def test_a_wrong_guess_loses_the_best_no_more_often() -> None:
    """The step before had it that the best leaves first and is nobody's rival: lost in at most 5 % of the orders."""
    draw = np.random.default_rng(11)
    scores = draw.normal(50, 5, (1, 64)) + draw.normal(0, 1, (11, 64))
    best = int(scores.sum(axis=1).argmin())
    for guess in (np.where(np.arange(11) == best, 8.0, 64.0), np.full(11, 8.0)):
        lost = 0
        for seed in range(300):
            problem = Problem(
                num_blocks=11,
                num_remove=1,
                protected=(),
                calibration=np.arange(64),
                held_out=np.arange(0),
                token_counts=np.full(64, 9),
                racing=True,
                seed=seed,
            )
            score = lambda sets, chosen: scores[np.ix_([each[0] for each in sets], chosen)]  # noqa: E731
            _, seen = race(problem, score, [(block,) for block in range(11)], 2, guess)
            assert seen is not None
            lost += not seen[best].all()
        assert lost <= 0.05 * 300
