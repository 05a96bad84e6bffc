"""The token view: a passage coloured by where predictions settle, and the predictions of the token that is picked.

Python sends numbers and texts once; token_view.js draws, and answers clicks and keys without asking the server. Every
text goes as data and is set as text there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st
from plotly.colors import sample_colorscale

from app.components.registry import component
from sleb.model.token_text import without_bytes
from sleb.records import Passage, PassageToken, Run
from sleb.report.figures import style


def token_view(run: Run, passage: Passage, num_blocks: int, exit_at: str) -> None:
    """Draw the passage with its predictions, coloured by the `first` or the `settled` exit.

    The address keeps the picked token as `token`, counted from 0.
    """
    key = f"tokens-{run.run_id}"

    def picked() -> None:
        token = st.session_state[key]["token"]
        if token is not None:
            st.query_params["token"] = str(int(token))

    component("token_view")(
        key=key,
        data=view_data(passage, num_blocks, run.removal_list)
        | {"run": run.run_id, "exit": exit_at, "token": wanted_token(st.query_params.get("token"), passage)},
        on_token_change=picked,
    )


def wanted_token(text: str | None, passage: Passage) -> int:
    """The token of the address, else an interesting one: decided early, after its prediction has changed."""
    if text is not None and text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < len(passage.tokens):
        return int(text)
    return max(range(len(passage.tokens)), key=lambda place: _worth(passage, place), default=0)


def _worth(passage: Passage, place: int) -> tuple[bool, int, int]:
    """A key that sorts tokens by interest: a word decided before the last block, after some changes."""
    token = passage.tokens[place]
    final = token.top[-1][0][0] if token.top and token.top[-1] else ""
    early = token.settled_exit < len(token.top) - 1
    return any(char.isalpha() for char in without_bytes(final)), early * (token.settled_exit - token.first_exit), -place


def view_data(passage: Passage, num_blocks: int, removed: tuple[int, ...]) -> dict[str, Any]:
    """Data of the component, with each token's text once, since predictions repeat at most blocks.

    Ids distinguish the tokens. Without ids (`known` is false) equal texts may be different tokens: then only the exits
    say which predictions are the final one.
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
    """Whether the passage keeps the ids of its tokens."""
    return all(each.id is not None for each in passage.tokens)


def block_colours(num_blocks: int) -> list[list[str]]:
    """Background and text colour for each block, from the first to the last."""
    depth = [block / max(num_blocks - 1, 1) for block in range(num_blocks)]
    channels = sample_colorscale(style.SCALE, depth, colortype="tuple")
    backgrounds = ["#" + "".join(f"{round(255 * each):02x}" for each in rgb) for rgb in channels]
    return [[each, style.ink_on(each)] for each in backgrounds]
