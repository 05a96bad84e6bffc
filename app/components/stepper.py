"""The stepper: a component that draws a search step by step in the browser. A run -> its data, and the step shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.components.registry import component
from app.wording import rise_in_words
from sleb.methods.statistics import Comparison
from sleb.records import Run
from sleb.report.figures import step_animation, style
from sleb.report.figures import steps as charts
from sleb.report.summaries import step_comparison, step_words


def draw(data: dict[str, Any], *, key: str) -> int | None:
    """Draw the component; returns the step at which the user left it, once it rests."""
    state = component("stepper")(key=key, data=data, on_step_change=lambda: None)
    return state.step if isinstance(state.step, int) else None


def payload(run: Run, evidence: Sequence[Comparison | None]) -> dict[str, Any]:
    """Data of the component: all steps with their candidates, curve and axes; `evidence` has a comparison a step."""
    assert run.trace is not None
    assert run.stack is not None
    whole = [step_comparison.bars(run, number, each) for number, each in enumerate(evidence, start=1)]
    compared = [each.by_block for each in whole]  # one bar for each block; the words cover all candidates
    unit = step_comparison.unit_of(run)
    axes: dict[str, list[float]] = {}
    for name in ("rises", "differences"):
        tops = [
            step_animation.extent_of_axis(getattr(each, name), each.half_widths, (each.chosen, *each.tied), 0.75)
            for each in compared
        ]
        bottoms = [_lowest(getattr(each, name)) for each in compared]
        axes[name] = [1.15 * min([0.0, *bottoms]), 1.12 * max(tops, default=1.0)]
    return {
        "run": run.run_id,
        "blocks": run.stack.num_blocks,
        "protected": list(run.stack.protected),
        "score_name": unit,
        "unit": {
            "rises": f"Cost of removing it ({unit})",
            "differences": f"Above the best candidate ({unit})",
        },
        "swap_unit": {
            "rises": f"Best swap that removes it, above the list before ({unit})",
            "differences": f"Best swap that removes it, above the best one ({unit})",
        },
        "axis": axes,
        "interval": f"{run.spec.confidence:.0%} interval of the difference" if _has_intervals(compared) else "",
        "words": _before(run),
        "verdicts": {"tied": style.TIED_VERDICT, "different": style.DIFFERENT},
        "steps": [
            _step(each, step_words.words(every, run.spec.confidence))
            for each, every in zip(compared, whole, strict=True)
        ],
        "curve": _curve(run),
    }


def _step(shown: step_comparison.Bars, text: str) -> dict[str, Any]:
    step = shown.step
    chunk = shown.removes_chunk  # in one piece, whatever an earlier chunk had taken
    removed_at = step_comparison.removed_at_after(shown)
    if chunk:
        removed_at = dict.fromkeys(step.removal_list, step.number)
    return {
        "number": step.number,
        "swap": step.is_swap,
        "removed": list(step.removal_list if chunk else step.removed),
        "restored": list(step.restored) if step.is_swap else [],
        "list": list(step.removal_list),
        "removed_at": removed_at,
        "blocks": list(shown.blocks),
        "names": list(shown.names),
        "chunks": [None if each is None else [each[0], each[-1]] for each in shown.chunks],
        "scores": _short(shown.scores),
        "rises": _short(shown.rises),
        "differences": _short(shown.differences),
        "half_widths": _short(shown.half_widths),
        "perplexities": _short([each.perplexity for each in shown.candidates]),
        "chosen": shown.chosen,
        "tied": list(shown.tied),
        "words": text,
    }


def _has_intervals(compared: Sequence[step_comparison.Bars]) -> bool:
    return any((each.half_widths[np.isfinite(each.half_widths)] > 0).any() for each in compared)


def _before(run: Run) -> str:
    assert run.trace is not None
    candidates = len(run.trace.steps[0].candidates) if run.trace.steps else 0
    compare = f" Step 1 compares {candidates} candidates." if candidates > 1 else ""
    return f"The baseline: all blocks are in place.{compare}"


def _curve(run: Run) -> list[dict[str, float | str | None]]:
    """Perplexity after 0 .. n steps, with the rise over the baseline in words."""
    table = charts.curve_table(run)
    points: list[dict[str, float | str | None]] = []
    for row in table.to_dict("records"):
        point: dict[str, float | str | None] = {}
        for text in ("calibration", "held_out"):
            now, first = row[f"{text}_perplexity"], table[f"{text}_perplexity"].iloc[0]
            point[text] = _finite(now)
            if math.isfinite(now) and math.isfinite(first) and first > 0:
                spread = row["held_out_high"] / row["held_out_low"] if text == "held_out" else math.nan
                point[f"{text}_rise"] = _rise(now / first, spread)
        point["held_out_low"], point["held_out_high"] = _finite(row["held_out_low"]), _finite(row["held_out_high"])
        points.append(point)
    return points


def _rise(ratio: float, spread: float) -> str:
    """A rise in words; `spread` is the ratio of the bounds of one standard error either way."""
    error = ratio * math.log(spread) / 2 if math.isfinite(spread) and spread > 1 else None
    return rise_in_words(ratio, error)


def _lowest(values: Any) -> float:
    finite = [float(value) for value in values if math.isfinite(value)]
    return min(finite, default=0.0)


def _short(values: Any) -> list[float | None]:
    """Numbers with six digits, more than a screen shows; None in the place of what is not a number."""
    return [_finite(value, 6) for value in values]


def _finite(value: float | None, digits: int = 8) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
