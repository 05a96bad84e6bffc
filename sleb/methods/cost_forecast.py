"""The cost of a search, counted before it is run: the search itself, over a score that only counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sleb.methods.problem import Problem, number_to_remove, protected_blocks, require_possible
from sleb.methods.strategies import baseline, search
from sleb.records import Baseline, Method, RunSpec, Step, default_held_out
from sleb.scoring.sweep_plan import Cost, SkipSet, cost_of

SEPARATIONS = (0.0, 0.27, 0.5, 0.57, 0.67, 0.97, 1.17, 1.27, 1.41, 1.57, 1.68, 1.79, 2.72, 4.41, 6.09)
"""How far candidates typically are from the best, best first, in standard deviations of the difference of a sequence:
the mean of six steps on the demo model with 128 sequences of 128 tokens. How long a race takes follows from them."""


def cost_of_search(
    method: Method,
    problem: Problem,
    steps: Sequence[Step] = (),
    *,
    with_baseline: bool = True,
    plain: bool = False,
) -> Cost:
    """The work ahead of a search that has finished `steps`, as if it removed evenly spread blocks.

    A typical search removes about such blocks. One that stops early, at a perplexity, takes less. One round of swaps is
    counted, as if it found none: each swap takes another round.
    """
    total = Cost(0, 0)
    draw = np.random.default_rng(0)
    everybody = len(problem.calibration) + len(problem.held_out)
    noise = draw.normal(size=(problem.num_blocks, everybody)) if problem.racing else np.zeros((problem.num_blocks, 1))
    ranks = (np.arange(problem.num_blocks) * 7919) % problem.num_blocks / problem.num_blocks  # evenly spread
    apart = np.interp(ranks, np.linspace(0.0, 1.0, len(SEPARATIONS)), SEPARATIONS)
    apart[list(steps[-1].removal_list) if steps else []] = 0.0  # what was removed was the best: no swap beats it

    def count(skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        nonlocal total
        total += cost_of(skip_sets, problem.num_blocks, len(sequences), plain=plain)
        column = sequences if problem.racing else np.zeros_like(sequences)
        rows = [apart[np.array(each, int), None] + noise[np.ix_(np.array(each, int), column)] for each in skip_sets]
        return np.stack([row.sum(axis=0) for row in rows])

    calibration, held_out, _ = baseline(problem, count)
    if not with_baseline:
        total = Cost(0, 0)
    first = Baseline(calibration=calibration, held_out=held_out, block_evaluations=0, head_evaluations=0, seconds=0)
    endless = replace(problem, until_perplexity=None)
    influence = np.ones((problem.num_blocks, len(problem.calibration)))

    def count_with_base(skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        nonlocal total
        total += cost_of([*skip_sets, ()], problem.num_blocks, len(sequences), plain=plain)
        total -= cost_of(skip_sets, problem.num_blocks, len(sequences), plain=plain)
        return count(skip_sets, sequences)

    score = count_with_base if problem.objective == "kl" else count
    for decision in search(method, endless, score, first, tuple(steps), lambda: influence, judge=count):
        if decision.step.is_swap:  # by the luck of made-up noise
            break
    return total


def cost_of_spec(spec: RunSpec, num_blocks: int) -> tuple[Cost, int]:
    """The work of a run on a model of so many blocks, and how many of them it removes. Raises `OptionError`."""
    protected = protected_blocks(spec, num_blocks)
    available = num_blocks - len(protected)
    removing = number_to_remove(num_blocks, available, spec.num_remove, spec.ratio)
    require_possible(spec.method, num_blocks, removing, protected)
    held_out = default_held_out(spec.calibration.sequences) if spec.held_out is None else spec.held_out
    # Without a race one sequence stands for all of them: work is proportional to their number.
    sequences = spec.calibration.sequences if spec.races else 1
    choosing = cost_of_search(
        spec.method,
        Problem(
            num_blocks=num_blocks,
            num_remove=removing,
            protected=protected,
            calibration=np.arange(sequences),
            held_out=np.arange(0),
            token_counts=np.ones(sequences, dtype=np.int64),
            objective=spec.objective,
            racing=spec.races,
            refine=spec.refine,
        ),
    )
    judged = [cost_of([tuple(range(step))], num_blocks) for step in range(removing + 1)] if held_out else []
    passes = num_blocks if spec.method is Method.METRIC1 else 0  # it measures blocks in a plain forward pass
    total = choosing * (spec.calibration.sequences // sequences) + Cost(passes, 0) * spec.calibration.sequences
    for each in judged:
        total += each * held_out
    return total, removing
