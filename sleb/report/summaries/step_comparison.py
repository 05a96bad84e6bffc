"""One step of a search: what it compared, as bars with their errors and in words. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sleb.methods.statistics import Comparison
from sleb.records import Baseline, Candidate, Run, Step, steps_of_removal

SCORE_NAMES = {
    "metric3": "Metric3: nats per token without the block",
    "metric2": "Metric2: nats per token of the baseline without this block alone",
    "metric1": "Metric1: 1 − cosine of the block's input and output",
    "early-exit": "Nats per token without the last blocks",
    "best-chunk": "Nats per token without the chunk",
}
"""The score of each method, as its axis names it."""

UNITS = {"nll": "nats per token", "kl": "nats of divergence per token", "metric1": "1 − cosine"}
"""Units of scores, by what was compared."""

SHORT_UNITS = {"nll": "nats", "kl": "nats of divergence", "metric1": "1 − cosine"}
"""Units of scores without "per token", for narrow columns."""


def unit_of(run: Run) -> str:
    """Unit of the run's scores."""
    return UNITS[_objective_of(run)]


def short_unit_of(run: Run) -> str:
    """Unit of the run's scores, short where a column has no room for "per token"."""
    return SHORT_UNITS[_objective_of(run)]


def _objective_of(run: Run) -> str:
    steps = run.trace.steps if run.trace else ()
    return steps[0].candidates[0].objective if steps else "nll"


@dataclass(frozen=True)
class Bars:
    """One step's comparison. Arrays are (candidates,), in the units of the score: nats per token, or 1 - cosine."""

    step: Step
    candidates: tuple[Candidate, ...]
    """The candidates that have a bar."""
    blocks: tuple[int, ...]
    """The block that each adds to the removal list."""
    names: tuple[str, ...]
    """The block a candidate adds, the chunk it is, or the swap: "16", "5-7" or "14 back, 12 out"."""
    scores: np.ndarray
    """NaN where the predictions were not numbers."""
    differences: np.ndarray
    """Differences to the chosen one, on the same sequences; NaN where the score is NaN."""
    half_widths: np.ndarray
    """Half-widths of the differences' intervals; NaN where there is none, 0 for the chosen one."""
    chosen: int
    """Index of the one that was removed."""
    tied: tuple[int, ...]
    """Indices of those that are statistically tied with it."""
    base: float | None
    """The score of removing nothing: that of the model with which this step started."""
    base_name: str
    removed_at: dict[int, int]
    """Blocks removed before this step, and in which step each."""

    @property
    def rises(self) -> np.ndarray:
        """Scores above `base`: what removing each costs."""
        return self.scores - (self.base if self.base is not None else float(np.nanmin(self.scores)))

    @property
    def chunks(self) -> tuple[range | None, ...]:
        """The chunk that each candidate removes in one piece; None for a single block or a swap."""
        return tuple(None if self.step.is_swap else chunk_of(each) for each in self.candidates)

    @property
    def removes_chunk(self) -> bool:
        """Whether the step removed a chunk in one piece."""
        return self.chunks[self.chosen] is not None

    @property
    def backs(self) -> tuple[int | None, ...]:
        """The block that each candidate of a swap takes back; None in other steps."""
        return tuple(next(iter(self.step.restored_by(each)), None) for each in self.candidates)

    @property
    def by_block(self) -> Bars:
        """One candidate a block, for charts that have one bar a block: of swaps that remove the same, the best."""
        if not self.step.is_swap:
            return self
        ranked = np.argsort(np.where(np.isfinite(self.differences), self.differences, math.inf), kind="stable")
        best: dict[int, int] = {self.blocks[self.chosen]: self.chosen}
        for index in ranked.tolist():
            best.setdefault(self.blocks[index], index)
        kept = sorted(best.values(), key=lambda index: self.blocks[index])
        return replace(
            self,
            candidates=tuple(self.candidates[index] for index in kept),
            blocks=tuple(self.blocks[index] for index in kept),
            names=tuple(self.names[index] for index in kept),
            scores=self.scores[kept],
            differences=self.differences[kept],
            half_widths=self.half_widths[kept],
            chosen=kept.index(self.chosen),
            tied=tuple(place for place, index in enumerate(kept) if index in self.tied),
        )

    @property
    def order(self) -> np.ndarray:
        """Rank of each candidate, 1 for the lowest score; NaN where it has none."""
        ranks = np.full(len(self.scores), np.nan)
        ranked = [i for i in np.argsort(self.scores, kind="stable") if math.isfinite(self.scores[i])]
        ranks[ranked] = np.arange(1, len(ranked) + 1)
        return ranks


