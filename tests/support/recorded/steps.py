"""What is recorded of a run, and compared with it when a later version reads it."""

from __future__ import annotations

from typing import Any

from sleb.records import Run, Step


def step_of(step: Step) -> dict[str, Any]:
    """The evidence of one step that a reader must find again."""
    return dict(
        number=step.number,
        removed=step.removed,
        restored=step.restored,
        removal_list=step.removal_list,
        perplexity=step.perplexity,
        held_out_perplexity=step.held_out.perplexity,
        margin=step.margin,
        margin_standard_error=step.margin_standard_error,
        tied=step.tied,
        improvement=step.improvement,
        candidates=[[each.block, each.score_sum, each.sequences] for each in step.candidates],
    )


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The evidence of all steps of a run."""
    return [step_of(step) for step in (run.trace.steps if run.trace else ())]
