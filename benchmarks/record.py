"""Keeps the ratio that a benchmark found in a file, and says what the file held before (`--record FILE`)."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import sleb


def record(path: Path, name: str, settings: str, ratio: float, lowest: float, highest: float) -> str:
    """Write a ratio under its name and settings, and return one line that puts the last recorded one beside it.

    The file is tracked: committing it makes this run the one that later runs are compared with.
    """
    earlier = json.loads(path.read_text()) if path.exists() else {}
    key = f"{name} ({settings})"
    last = earlier.get(key)
    now = {
        "ratio": round(ratio, 3),
        "lowest": round(lowest, 3),
        "highest": round(highest, 3),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"sleb {sleb.__version__}, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.write_text(json.dumps(earlier | {key: now}, indent=2) + "\n")
    line = f"{key}: {ratio:.2f} (rounds {lowest:.2f} to {highest:.2f})"
    if last is None:
        return f"{line}; nothing was recorded before"
    return f"{line}; last recorded: {last['ratio']:.2f} ({last['date']}; {last['machine']})"
