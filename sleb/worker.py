"""Executes a job: refuses what it can at once, loads the model, does what the job says, and records how it went.

`EXECUTORS` says what executes each kind of job.
"""

from __future__ import annotations

import io
import logging
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar, cast

import torch

from sleb.errors import printable
from sleb.evaluation import continuations, evaluation_job, perplexity_and_accuracy, quantization, timing
from sleb.evaluation.evaluated_model import Subject
from sleb.evaluation.healing import healing_job
from sleb.evaluation.lm_eval_tasks import Tasks
from sleb.export import export_job
from sleb.model.loading import LoadedModel
from sleb.model.model_of_run import load_run_model
from sleb.model.streaming import streamed_blocks
from sleb.records import (
    AnalyzeJob,
    Ask,
    Attempt,
    EvaluateJob,
    ExportJob,
    JobKind,
    JobSettings,
    JobSpec,
    Permissions,
    QuestionJob,
    Run,
    SearchJob,
)
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import distributed, job_processes
from sleb.runtime.processes.progress import Meter, Watcher
from sleb.search_job import Session
from sleb.text import calibration

log = logging.getLogger(__name__)

J = TypeVar("J", bound=JobSettings)
P = TypeVar("P")
Q = TypeVar("Q", bound=QuestionJob)
A = TypeVar("A", bound=Ask)


def execute(job_dir: Path, reporter: job_processes.Reporter, watcher: Watcher, permissions: Permissions) -> None:
    """Execute a job within its permissions; the caller holds the run (`job_processes.executing`)."""
    job = _granted(job_dir, permissions)
    executor = EXECUTORS[job.kind]
    with _logging_to(job_dir):
        run = run_folder.load(job_dir.parent.parent)
        meter = Meter(reporter.progress, watcher.progress)
        attempt = _AttemptFile.begun(job_dir, job, watcher)
        log.info("Job %s of run %s: %s", job_dir.name, run.run_id, run.spec.model)
        try:
            prepared = executor.prepare(run, job)  # what can be refused is refused before minutes of loading
            meter.phase("Loading the model")
            executor.work(_Execution(run, job, job_dir, permissions, meter, watcher, attempt), prepared)
            log.info("Done.")
        finally:
            attempt.learn(peak_memory=_peak_memory())


@dataclass(frozen=True)
class _Execution(Generic[J]):
    """A job of one kind that is being executed."""

    run: Run
    job: J
    job_dir: Path
    permissions: Permissions
    meter: Meter
    watcher: Watcher
    attempt: _AttemptFile

    def loaded(self, gguf: Path | None = None) -> LoadedModel:
        """The model of the run, or the GGUF file that is cut, loaded in this process."""
        loaded = load_run_model(self.run, self.job, self.job.device, gguf)
        self.attempt.loaded(loaded)
        return loaded

    def subject(self: _Execution[Q]) -> Subject:
        """The opened model of the run, about which a question is answered."""
        return evaluation_job.subject_of(self.run, self.job, self.job_dir, self.loaded(), self.meter, self.watcher)


class _Executor(Protocol[J, P]):
    """Executes jobs of one kind."""

    def prepare(self, run: Run, job: J, /) -> P:
        """Refuse what can be refused before the model is loaded, and return what `work` needs of it."""

    def work(self, execution: _Execution[J], prepared: P, /) -> None:
        """Load the model and do what the job says."""


class _Search:
    """Searches or analyzes a run, in one process or several."""

    def prepare(self, run: Run, job: SearchJob | AnalyzeJob) -> None:
        calibration.require_there(run.spec.calibration)

    def work(self, execution: _Execution[SearchJob | AnalyzeJob], prepared: None) -> None:
        job = execution.job
        with distributed.joined(execution.job_dir, job.processes, job.device, execution.permissions) as group:
            session = _session(execution.run, job, group, execution.meter, execution.watcher)
            execution.attempt.loaded(session.loaded, processes=group.size)
            session.go()
        execution.attempt.learn(batch_size=session.batch_size)


class _Export:
    """Writes the smaller model of a run."""

    def prepare(self, run: Run, job: ExportJob) -> export_job.Plan:
        return export_job.plan_of(run, job)

    def work(self, execution: _Execution[ExportJob], prepared: export_job.Plan) -> None:
        loaded = execution.loaded(prepared.gguf)
        export_job.export(execution.run, execution.job, execution.job_dir, prepared, loaded, execution.meter)


