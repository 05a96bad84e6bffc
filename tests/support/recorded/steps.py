"""A step of a search as the fixture of `tests/test_compatibility.py` has it on record."""

from __future__ import annotations

from typing import Any

from sleb.records import Step


def step_of(step: Step) -> dict[str, Any]:
    """The evidence of one step that every later version must read again."""
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
