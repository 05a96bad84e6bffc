"""How values of options are typed, and written again: `0,29`, `8-20`, `+10%`, `24GB`. Knows records only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from sleb.errors import OptionError, quoted
from sleb.records.options import Setting

_BLOCK = re.compile(r"(-?[0-9]{1,15})(?:-([0-9]{1,15}))?")
"""A block's index, or the first and last of a range; digits of other scripts, which Python reads too, are not taken."""
_MOST_BLOCKS = 10_000
"""The longest range that is written out: no model has nearly as many blocks."""
_RISE = re.compile(r"\s*\+?([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(%?)\s*", re.ASCII)
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt])(i?)b?|b)\s*", re.IGNORECASE | re.ASCII)


def read(setting: Setting, text: str) -> Any:
    """The value that is typed. Raises `OptionError`, which names the option and shows an example."""
    readers = {"blocks": blocks, "rise": _rise, "size": _size}
    if setting.kind not in readers:
        return text
    value = readers[setting.kind](text)
    if value is None:
        takes = {
            "blocks": f"block indices such as {setting.option.metavar}",
            "rise": f"a rise such as {setting.option.metavar}",
            "size": f"a size such as {setting.option.metavar} or 500MB",
        }
        raise OptionError(f"`{setting.name}` takes {takes[setting.kind]}; found {quoted(text)}.")
    return value


def written(setting: Setting, value: Any) -> str:
    """The value as it is typed."""
    if setting.kind == "blocks":
        return ",".join(map(str, value))
    if setting.kind == "rise":
        return f"+{value * 100:g}%"
    if setting.kind == "size":
        return _written_size(value)
    return str(getattr(value, "value", value))


def blocks(text: str) -> tuple[int, ...] | None:
    """`0,29`, `8-20,22`, or `none` -> indices; None for anything else."""
    parts = [part for part in re.split(r"[\s,]+", text.strip()) if part]
    if parts == ["none"]:
        return ()
    indices: list[int] = []
    for part in parts:
        match = _BLOCK.fullmatch(part)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < _MOST_BLOCKS:
            return None
        indices += range(first, last + 1)
    return tuple(indices)


def listed(indices: Sequence[int]) -> str:
    """Blocks in a field of a form; `none` for an empty list."""
    return ", ".join(map(str, indices)) or "none"


def _rise(text: str) -> float | None:
    """`+10%` or `0.1` -> 0.1."""
    match = _RISE.fullmatch(text)
    value = float(match[1]) / (100 if match[2] else 1) if match else math.inf
    is_share = value <= 1 or bool(match and match[2])  # 10 could mean +10% as well as +1000%
    return value if value < 1e6 and is_share else None


def _size(text: str) -> int | None:
    """`24GB` -> 24 billion; decimal units, and GiB and so on where they are meant."""
    match = _SIZE.fullmatch(text)
    if not match or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))


def _written_size(size: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if size % 1000**power == 0:
            return f"{size // 1000**power}{unit}"
    return f"{size}B"
