"""Gates: what a removal list may cost and must buy -> the numbers of blocks that pass, and one to take. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sleb.report.summaries.numbers import as_bytes, minus, rise, span, upper

Unit = Literal["rise", "points", "speedup", "bytes"]
"""Units of a gate's numbers: nats per token over the baseline, share of right answers lost, speedup, bytes."""


@dataclass(frozen=True)
class Reading:
    """One list's value in the gate's unit, with the range of its error."""

    value: float
    low: float | None = None
    high: float | None = None
    predicted: bool = False
    """Whether it is computed from the number of blocks, not measured."""


@dataclass(frozen=True)
class Gate:
    """One demand on a list, and the reading of each number of blocks removed."""

    name: str
    """Its name within a sentence: `the perplexity on wikitext2`."""
    unit: Unit
    limit: float
    """The most nats, points or bytes; the least speedup."""
    readings: Mapping[int, Reading]

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.unit == "speedup"

    @property
    def asks(self) -> str:
        """`at least` or `at most`."""
        return "at least" if self.at_least else "at most"

    def passes(self, number: int) -> bool | None:
        """Whether a number of blocks passes; None where it has no reading."""
        reading = self.readings.get(number)
        if reading is None:
            return None
        return reading.value >= self.limit if self.at_least else reading.value <= self.limit

    def is_close(self, number: int) -> bool:
        """Whether the limit lies within the reading's error."""
        reading = self.readings.get(number)
        if reading is None or reading.low is None or reading.high is None or reading.low == reading.high:
            return False
        return reading.low <= self.limit <= reading.high

    def explained(self, number: int) -> str:
        """The reading of a number of blocks, beside the limit."""
        reading = self.readings[number]
        return f"{self.name}: {in_words(self.unit, reading)} ({self.asks} {self.bound})"

    @property
    def bound(self) -> str:
        """The limit in words."""
        if self.unit == "rise":
            return f"{100 * math.expm1(self.limit):.3g}%"
        return f"{100 * self.limit:.3g}" if self.unit == "points" else in_words(self.unit, Reading(self.limit))


@dataclass(frozen=True)
class Judgement:
    """What all gates together come to."""

    admissible: tuple[int, ...]
    """Numbers of blocks removed that pass every gate, 0 (the baseline) among them."""
    proposal: int | None
    """The most blocks that pass; None where no list does."""
    reasons: tuple[str, ...]
    """The readings of the proposal, gate by gate."""
    doubts: tuple[str, ...]
    """How sure the proposal is: what passes or fails within its error, what is predicted, what is unknown."""
    refusal: str = ""
    """Why nothing is proposed: which gate excludes everything."""


def judge(gates: Sequence[Gate], numbers: Collection[int]) -> Judgement:
    """The numbers of blocks that pass all gates, and the highest of them; `numbers` are those that have a list."""
    admissible = tuple(each for each in sorted(numbers) if all(gate.passes(each) for gate in gates))
    proposal = max((each for each in admissible if each > 0), default=None)
    if not gates:
        return Judgement(admissible, None, (), (), "Every gate is off.")
    if proposal is None:
        return Judgement(admissible, None, (), (), _refusal(gates, numbers))
    reasons = tuple(gate.explained(proposal) for gate in gates)
    return Judgement(admissible, proposal, reasons, _doubts(gates, numbers, proposal))


def _doubts(gates: Sequence[Gate], numbers: Collection[int], proposal: int) -> tuple[str, ...]:
    doubts = [
        f"With {proposal} removed, {gate.name} passes, but within its {_error(gate)}: it might as well fail."
        for gate in gates
        if gate.is_close(proposal)
    ]
    doubts += [
        f"The error of {gate.name} is unknown: it was measured on a single piece of text. Measure more first."
        for gate in gates
        if gate.unit == "rise" and gate.readings[proposal].low is None
    ]
    doubts += [
        f"{upper(gate.name)} is predicted from the number of blocks, not timed."
        for gate in gates
        if gate.readings[proposal].predicted
    ]
    above = min((each for each in numbers if each > proposal), default=None)
    if above is None:
        return (*doubts, "No longer list exists: more blocks might pass as well.")
    failed = [gate for gate in gates if gate.passes(above) is False]
    if failed and all(gate.is_close(above) for gate in failed):
        names = " and ".join(gate.name for gate in failed)
        doubts.append(
            f"With {above} removed, {names} fails, but within its {_error(failed[0])}: it might as well pass."
        )
    unknown = [gate for gate in gates if gate.passes(above) is None]
    if unknown and not failed:
        doubts.append(f"With {above} removed, {unknown[0].name} is not known yet.")
    lower = [each for each in sorted(numbers) if 0 < each < proposal and any(g.passes(each) is False for g in gates)]
    if lower and any(not gate.at_least and gate.passes(each) is False for gate in gates for each in lower):
        doubts.append(
            f"Fewer blocks do not always pass: {span(lower)} removed {'does' if len(lower) == 1 else 'do'} not."
        )
    return tuple(doubts)


def _refusal(gates: Sequence[Gate], numbers: Collection[int]) -> str:
    own = [each for each in sorted(numbers) if each > 0]
    if not own:
        return "No list exists yet."
    alone = []
    for gate in gates:
        known = [each for each in own if gate.passes(each) is not None]
        if not known:
            alone.append(f"{gate.name} is not known yet")
        elif not any(gate.passes(each) for each in known):
            best = (max if gate.at_least else min)(known, key=lambda each: gate.readings[each].value)
            text = f"{gate.name} is at best {in_words(gate.unit, gate.readings[best])}, with {best} removed, where "
            text += f"{gate.asks} {gate.bound} is required"
            close = f" (within its {_error(gate)}: it might as well pass)" if gate.is_close(best) else ""
            alone.append(text + close)
    if alone:
        return f"No list passes: {'; '.join(alone)}."
    spans = [f"{gate.name} passes with {span([each for each in own if gate.passes(each)])}" for gate in gates]
    return f"No number of blocks passes all gates: {'; '.join(spans)}."


def in_words(unit: Unit, reading: Reading) -> str:
    """A reading with its error: +8.1% ± 0.6%, 1.32× (1.30 to 1.35), 1.8 points, 13.5 GB."""
    value, error = reading.value, None
    if reading.low is not None and reading.high is not None:
        error = (reading.high - reading.low) / 2
    if unit == "rise":
        return rise(value, error)
    if unit == "points":
        return minus(f"{100 * value:+.1f}") + (f" ± {100 * error:.1f}" if error else "") + " points"
    if unit == "speedup":
        spread = "" if reading.low is None or reading.high is None else f" ({reading.low:.2f} to {reading.high:.2f})"
        return f"{value:.2f}×{spread}"
    return as_bytes(value)


def _error(gate: Gate) -> str:
    return "spread" if gate.unit == "speedup" else "standard error"
