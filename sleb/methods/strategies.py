"""The search methods, as generators of decisions over a `score` callable. Knows scores; never sees a model.

Every method yields one decision for each removal, with all its evidence; the caller stores it, times it, and may stop
between two. Given the steps of an earlier attempt, a generator goes on after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from sleb.errors import NotNumbers, model_without
from sleb.methods.problem import Decision, Problem, Score, contiguous_chunks
from sleb.methods.race import lasted_before, race
from sleb.methods.statistics import compare, measured
from sleb.records import Baseline, Candidate, Measured, Method, Step
from sleb.scoring.sweep_plan import SkipSet

Objective = Literal["nll", "kl", "metric1"]


def baseline(problem: Problem, score: Score) -> tuple[Measured, Measured, np.ndarray]:
    """The baseline's sums over the calibration set and the held-out sequences, and its nats on each sequence."""
    everything = np.concatenate([problem.calibration, problem.held_out])
    nats = score([()], everything)[0]
    count = len(problem.calibration)
    return (
        measured(nats[:count], problem.token_counts[problem.calibration]),
        measured(nats[count:], problem.token_counts[problem.held_out]),
        nats,
    )


def search(
    method: Method,
    problem: Problem,
    score: Score,
    first: Baseline,
    steps: Sequence[Step] = (),
    influence: Callable[[], np.ndarray] | None = None,
    judge: Score | None = None,
) -> Iterator[Decision]:
    """Decisions after `steps` until enough blocks are removed, or until the held-out perplexity rises too far.

    `influence()` gives Metric1's sums, (blocks, calibration sequences), and is called for that method only. `judge`
    is the likelihood, by which the model a step leaves is measured, where `score` is another objective. Where
    `problem.refine` asks for them, swaps follow the last removal. Raises `NotNumbers` where no candidate's predictions
    are, or where for that reason the rise of the perplexity is unknown.
    """
    rank = {
        Method.METRIC3: _greedy,
        Method.METRIC2: _one_shot,
        Method.EARLY_EXIT: _early_exit,
        Method.BEST_CHUNK: _best_chunk,
    }
    last = steps[-1] if steps else None
    removed = last.removal_list if last else ()
    if method is Method.METRIC1:
        assert influence is not None
        decisions = _metric1(problem, judge or score, removed, influence)
    else:
        decisions = rank[method](problem, score, judge or score, last)
    number = len(steps)
    for decision in decisions:
        if _too_far(decision.step, first, problem):
            return
        yield decision
        removed, number = decision.step.removal_list, decision.step.number
    if problem.refine == "swap":
        for decision in _swaps(problem, score, judge or score, removed, number):
            if _too_far(decision.step, first, problem):
                return
            yield decision


def _too_far(step: Step, first: Baseline, problem: Problem) -> bool:
    until = problem.until_perplexity
    if until is None or first.held_out.perplexity is None:
        return False
    rise = step.held_out.rise_over(first.held_out)
    if rise is None:  # how far is not known
        raise NotNumbers(model_without(step.removal_list), problem.dtype)
    # In nats: a perplexity can be too large for a number, and a rise of it still be one.
    return rise > math.log1p(until)


def _greedy(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """Metric3 (paper, Algorithm 1): the lowest likelihood loss under the model as streamlined so far."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(*removed, block) for block in alive]
        nats, seen = race(problem, score, skip_sets, len(removed) + 1, lasted_before(last, alive))
        decision = _decide(problem, judge, removed, alive, skip_sets, nats, seen=seen)
        yield decision
        last, removed = decision.step, decision.step.removal_list


def _swaps(problem: Problem, score: Score, judge: Score, removed: SkipSet, number: int) -> Iterator[Decision]:
    """Swaps, which go beyond greedy: one block back and another out, as long as that lowers the score beyond its error.

    A round races every such swap against the list as it is. The best one is accepted if its paired difference to that
    list, over the whole calibration set, is below zero beyond the interval by which candidates are statistically tied.
    A list that left the race has lost it, but the race asks about this very set: its score is completed all the same,
    so that the rule and the number on record are the same with a race and without. The first round whose best swap does
    not pass ends it. Every swap lowers the score, so no list comes back and there is an end.
    """
    counts = problem.token_counts[problem.calibration]
    while True:
        number += 1
        alive = [block for block in problem.candidates if block not in removed]
        swaps = [(*(each for each in removed if each != back), block) for back in removed for block in alive]
        if not swaps:
            return
        nats, seen = race(problem, score, [removed, *swaps], number)  # the list as it is comes first: it wins draws
        best = compare(nats, counts, problem.confidence, seen).winner
        if best == 0:
            return
        if seen is not None and not seen[0].all():
            nats[0, ~seen[0]] = score([removed], problem.calibration[~seen[0]])[0]
        against = compare(nats[[best, 0]], counts, problem.confidence)
        if against.winner != 0 or against.tied:
            return
        blocks, rest = [swap[-1] for swap in swaps], None if seen is None else seen[1:]
        decision = _decide(problem, judge, removed, blocks, swaps, nats[1:], seen=rest, number=number)
        fall = {"improvement": against.margin, "improvement_standard_error": against.standard_error}
        yield replace(decision, step=decision.step.model_copy(update=fall))
        removed = decision.step.removal_list


def _one_shot(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """Metric2 (paper, equation 4): all blocks scored once on the baseline, the lowest removed in turn."""
    singles = score([(block,) for block in problem.candidates], problem.calibration)
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        rows = [row for row, block in enumerate(problem.candidates) if block not in removed]
        alive = [problem.candidates[row] for row in rows]
        decision = _decide(problem, judge, removed, alive, [(block,) for block in alive], singles[rows], alone=True)
        yield decision
        removed = decision.step.removal_list


def _metric1(
    problem: Problem, judge: Score, removed: SkipSet, influence: Callable[[], np.ndarray]
) -> Iterator[Decision]:
    """Metric1 (paper, equation 3): 1 - cosine of a block's input and output; no model runs without the block."""
    sums = influence()
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(block,) for block in alive]
        decision = _decide(problem, judge, removed, alive, skip_sets, sums[alive], alone=True, objective="metric1")
        yield decision
        removed = decision.step.removal_list


