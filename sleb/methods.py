"""The methods, as generators of decisions over a `score` callable. Knows scores and block indices; never sees a model.

Every method yields one decision a removal, with all its evidence; whoever drives the generator stores it, times
it, and may stop between two. Given the steps of an earlier attempt, a generator goes on after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import OptionError, ScoringError
from .records import Baseline, Candidate, Measured, Method, Step

SkipSet = tuple[int, ...]
Score = Callable[[Sequence[SkipSet], np.ndarray], np.ndarray]
"""score(skip_sets, sequences) -> float64 (skip_sets, sequences), nats."""


@dataclass(frozen=True)
class Problem:
    """What a search needs to know beside the scores."""

    num_blocks: int
    num_remove: int
    protected: tuple[int, ...]
    calibration: np.ndarray
    """Indices of the sequences that choose."""
    held_out: np.ndarray
    """Indices of the sequences that take no part in any choice."""
    token_counts: np.ndarray
    """Predicted tokens of every sequence, int64."""
    confidence: float = 0.95
    until_perplexity: float | None = None

    @property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may be removed, ascending."""
        return tuple(block for block in range(self.num_blocks) if block not in set(self.protected))


@dataclass(frozen=True)
class Decision:
    """A step without its costs, and the scores behind it: float64 (candidates, calibration sequences)."""

    step: Step
    scores: np.ndarray
    held_out: np.ndarray
    """Sums of the held-out sequences under the model this step leaves, nats."""


@dataclass(frozen=True)
class Comparison:
    """How the lowest score compares with the others on the same sequences."""

    winner: int
    margin: float | None
    standard_error: float | None
    tied: tuple[int, ...]
    differences: np.ndarray
    """Per candidate, mean difference to the winner per token; 0 for itself, infinite where not a number."""
    reach: np.ndarray
    """Half width of its interval at the confidence asked for; NaN where one sequence gives no spread."""


def number_to_remove(num_blocks: int, available: int, num_remove: int | None, ratio: float | None) -> int:
    """How many blocks to remove. A ratio is rounded up, as in the paper (4.1). Raises `OptionError` out of range."""
    if num_remove is not None:
        wanted = num_remove
    elif ratio is not None:
        wanted = math.ceil(round(ratio * num_blocks, 9))  # 0.1 * 30 is 3.0000000000000004
    else:
        wanted = min(available, num_blocks - 1)
    if available == 0:
        raise OptionError(f"All {num_blocks} blocks are protected: nothing can be removed. Shorten --protect.")
    if not 1 <= wanted <= min(available, num_blocks - 1):
        raise OptionError(
            f"Asked to remove {wanted} of {num_blocks} blocks; {min(available, num_blocks - 1)} may be removed "
            f"({num_blocks - available} protected, at least one must stay). Lower --remove or --ratio."
        )
    return wanted


def require_possible(method: Method, num_blocks: int, num_remove: int, protected: Sequence[int]) -> None:
    """Whether the method can remove so many at all. Raises `OptionError` before anything is scored."""
    kept = set(protected)
    if method is Method.EARLY_EXIT:
        hit = [block for block in range(num_blocks - num_remove, num_blocks) if block in kept]
        if hit:
            raise OptionError(
                f"Early exit removes the last {num_remove} blocks, and block {hit[-1]} is protected. "
                "Use --protect '' to free it, or --remove fewer."
            )
    if method is Method.BEST_CHUNK and not _chunks(num_blocks, num_remove, kept):
        raise OptionError(
            f"No {num_remove} neighbouring blocks are all unprotected. Shorten --protect, or --remove fewer."
        )


def _chunks(num_blocks: int, length: int, protected: set[int]) -> list[SkipSet]:
    """Contiguous runs of unprotected blocks, by their start."""
    runs = (tuple(range(start, start + length)) for start in range(num_blocks - length + 1))
    return [run for run in runs if protected.isdisjoint(run)]


def baseline(problem: Problem, score: Score) -> tuple[Measured, Measured, np.ndarray]:
    """The unmodified model: calibration set, held-out sequences, and the sums per sequence (all of them)."""
    everything = np.concatenate([problem.calibration, problem.held_out])
    nats = score([()], everything)[0]
    count = len(problem.calibration)
    return (
        measured(nats[:count], problem.token_counts[problem.calibration]),
        measured(nats[count:], problem.token_counts[problem.held_out]),
        nats,
    )


