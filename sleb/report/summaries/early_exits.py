"""What an ideal early exit would reach, in a few numbers: shares, speedups, blocks. Knows records; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sleb.analysis.prediction_alignment import half_decided
from sleb.records import ExitStatistics


@dataclass(frozen=True)
class Skipped:
    """What an ideal exit skips when so many tokens leave together."""

    batch: int
    first: float
    """Share of blocks skipped, if tokens leave at the first agreement."""
    first_speedup: float
    settled: float
    """Share of blocks skipped, if tokens leave once their prediction has settled."""


def skipped(exits: ExitStatistics, batch: int) -> Skipped | None:
    """The share of blocks skipped at a batch size; None where it was not computed."""
    if batch not in exits.skipped_share:
        return None
    first = exits.skipped_share[batch]
    return Skipped(batch, first, exits.speedup(first), exits.settled_skipped_share[batch])


@dataclass(frozen=True)
class Decided:
    """The blocks by which tokens are decided, at the first agreement and once settled."""

    half_first: int | None
    """The block by which half of the tokens have agreed with the final prediction."""
    half_settled: int | None
    last_first: float
    """Share of tokens that agree with no earlier block's prediction."""
    last_settled: float


def decided(exits: ExitStatistics) -> Decided:
    """When half of the tokens are decided, and how many need the last block."""
    tokens = max(exits.token_count, 1)
    return Decided(
        half_decided(exits.first_exit),
        half_decided(exits.settled_exit),
        exits.first_exit[-1] / tokens,
        exits.settled_exit[-1] / tokens,
    )
