"""Continuations by the baseline and by removal lists, and where their predictions part."""

from __future__ import annotations

from .errors import OptionError
from .findings import GenerateSpec
from .subject import Subject


def require(ask: GenerateSpec) -> None:
    """What can be refused before minutes of loading. Raises `OptionError`."""
    raise OptionError("Not there yet.")


def work(subject: Subject, ask: GenerateSpec) -> None:
    """What the ask says, for the baseline and its lists; each finding is kept as soon as it is there."""
    raise OptionError("Not there yet.")