@dataclass(frozen=True)
class _Answer(Generic[Q, A]):
    """Answers one kind of question about removal lists, by the functions of the module for it."""

    require: Callable[[Q], None]
    answer: Callable[[Subject, A], None]

    def prepare(self, run: Run, job: Q) -> None:
        self.require(job)

    def work(self, execution: _Execution[Q], prepared: None) -> None:
        self.answer(execution.subject(), cast(A, execution.job.ask))


class _Evaluate:
    """Measures perplexity and accuracy."""

    def prepare(self, run: Run, job: EvaluateJob) -> Tasks | None:
        return perplexity_and_accuracy.prepare(job)

    def work(self, execution: _Execution[EvaluateJob], prepared: Tasks | None) -> None:
        perplexity_and_accuracy.work(execution.subject(), execution.job.ask, prepared)


EXECUTORS: Mapping[JobKind, _Executor[Any, Any]] = {
    "search": _Search(),
    "analyze": _Search(),
    "export": _Export(),
    "evaluate": _Evaluate(),
    "benchmark": _Answer(timing.require, timing.work),
    "quantize": _Answer(quantization.require, quantization.work),
    "heal": _Answer(healing_job.require, healing_job.work),
    "generate": _Answer(continuations.require, continuations.work),
}
"""What executes each kind of job: the only place that lists them."""


def _granted(job_dir: Path, permissions: Permissions) -> JobSpec:
    """The job with what it is permitted. Raises `NotPermitted` or `UnconfirmedNames` where it needs more."""
    job = job_folder.load_job(job_dir)
    job_processes.require_allowed(job, permissions)
    return permissions.granted(job.require_spec())


def assist(job_dir: Path, permissions: Permissions) -> None:
    """Compute a share of what the first process of a job executes; writes nothing."""
    job = _granted(job_dir, permissions)
    run = run_folder.load(job_dir.parent.parent)
    logging.getLogger("sleb").setLevel(logging.ERROR)  # the first one says it
    with (
        job_processes.stopping_on_sigterm(),
        distributed.joined(job_dir, job.processes, job.device, permissions) as group,
    ):
        _session(run, job, group, Meter(), Watcher()).go()


def _session(run: Run, job: JobSettings, group: distributed.Group, meter: Meter, watcher: Watcher) -> Session:
    """Open the session of a rank: with run and type of the first one, on a device of its own."""
    run = group.share(lambda: run)
    device = distributed.device_of(group, job.device)
    loaded = load_run_model(run, job, device) if group.first else None
    dtype = group.share(lambda: loaded.dtype if loaded else "")
    if loaded is None:
        loaded = load_run_model(
            run.model_copy(update={"spec": run.spec.model_copy(update={"dtype": dtype})}), job, device
        )
    return Session.opened(run, job, loaded, meter, watcher, group)


@dataclass
class _AttemptFile:
    """`attempt.json`, written at once and again whenever more is known."""

    job_dir: Path
    watcher: Watcher
    attempt: Attempt

    @classmethod
    def begun(cls, job_dir: Path, job: JobSettings, watcher: Watcher) -> _AttemptFile:
        """Write what is known of an attempt as it begins."""
        attempt = Attempt(
            device=job.device,
            batch_size=job.batch_size,
            processes=job.processes,
            memory_budget=job.memory_budget,
            threads=torch.get_num_threads(),
            host=socket.gethostname(),
            versions=versions(),
        )
        file = cls(job_dir, watcher, attempt)
        file.learn()
        return file

    def loaded(self, loaded: LoadedModel, **changes: Any) -> None:
        """Note that the model is loaded, in the file, the log and on the screen."""
        streamed = streamed_blocks(loaded.model) is not None
        self.learn(device=loaded.device, threads=torch.get_num_threads(), streamed=streamed, **changes)
        log.info("Loaded in %s, %s", loaded.dtype, self.attempt.described)
        self.watcher.attempt(self.attempt)

    def learn(self, **changes: Any) -> None:
        """Note what became known about this attempt."""
        self.attempt = self.attempt.model_copy(update=changes)
        job_folder.write_attempt(self.job_dir, self.attempt)


def _peak_memory() -> int:
    """Peak memory in bytes, of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Versions on which the numbers depend besides model and text."""
    installed = {"python": platform.python_version()}
    for package in ("sleb", "torch", "transformers", "numpy", "datasets"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


class _Log(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: a log that cannot be written must not end the work."""


class _Printable(logging.Formatter):
    """Writes lines that do not steer the screen on which they are shown, whatever names from files are in them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _logging_to(job_dir: Path) -> Iterator[None]:
    raw = job_folder.open_log(job_dir)
    file = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
    handler = _Log(file)
    handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("sleb")
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        with suppress(OSError):  # a full disk
            file.close()
