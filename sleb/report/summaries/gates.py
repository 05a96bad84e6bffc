"""Gates: what a removal list may cost and must buy -> the numbers of blocks that pass, and one to take. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["rise", "points", "speedup", "bytes"]
"""Of a gate's numbers: nats per token over the baseline, share of right answers lost, times as fast, bytes."""


@dataclass(frozen=True)
class Reading:
    """What is known of one list: a value in the gate's unit, with the range in which it may as well lie."""

    value: float
    low: float | None = None
    high: float | None = None
    predicted: bool = False
    """Computed from the number of blocks, not measured."""


@dataclass(frozen=True)
class Gate:
    """One demand on a list, and what is known of each number of blocks removed."""

    name: str
    """As it stands in a sentence: `the perplexity on wikitext2`."""
    unit: Unit
    limit: float
    """At most so many nats, points or bytes; at least so many times as fast."""
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
        """Whether a number of blocks passes; None where nothing is known of it."""
        reading = self.readings.get(number)
        if reading is None:
            return None
        return reading.value >= self.limit if self.at_least else reading.value <= self.limit

    def is_close(self, number: int) -> bool:
        """Whether the limit lies within the error: it passes or fails by no more than that."""
        reading = self.readings.get(number)
        if reading is None or reading.low is None or reading.high is None or reading.low == reading.high:
            return False
        return reading.low <= self.limit <= reading.high

    def explained(self, number: int) -> str:
        """What is known of a number of blocks, beside the limit."""
        reading = self.readings[number]
        return f"{self.name}: {in_words(self.unit, reading)} ({self.asks} {self.bound})"

    @property
    def bound(self) -> str:
        """The limit, in words."""
        if self.unit == "rise":
            return f"{100 * math.expm1(self.limit):.3g}%"
        return f"{100 * self.limit:.3g}" if self.unit == "points" else in_words(self.unit, Reading(self.limit))


@dataclass(frozen=True)
class Judgement:
    """What the gates say together."""

    admissible: tuple[int, ...]
    """Numbers of blocks removed that pass every gate, 0 (the unmodified model) among them."""
    proposal: int | None
    """The most blocks that pass; None where none does."""
    reasons: tuple[str, ...]
    """Of the proposal, gate by gate."""
    doubts: tuple[str, ...]
    """How sure it is: what passes or fails within its error, what is predicted, what is not known."""
    refusal: str = ""
    """Without a proposal: which gate excludes everything."""


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
        f"With {proposal} removed, {gate.name} passes within its {_error(gate)} only: it could as well fail."
        for gate in gates
        if gate.is_close(proposal)
    ]
    doubts += [
        f"How sure {gate.name} is, nobody knows: it was measured on a single piece of text. Measure more first."
        for gate in gates
        if gate.unit == "rise" and gate.readings[proposal].low is None
    ]
    doubts += [
        f"{_upper(gate.name)} is predicted from the number of blocks, not timed."
        for gate in gates
        if gate.readings[proposal].predicted
    ]
    above = min((each for each in numbers if each > proposal), default=None)
    if above is None:
        return (*doubts, "There is no longer list here: more blocks might pass as well.")
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
        doubts.append(f"Fewer blocks do not always pass here: {span(lower)} removed {_verb(lower)} not.")
    return tuple(doubts)


def _refusal(gates: Sequence[Gate], numbers: Collection[int]) -> str:
    own = [each for each in sorted(numbers) if each > 0]
    if not own:
        return "There is no list yet that could pass."
    alone = []
    for gate in gates:
        known = [each for each in own if gate.passes(each) is not None]
        if not known:
            alone.append(f"of {gate.name} nothing is known yet")
        elif not any(gate.passes(each) for each in known):
            best = (max if gate.at_least else min)(known, key=lambda each: gate.readings[each].value)
            text = f"{gate.name} is {in_words(gate.unit, gate.readings[best])} at best, with {best} removed, where "
            text += f"{gate.asks} {gate.bound} is asked for"
            close = f" (within its {_error(gate)}: it could as well pass)" if gate.is_close(best) else ""
            alone.append(text + close)
    if alone:
        return f"No list passes: {'; '.join(alone)}."
    spans = [f"{gate.name} is passed by {span([each for each in own if gate.passes(each)])}" for gate in gates]
    return f"No number of blocks passes all gates: {'; '.join(spans)}."


def in_words(unit: Unit, reading: Reading) -> str:
    """A reading with its error: +8.1% ± 0.6%, 1.32× (1.30 to 1.35), 1.8 points, 13.5 GB."""
    value = reading.value
    if unit == "rise":
        if not value < 10:
            return "no number" if math.isinf(value) else f"× {math.exp(min(value, 700)):.3g}"
        error = (reading.high - reading.low) / 2 if reading.low is not None and reading.high is not None else 0.0
        digits = 0 if math.expm1(value) >= 1 else 1
        text = f"{math.expm1(value):+.{digits}%}".replace("-", "−")
        return text + (f" ± {math.exp(value) * error:.{digits}%}" if error else "")
    if unit == "points":
        error = (reading.high - reading.low) / 2 if reading.low is not None and reading.high is not None else 0.0
        text = f"{100 * value:+.1f}".replace("-", "−")
        return text + (f" ± {100 * error:.1f}" if error else "") + " points"
    if unit == "speedup":
        spread = "" if reading.low is None or reading.high is None else f" ({reading.low:.2f} to {reading.high:.2f})"
        return f"{value:.2f}×{spread}"
    return as_bytes(value)


def as_bytes(value: float) -> str:
    """Bytes in words, in powers of ten."""
    for power, name in ((1e9, "GB"), (1e6, "MB")):
        if value >= power:
            return f"{value / power:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def span(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 1 to 3 and 5."""
    runs: list[list[int]] = []
    for each in numbers:
        if runs and runs[-1][1] == each - 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    words = [str(low) if low == high else f"{low}{' to ' if high > low + 1 else ' and '}{high}" for low, high in runs]
    return ", ".join(words) or "none"


def _error(gate: Gate) -> str:
    return "spread" if gate.unit == "speedup" else "standard error"


def _verb(numbers: Sequence[int]) -> str:
    return "does" if len(numbers) == 1 else "do"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
