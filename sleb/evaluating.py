"""Judges removal lists by perplexity and accuracy: what `sleb evaluate` does, once the model is open."""

from __future__ import annotations

from . import perplexity, zeroshot
from .findings import EvaluateSpec
from .subject import Subject


def require(ask: EvaluateSpec) -> None:
    """What can be refused before minutes of loading. Raises `CalibrationError`, `OptionError`."""
    perplexity.require_there(ask.texts)
    if ask.tasks:
        zeroshot.require(ask)


def work(subject: Subject, ask: EvaluateSpec) -> None:
    """All texts, then all tasks; whatever is known already is not computed again."""
    for name in ask.texts:
        subject.perplexities(subject.windows(name, window=ask.window, bos=ask.bos, limit=ask.limit), ask.lists)
    if ask.tasks:
        zeroshot.work(subject, ask)
