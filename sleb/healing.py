"""Healing a streamlined model: low-rank adapters (peft), or a remedy at its cuts without training."""

from __future__ import annotations

from .errors import OptionError
from .findings import HealSpec
from .subject import Subject


def require(ask: HealSpec) -> None:
    """What can be refused before minutes of loading. Raises `OptionError`."""
    raise OptionError("Not there yet.")


def work(subject: Subject, ask: HealSpec) -> None:
    """What the ask says, for the baseline and its lists; each finding is kept as soon as it is there."""
    raise OptionError("Not there yet.")
