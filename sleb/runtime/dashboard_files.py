"""Where the dashboard and its recorded samples lie, and what starts it. Knows folders only, and imports neither."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path


def _root() -> Path:
    """The folder of the dashboard's files: inside an installed package, or the top of a checkout."""
    package = Path(sys.modules[__name__.partition(".")[0]].__path__[0]).resolve()
    installed = package / "_dashboard"
    return installed if installed.is_dir() else package.parent


ROOT = _root()
"""The folder with `app/`, `pages/` and `assets/`: the top of a checkout, or a folder inside the installed package."""
MAIN = ROOT / "app" / "main.py"
"""The script that Streamlit runs."""
SERVER = ROOT / "app" / "serve.py"
"""The script that starts Streamlit without reading the current folder's settings."""
SAMPLES = ROOT / "assets" / "sample"
"""Recorded runs of a real model, made by the program itself; read-only."""

ALLOW_PATH, READ_ONLY = "SLEB_DASHBOARD_ALLOW_PATH", "SLEB_DASHBOARD_READ_ONLY"
"""Environment variables with the server's permissions: a list of folders as JSON, and 1 for read-only."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command that starts the dashboard: this Python's own Streamlit, with the absolute path of its entry.

    The current folder is data: it stays off the import path (`-P`), and its settings are not read.
    """
    return [sys.executable, "-P", str(SERVER), "run", str(MAIN), *arguments]


def is_local(address: object) -> bool:
    """Whether only users of this machine can reach an address; a server without one can be reached from everywhere."""
    if not isinstance(address, str):
        return False
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return address.lower() == "localhost"
