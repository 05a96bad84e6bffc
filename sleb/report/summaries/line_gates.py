"""Gates over the lines of a run: what each line says of every list, as a gate reads it. Draws nothing."""

from __future__ import annotations

import math

from sleb.report.summaries.gates import Gate, Reading
from sleb.report.summaries.list_curves import Curves, Line


def proportional(num_blocks: int, removed: int) -> float:
    """The speedup if time were proportional to the number of blocks."""
    return num_blocks / (num_blocks - removed)


def cost_gate(line: Line, share: float) -> Gate:
    """A limit on the rise of the perplexity over the baseline: 0.1 is ten per cent."""
    readings = {
        each.removed: _reading(each.change, each.change_error) for each in line.points if each.change is not None
    }
    kind = f"{line.name} (an estimate)" if line.is_estimate else line.name
    named = "the held-out perplexity" if line.kind == "held-out" else f"the perplexity on {kind}"
    return Gate(named, "rise", math.log1p(share), readings)


def accuracy_gate(line: Line, points: float) -> Gate:
    """A limit on the accuracy lost, as a share: 0.02 is two points."""
    readings = {
        each.removed: _reading(each.change, each.change_error) for each in line.points if each.change is not None
    }
    name = "the mean accuracy lost" if line.kind == "mean" else f"the accuracy lost on {line.name}"
    return Gate(name + (" (an estimate)" if line.is_estimate else ""), "points", points, readings)


def speed_gate(curves: Curves, line: Line | None, times: float) -> Gate:
    """A least speedup: measured where there is a timing, else predicted from the number of blocks."""
    readings = {
        removed: Reading(proportional(curves.num_blocks, removed), predicted=True)
        for removed in curves.lists
        if removed < curves.num_blocks
    }
    readings[0] = Reading(1.0)
    for each in line.points if line else ():
        readings[each.removed] = Reading(each.value, each.low, each.high)
    return Gate(f"the speed of {line.name}" if line else "the speed", "speedup", times, readings)


def size_gate(curves: Curves, limit: float) -> Gate:
    """A limit on the bytes that `whole_size` counts."""
    line = whole_size(curves)
    readings = {each.removed: Reading(each.value) for each in line.points} if line else {}
    return Gate("the size", "bytes", limit, readings)


def whole_size(curves: Curves) -> Line | None:
    """Bytes of the weights, with the KV cache where a generation was timed; None for a dtype of unknown size."""
    own = {line.kind: line for line in reversed(curves.size) if line.kind in ("weights", "whole")}
    return own.get("whole", own.get("weights"))


def _reading(change: float | None, error: float | None) -> Reading:
    value = math.inf if change is None else change
    return Reading(value) if error is None else Reading(value, value - error, value + error)
