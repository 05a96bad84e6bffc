"""Limits of time and memory for what a task file asks for: here, or beforehand in a copy of this process.

Knows neither tasks nor lm-eval. A signal ends loops of Python and of regular expressions, not those of other C code:
that is why `tried` does the same work first where the system can end it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sleb.errors import OptionError, SlebError, WorkEnded, excerpt

SECONDS_EACH = 10.0
"""Seconds for one text, or for the work on one answer; a hundredth is plenty."""
MEMORY_EACH = 2 << 30
"""Bytes of memory for one text, or for the work on one answer."""
SECONDS = 600
"""Seconds of processor time to load tasks and build all their prompts."""
MEMORY = 4 << 30
LARGEST_FILE = 8 << 30
"""Most bytes of a file that loading writes: examples are unpacked and converted into a cache."""
_MESSAGE = 4_000  # bytes
_ends = threading.local()


def _data_bytes() -> int | None:
    """Memory that counts against RLIMIT_DATA; files that are mapped do not. None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    used = _data_bytes()
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
    if soft != resource.RLIM_INFINITY and soft <= most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End what runs inside after so many seconds; only in the main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    running = True

    def end(_number: int, _frame: FrameType | None) -> None:
        if running:
            raise WorkEnded(f"it took more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, end)
    start = time.monotonic()
    # again every second: Jinja's compiler tries constants out, and takes any error for "not now"
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # the timer of another caller goes on
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - start)), interval)


@contextmanager
def within(seconds: float | None = None, memory: int = MEMORY_EACH) -> Iterator[None]:
    """End what runs inside at a limit. Raises `WorkEnded`; a limit inside another one is not counted."""
    if getattr(_ends, "inside", False):
        yield
        return
    _ends.inside = True
    try:
        with _memory_limit(memory), _time_limit(SECONDS_EACH if seconds is None else seconds):
            yield
    except MemoryError as error:
        raise WorkEnded(f"it needed more than {memory / 1e9:.1f} GB of memory") from error
    except RecursionError as error:
        raise WorkEnded("it is nested too deeply") from error
    finally:
        _ends.inside = False


def tried(work: Callable[[], object]) -> None:
    """Do work in a copy of this process, which takes a tenth of a second, and forget what it makes.

    Raises `OptionError` with the sentence in which the work failed, `WorkEnded` with a clause at a limit.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _in_child(work, writing)
    os.close(writing)
    try:
        report = _received(reading, time.monotonic() + 60 + 4 * SECONDS)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has reported all, or it is late
        _, status = os.waitpid(child, 0)
    if report[:1] == b"r":
        raise OptionError(report[1:].decode("utf-8", "replace"))
    if report[:1] == b"e":
        raise WorkEnded(report[1:].decode("utf-8", "replace"))
    if report[:1] != b"d":
        ended = os.waitstatus_to_exitcode(status)
        if -ended in (signal.SIGXCPU, signal.SIGKILL):
            raise WorkEnded(f"it took more than {SECONDS} seconds, or more memory than there is")
        raise WorkEnded(f"the process that tried it ended with exit code {ended}")


def _received(reading: int, until: float) -> bytes:
    """What the child reports until it closes its end. Raises `WorkEnded`."""
    report = b""
    while len(report) <= _MESSAGE:
        if not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
            raise WorkEnded(f"it took more than {SECONDS} seconds")
        part = os.read(reading, _MESSAGE)
        if not part:
            break
        report += part
    return report


def _in_child(work: Callable[[], object], writing: int) -> None:
    """Do the work, report, and exit: nothing of this process may be done twice."""
    report = b"e"
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _die_with_parent()
        _silence()
        os.setsid()  # Ctrl-C is for the parent, who ends this one
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of writing
        for kind, most in {"CORE": 0, "CPU": SECONDS, "FSIZE": LARGEST_FILE}.items():
            number = getattr(resource, f"RLIMIT_{kind}")
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
        with _memory_limit(MEMORY):
            work()
        report = b"d"
    except WorkEnded as error:
        report += excerpt(error).encode()
    except SlebError as error:
        report = b"r" + str(error).encode("utf-8", "replace")[:_MESSAGE]
    except MemoryError:
        report += f"it needed more than {MEMORY / 1e9:.1f} GB of memory".encode()
    except BaseException as error:  # whatever it is, it must not go on in a copy of the caller
        report += excerpt(f"{type(error).__name__}: {error}").encode()
    finally:
        with suppress(OSError):
            os.write(writing, report)
        os._exit(0)


def _silence() -> None:
    """Print and log nothing: the parent does so when it does the same work."""
    for name in (None, "sleb"):
        logging.getLogger(name).handlers = []
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def _die_with_parent() -> None:
    """End with the parent, so that no process of a killed one holds its locks. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
