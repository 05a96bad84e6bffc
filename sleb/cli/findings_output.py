"""Findings on a terminal: tables, and what both models say to a prompt. Knows records; computes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sleb.cli.output import put
from sleb.cli.terminal import table
from sleb.errors import printable
from sleb.formats.findings_tables import in_order, tables_of
from sleb.records import Finding, Generation
from sleb.runtime.findings_folder import of_kind

_FLIPS_SHOWN = 12
_CONTEXT = 6  # tokens before one that flipped


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings, the baseline before the shorter lists before the longer ones."""
    for each in tables_of(findings):
        _titled(each.title, each.columns, each.rows)
        for note in (*each.notes, *(f"Written and proven: {folder}" for folder in each.folders)):
            put(printable(note))
    _generations(of_kind(in_order(findings), Generation))


def _titled(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table under a title, which may be longer than the table is wide."""
    put(f"\n{printable(title)}")
    table("", columns, rows)


def _generations(generations: Sequence[Generation]) -> None:
    """Print what the baseline says once, above what the lists say to the same prompt."""
    for ask in dict.fromkeys(each.ask for each in generations):
        own = [each for each in generations if each.ask == ask]
        first = own[0]
        put(
            f"\nTo the prompt {printable(_quoted(ask.prompt))}\n\n"
            f"The baseline ({_spoken(len(first.baseline_tokens), first.baseline_seconds)}):\n"
            f"{printable(first.baseline_text)}"
        )
        for each in own:
            if each.removal_list:
                _generation(each)


def _generation(generation: Generation) -> None:
    without = ", ".join(map(str, generation.removal_list))
    put(
        f"\nWithout {without} ({_spoken(len(generation.tokens), generation.list_seconds)}, {_parting(generation)}):\n"
        f"{printable(generation.text)}"
    )
    share = f" ({len(generation.flips) / generation.compared:.0%})" if generation.compared else ""
    title = (
        f"{len(generation.flips)} of {generation.compared} predictions{share} on the baseline's text, prompt included, "
        "are other tokens without these blocks"
    )
    text = [*generation.prompt_tokens, *generation.baseline_tokens]
    rows = [
        (
            str(each.position),
            _quoted("".join(text[max(0, each.position - _CONTEXT) : each.position])),
            f"{_quoted(each.before)} {each.before_probability:.0%}",
            f"{_quoted(each.after)} {each.after_probability:.0%}",
        )
        for each in generation.flips[:_FLIPS_SHOWN]
    ]
    if not rows:
        put(f"\n{title}.")
        return
    _titled(title, ("at", "after", "baseline", "without"), rows)
    if len(generation.flips) > len(rows):
        put(f"and {len(generation.flips) - len(rows)} more; --json has all of them")


def _parting(generation: Generation) -> str:
    """Where the two texts begin to differ, in words."""
    before, after = generation.known_apart
    pairs = zip(before, after, strict=False)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if same is None:
        return "the same text" if before == after else "the same as far as it goes"
    return f"another text from token {same + 1} on"


def _spoken(tokens: int, seconds: float) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'} in {seconds:.1f} s"


def _quoted(text: str) -> str:
    """A piece of text in a cell, its spaces and line ends to be seen."""
    return json.dumps(text, ensure_ascii=False)
