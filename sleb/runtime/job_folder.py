"""The job folders of a run: a job's spec, its status, its attempt and its result."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, get_args

from sleb.errors import RunError
from sleb.records import Attempt, Job, JobKind, JobSpec, JobState, JobStatus, UnreadableJob
from sleb.runtime import origin
from sleb.runtime.files import inside, open_regular, open_to_append, read_json_inside, replace_file, writing
from sleb.runtime.record_files import read_job_spec, read_record
from sleb.runtime.unfinished import names

LOG, RESULT = "log.txt", "result.json"
MOST_JOBS = 999_999_999
"""The largest number of a job; folders with larger ones are not listed."""


def create_job(directory: Path, spec: JobSpec) -> Job:
    """Make the next numbered job folder of a run."""
    jobs = inside(directory, "jobs")
    with writing(jobs):
        jobs.mkdir(exist_ok=True)
    partial = names.temporary(jobs / spec.kind)
    try:
        with writing(partial):
            partial.mkdir()
        origin.write_signed(partial, "spec.json", spec.model_dump_json(indent=1))
        replace_file(partial / "status.json", JobStatus().model_dump_json(indent=1))
        return load_job(_numbered(directory, partial, spec.kind))
    except BaseException:  # such as a full disk: no incomplete job stays
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _numbered(directory: Path, partial: Path, kind: str) -> Path:
    """Give a written job the next free number; it appears whole."""
    number = max((number_of(each.name) for each in job_dirs(directory)), default=0)
    while True:
        number += 1
        if number > MOST_JOBS:
            raise RunError(f"{directory}/jobs has a job of number {number - 1}, which no program wrote; delete it.")
        target = partial.with_name(f"{number}-{kind}")
        with writing(target):
            try:
                os.rename(partial, target)
                return target
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise


def read_jobs(directory: Path) -> tuple[Job, ...]:
    """Read the run's jobs, oldest first, as they were written."""
    jobs = []
    for job_dir in job_dirs(directory):
        if not (job_dir / "spec.json").exists():  # a job that is still being created
            continue
        try:
            jobs.append(load_job(job_dir))
        except RunError as error:  # an old job's file must not make the run unusable
            named: Any = job_dir.name.partition("-")[2]
            spec = UnreadableJob(kind=named if named in get_args(JobKind) else "search")
            status = JobStatus(state=JobState.FAILED, message=str(error))
            jobs.append(Job(name=job_dir.name, directory=job_dir, spec=spec, status=status))
    return tuple(jobs)


def load_job(directory: Path) -> Job:
    """Read one job folder as it was written; `job_processes.watched` derives what a dead process could not write."""
    run_dir, parts = run_and_parts(directory)
    has_status, has_attempt = ((directory / name).exists() for name in ("status.json", "attempt.json"))
    return Job(
        name=directory.name,
        directory=directory,
        spec=read_job_spec(run_dir, *parts, "spec.json"),
        status=read_record(JobStatus, run_dir, *parts, "status.json") if has_status else JobStatus(),
        attempt=read_record(Attempt, run_dir, *parts, "attempt.json") if has_attempt else None,
    )


def run_and_parts(job_dir: Path) -> tuple[Path, tuple[str, str]]:
    """The run folder of a job folder, and the names that lead from there to it."""
    return job_dir.parent.parent, (job_dir.parent.name, job_dir.name)


def _file(job_dir: Path, name: str) -> Path:
    """A file of a job folder, no part of whose path below the run folder is a link."""
    run_dir, parts = run_and_parts(job_dir)
    return inside(run_dir, *parts, name)


def open_log(job_dir: Path) -> IO[bytes]:
    """Open the job's log, to be appended to. Raises `RunError` for a link, `StorageError`."""
    run_dir, parts = run_and_parts(job_dir)
    return open_to_append(run_dir, *parts, LOG)


def log_end(job_dir: Path, most_bytes: int = 200_000) -> str:
    """The end of the job's log; empty where there is none that can be read."""
    try:
        with os.fdopen(open_regular(_file(job_dir, LOG), os.O_RDONLY), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
            return file.read(most_bytes).decode("utf-8", "replace")
    except (OSError, ValueError, RunError):
        return ""


def read_result(job_dir: Path) -> Any:
    """Read what `write_result` wrote. Raises `ValueError`, `OSError` or `RunError`."""
    run_dir, parts = run_and_parts(job_dir)
    return read_json_inside(run_dir, *parts, RESULT)


def write_status(job_dir: Path, status: JobStatus) -> None:
    """Write the state of a job; only the holder of the run's lock calls this."""
    replace_file(_file(job_dir, "status.json"), status.model_dump_json(indent=1), make_folder=False)


def write_attempt(job_dir: Path, attempt: Attempt) -> None:
    """Write how this try of the job is executed."""
    replace_file(_file(job_dir, "attempt.json"), attempt.model_dump_json(indent=1), make_folder=False)


def write_result(job_dir: Path, result: dict[str, Any]) -> None:
    """Write the result of a job that is not a search."""
    replace_file(_file(job_dir, RESULT), json.dumps(result, indent=1))


def withdraw_job(job: Job) -> None:
    """Remove a job that never began."""
    shutil.rmtree(job.directory, ignore_errors=True)


def job_dirs(directory: Path) -> list[Path]:
    """The run's job folders, oldest first; one that is being created has no spec yet."""
    jobs = inside(directory, "jobs")
    if not jobs.is_dir():
        return []
    folders = [each for each in jobs.iterdir() if re.fullmatch(r"[0-9]{1,9}-[a-z]+", each.name)]
    return sorted(folders, key=lambda each: number_of(each.name))


def number_of(job_name: str) -> int:
    """The number by which a run's jobs are ordered."""
    return int(job_name.split("-")[0])
