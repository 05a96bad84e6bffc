"""The command line in this process, for tests of what it prints."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

from sleb.cli.main import main

SLEB = str(Path(sys.executable).with_name("sleb"))
"""The installed command: unlike `python -m`, it puts no folder of the user's on the import path."""


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """In this process, through the real entry point: (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["sleb", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert (ended.value.code or 0) == code, err.getvalue()
    return out.getvalue(), err.getvalue()
