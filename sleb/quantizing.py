"""Perplexity of removal lists with quantised weights (torchao)."""

from __future__ import annotations

from .errors import OptionError
from .findings import QuantizeSpec
from .subject import Subject


def require(ask: QuantizeSpec) -> None:
    """What can be refused before minutes of loading. Raises `OptionError`."""
    raise OptionError("Not there yet.")


def work(subject: Subject, ask: QuantizeSpec) -> None:
    """What the ask says, for the baseline and its lists; each finding is kept as soon as it is there."""
    raise OptionError("Not there yet.")
