"""Two block outputs and what lies between them: their numbers, names and addresses. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sleb.analysis.similarity import TokenSimilarity
from sleb.records import Run

EMBEDDING = -1
"""The embedding output in the place of a block; "in" in labels and in addresses."""
Measure = Literal["cosine", "angular"]

Pick = tuple[int, int]
"""The blocks of a cell's row and column."""

FLOOR = 1e-6  # recorded similarities have six digits, so a smaller Metric1 is noise
MEASURE_NAMES: dict[Measure, str] = {"cosine": "Cosine similarity", "angular": "Angular distance"}


def number(value: float) -> str:
    """A cosine or a distance with as many digits as distinguish it from 0 and from 1."""
    rest = min(abs(value), abs(1.0 - abs(value)))
    return f"{value:.{4 if rest >= 1e-3 or rest < FLOOR / 2 else 6}f}"


def label(block: int) -> str:
    """The name of an output on an axis and in an address."""
    return "in" if block == EMBEDDING else str(block)


def name(block: int) -> str:
    """The name of an output in a sentence."""
    return "the embedding" if block == EMBEDDING else f"block {block}"


def address(pick: Pick) -> str:
    """A cell in an address: "3-17"."""
    return f"{label(pick[0])}-{label(pick[1])}"


def parse(text: str | None, num_blocks: int) -> Pick | None:
    """The cell of an address, as "3-17" or "in-5"; None where there is none, or not in this stack."""
    match = re.fullmatch(r"(in|[0-9]{1,4})-(in|[0-9]{1,4})", text or "", re.ASCII)
    if match is None:
        return None
    row, column = (EMBEDDING if each == "in" else int(each) for each in match.groups())
    return (row, column) if max(row, column) < num_blocks else None


@dataclass(frozen=True)
class Pair:
    """Two outputs and what lies between them: the blocks after the earlier one, up to the later one, included."""

    earlier: int
    later: int
    cosine: float
    angular: float
    """Angular distance in [0, 1]."""
    between: range
    """Blocks earlier + 1 to later, both included, as a half-open range."""
    mean_metric1: float | None
    """Mean Metric1 of the blocks between; None where there is none."""
    removed: int
    """How many of the blocks between the run removed."""
    rank: int | None
    """Rank of the chunk between among those of its length, 1 turning least; None where there is none."""
    best_start: int | None
    """First block of the chunk of the same length that turns least."""

    @property
    def chunks(self) -> int:
        """How many chunks have its length."""
        return self._num_blocks - len(self.between) + 1

    _num_blocks: int


def pair(similarities: TokenSimilarity, pick: Pick, removed: Collection[int] = ()) -> Pair:
    """The facts of a cell; the order of row and column makes no difference."""
    earlier, later = min(pick), max(pick)
    between = range(earlier + 1, later + 1)
    rank = best = None
    if between:
        distances = np.diagonal(similarities.angular, offset=len(between))
        rank = int((distances < distances[between.start]).sum()) + 1
        best = int(distances.argmin())
    return Pair(
        earlier=earlier,
        later=later,
        cosine=float(similarities.mean[earlier + 1, later + 1]),
        angular=float(similarities.angular[earlier + 1, later + 1]),
        between=between,
        mean_metric1=float(similarities.metric1[between.start : between.stop].mean()) if between else None,
        removed=sum(block in removed for block in between),
        rank=rank,
        best_start=best,
        _num_blocks=len(similarities.mean) - 1,
    )


def pair_title(pick: Pick) -> str:
    """Two outputs as a headline."""
    earlier, later = min(pick), max(pick)
    words = name(earlier).capitalize()
    return words if earlier == later else f"{words} and {name(later)}"


def between_words(facts: Pair, is_search: bool) -> str:
    """What lies between two outputs, as Markdown: with both ends and as a half-open range."""
    if not facts.between:
        return "This is one output: nothing lies between. Choose a cell beside the diagonal to compare two."
    first, last, count = facts.between.start, facts.between.stop - 1, len(facts.between)
    between = f"block {first} alone**" if count == 1 else f"{count} blocks, {first} to {last}**, both included"
    lines = [f"**Between the two outputs: {between}; half-open `[{first},\N{NO-BREAK SPACE}{last + 1})`."]
    lines.append(f"{'Mean ' if count > 1 else ''}Metric1 {number(facts.mean_metric1 or 0.0)}.")
    if is_search and count == 1:
        lines[-1] += " This run removed it." if facts.removed else " This run did not remove it."
    elif is_search:
        lines[-1] += f" This run removed {facts.removed or 'none'} of them."
    if facts.chunks > 1 and facts.best_start is not None:
        kind = "blocks" if count == 1 else f"chunks of {count} blocks"
        best = f"{facts.best_start}" if count == 1 else f"{facts.best_start} to {facts.best_start + count - 1}"
        least = "it turns its input least." if facts.rank == 1 else f"number {facts.rank}; the first is {best}."
        lines.append(f"Among all {facts.chunks} {kind} by angular distance: {least}")
    return "  \n".join(lines)


def details_table(run: Run, similarities: TokenSimilarity, pick: Pick) -> str:
    """Facts about the two blocks of a cell, as a Markdown table with a column for each."""
    assert run.stack is not None
    metric1 = similarities.metric1
    columns = [["&nbsp;", "Parameters", "Metric1", "Its rank, lowest first", "In this run"]]
    for block in dict.fromkeys(sorted(pick)):
        head, state = name(block).capitalize(), state_of(run, block)
        if block == EMBEDDING:
            columns.append([head, "–", "–", "–", state])
            continue
        parameters, rank = run.stack.block_parameters[block], int((metric1 < metric1[block]).sum()) + 1
        columns.append([head, f"{parameters:,}", number(float(metric1[block])), f"{rank} of {len(metric1)}", state])
    first, *rest = ["| " + " | ".join(row) + " |" for row in zip(*columns, strict=True)]
    return "\n".join([first, "|---" * len(columns) + "|", *rest])


def state_of(run: Run, block: int) -> str:
    """Whether a run removed a block, in words; analyses alone decide nothing."""
    assert run.stack is not None
    if block == EMBEDDING:
        return "always kept"
    since = run.trace.removed_at if run.trace else {}
    if block in since:
        return f"removed at step {since[block]}"
    if run.spec.kind != "search":
        return "not searched"
    return "protected, never a candidate" if block in run.stack.protected else "kept"
