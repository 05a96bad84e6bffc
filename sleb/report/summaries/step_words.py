"""One step of a search in one or two sentences: what it removed, and how sure that is. Draws nothing."""

from __future__ import annotations

import math

import numpy as np

from sleb.report.summaries.numbers import listed
from sleb.report.summaries.step_comparison import UNITS, Bars, swaps_in_words


def words(shown: Bars, confidence: float) -> str:
    """What happened in a step, and how sure it is, in one or two sentences."""
    step = shown.step
    if step.is_swap:
        return _words_of_swap(shown, confidence)
    if shown.removes_chunk or (
        len(step.candidates[shown.chosen].skipped) == len(step.removal_list) > 1 and step.restored
    ):
        text = f"Step {step.number} removed blocks {shown.names[shown.chosen]}"
        text += f" and took {listed(step.restored)} back" if step.restored else ""
    else:
        text = f"Step {step.number} removed block {listed(step.removed)}"
    if step.margin is None:
        return f"{text}, the only candidate{'' if len(step.candidates) == 1 else ' whose predictions are numbers'}."
    others = [shown.names[index] for index in shown.tied]
    if len(others) == len(step.candidates) - 1 and step.margin_standard_error is None:
        return f"{text}: {_margin(shown, confidence)} better than the next best, but one sequence distinguishes none."
    if not others:
        return f"{text}, significantly different from all others: the next best is {_margin(shown, confidence)} behind."
    if len(others) > 8:
        return f"{text}, statistically tied with {len(others)} others: any of them might as well have been removed."
    return f"{text}, statistically tied with {listed(others)}: the next best is {_margin(shown, confidence)} behind."


def _words_of_swap(shown: Bars, confidence: float) -> str:
    step = shown.step
    text = f"Step {step.number}, a swap: {shown.names[shown.chosen]}"
    if step.improvement is not None:
        objective = step.candidates[0].objective
        error = step.improvement_standard_error
        text += f", {step.improvement:.4f} {UNITS[objective]} better than before"
        text += f" (standard error {error:.4f})" if error is not None else ""
    if step.margin is None:
        return f"{text}; the only swap{'' if len(step.candidates) == 1 else ' whose predictions are numbers'}."
    if shown.tied:
        return f"{text}; statistically tied with {swaps_in_words(len(shown.tied))}."
    return f"{text}; significantly different from all others: the next best is {_margin(shown, confidence)} behind."


def _margin(shown: Bars, confidence: float) -> str:
    """How far the next best is behind, with the half-width of the interval that decides whether it is tied."""
    if len(shown.scores) < 2 or np.isnan(np.delete(shown.scores, shown.chosen)).all():
        return f"{shown.step.margin:.4f}"
    next_best = int(np.nanargmin(np.where(np.arange(len(shown.scores)) == shown.chosen, np.nan, shown.scores)))
    half_width = float(shown.half_widths[next_best])
    objective = shown.step.candidates[0].objective
    unit = "" if objective == "metric1" else f" {UNITS[objective]}"
    if not math.isfinite(half_width):
        return f"{shown.step.margin:.4f}{unit}"
    return f"{shown.step.margin:.4f}{unit} (± {half_width:.4f} at {confidence:.0%})"
