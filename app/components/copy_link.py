"""A button that copies the address of the page."""

from __future__ import annotations

import streamlit as st

_COPY = st.components.v2.component(
    "sleb_copy_link",
    html='<button type="button">Copy link</button>',
    css="""
button { font: inherit; font-size: 0.875rem; white-space: nowrap; padding: 0.45rem 0.75rem; cursor: pointer;
  color: var(--st-text-color); background: var(--st-background-color); border: 1px solid var(--st-border-color);
  border-radius: var(--st-base-radius); }
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
""",
    js="""
export default function ({ parentElement }) {
  const button = parentElement.querySelector("button");
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(location.href); button.textContent = "Copied"; }
    catch { button.textContent = "Copy it from the address bar"; }
    setTimeout(() => { button.textContent = "Copy link"; }, 2000);
  };
}
""",
)


def copy_link() -> None:
    """Draw a button that copies this page's address, with all its choices."""
    _COPY(key="copy-link", width="content")
