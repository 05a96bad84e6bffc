"""The dashboard's entry: import path, page settings, navigation. Draws no page itself."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # `streamlit run` puts this file's folder there; other folders may have an app.py
    sys.path[:] = [str(ROOT), *(each for each in sys.path if each != str(ROOT))]

import streamlit as st

st.set_page_config(page_title="SLEB", page_icon=str(ROOT / "assets" / "icon.png"), layout="wide")
st.logo(str(ROOT / "assets" / "logo.svg"), size="large", icon_image=str(ROOT / "assets" / "icon.png"))

st.html(  # beyond what theme options can do: less space above the page, and lines that stay readable on a wide screen
    "<style>.stMainBlockContainer {padding-top: 4.2rem; padding-bottom: 3rem; max-width: 1760px; margin: 0 auto}"
    "</style>"
)


def _page(name: str, title: str, icon: str, *, default: bool = False) -> st.Page:
    return st.Page(ROOT / "pages" / f"{name}.py", title=title, icon=icon, url_path=name, default=default)


st.navigation(
    [
        _page("runs", "Runs", ":material/list:", default=True),
        _page("similarity", "Similarity", ":material/grid_on:"),
        _page("alignment", "Prediction alignment", ":material/flag:"),
        _page("steps", "Removal steps", ":material/layers_clear:"),
        _page("compare", "Compare", ":material/compare_arrows:"),
        _page("evaluate", "Evaluate", ":material/balance:"),
        _page("export", "Export", ":material/output:"),
    ],
    position="top",
).run()