def measured(nats: np.ndarray, token_counts: np.ndarray) -> Measured:
    """Sums; None where any sequence's predictions were not numbers."""
    total = float(nats.sum())
    return Measured(nll_sum=total if math.isfinite(total) else None, token_count=int(token_counts.sum()))


def compare(scores: np.ndarray, token_counts: np.ndarray, confidence: float) -> Comparison:
    """Winner, margin to the runner-up with its standard error, and who cannot be told from the winner.

    `scores` is (candidates, sequences). The sequences are the same for all, so differences are taken in pairs, and
    the interval of their mean is Student's. One sequence gives no interval: then nobody can be told from the winner.
    """
    totals = np.where(np.isfinite(scores).all(axis=1), scores.sum(axis=1), np.inf)
    winner = int(np.argmin(totals))  # the first of equals: the earliest block, like the reference (sleb.py, strict <)
    others = np.array([i for i in range(len(scores)) if i != winner and np.isfinite(totals[i])], dtype=int)
    all_differences, all_reach = np.full(len(scores), np.inf), np.full(len(scores), np.nan)
    all_differences[winner] = all_reach[winner] = 0.0
    if not len(others):
        return Comparison(winner, None, None, (), all_differences, all_reach)
    means, errors = mean_and_error(scores[others] - scores[winner], token_counts)
    all_differences[others] = means
    runner_up = int(np.argmin(means))
    if len(token_counts) < 2:
        everyone = tuple(others.tolist())
        return Comparison(winner, float(means[runner_up]), None, everyone, all_differences, all_reach)
    from scipy.special import stdtrit  # a third of a second to import

    reach = float(stdtrit(len(token_counts) - 1, 0.5 + confidence / 2)) * errors
    all_reach[others] = reach
    tied = tuple(others[means <= reach].tolist())
    return Comparison(winner, float(means[runner_up]), float(errors[runner_up]), tied, all_differences, all_reach)


def mean_and_error(differences: np.ndarray, token_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean per token of paired differences (..., sequences) in nats, and its standard error.

    The error is that of a ratio estimate (Cochran, Sampling Techniques, 6.4); NaN for a single sequence.
    """
    sequences = len(token_counts)
    means = differences.sum(axis=-1) / token_counts.sum()
    if sequences < 2:
        return means, np.full_like(means, np.nan)
    residuals = differences - means[..., None] * token_counts
    spread = np.sqrt((residuals**2).sum(axis=-1) * sequences / (sequences - 1))
    return means, spread / token_counts.sum()


def search(
    method: Method,
    problem: Problem,
    score: Score,
    first: Baseline,
    steps: Sequence[Step] = (),
    influence: Callable[[], np.ndarray] | None = None,
) -> Iterator[Decision]:
    """Decisions after `steps` until enough blocks are removed, or until the held-out perplexity rises too far.

    `influence()` gives Metric1's sums, (blocks, calibration sequences), and is called for that method only.
    """
    rank = {
        Method.METRIC3: _greedy,
        Method.METRIC2: _one_shot,
        Method.EARLY_EXIT: _early_exit,
        Method.BEST_CHUNK: _best_chunk,
    }
    removed = steps[-1].removal_list if steps else ()
    if method is Method.METRIC1:
        assert influence is not None
        decisions = _metric1(problem, score, removed, influence)
    else:
        decisions = rank[method](problem, score, removed)
    for decision in decisions:
        if _too_far(decision.step, first, problem.until_perplexity):
            return
        yield decision


def _too_far(step: Step, first: Baseline, until: float | None) -> bool:
    if until is None or first.held_out.perplexity is None:
        return False
    before, now = first.held_out, step.held_out
    if before.nll_sum is None or now.nll_sum is None:
        return True
    # In nats: a perplexity can be too large for a number, and a rise of it still be one.
    return now.nll_sum / now.token_count - before.nll_sum / before.token_count > math.log1p(until)


def _greedy(problem: Problem, score: Score, removed: SkipSet) -> Iterator[Decision]:
    """Metric3 (paper, Algorithm 1): the lowest likelihood loss under the model as streamlined so far."""
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(*removed, block) for block in alive]
        nats = score(skip_sets, problem.calibration)
        decision = _decide(problem, score, removed, alive, skip_sets, nats)
        yield decision
        removed = decision.step.removal_list


def _one_shot(problem: Problem, score: Score, removed: SkipSet) -> Iterator[Decision]:
    """Metric2 (paper, equation 4): all blocks scored once on the whole model, the lowest removed in turn."""
    singles = score([(block,) for block in problem.candidates], problem.calibration)
    while len(removed) < problem.num_remove:
        rows = [row for row, block in enumerate(problem.candidates) if block not in removed]
        alive = [problem.candidates[row] for row in rows]
        decision = _decide(problem, score, removed, alive, [(block,) for block in alive], singles[rows], alone=True)
        yield decision
        removed = decision.step.removal_list


def _metric1(
    problem: Problem, score: Score, removed: SkipSet, influence: Callable[[], np.ndarray]
) -> Iterator[Decision]:
    """Metric1 (paper, equation 3): 1 - cosine of a block's input and output; no model runs without the block."""
    sums = influence()
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(block,) for block in alive]
        decision = _decide(problem, score, removed, alive, skip_sets, sums[alive], alone=True, objective="metric1")
        yield decision
        removed = decision.step.removal_list


