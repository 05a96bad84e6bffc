"""Two continuations side by side, and which predictions flipped: a component that draws tokens as data.

Python sends tokens once; side_by_side.js draws, and answers pointer and keys without asking the server. Every text goes
as data and is set as text there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from typing import Any

from app.components.registry import component
from sleb.records import Generation
from sleb.runtime.processes.progress import duration


def draw(answer: Generation) -> None:
    """Draw both texts, and the baseline's with the places where the smaller model predicts another token."""
    component("side_by_side")(key="side-by-side", data=payload(answer))


def payload(answer: Generation) -> dict[str, Any]:
    """Data of the component: both texts and the flipped predictions."""
    before, after = differing(*answer.known_apart)
    blocks = ", ".join(map(str, answer.removal_list)) or "nothing"
    return {
        "id": answer.question,
        "prompt": list(answer.prompt_tokens),
        "texts": [
            {
                "title": "Baseline",
                "about": _about(answer.baseline_tokens, answer.baseline_seconds, answer.baseline_cached),
                "tokens": list(answer.baseline_tokens),
                "differs": before,
            },
            {
                "title": f"Without {blocks}",
                "about": _about(answer.tokens, answer.list_seconds, answer.cached),
                "tokens": list(answer.tokens),
                "differs": after,
            },
        ],
        "flips": [
            {
                "place": each.position,
                "before": each.before,
                "after": each.after,
                "before_share": each.before_probability,
                "after_share": each.after_probability,
            }
            for each in answer.flips
        ],
        "compared": answer.compared,
    }


def differing(before: Sequence[Hashable], after: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Places at which either text has tokens that the other, aligned with it, does not have."""
    first: list[int] = []
    second: list[int] = []
    for kind, low, high, start, stop in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            first += range(low, high)
            second += range(start, stop)
    return first, second


def _about(tokens: Sequence[str], seconds: float, cached: bool) -> str:
    took = f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
    return f"{len(tokens)} tokens in {took}" + ("" if cached else ", without a KV cache")
