"""How pages, figures and the report write numbers: perplexities, rises, bytes, ranges. Knows records; draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sleb.formats.findings_tables import NO_NUMBER
from sleb.records import Measured, StackDescription, Trace

NONE = "–"
"""A value that does not exist, in a table or beside a label."""


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def perplexity(measured: Measured) -> str:
    """A perplexity, or a remark where predictions were not numbers."""
    return NO_NUMBER if measured.no_number else number(measured.perplexity)


def minus(text: str) -> str:
    """The text of a number, with a minus sign in place of a hyphen."""
    return text.replace("-", "−")


def rise(nats_more: float, error: float | None = None) -> str:
    """A perplexity's rise from nats per token, ± one standard error: `+8.1% ± 0.6%`, or `× 12` where it is huge."""
    if not nats_more < 10:
        return "no number" if math.isinf(nats_more) else f"× {math.exp(min(nats_more, 700)):.3g}"
    digits = 0 if math.expm1(nats_more) >= 1 else 1
    text = minus(f"{math.expm1(nats_more):+.{digits}%}")
    return text + (f" ± {math.exp(nats_more) * error:.{digits}%}" if error else "")


def as_bytes(value: float) -> str:
    """Bytes in powers of ten: `13.5 GB`."""
    for power, name in ((1e9, "GB"), (1e6, "MB")):
        if value >= power:
            return f"{value / power:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def span(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: `1 to 3, 5`."""
    words = [
        str(low) if low == high else f"{low}{' to ' if high > low + 1 else ' and '}{high}"
        for low, high in consecutive(numbers)
    ]
    return ", ".join(words) or "none"


def consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers in pieces without a gap, as the first and the last number of each."""
    pieces: list[tuple[int, int]] = []
    for each in numbers:
        if pieces and pieces[-1][1] == each - 1:
            pieces[-1] = (pieces[-1][0], each)
        else:
            pieces.append((each, each))
    return pieces


def listed(values: Sequence[object]) -> str:
    """Values with commas and an `and` before the last."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def cut(text: str, length: int) -> str:
    """A text of at most so many characters; a longer one ends in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def upper(text: str) -> str:
    """A text with a capital at its head, the rest as it is."""
    return text[:1].upper() + text[1:]


def share_of_parameters(stack: StackDescription, blocks: Sequence[int]) -> float:
    """These blocks' share of all parameters, embedding and LM head included."""
    return 1 - stack.parameters_without(blocks) / stack.total_parameters


def search_seconds(trace: Trace) -> float:
    """Seconds spent on the baseline and the finished steps."""
    return trace.baseline.seconds + sum(step.seconds for step in trace.steps)
