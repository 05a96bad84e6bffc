"""Whose turn it is on a device: tickets in the order of arrival, no daemon. Knows files and processes; knows no run.

A ticket is an empty file whose name says everything: its number, and the process that waits or works. The lowest
number whose process lives has the device, so a process that is killed gives its turn back by being gone.
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

_TICKET = re.compile(r"(\d{9})-(\d+)-(\d+\.\d\d)")


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
def turn(home: Path, device: str, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold the device, after everybody who came before. `waiting` hears how many those are, when it changes.

    Where tickets cannot be written (a read-only home), nobody waits, and the log says so.
    """
    folder = _folder(home, device)
    try:
        ticket = _draw(folder)
    except OSError as error:
        log.warning("Jobs do not wait for each other: %s cannot be written (%s).", folder, error.strerror)
        yield
        return
    try:
        told = 0
        while before := _before(folder, ticket):
            if before != told:
                waiting(before)
                told = before
            time.sleep(POLL_SECONDS)
        yield
    finally:
        with suppress(OSError):
            ticket.unlink()


def queue(home: Path, device: str) -> list[int]:
    """Process ids in the order of their turns; the first one has the device."""
    return [int(_parts(ticket)[1]) for ticket in _living(_folder(home, device))]


def _folder(home: Path, device: str) -> Path:
    """Of this host: a home may be shared by many."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname()}-{device_name(device)}")
    return home / "queue" / name


def _draw(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    with FileLock(folder / ".lock"):
        number = 1 + max((int(_parts(each)[0]) for each in _tickets(folder)), default=0)
        ticket = folder / f"{number:09d}-{process.pid}-{process.create_time():.2f}"
        ticket.touch()
    return ticket


def _before(folder: Path, ticket: Path) -> int:
    return sum(each.name < ticket.name for each in _living(folder))


def _living(folder: Path) -> list[Path]:
    """Tickets whose process is there, in order; the others are torn up."""
    found = []
    for ticket in sorted(_tickets(folder)):
        _, pid, started = _parts(ticket)
        if alive(int(pid), float(started)):
            found.append(ticket)
        else:
            with suppress(OSError):
                ticket.unlink()
    return found


def _tickets(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if _TICKET.fullmatch(each.name)]
    except FileNotFoundError:
        return []


def _parts(ticket: Path) -> tuple[str, str, str]:
    number, pid, started = ticket.name.split("-")
    return number, pid, started


def alive(pid: int, started: float, tolerance: float = 1.0) -> bool:
    """Whether the process is there and is the one that began then, give or take: a process id may be reused."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < tolerance and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
