"""Seconds of removal lists and of the baseline, in turn on the same input."""

from __future__ import annotations

from .errors import OptionError
from .findings import BenchmarkSpec
from .subject import Subject


def require(ask: BenchmarkSpec) -> None:
    """What can be refused before minutes of loading. Raises `OptionError`."""
    raise OptionError("Not there yet.")


def work(subject: Subject, ask: BenchmarkSpec) -> None:
    """What the ask says, for the baseline and its lists; each finding is kept as soon as it is there."""
    raise OptionError("Not there yet.")
