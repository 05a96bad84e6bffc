"""Accuracy of removal lists on lm-eval's tasks, by the unmodified package on the live model."""

from __future__ import annotations

from .errors import OptionError
from .findings import EvaluateSpec
from .subject import Subject


def require(ask: EvaluateSpec) -> None:
    """What can be refused before minutes of loading. Raises `OptionError`."""
    raise OptionError("Not there yet.")


def work(subject: Subject, ask: EvaluateSpec) -> None:
    """What the ask says, for the baseline and its lists; each finding is kept as soon as it is there."""
    raise OptionError("Not there yet.")