def bars(run: Run, number: int, evidence: Comparison | None) -> Bars:
    """What step `number` (from 1) compared. Intervals need the scores of its sequences."""
    assert run.trace is not None
    step, before = run.trace.steps[number - 1], run.trace.steps[: number - 1]
    scores = np.array([math.nan if each.score is None else each.score for each in step.candidates])
    chosen = next(i for i, each in enumerate(step.candidates) if each.skipped in (step.removal_list, step.removed))
    blocks = tuple(each.block for each in step.candidates)
    if evidence is None:
        differences, half_widths = scores - scores[chosen], np.full(len(scores), math.nan)
        half_widths[chosen] = 0.0
    else:
        differences = np.where(np.isfinite(evidence.differences), evidence.differences, math.nan)
        half_widths = evidence.half_width
        # What left a race was scored on fewer sequences, easy or hard ones: only the difference on them compares.
        scores = np.where(left_race(step), scores[chosen] + differences, scores)
    base, base_name = _base(run.trace.baseline, before, step)
    tied = set(step.tied_candidates)
    return Bars(
        step=step,
        candidates=step.candidates,
        blocks=blocks,
        names=tuple(candidate_name(each, step.restored_by(each)) for each in step.candidates),
        scores=scores,
        differences=differences,
        half_widths=half_widths,
        chosen=chosen,
        tied=tuple(i for i, each in enumerate(step.candidates) if each in tied),
        base=base,
        base_name=base_name,
        removed_at=steps_of_removal(before),
    )


def left_race(step: Step) -> np.ndarray:
    """Whether each candidate was scored on a part of the calibration set only, bool (candidates,)."""
    counts = [each.token_count for each in step.candidates]
    return np.array([count < max(counts) for count in counts])


def candidate_name(candidate: Candidate, back: Sequence[int] = ()) -> str:
    """The block a candidate adds, or the chunk it is, or what it swaps: `back` is what it takes back."""
    if back:
        return f"{', '.join(map(str, back))} back, {candidate.block} out"
    chunk = chunk_of(candidate)
    return str(candidate.block) if chunk is None else f"{chunk[0]}–{chunk[-1]}"


def chunk_of(candidate: Candidate) -> range | None:
    """The consecutive blocks that a candidate removes in one piece; None for a single block."""
    first, last = candidate.skipped[0], candidate.skipped[-1]
    chunk = range(first, last + 1)
    return chunk if candidate.block == first != last and candidate.skipped == tuple(chunk) else None


def swaps_in_words(count: int) -> str:
    """A number of other swaps in words; empty for none."""
    return f"{count} other swap{'s' if count > 1 else ''}" if count else ""


def removed_at_after(shown: Bars) -> dict[int, int]:
    """Blocks removed up to and with this step, and the step of each."""
    return {block: at for block, at in shown.removed_at.items() if block not in shown.step.restored} | dict.fromkeys(
        shown.step.removed, shown.step.number
    )


def _base(baseline: Baseline, before: Sequence[Step], step: Step) -> tuple[float | None, str]:
    """Mean score of removing nothing: of the model so far where candidates were scored on it, else of the baseline."""
    if step.is_swap:
        chosen = next(each for each in step.candidates if each.skipped == step.removal_list)
        known = chosen.score is not None and step.improvement is not None
        return (chosen.score or 0.0) + (step.improvement or 0.0) if known else None, "the list before the swap"
    if step.candidates[0].objective != "nll":
        return 0.0, "a block that changes nothing"
    so_far = set(before[-1].removal_list) if before else set()
    if so_far and all(so_far <= set(each.skipped) for each in step.candidates):
        return before[-1].calibration.nats_per_token, f"the model after step {before[-1].number}"
    return baseline.calibration.nats_per_token, "the baseline"
