"""The walk up the stack for many skip sets at once, planned and counted. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SkipSet = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of scoring: blocks x sequences, and distinct skip sets x sequences."""

    block_evaluations: int
    head_evaluations: int

    def units(self, head_weight: float) -> float:
        """Work in block evaluations, where the logits of one skip set cost `head_weight` of them."""
        return self.block_evaluations + head_weight * self.head_evaluations

    def __mul__(self, times: int) -> Cost:
        return Cost(self.block_evaluations * times, self.head_evaluations * times)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.block_evaluations + other.block_evaluations, self.head_evaluations + other.head_evaluations)


@dataclass(frozen=True)
class Visit:
    """The events at one block: streams fork where a skip set leaves, and all others go through."""

    block: int
    forks: tuple[tuple[SkipSet, SkipSet], ...]
    """Pairs of a stream and its fork that skips this block."""
    ended: tuple[SkipSet, ...]
    """Streams that no skip set follows any further."""
    through: tuple[SkipSet, ...]


def itinerary(skip_sets: Iterable[SkipSet], num_blocks: int) -> list[Visit]:
    """The walk up the stack for these skip sets; a stream is named by what it has skipped so far."""
    members: dict[SkipSet, set[SkipSet]] = {(): {tuple(sorted(skipped)) for skipped in skip_sets}}
    visits = []
    for block in range(num_blocks):
        forks, ended = [], []
        for prefix in list(members):
            leaving = {skipped for skipped in members[prefix] if block in skipped}
            if leaving:
                forks.append((prefix, (*prefix, block)))
                members[prefix] -= leaving
                members[(*prefix, block)] = leaving
                if not members[prefix]:
                    ended.append(prefix)
                    del members[prefix]
        skipping = {fork for _, fork in forks}
        through = tuple(prefix for prefix in members if prefix not in skipping)
        visits.append(Visit(block, tuple(forks), tuple(ended), through))
    return visits


def cost_of(skip_sets: Iterable[SkipSet], num_blocks: int, sequences: int = 1, *, plain: bool = False) -> Cost:
    """Evaluations the sweep needs: the nodes of the trie of skip sets. `plain`: one forward pass per skip set."""
    distinct = {tuple(sorted(skipped)) for skipped in skip_sets}
    if plain:
        blocks = sum(num_blocks - len(skipped) for skipped in distinct)
    else:
        blocks = sum(len(visit.through) for visit in itinerary(distinct, num_blocks))
    return Cost(blocks * sequences, len(distinct) * sequences)
