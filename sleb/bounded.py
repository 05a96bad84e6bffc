"""Work that untrusted data asks for, in a process that is ended at a limit of time and memory. Knows no such work.

What a template or a task's text makes a library do has no bound of its own, and a loop inside C code hears no signal.
So it is done by a fresh Python that inherits nothing, which the system ends.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from sleb.errors import WorkEnded, excerpt

SECONDS = 10.0
"""Seconds of processor time for work on a few pages of text, which takes a hundredth of that."""
MEMORY = 1 << 30
"""Bytes of address space beyond what the libraries take."""
_STARTING_SECONDS = 60.0  # by the clock, for a machine with other things to do
_TOO_DEEP = "it is nested too deeply"


def call(
    work: Callable[..., Any], *arguments: Any, seconds: float = SECONDS, memory: int = MEMORY, answer: int = 64 << 20
) -> Any:
    """Call `work(*arguments)` in a process of its own, which costs about a second.

    `work` is a function at the top of a module, its arguments can be pickled, and what it returns can be written as
    JSON of at most `answer` bytes (dates and the like become text). `seconds` of processor time and `memory` bytes are
    what it may take beyond what importing its module takes. Raises `WorkEnded` where a limit was reached or the work
    failed; its message is a clause, such as "it took more than 10 seconds". Can be called from any thread.
    """
    try:
        given = pickle.dumps((seconds, memory, answer, work, arguments))
    except RecursionError as error:
        raise WorkEnded(_TOO_DEEP) from error
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us, who end it
    )
    try:
        output, _ = child.communicate(given, timeout=_STARTING_SECONDS + 4 * seconds)
    except subprocess.TimeoutExpired as error:
        raise WorkEnded(f"it took more than {seconds:.0f} seconds") from error
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise WorkEnded(f"it took more than {seconds:.0f} seconds, or more memory than there is")
    try:
        reply = json.loads(output)
    except ValueError as error:
        raise WorkEnded(
            f"its process ended with exit code {child.returncode}, perhaps without enough memory"
        ) from error
    if "failed" in reply:
        raise WorkEnded(reply["failed"])
    return reply["answer"]


def _limit(seconds: float, memory: int) -> None:
    """Limit what this process takes from here on; what the libraries took is not counted."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (used, used + 5))
    most = psutil.Process().memory_info().vms + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answered(seconds: float, memory: int, most: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    _limit(seconds, memory)
    try:
        reply = json.dumps({"answer": work(*arguments)}, ensure_ascii=False, default=str).encode(
            "utf-8", "surrogatepass"
        )
    except WorkEnded as error:
        failed = excerpt(error)
    except MemoryError:
        failed = f"it needed more than {memory / 1e9:.1f} GB of memory"
    except RecursionError:
        failed = _TOO_DEEP
    except Exception as error:  # whatever a library makes of such data is reported, and ends here
        failed = excerpt(f"{type(error).__name__}: {error}")
    else:
        if len(reply) <= most:
            return reply
        failed = f"it gave more than {most / 1e6:.0f} MB"
    return json.dumps({"failed": failed}).encode()


def _main() -> None:
    """In the child: read our own pickle from standard input, do the work, write JSON to what was standard output."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    output.write(_answered(*pickle.load(sys.stdin.buffer)))
    output.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
