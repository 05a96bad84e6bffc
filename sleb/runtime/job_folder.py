"""The job folders of a run: what a job is asked, its status, its attempt and its result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

from sleb.errors import RunError
from sleb.records import Attempt, Job, JobSpec, JobState, JobStatus
from sleb.runtime.files import replace_file, writing
from sleb.runtime.record_files import read_record


def create_job(directory: Path, spec: JobSpec) -> Job:
    """The next numbered job folder of a run."""
    jobs = directory / "jobs"
    with writing(jobs):
        jobs.mkdir(exist_ok=True)
        number = max((int(each.name.split("-")[0]) for each in _job_dirs(directory)), default=0)
        while True:
            number += 1
            try:
                target = jobs / f"{number}-{spec.kind}"
                target.mkdir()
                break
            except FileExistsError:
                continue
    try:
        replace_file(target / "spec.json", spec.model_dump_json(indent=1))
        replace_file(target / "status.json", JobStatus().model_dump_json(indent=1))
        return load_job(target)
    except BaseException:  # a full disk, for one: half a job is none
        shutil.rmtree(target, ignore_errors=True)
        raise


def read_jobs(directory: Path) -> tuple[Job, ...]:
    """The run's jobs, oldest first, as they were written."""
    found = []
    for job_dir in _job_dirs(directory):
        if not (job_dir / "spec.json").exists():  # a job being created is none yet
            continue
        try:
            found.append(load_job(job_dir))
        except RunError as error:  # an old job's file must not make the run unusable
            kind: Any = job_dir.name.partition("-")[2]
            kind = kind if kind in get_args(JobSpec.model_fields["kind"].annotation) else "search"
            status = JobStatus(state=JobState.FAILED, message=str(error))
            found.append(Job(name=job_dir.name, directory=job_dir, spec=JobSpec(kind=kind), status=status))
    return tuple(found)


def load_job(directory: Path) -> Job:
    """One job folder, read as it was written; `job_processes.watched` derives what a dead process could not write."""
    attempt = directory / "attempt.json"
    status = directory / "status.json"
    return Job(
        name=directory.name,
        directory=directory,
        spec=read_record(directory / "spec.json", JobSpec),
        status=read_record(status, JobStatus) if status.exists() else JobStatus(),
        attempt=read_record(attempt, Attempt) if attempt.exists() else None,
    )


def write_status(job_dir: Path, status: JobStatus) -> None:
    """Only the holder of the run's lock calls this."""
    replace_file(job_dir / "status.json", status.model_dump_json(indent=1), make_folder=False)


def write_attempt(job_dir: Path, attempt: Attempt) -> None:
    """How this try is made."""
    replace_file(job_dir / "attempt.json", attempt.model_dump_json(indent=1), make_folder=False)


def write_result(job_dir: Path, result: dict[str, Any]) -> None:
    """What a job that is no search found."""
    replace_file(job_dir / "result.json", json.dumps(result, indent=1))


def withdraw_job(job: Job) -> None:
    """Take back a job that never began."""
    shutil.rmtree(job.directory, ignore_errors=True)


def _job_dirs(directory: Path) -> list[Path]:
    jobs = directory / "jobs"
    if not jobs.is_dir():
        return []
    found = [each for each in jobs.iterdir() if re.fullmatch(r"[0-9]{1,9}-[a-z]+", each.name)]
    return sorted(found, key=lambda each: int(each.name.split("-")[0]))