def _early_exit(problem: Problem, score: Score, removed: SkipSet) -> Iterator[Decision]:
    """The last blocks, from the end (paper, Figure 4, "Early Exit")."""
    while len(removed) < problem.num_remove:
        block = problem.num_blocks - 1 - len(removed)
        skip_set = (*removed, block)
        nats = score([skip_set], problem.calibration)
        decision = _decide(problem, score, removed, [block], [skip_set], nats)
        yield decision
        removed = decision.step.removal_list


def _best_chunk(problem: Problem, score: Score, removed: SkipSet) -> Iterator[Decision]:
    """The contiguous run of blocks with the lowest perplexity, for each length (paper, Figure 4, "Chunk Best")."""
    while len(removed) < problem.num_remove:
        chunks = _chunks(problem.num_blocks, len(removed) + 1, set(problem.protected))
        starts = [chunk[0] for chunk in chunks]
        nats = score(chunks, problem.calibration)
        decision = _decide(problem, score, removed, starts, chunks, nats)
        yield decision
        removed = decision.step.removal_list


def _decide(
    problem: Problem,
    score: Score,
    before: SkipSet,
    blocks: Sequence[int],
    skip_sets: Sequence[SkipSet],
    scores: np.ndarray,
    *,
    alone: bool = False,
    objective: Literal["nll", "metric1"] = "nll",
) -> Decision:
    """Choose the lowest of `scores` (candidates, calibration sequences) and measure the model it leaves.

    `alone`: candidates were scored without the blocks removed `before`, and are added to them.
    """
    counts = problem.token_counts[problem.calibration]
    score_counts = counts + 1 if objective == "metric1" else counts  # hidden states exist for the last token too
    result = compare(scores, score_counts, problem.confidence)
    chosen = skip_sets[result.winner]
    candidates = []
    for block, skipped, row in zip(blocks, skip_sets, scores, strict=True):
        total = measured(row, score_counts)
        candidates.append(
            Candidate(
                block=block,
                skipped=skipped,
                objective=objective,
                score_sum=total.nll_sum,
                nll_sum=None if objective == "metric1" else total.nll_sum,
                token_count=total.token_count,
            )
        )
    if candidates[result.winner].score_sum is None:
        raise ScoringError(
            f"No candidate of step {len(before) + 1} gives predictions that are numbers. "
            "Use --dtype bfloat16 or float32, or remove fewer blocks."
        )
    removal_list = (*before, *chosen) if alone else chosen
    on_calibration = scores[result.winner]
    if objective != "nll" or set(removal_list) != set(chosen):  # nobody has run this model yet
        on_calibration = score([removal_list], problem.calibration)[0]
    held_out = score([removal_list], problem.held_out)[0] if len(problem.held_out) else np.zeros(0)
    step = Step(
        number=len(before) + 1,
        removed=tuple(block for block in removal_list if block not in before),
        restored=tuple(block for block in before if block not in removal_list),
        removal_list=removal_list,
        candidates=tuple(candidates),
        calibration=measured(on_calibration, counts),
        held_out=measured(held_out, problem.token_counts[problem.held_out]),
        margin=result.margin,
        margin_standard_error=result.standard_error,
        tied=tuple(blocks[index] for index in result.tied),
        block_evaluations=0,
        head_evaluations=0,
        seconds=0.0,
    )
    return Decision(step, scores, held_out)
