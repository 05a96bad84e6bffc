"""Executes a job: takes the run's lock, loads the model, does what the job says, writes how it went."""

from __future__ import annotations

import io
import logging
import platform
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from sleb.errors import printable
from sleb.evaluation import evaluation_job
from sleb.export import export_job
from sleb.model.loading import LoadedModel
from sleb.model.model_of_run import load_run_model
from sleb.model.streaming import streamed_blocks
from sleb.records import Attempt, Job, JobSpec, Permissions, Run
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import distributed, job_processes
from sleb.runtime.processes.progress import Meter, Watcher
from sleb.search_job import Session
from sleb.text import calibration

log = logging.getLogger(__name__)


def execute(job_dir: Path, reporter: job_processes.Reporter, watcher: Watcher, permissions: Permissions) -> None:
    """Do what the job asks within its permissions; the caller holds the run (`job_processes.executing`)."""
    job = _granted(job_dir, permissions)
    with _logging_to(job_dir):
        run = run_folder.load(job_dir.parent.parent)
        meter = Meter(reporter.progress, watcher.progress)
        attempt = _AttemptFile(job_dir, job.spec)
        log.info("Job %s of run %s: %s", job.name, run.run_id, run.spec.model)
        try:
            evaluator = evaluation_job.evaluator_of(job.spec)
            if evaluator is not None:
                evaluation_job.require(job.spec)  # refused before minutes of loading, as below
                loaded = _opened(run, job, meter, attempt, watcher)
                evaluator.work(evaluation_job.subject_of(run, job, loaded, meter, watcher), job.spec.ask)
            elif job.spec.kind == "export":
                plan = export_job.plan_of(run, job.spec)
                loaded = _opened(run, job, meter, attempt, watcher, plan.gguf)
                export_job.export(run, job, plan, loaded, meter)
            else:
                calibration.require_there(run.spec.calibration)
                meter.phase("Loading the model")
                with distributed.joined(job_dir, job.spec.processes, job.spec.device, permissions) as group:
                    session = _session(run, job.spec, group, meter, watcher)
                    attempt.loaded(session.loaded, watcher, processes=group.size)
                    session.go()
                attempt.learn(batch_size=session.batch_size)
            log.info("Done.")
        finally:
            attempt.learn(peak_memory=_peak_memory())


def _opened(
    run: Run, job: Job, meter: Meter, attempt: _AttemptFile, watcher: Watcher, gguf: Path | None = None
) -> LoadedModel:
    meter.phase("Loading the model")
    loaded = load_run_model(run, job.spec, job.spec.device, gguf)
    attempt.loaded(loaded, watcher)
    return loaded


def _granted(job_dir: Path, permissions: Permissions) -> Job:
    """The job with what it may. Raises `NotPermitted` or `UnconfirmedNames` where it asks for more."""
    job = job_folder.load_job(job_dir)
    job_processes.require_allowed(job, permissions)
    return job.model_copy(update={"spec": permissions.granted(job.spec)})


def assist(job_dir: Path, permissions: Permissions) -> None:
    """Compute a share of what the first process of a job executes; writes nothing."""
    job = _granted(job_dir, permissions).spec
    run = run_folder.load(job_dir.parent.parent)
    logging.getLogger("sleb").setLevel(logging.ERROR)  # the first one says it
    with (
        job_processes.stopping_on_sigterm(),
        distributed.joined(job_dir, job.processes, job.device, permissions) as group,
    ):
        _session(run, job, group, Meter(), Watcher()).go()


def _session(run: Run, job: JobSpec, group: distributed.Group, meter: Meter, watcher: Watcher) -> Session:
    """The same on every rank: run and type of the first one, a device of its own."""
    run = group.share(lambda: run)
    device = distributed.device_of(group, job.device)
    loaded = load_run_model(run, job, device) if group.first else None
    dtype = group.share(lambda: loaded.dtype if loaded else "")
    if loaded is None:
        loaded = load_run_model(
            run.model_copy(update={"spec": run.spec.model_copy(update={"dtype": dtype})}), job, device
        )
    return Session(run, job, loaded, meter, watcher, group)


class _AttemptFile:
    """`attempt.json`, written at once and again whenever more is known."""

    def __init__(self, job_dir: Path, job: JobSpec) -> None:
        self.job_dir = job_dir
        self.attempt = Attempt(
            device=job.device,
            batch_size=job.batch_size,
            processes=job.processes,
            memory_budget=job.memory_budget,
            threads=torch.get_num_threads(),
            host=socket.gethostname(),
            versions=versions(),
        )
        self.learn()

    def loaded(self, loaded: LoadedModel, watcher: Watcher, **changes: Any) -> None:
        """The model is there: said in the log and on the screen."""
        streamed = streamed_blocks(loaded.model) is not None
        self.learn(device=loaded.device, threads=torch.get_num_threads(), streamed=streamed, **changes)
        log.info("Loaded in %s, %s", loaded.dtype, self.attempt.described)
        watcher.attempt(self.attempt)

    def learn(self, **changes: Any) -> None:
        """Something about this try became known."""
        self.attempt = self.attempt.model_copy(update=changes)
        job_folder.write_attempt(self.job_dir, self.attempt)


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """What the numbers depend on besides model and text."""
    found = {"python": platform.python_version()}
    for package in ("sleb", "torch", "transformers", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Log(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written must not end the work it tells of."""


class _Printable(logging.Formatter):
    """Lines of a log that steer no screen on which they are shown, whatever names from files are in them."""

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
