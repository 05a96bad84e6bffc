"""`python -m app`: starts the dashboard from any directory. Arguments go to Streamlit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MAIN = Path(__file__).resolve().with_name("main.py")


def command(arguments: list[str]) -> list[str]:
    """What starts the dashboard: a Streamlit of this Python's own, with the absolute path of its entry."""
    return [sys.executable, "-m", "streamlit", "run", str(MAIN), *arguments]


if __name__ == "__main__":
    os.execv(sys.executable, command(sys.argv[1:]))
