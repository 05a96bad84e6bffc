"""Executing jobs in this process, once their device is free. Imports torch only to work."""

from __future__ import annotations

import os
import time
from functools import partial
from os import PathLike
from pathlib import Path

from sleb.errors import RunBusy
from sleb.model.inspection import presence
from sleb.records import Forecast, JobSpec, JobState, Permissions, Run, RunSpec
from sleb.runtime import job_folder, origin, run_folder
from sleb.runtime.processes import distributed, job_processes
from sleb.runtime.processes.progress import WaitingWatcher, Watcher
from sleb.specs import JobOptions, job_spec, text


def as_before(run: Run, processes: int | None, memory_budget: int | None) -> tuple[int, int | None]:
    """The given values; in place of None those of the last attempt on this machine, which were needed to fit."""
    ours = (job for job in reversed(run.jobs) if origin.is_written_here(run.run_dir, "jobs", job.name))
    last = next((job.spec for job in ours if job.spec.kind == run.spec.kind), None)
    if last is None:
        return processes or 1, memory_budget
    return processes or last.processes, last.memory_budget if memory_budget is None else memory_budget


def resuming_job(run: Run, options: JobOptions, allow_pickle: bool, trust_remote_code: bool) -> JobSpec:
    """A job that resumes a run: the given options, and for the rest those of the last attempt on this machine."""
    processes, memory_budget = as_before(run, options.get("processes"), options.get("memory_budget"))
    given = options | {"processes": processes, "memory_budget": memory_budget}
    return job_spec(run.spec.kind, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, **given)


def start(
    spec: RunSpec, job: JobSpec, run_dir: str | PathLike[str] | None = None, watcher: Watcher | None = None
) -> Run:
    """Create a run and execute its first job here, with the permissions that the caller's job asks for."""
    run = run_folder.create(spec, None if run_dir is None else Path(text("`run_dir`", run_dir)))
    return execute(run, job, watcher, Permissions.of(job, trust_paths=True))


def forecast(spec: RunSpec, job: JobSpec | None = None) -> Forecast:
    """Forecast what a run will take: load the model and time a few blocks. Writes nothing."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sleb.forecast import timing_probe

    return timing_probe(spec, job or job_spec(spec.kind))


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do."""
    if run.spec.kind == "evaluate":
        return True
    if run.spec.kind == "search" and (run.trace is None or run.trace.finished is None):
        return False
    analysed = run.analysis is not None or run.analysis_unavailable is not None
    return analysed or (run.spec.kind == "search" and not run.spec.analysis)


def execute(run: Run, spec: JobSpec, watcher: Watcher | None = None, permissions: Permissions | None = None) -> Run:
    """Execute a new job of a run in this process. Without `permissions` it has none.

    Raises `RunBusy` while another process executes the run, `NotPermitted` or `UnconfirmedNames` where the job or the
    run folder asks for more than it may.
    """
    permissions = permissions or Permissions()
    permissions.granted(spec)  # refused before there is a job
    if not permissions.trust_paths:
        origin.require_confirmed(run.run_dir)
    job = job_processes.next_job(run, spec)
    try:
        return job_processes.watched(work(job.directory, watcher, permissions))
    except RunBusy:
        job_folder.withdraw_job(job)
        raise


def work(job_dir: Path, watcher: Watcher | None = None, permissions: Permissions | None = None) -> Run:
    """Execute a job that is waiting, in this process, once the device is free. Imports torch.

    Raises a `SlebError` with one sentence, after writing it down. What the job may is `permissions`, and nothing
    without them: its own file only says what it asks for.
    """
    permissions = permissions or Permissions()
    job_processes.require_allowed(job_folder.load_job(job_dir), permissions)
    # Threads that spin while they wait cost nothing on idle cores and half the speed on busy ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    watcher = watcher or WaitingWatcher()
    rank = distributed.rank_here()
    if rank.rank > 0:
        _assist(job_dir, permissions)
        return run_folder.load(job_dir.parent.parent)
    local = rank.local_size if rank.size > 1 else None
    with job_processes.executing(job_dir, watcher.waiting, local, partial(_require_model, job_dir)) as reporter:
        from sleb.worker import execute as execute_job  # torch: not before it is this job's turn

        execute_job(job_dir, reporter, watcher, permissions)
    return run_folder.load(job_dir.parent.parent)


def _require_model(job_dir: Path) -> None:
    """Raises `ModelError`, before the job waits for its device, where its model does not exist."""
    presence.require_there(run_folder.load(job_dir.parent.parent), job_folder.load_job(job_dir).spec)


def _assist(job_dir: Path, permissions: Permissions) -> None:
    """Work as one of several processes, but not the first: begin when that one has the device."""
    distributed.die_with_the_first()
    while (job := job_folder.load_job(job_dir)).status.state is JobState.QUEUED:
        time.sleep(0.2)
    if job.status.state is JobState.RUNNING:
        from sleb.worker import assist

        assist(job_dir, permissions)
