"""Races: candidates that cannot win any more leave a step early. Knows scores; never sees a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sleb.methods.problem import Problem, Score
from sleb.records import Step
from sleb.scoring.sweep_plan import SkipSet


def race(
    problem: Problem, score: Score, skip_sets: Sequence[SkipSet], number: int, lasted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores (candidates, sequences) of the calibration set, and which of them were taken (None: all).

    In a race, sequences come in rounds, in an order drawn again for each step. After a round a candidate leaves whose
    mean difference to some other, on the same sequences, is above zero beyond what chance allows; a candidate that
    stays sees the whole calibration set. The question is which one wins on *this* finite set, so the error shrinks as
    the set is used up (finite-population correction, Cochran, 2.6), and the doubt about a candidate is shared out over
    its rivals and the looks (Bonferroni): the best candidate is lost in at most 1 - `confidence` of the steps. The
    shares follow `lasted`, the sequences that each candidate saw in the race before, where there was one.
    """
    everything = problem.calibration
    if not problem.racing or len(skip_sets) == 1:
        return score(skip_sets, everything), None
    count = len(everything)
    looks = looks_of(count)
    by_rival, by_look = _shares(len(skip_sets), looks, lasted)
    order = np.random.default_rng([problem.seed, number]).permutation(count)
    scores = np.full((len(skip_sets), count), np.nan)
    alive, done = np.arange(len(skip_sets)), 0
    while done < count:
        stop = next((look for look in looks if look > done), count) if len(alive) > 1 else count
        chosen = order[done:stop]
        new_scores = score([skip_sets[int(index)] for index in alive], everything[chosen])
        scores[np.ix_(alive, chosen)] = np.where(np.isfinite(new_scores), new_scores, np.inf)
        done = stop
        if done < count and len(alive) > 1:
            so_far = scores[np.ix_(alive, order[:done])]
            share = by_rival[np.ix_(alive, alive)] * by_look[alive, looks.index(done), None]
            doubt = (1.0 - problem.confidence) * share
            alive = alive[~_beaten(so_far, problem.token_counts[everything[order[:done]]], count, doubt)]
    return scores, ~np.isnan(scores)


def looks_of(sequences: int) -> tuple[int, ...]:
    """The numbers of sequences after which candidates can leave: 8, 12, 16, 24 ... Few looks cost little confidence."""
    looks, size = [], 8
    while size < sequences:
        looks += [look for look in (size, size * 3 // 2) if look < sequences]
        size *= 2
    return tuple(looks)


def _shares(candidates: int, looks: Sequence[int], lasted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the doubt about each candidate: over (candidates, rivals) and over (candidates, looks).

    Evenly where nothing is known. Else a candidate will likely leave when it left in the race before, and one that
    lasted long there will likely be the one to beat it. What a candidate's rivals get adds up to 1, and so do its
    looks; settled before the order of the sequences is drawn, that is all Bonferroni asks. A wrong guess costs
    evaluations only.
    """
    weights = np.ones(candidates) if lasted is None else lasted
    ratio = np.ones((candidates, len(looks))) if lasted is None else np.array(looks) / lasted[:, None]
    nearness = np.minimum(ratio, 1.0 / ratio) ** 2
    return weights / (weights.sum() - weights[:, None]), nearness / nearness.sum(axis=1, keepdims=True)


def lasted_before(before: Step | None, blocks: Sequence[int]) -> np.ndarray | None:
    """The number of sequences that each candidate saw in the race of the step before; None where there was none."""
    seen = {each.block: each.sequences for each in before.candidates} if before else {}
    lasted = [seen.get(block) for block in blocks]
    return None if None in lasted else np.array(lasted, dtype=np.float64)


def _beaten(scores: np.ndarray, token_counts: np.ndarray, population: int, doubt: np.ndarray) -> np.ndarray:
    """The candidates that are worse than some other beyond `doubt` (candidates, rivals), bool (candidates,).

    There are `population` sequences in all. The error of all paired differences comes from one product of the
    residuals to the leader: a thousand swaps have a million pairs.
    """
    from scipy.special import stdtrit

    totals = scores.sum(axis=1)
    finite: np.ndarray = np.isfinite(totals)
    if not finite.any():
        return np.zeros(len(scores), dtype=bool)
    behind = np.where(finite[:, None], scores - scores[int(np.argmin(totals))], 0.0)
    seen, tokens = len(token_counts), token_counts.sum()
    means = behind.sum(axis=1) / tokens
    residuals = behind - means[:, None] * token_counts
    products = residuals @ residuals.T
    squares = np.maximum(np.diag(products)[:, None] + np.diag(products) - 2.0 * products, 0.0)
    errors = np.sqrt(squares * seen / (seen - 1) * (1.0 - seen / population)) / tokens  # as in `mean_and_error`
    doubts, where = np.unique(doubt, return_inverse=True)
    half_width = stdtrit(seen - 1, 1.0 - doubts)[where].reshape(doubt.shape) * errors
    beaten: np.ndarray = means[:, None] - means > half_width
    return ~finite | (beaten & finite).any(axis=1)
