"""Where runs, the cache and this machine's signing key lie. Knows folders only."""

from __future__ import annotations

import os
from pathlib import Path

from sleb.runtime.files import expanded


def home() -> Path:
    """The folder with runs and cache: `SLEB_HOME`, or a per-user data folder."""
    chosen = os.environ.get("SLEB_HOME")
    if chosen:
        return expanded(Path(chosen)).absolute()
    from platformdirs import user_data_path

    return user_data_path("sleb", appauthor=False)
