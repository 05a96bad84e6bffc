"""Perplexity and accuracy of removal lists: what `sleb evaluate` does, once the model is open."""

from __future__ import annotations

from sleb.evaluation import perplexity, task_accuracy
from sleb.evaluation.evaluated_model import Subject
from sleb.records import EvaluateJob, EvaluateSpec


def require(job: EvaluateJob) -> None:
    """Refuse what can be refused before minutes of loading. Raises `CalibrationError`, `OptionError`."""
    perplexity.require_there(job.ask.texts)
    if job.ask.tasks:
        task_accuracy.require(job.ask, job.trust_remote_code)


def work(subject: Subject, ask: EvaluateSpec) -> None:
    """Evaluate all texts, then all tasks; known answers are not computed again."""
    for name in ask.texts:
        subject.perplexities(subject.windows(name, window=ask.window, bos=ask.bos, limit=ask.limit), ask.lists)
    if ask.tasks:
        task_accuracy.work(subject, ask)
