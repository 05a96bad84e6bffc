"""lm-eval and the libraries below it, kept from disturbing the process they run in. Knows neither tasks nor models.

What they print, draw, seed and warn about stays inside (`apart`, `seeded`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import numpy as np
import torch

from sleb.errors import excerpt

log = logging.getLogger(__name__)

# What a task's YAML, its functions and its data set raise where they are absent, damaged, or not for this model.
_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    NameError,
    SyntaxError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    re.error,
)
_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers")  # libraries that log while they work


class _Passing(logging.Handler):
    """A handler that passes what other libraries log on to the job's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.info("%s: %s", record.name, record.getMessage())


@contextmanager
def apart(level: int = logging.WARNING) -> Iterator[None]:
    """Let libraries print, draw and warn about nothing: stdout belongs to results, stderr to our own progress."""
    from tqdm import tqdm

    drawn, printed, passing = tqdm.__init__, io.StringIO(), _Passing(level)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(each, each.handlers, each.propagate) for each in loggers]
    with ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(_quiet_children())
        try:
            for each in loggers:
                each.handlers, each.propagate = [passing], False
            tqdm.__init__ = lambda bar, *args, **kwargs: drawn(bar, *args, **(kwargs | {"disable": True}))
            yield
        finally:
            tqdm.__init__ = drawn
            for each, handlers, propagate in before:
                each.handlers, each.propagate = handlers, propagate
            if printed.getvalue().strip():
                log.info("lm-eval: %s", printed.getvalue().strip())


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Ignore the SIGTERM by which lm-eval ends the processes that it forks to bootstrap: it does not stop this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here = os.getpid()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if os.getpid() != here:
            os._exit(0)
        if callable(handler):
            handler(number, frame)

    try:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def seeded(device: torch.device | None = None) -> Iterator[None]:
    """Seed as lm-eval does; random numbers drawn afterwards are those that would have been drawn anyway."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def failures() -> tuple[type[Exception], ...]:
    """Exceptions that tasks raise, with those of libraries below lm-eval that do not descend from Python's."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    return *_FAILURES, DatasetsError, TemplateError, YAMLError


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for a sentence."""
    return excerpt((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
