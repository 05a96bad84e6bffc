"""Paired differences between candidates: means, standard errors, and which are statistically tied."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sleb.records import Measured


@dataclass(frozen=True)
class Comparison:
    """The lowest score compared with the others on the same sequences."""

    winner: int
    margin: float | None
    standard_error: float | None
    tied: tuple[int, ...]
    differences: np.ndarray
    """Mean difference to the winner of each candidate, nats per token; 0 for itself, infinite where not a number."""
    half_width: np.ndarray
    """Half width of the confidence interval of each difference; NaN where one sequence gives no spread."""


def measured(nats: np.ndarray, token_counts: np.ndarray) -> Measured:
    """The sum of nats and of tokens; None for nats where any sequence's predictions were not numbers."""
    total = float(nats.sum())
    return Measured(nll_sum=total if math.isfinite(total) else None, token_count=int(token_counts.sum()))


def compare(
    scores: np.ndarray, token_counts: np.ndarray, confidence: float, seen: np.ndarray | None = None
) -> Comparison:
    """The winner, its margin to the runner-up with the standard error, and the candidates statistically tied with it.

    `scores` is (candidates, sequences), and `seen` says which of them were scored: all of them unless candidates left
    a race. The sequences are the same for a candidate and the winner, so differences are taken in pairs, and the
    interval of their mean is Student's. One sequence gives no interval: then all are statistically tied.
    """
    seen = np.ones(scores.shape, dtype=bool) if seen is None else seen
    numbers = np.asarray(np.isfinite(np.where(seen, scores, 0.0)).all(axis=1))
    totals = np.where(numbers & seen.all(axis=1), scores.sum(axis=1), np.inf)
    winner = int(np.argmin(totals))  # the first of equals: the earliest block, like the reference (sleb.py, strict <)
    others = np.array([i for i in range(len(scores)) if i != winner and numbers[i]], dtype=int)
    all_differences, all_half_widths = np.full(len(scores), np.inf), np.full(len(scores), np.nan)
    all_differences[winner] = all_half_widths[winner] = 0.0
    if not len(others):
        return Comparison(winner, None, None, (), all_differences, all_half_widths)
    differences = np.where(seen[others], scores[others] - scores[winner], 0.0)
    means, errors = mean_and_error(differences, token_counts * seen[others])
    all_differences[others] = means
    runner_up = int(np.argmin(means))
    from scipy.special import stdtrit  # a third of a second to import

    freedom = seen[others].sum(axis=1) - 1
    half_width = np.where(freedom > 0, stdtrit(np.maximum(freedom, 1), 0.5 + confidence / 2) * errors, np.nan)
    all_half_widths[others] = half_width
    tied = tuple(others[~(means > half_width)].tolist())
    error = float(errors[runner_up]) if np.isfinite(errors[runner_up]) else None
    return Comparison(winner, float(means[runner_up]), error, tied, all_differences, all_half_widths)


def mean_and_error(differences: np.ndarray, token_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean per token of paired differences (..., sequences) in nats, and its standard error.

    `token_counts` is (..., sequences) or the same for all; 0 where a sequence was not seen. The error is that of a
    ratio estimate (Cochran, Sampling Techniques, 6.4); NaN for a single sequence.
    """
    counts = np.broadcast_to(token_counts, differences.shape)
    sequences = (counts > 0).sum(axis=-1)
    tokens = counts.sum(axis=-1)
    means = differences.sum(axis=-1) / tokens
    residuals = differences - means[..., None] * counts
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt((residuals**2).sum(axis=-1) * sequences / (sequences - 1))
    return means, np.where(sequences > 1, spread / tokens, np.nan)
