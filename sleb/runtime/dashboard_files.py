"""Where the dashboard and its recorded samples lie, and what starts it. Knows folders only, and imports neither."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
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
SERVER = ROOT / "app" / "serve.py"
"""What starts Streamlit, without a look at the current folder's settings."""
SAMPLES = ROOT / "assets" / "sample"
"""Recorded runs of a real model, made by the program itself; read-only."""

ALLOW_PATH, READ_ONLY = "SLEB_DASHBOARD_ALLOW_PATH", "SLEB_DASHBOARD_READ_ONLY"
"""Environment variables by which the server learns what it may: a list of folders as JSON, and 1 for only showing."""


def command(arguments: Sequence[str]) -> list[str]:
    """What starts the dashboard: a Streamlit of this Python's own, with the absolute path of its entry.

    The current folder is data: it stays off the import path (`-P`), and its settings are not read.
    """
    return [sys.executable, "-P", str(SERVER), "run", str(MAIN), *arguments]


def is_local(address: object) -> bool:
    """Whether only this machine's users reach what listens there; without an address everybody does."""
    if not isinstance(address, str):
        return False
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return address.lower() == "localhost"
