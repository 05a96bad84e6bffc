"""The race on the recorded scores of a full search of the demo model (benchmarks/race.py makes the table anew)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sleb.costs import Cost, cost_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark():  # type: ignore[no-untyped-def]
    """The benchmark's own replay."""
    spec = importlib.util.spec_from_file_location("race_benchmark", ROOT / "benchmarks" / "race.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_race_finds_the_full_list_with_a_sixth_of_the_plain_loops_evaluations(benchmark) -> None:  # type: ignore[no-untyped-def]
    table = benchmark.steps_of(ROOT / "tests" / "race_table.npz")
    plain = Cost(0, 0)
    for removed, blocks, nats in table:
        plain += cost_of([(*removed, int(block)) for block in blocks], 30, nats.shape[1], plain=True)
    runs = [benchmark.replay(table, seed) for seed in range(100)]
    assert len(table) == 6
    assert sum(same for same, _ in runs) >= 99
    mean = sum(cost.block_evaluations for _, cost in runs) / len(runs)
    assert plain.block_evaluations / mean >= 6
