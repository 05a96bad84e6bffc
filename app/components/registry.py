"""The dashboard's own components, registered with Streamlit when they are first drawn. Knows the files beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

_HERE = Path(__file__).resolve().parent


@cache
def component(name: str) -> Callable[..., Any]:
    """The component that `NAME.js` draws, with `NAME.css`, in the element of `NAME.html` or an empty one."""
    page = _HERE / f"{name}.html"
    return st.components.v2.component(
        f"sleb_{name}",
        html=page.read_text(encoding="utf-8") if page.is_file() else '<div class="view"></div>',
        css=(_HERE / f"{name}.css").read_text(encoding="utf-8"),
        js=(_HERE / f"{name}.js").read_text(encoding="utf-8"),
    )
