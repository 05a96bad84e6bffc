"""The device queue: jobs use a device in the order of arrival, no daemon. Knows files and processes; knows no run.

An entry of the queue is an empty file whose name says everything: its number, and the process that waits or works. The
process of the lowest number that is alive has the device, so a process that is killed frees the device by ending.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5

_ENTRY = re.compile(r"(\d{9})-(\d+)-(\d+\.\d\d)")


def device_name(device: str) -> str:
    """The device a job will use, without torch: `auto` is the first GPU where there is one.

    Only the order of jobs depends on it; where the guess is wrong they wait for each other needlessly.
    """
    if device == "cuda":
        return "cuda:0"
    if device != "auto":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible not in ("", "-1") and (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return "cuda:0"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def devices(device: str, processes: int) -> list[str]:
    """What a job of several processes on this host will use: a GPU each, or the CPU together."""
    if device == "all":
        processes = max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    first = device_name("auto" if device == "all" else device)
    if processes == 1 or not first.startswith("cuda"):
        return [first]
    return [f"cuda:{index}" for index in range(processes)]


@contextmanager
def holding(home: Path, device: str, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold the device, after all jobs that came before. `waiting` is called with their number when it changes.

    Where the queue cannot be written (a read-only home), no job waits, and the log says so.
    """
    folder = _folder(home, device)
    try:
        entry = _enter(folder)
    except OSError as error:
        log.warning("Jobs do not wait for each other: %s cannot be written (%s).", folder, error.strerror)
        yield
        return
    try:
        known = 0
        while before := sum(each.name < entry.name for each in _living(folder)):
            if before != known:
                waiting(before)
                known = before
            time.sleep(POLL_SECONDS)
        yield
    finally:
        with suppress(OSError):
            entry.unlink()


def queue(home: Path, device: str) -> list[int]:
    """Process ids in the order of the queue; the first one has the device."""
    return [int(_parts(entry)[1]) for entry in _living(_folder(home, device))]


def _folder(home: Path, device: str) -> Path:
    """The queue of a device of this host: a home may be shared by many hosts."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname()}-{device_name(device)}")
    return home / "queue" / name


def _enter(folder: Path) -> Path:
    """Join the queue at its end, and remove the entries of processes that have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    with FileLock(folder / ".lock"):
        entries = _entries(folder)
        number = 1 + max((int(_parts(each)[0]) for each in entries), default=0)
        for each in entries:
            if not _is_living(each):
                with suppress(OSError):
                    each.unlink()
        entry = folder / f"{number:09d}-{process.pid}-{process.create_time():.2f}"
        entry.touch()
    return entry


def _living(folder: Path) -> list[Path]:
    """Entries whose process is alive, in order."""
    return [entry for entry in sorted(_entries(folder)) if _is_living(entry)]


def _is_living(entry: Path) -> bool:
    _, pid, started = _parts(entry)
    return alive(int(pid), float(started))


def _entries(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if _ENTRY.fullmatch(each.name)]
    except FileNotFoundError:
        return []


def _parts(entry: Path) -> tuple[str, str, str]:
    number, pid, started = entry.name.split("-")
    return number, pid, started


def alive(pid: int, started: float, tolerance: float = 1.0) -> bool:
    """Whether the process lives and began then, within `tolerance` seconds: a process id may be reused."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < tolerance and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
