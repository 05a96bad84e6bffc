"""Names of files and folders while they are written: each says whose it is, so that a dead writer's are recognised.

`.model.host-4711-176430000012.a1b2c3d4.partial` is what process 4711 of `host`, which began at that time, writes to
become `model`. Knows names and processes; removes nothing.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from functools import lru_cache
from pathlib import Path

import psutil

from sleb.runtime.processes.device_queue import alive

FOREIGN_SECONDS = 24 * 3600.0
"""Seconds without a change after which the unfinished file of another host, whose process is unknown, is abandoned."""

CLOCK_SECONDS = 600.0
"""Seconds by which the clock can be set while a writer lives: the start of its process is compared within them."""

SUFFIX = ".partial"
_MOST_BYTES = 80  # of the name it will have: file systems take 255 for all
_NAME = re.compile(
    r"\.(?P<target>.+)\.(?P<host>[A-Za-z0-9_-]{1,64})-(?P<pid>\d{1,9})-(?P<started>\d{1,15})\.[0-9a-z_]{8}\.partial",
    re.DOTALL,
)


def temporary(target: Path) -> Path:
    """An unused name beside `target`, for what will become it."""
    return target.with_name(f"{prefix(target.name)}{secrets.token_hex(4)}{SUFFIX}")


def prefix(target: str) -> str:
    """The beginning of a temporary name; eight random characters and `SUFFIX` follow."""
    return f".{_shown(target)}.{_own(os.getpid())}."


def is_unfinished(name: str) -> bool:
    """Whether a name is one of those that `temporary` gives."""
    return _NAME.fullmatch(name) is not None


def becomes(name: str, target: str) -> bool:
    """Whether the name is that of something unfinished that is to be called `target`, or was."""
    match = _NAME.fullmatch(name)
    return match is not None and match["target"] == _shown(target)


def is_abandoned(path: Path) -> bool:
    """Whether a path has a temporary name, and the process in that name has ended."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] == _host():
        return not alive(int(match["pid"]), int(match["started"]) / 100, CLOCK_SECONDS)
    try:
        return time.time() - path.lstat().st_mtime > FOREIGN_SECONDS
    except OSError:
        return False


def _shown(name: str) -> str:
    return name.encode(errors="ignore")[:_MOST_BYTES].decode(errors="ignore")


@lru_cache(maxsize=1)
def _own(pid: int) -> str:
    """The part of a name that says whose it is, by process id: a forked process inherits what is cached."""
    return f"{_host()}-{pid}-{round(psutil.Process(pid).create_time() * 100)}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "-"
