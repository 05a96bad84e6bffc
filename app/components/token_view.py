"""The token view: a passage coloured by where predictions settle, and the predictions of the token that is picked.

Python sends numbers and texts once; tokenview.js draws, and answers clicks and keys without asking the server. Every
text goes as data and is set as text there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from plotly.colors import sample_colorscale

from sleb.model.token_text import without_bytes
from sleb.records import Passage, PassageToken, Run
from sleb.report.figures import style

_HERE = Path(__file__).resolve().parent
_VIEW = st.components.v2.component(
    "sleb_token_view",
    html='<div class="view"></div>',
    css=(_HERE / "token_view.css").read_text(encoding="utf-8"),
    js=(_HERE / "token_view.js").read_text(encoding="utf-8"),
)


def token_view(run: Run, passage: Passage, num_blocks: int, exit_at: str) -> None:
    """The passage with its predictions, coloured by the `first` or the `settled` exit.

    The token that is picked is kept in the URL as `token`, counted from 0.
    """
    key = f"tokens-{run.run_id}"

    def picked() -> None:
        token = st.session_state[key]["token"]
        if token is not None:
            st.query_params["token"] = str(int(token))

    _VIEW(
        key=key,
        data=view_data(passage, num_blocks, run.removal_list)
        | {"run": run.run_id, "exit": exit_at, "token": wanted_token(st.query_params.get("token"), passage)},
        on_token_change=picked,
    )


def wanted_token(text: str | None, passage: Passage) -> int:
    """The token of the URL if it is one, else one worth a look: it is decided early and changes its mind."""
    if text is not None and text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < len(passage.tokens):
        return int(text)
    return max(range(len(passage.tokens)), key=lambda place: _worth(passage, place), default=0)


def _worth(passage: Passage, place: int) -> tuple[bool, int, int]:
    """How much there is to see: a word that is decided before the end, after some going back and forth."""
    token = passage.tokens[place]
    final = token.top[-1][0][0] if token.top and token.top[-1] else ""
    early = token.settled_exit < len(token.top) - 1
    return any(char.isalpha() for char in without_bytes(final)), early * (token.settled_exit - token.first_exit), -place


def view_data(passage: Passage, num_blocks: int, removed: tuple[int, ...]) -> dict[str, Any]:
    """What the browser needs, each token's text once: a prediction repeats at most blocks.

    Tokens are told apart by their ids. Without ids (`known` is false) equal texts may be different tokens: then only
    the exits say which predictions are the final one.
    """
    places: dict[int | str, int] = {}
    words: list[str] = []

    def word(token: int | str, text: str) -> int:
        if token not in places:
            places[token] = len(words)
            words.append(text)
        return places[token]

    def top(each: PassageToken) -> list[list[list[int]]]:
        ids: Sequence[Sequence[int | str]] = each.top_ids or [[text for text, _ in block] for block in each.top]
        return [
            [[word(token, text), round(1000 * share)] for token, (text, share) in zip(own, block, strict=True)]
            for own, block in zip(ids, each.top, strict=True)
        ]

    tokens = [
        {
            "text": each.token,
            "word": word(each.token if each.id is None else each.id, each.token),
            "first": each.first_exit,
            "settled": each.settled_exit,
            "top": top(each),
        }
        for each in passage.tokens
    ]
    return {
        "tokens": tokens,
        "words": words,
        "known": has_ids(passage),
        "blocks": num_blocks,
        "removed": sorted(removed),
        "colours": block_colours(num_blocks),
    }


def has_ids(passage: Passage) -> bool:
    """Whether it is known which token is which."""
    return all(each.id is not None for each in passage.tokens)


def block_colours(num_blocks: int) -> list[list[str]]:
    """Of each block, from the first to the last: a background from the scale, and black or white to read on it."""
    depth = [block / max(num_blocks - 1, 1) for block in range(num_blocks)]
    channels = sample_colorscale(style.SCALE, depth, colortype="tuple")
    return [["#" + "".join(f"{round(255 * each):02x}" for each in rgb), _ink(rgb)] for rgb in channels]


def _ink(rgb: tuple[float, float, float]) -> str:
    """Black or white, whichever is read better on a colour (WCAG 2 contrast)."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"
