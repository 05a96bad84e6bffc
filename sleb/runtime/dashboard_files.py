"""Where the dashboard and its recorded samples lie, and what starts it. Knows folders only, and imports neither."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def _root() -> Path:
    """The installed package has them in a folder of its own; in a checkout they lie beside the package."""
    package = Path(sys.modules[__name__.partition(".")[0]].__path__[0]).resolve()
    installed = package / "_dashboard"
    return installed if installed.is_dir() else package.parent


ROOT = _root()
"""Holds `app/`, `pages/` and `assets/`: the top of a checkout, or a folder inside the installed package."""
MAIN = ROOT / "app" / "main.py"
"""What Streamlit runs."""
SAMPLES = ROOT / "assets" / "sample"
"""Recorded runs of a real model, made by the program itself; read-only."""


def command(arguments: Sequence[str]) -> list[str]:
    """What starts the dashboard: a Streamlit of this Python's own, with the absolute path of its entry.

    The current folder stays off the import path (`-P`), so that an `app.py` there is not taken for the dashboard.
    """
    return [sys.executable, "-P", "-m", "streamlit", "run", str(MAIN), *arguments]