def _early_exit(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """The last blocks, from the end (paper, Figure 4, "Early Exit")."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        block = problem.num_blocks - 1 - len(removed)
        skip_set = (*removed, block)
        nats = score([skip_set], problem.calibration)
        decision = _decide(problem, judge, removed, [block], [skip_set], nats)
        yield decision
        removed = decision.step.removal_list


def _best_chunk(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """The contiguous run of blocks with the lowest perplexity, for each length (paper, Figure 4, "Chunk Best")."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        chunks = contiguous_chunks(problem.num_blocks, len(removed) + 1, set(problem.protected))
        starts = [chunk[0] for chunk in chunks]
        nats, seen = race(problem, score, chunks, len(removed) + 1, lasted_before(last, starts))
        decision = _decide(problem, judge, removed, starts, chunks, nats, seen=seen)
        yield decision
        last, removed = decision.step, decision.step.removal_list


def _decide(
    problem: Problem,
    judge: Score,
    before: SkipSet,
    blocks: Sequence[int],
    skip_sets: Sequence[SkipSet],
    scores: np.ndarray,
    *,
    alone: bool = False,
    objective: Objective | None = None,
    seen: np.ndarray | None = None,
    number: int | None = None,
) -> Decision:
    """Choose the lowest of `scores` (candidates, calibration sequences) and measure the model it leaves.

    `alone`: candidates were scored without the blocks removed `before`, and are added to them. `seen`: which scores
    were taken, where candidates left a race. `number` is the step's, where it is not one more than those removed.
    """
    number = number or len(before) + 1
    objective = objective or problem.objective
    counts = problem.token_counts[problem.calibration]
    score_counts = counts + 1 if objective == "metric1" else counts  # hidden states exist for the last token too
    result = compare(scores, score_counts, problem.confidence, seen)
    chosen = skip_sets[result.winner]
    candidates = _candidates(blocks, skip_sets, scores, seen, score_counts, objective)
    if candidates[result.winner].score_sum is None:
        raise NotNumbers(f"Every candidate of step {number}", problem.dtype)
    removal_list = (*before, *chosen) if alone else chosen
    is_measured = objective == "nll" and set(removal_list) == set(chosen)
    on_calibration = scores[result.winner] if is_measured else judge([removal_list], problem.calibration)[0]
    held_out = judge([removal_list], problem.held_out)[0] if len(problem.held_out) else np.zeros(0)
    removed, restored = _difference(removal_list, before), _difference(before, removal_list)
    is_swap = len(removed) == len(restored)
    step = Step(
        number=number,
        removed=removed,
        restored=restored,
        removal_list=removal_list,
        candidates=candidates,
        calibration=measured(on_calibration, counts),
        held_out=measured(held_out, problem.token_counts[problem.held_out]),
        margin=result.margin,
        margin_standard_error=result.standard_error,
        tied=tuple(blocks[index] for index in result.tied),
        tied_restored=tuple(min(set(before) - set(skip_sets[index])) for index in result.tied) if is_swap else (),
        block_evaluations=0,
        head_evaluations=0,
        seconds=0.0,
    )
    return Decision(step, scores, held_out, seen)


def _difference(blocks: SkipSet, others: SkipSet) -> SkipSet:
    return tuple(block for block in blocks if block not in others)


def _candidates(
    blocks: Sequence[int],
    skip_sets: Sequence[SkipSet],
    scores: np.ndarray,
    seen: np.ndarray | None,
    token_counts: np.ndarray,
    objective: Objective,
) -> tuple[Candidate, ...]:
    """The records of candidates, each with the sum over the sequences on which it was scored."""
    taken = np.ones(scores.shape, dtype=bool) if seen is None else seen
    candidates = []
    for block, skipped, row, own in zip(blocks, skip_sets, scores, taken, strict=True):
        total = measured(row[own], token_counts[own])
        candidates.append(
            Candidate(
                block=block,
                skipped=skipped,
                objective=objective,
                score_sum=total.nll_sum,
                nll_sum=total.nll_sum if objective == "nll" else None,
                token_count=total.token_count,
                sequences=int(own.sum()),
            )
        )
    return tuple(candidates)
