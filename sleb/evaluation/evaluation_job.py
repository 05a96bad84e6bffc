"""The model on which a job answers its question: checks that it is the run's, and that the removal lists fit it."""

from __future__ import annotations

import logging
from pathlib import Path

from sleb.errors import CalibrationError, RunError
from sleb.evaluation.evaluated_model import Subject
from sleb.model.block_stack import BlockStack
from sleb.model.loading import LoadedModel
from sleb.model.model_of_run import require_same_model
from sleb.records import QuestionJob, Run
from sleb.runtime import origin
from sleb.runtime.processes.progress import Meter, Watcher
from sleb.scoring import recorded_baseline
from sleb.scoring.scorer import Scorer
from sleb.scoring.stack_description import describe
from sleb.text import calibration

log = logging.getLogger(__name__)


def subject_of(
    run: Run, job: QuestionJob, job_dir: Path, loaded: LoadedModel, meter: Meter, watcher: Watcher
) -> Subject:
    """The model as it was searched, or, in a run that searches nothing, as it is now. Raises `RunError`."""
    stack = BlockStack(loaded.model)
    if run.stack is None:
        if run.spec.kind != "evaluate":
            raise RunError(f"Run {run.run_id} has not opened its model yet. Go on with it first: sleb resume.")
        meter.phase("Checking the sweep against plain forward passes")
        described = describe(stack, loaded)
        origin.write_stack(run.run_dir, described)
        run = run.model_copy(update={"stack": described})
        watcher.described(described)
    else:
        require_same_model(run, job, loaded)
    subject = Subject(run, job, job_dir, loaded, stack, meter)
    if run.trace is not None and run.stack is not None and run.stack.identity is None:
        _adopt(subject)
    subject.require_within(job.ask.lists)
    return subject


def _adopt(subject: Subject) -> None:
    """Find out whether a search by an earlier version, which compared weights alone, was of this model.

    Where its calibration text cannot be had, its findings are computed again when they are asked for.
    Raises `RunError` where it was of another.
    """
    run, spec = subject.run, subject.run.spec
    assert run.stack is not None
    subject.meter.phase("Comparing with the scores of the baseline")
    vocabulary = subject.stack.config.vocab_size
    try:
        text = calibration.build(
            spec.calibration, spec.held_out, spec.seed, subject.tokenizer, vocabulary, drawing=run.stack.drawing
        )
    except CalibrationError as error:
        log.warning("Whether this is the model that run %s searched is unknown: %s", run.run_id, error)
        return
    if text.tokens_hash != run.stack.tokens_hash:
        log.warning("Whether this is the model that run %s searched is unknown: its text has changed.", run.run_id)
        return
    scorer = Scorer(subject.stack, text.ids, batch_size=subject.job.batch_size, plain=subject.is_plain)
    recorded_baseline.require_same(run, scorer, recorded_baseline.recorded(run), text.sequences)
    subject.adopt()
