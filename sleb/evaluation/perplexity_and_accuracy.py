"""Perplexity and accuracy of removal lists: what `sleb evaluate` does, once the model is open."""

from __future__ import annotations

from sleb.evaluation import lm_eval_tasks, perplexity, task_accuracy
from sleb.evaluation.evaluated_model import Subject
from sleb.records import EvaluateJob, EvaluateSpec


def prepare(job: EvaluateJob) -> lm_eval_tasks.Tasks | None:
    """Refuse what can be refused before minutes of loading the model, and load the tasks; None where none are asked.

    Raises `CalibrationError`, `OptionError`.
    """
    perplexity.require_there(job.ask.texts)
    return lm_eval_tasks.load(job.ask, job.trust_remote_code) if job.ask.tasks else None


def work(subject: Subject, ask: EvaluateSpec, tasks: lm_eval_tasks.Tasks | None) -> None:
    """Evaluate all texts, then all tasks; known answers are not computed again."""
    for name in ask.texts:
        subject.perplexities(subject.windows(name, window=ask.window, bos=ask.bos, limit=ask.limit), ask.lists)
    if tasks is not None:
        task_accuracy.work(subject, ask, tasks)
