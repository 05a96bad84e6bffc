"""The results of a search: the baseline, and one step for each decision with all its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sleb.records.base import Measured, Record


class Candidate(Record):
    """A set of blocks that was scored: `score_sum` is what was compared, lowest first.

    For the likelihood it equals `nll_sum`. For the divergence it is nats of Kullback-Leibler from the
    baseline's predictions, for Metric1 the sum over tokens of 1 - cosine; then `nll_sum` is None.
    """

    block: int
    """The block this candidate adds to the removal list; the first of the chunk for best chunk."""
    skipped: Annotated[tuple[int, ...], Field(min_length=1)]
    objective: Literal["nll", "kl", "metric1"] = "nll"
    score_sum: float | None
    nll_sum: float | None = None
    token_count: Annotated[int, Field(gt=0)]
    sequences: Annotated[int, Field(gt=0)] | None = None
    """Number of calibration sequences it was scored on: fewer than all where it left a race. None in older runs."""

    @property
    def score(self) -> float | None:
        """Mean score per token, in nats for the likelihood; over other sequences than the winner's after a race."""
        return None if self.score_sum is None else self.score_sum / self.token_count

    @property
    def perplexity(self) -> float | None:
        """exp(nll_sum / token_count), where the likelihood was measured."""
        return Measured(nll_sum=self.nll_sum, token_count=self.token_count).perplexity


class Step(Record):
    """One decision with all its evidence. Carries the whole removal list after it: best chunks are not nested.

    A swap takes one block back and removes another: its removal list is as long as the one before.
    """

    number: int
    removed: Annotated[tuple[int, ...], Field(min_length=1)]
    restored: tuple[int, ...] = ()
    removal_list: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    calibration: Measured
    """The calibration set under the model without `removal_list`."""
    held_out: Measured
    """Sequences that took no part in the choice."""
    held_out_standard_error: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Standard error of the mean paired rise over the baseline on held-out sequences, per token; None below two."""
    margin: float | None
    """Mean paired difference of the runner-up's score to the winner's, per token; None without a runner-up."""
    margin_standard_error: float | None
    """Standard error of the margin; None where one sequence gives no spread."""
    tied: tuple[int, ...]
    """Candidates (their `block`) that are statistically tied with the winner."""
    tied_restored: tuple[int, ...] = ()
    """The block that each of `tied` would have taken back in a swap; empty in other steps."""
    improvement: float | None = None
    """Mean paired difference of the scores before and after a swap, per token; None in other steps."""
    improvement_standard_error: float | None = None
    block_evaluations: int
    head_evaluations: int
    seconds: float

    @model_validator(mode="after")
    def _whole(self) -> Step:
        blocks = self.removal_list
        if not self.candidates or len(set(blocks)) != len(blocks) or min(blocks, default=-1) < 0:
            raise ValueError("a step has candidates, and removes blocks that exist, each once")
        if not any(candidate.skipped in (blocks, self.removed) for candidate in self.candidates):
            raise ValueError("what a step removes is one of its candidates")
        if len(self.tied_restored) != (len(self.tied) if self.is_swap else 0):
            raise ValueError("a swap names the block that each tied candidate takes back, and no other step does")
        return self

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the calibration set after this step."""
        return self.calibration.perplexity

    @property
    def is_swap(self) -> bool:
        """Whether it took as many blocks back as it removed; another best chunk takes back fewer."""
        return len(self.removed) == len(self.restored)

    @property
    def before(self) -> frozenset[int]:
        """The blocks that were removed when this step began."""
        return frozenset({*self.removal_list, *self.restored} - {*self.removed})

    def restored_by(self, candidate: Candidate) -> tuple[int, ...]:
        """The block that a candidate of a swap takes back; nothing in other steps."""
        return tuple(sorted(self.before - set(candidate.skipped))) if self.is_swap else ()

    @property
    def tied_candidates(self) -> tuple[Candidate, ...]:
        """The candidates in `tied`: in a swap several candidates remove the same block."""
        if not self.is_swap:
            return tuple(each for each in self.candidates if each.block in self.tied)
        tied = set(zip(self.tied, self.tied_restored, strict=True))
        return tuple(each for each in self.candidates if (each.block, *self.restored_by(each)) in tied)


class Baseline(Record):
    """The baseline, the model with all its blocks, on the same text."""

    calibration: Measured
    held_out: Measured
    block_evaluations: int
    head_evaluations: int
    seconds: float
    warnings: tuple[str, ...] = ()
    speedups: tuple[str, ...] = ()
    """Optimizations of the blocks in use, here and in the steps: they round differently."""

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the calibration set."""
        return self.calibration.perplexity


class Trace(Record):
    """The baseline and every finished step."""

    baseline: Baseline
    steps: tuple[Step, ...] = ()
    finished: str | None = None
    """The reason why the search ended, once it has."""

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal, after the last step."""
        return self.steps[-1].removal_list if self.steps else ()

    @property
    def by_length(self) -> tuple[Step, ...]:
        """The last step that leaves 1, 2, ... blocks removed: swaps do not change the number."""
        return tuple({len(step.removal_list): step for step in self.steps}.values())

    @property
    def removed_at(self) -> dict[int, int]:
        """Removed block -> the step since which it is removed: best chunks are not nested, and a swap restores."""
        since: dict[int, int] = {}
        for step in self.steps:
            since = {block: since.get(block, step.number) for block in step.removal_list}
        return since

    @property
    def block_evaluations(self) -> int:
        """Number of blocks times sequences evaluated, the baseline and held-out sequences included."""
        return self.baseline.block_evaluations + sum(step.block_evaluations for step in self.steps)

    @property
    def head_evaluations(self) -> int:
        """Number of skip sets times sequences evaluated, the baseline and held-out sequences included."""
        return self.baseline.head_evaluations + sum(step.head_evaluations for step in self.steps)


def steps_of_removal(steps: Sequence[Step]) -> dict[int, int]:
    """Block that is removed after these steps -> the last step that removed it."""
    removed: dict[int, int] = {}
    for step in steps:
        for block in step.restored:
            removed.pop(block, None)
        removed.update(dict.fromkeys(step.removed, step.number))
    return removed
