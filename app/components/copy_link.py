"""A button that copies the address of the page."""

from __future__ import annotations

from app.components.registry import component


def copy_link() -> None:
    """Draw a button that copies this page's address, with all its choices."""
    component("copy_link")(key="copy-link", width="content")
