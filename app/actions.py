"""What the dashboard does to runs: start, continue, stop, delete. The only module that does; draws nothing.

Every function asks `access` first, so that no page, link or message of a browser evades the server's rule.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from app import access, data
from sleb.errors import NotPermitted, SlebError, UnconfirmedNames, printable
from sleb.records import EvaluateSpec, ExportJob, JobSettings, JobSpec, Permissions, QuestionJob, Run, RunSpec
from sleb.runtime import job_folder, origin, run_folder
from sleb.runtime.processes import job_processes


def begin(spec: RunSpec, job: JobSpec) -> Run:
    """Create a run, executed by a process of its own."""
    access.require_start(spec, job)
    run = run_folder.create(spec)
    job_processes.start(job_folder.create_job(run.run_dir, job), data.permissions_for(job))
    return run


def unconfirmed(run: Run, job: JobSpec) -> tuple[str, ...]:
    """Models and texts that this job would read and a run folder from elsewhere names. Raises `RunError`."""
    if data.is_sample(run):  # it came with the program
        return ()
    return origin.unconfirmed(run.run_dir, *_strangers(run, job))


def _strangers(run: Run, job: JobSpec) -> list[str]:
    """Names of jobs that this machine did not write and that name something which this job names too."""
    own = _names(job)
    return [
        each.name
        for each in run.jobs
        if own & _names(each.spec) and not origin.is_written_here(run.run_dir, "jobs", each.name)
    ]


def _names(job: JobSettings) -> set[str]:
    if isinstance(job, ExportJob):
        return {job.gguf} if job.gguf is not None else set()
    if isinstance(job, QuestionJob):
        return {*job.ask.sources, *(job.ask.tasks if isinstance(job.ask, EvaluateSpec) else ())}
    return set()


def go_on(run: Run, job: JobSpec, *, again: bool = False, seen: Sequence[str] = ()) -> Run:
    """Start one more job of a run, in a process of its own; returns the run it belongs to.

    Samples are never changed: results belong to a copy in the store. `again` says that the job is one of the run
    folder's: then it may write nowhere and read no task files, no matter who wrote it there. `seen` are the names that
    a user has seen and confirmed; raises `UnconfirmedNames` for others.
    """
    access.require_start(run.spec, job, run)
    if data.is_sample(run):
        run = job_processes.bring_in(run.run_dir)
        origin.confirm(run.run_dir)
    elif names := unconfirmed(run, job):
        if set(names) - set(seen):
            raise UnconfirmedNames(str(run.run_dir), names)
        origin.confirm(run.run_dir, *_strangers(run, job))
    made = job_processes.next_job(run, job)
    try:
        of_server = Permissions.model_validate(data.permissions())
        job_processes.start(made, of_server if again else data.permissions_for(job))
    except NotPermitted as error:
        job_folder.withdraw_job(made)
        options = shlex.join(job_processes.permission_options(error.lacking))
        command = printable(f"sleb resume {run_folder.reference(run)} {options}")
        raise access.NotAllowed(
            f"No page can allow what this job needs; continue it from a terminal: {command}"
        ) from error
    except SlebError:
        job_folder.withdraw_job(made)
        raise
    return run


def stop(run: Run) -> None:
    """End the process that executes the run."""
    access.require_changes()
    access.require_run(run.run_dir)
    job_processes.stop(run)


def delete(run: Run) -> None:
    """Remove the run folder for good; of a link only the link."""
    access.require_changes()
    access.require_run(run.run_dir)
    job_processes.delete(run.run_dir)
