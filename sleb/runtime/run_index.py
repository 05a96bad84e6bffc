"""Runs at a glance: what a list of hundreds shows, without reading their traces whole. Knows files only."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sleb.errors import RunError
from sleb.records import Baseline, Job, JobState, RunSpec, Step
from sleb.runtime import findings_folder, job_folder, job_processes, record_files, run_folder, trace_file
from sleb.runtime.files import parse_json, read_bytes, read_json


@dataclass(frozen=True)
class Outline:
    """One run in a list. Times are seconds since the epoch."""

    run_id: str
    run_dir: Path
    created: float
    state: JobState
    spec: RunSpec
    num_blocks: int | None
    baseline: Baseline | None
    last: Step | None
    """The newest finished step."""
    finished: bool
    seconds: float | None
    """Spent on the search itself so far."""
    job: Job | None
    """The newest search or analysis."""

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal so far, or those that were given."""
        return self.last.removal_list if self.last else self.spec.given or ()


def list_outlines(folder: Path | None = None) -> list[Outline | RunError]:
    """All runs of a folder (by default the runs folder), newest first; an unreadable one is its error."""
    found: list[Outline | RunError] = []
    for directory in run_folder.run_dirs(folder):
        try:
            found.append(outline(directory))
        except RunError as error:
            found.append(error)
    return found


def outline(directory: Path) -> Outline:
    """One run folder. Raises `RunError` where it is damaged or of another version."""
    spec = record_files.read_spec(directory)
    own = [job for job in job_folder.read_jobs(directory) if job.spec.is_own(spec)]
    job = job_processes.derived(own[-1]) if own else None
    baseline, last, finished, seconds = _ends(directory / "trace.jsonl")
    num_blocks = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        num_blocks = int(read_json(directory / "stack.json")["num_blocks"])
    return Outline(
        run_id=directory.name,
        run_dir=directory,
        created=(directory / "spec.json").stat().st_mtime,
        state=job.status.state if job else JobState.QUEUED,
        spec=spec,
        num_blocks=num_blocks,
        baseline=baseline,
        last=last,
        finished=finished,
        seconds=seconds,
        job=job,
    )


def watched(found: Outline) -> Outline:
    """The same, as it is now: a process may have gone without a word."""
    if found.job is None:
        return found
    job = job_processes.derived(found.job)
    return replace(found, job=job, state=job.status.state)


def _ends(path: Path) -> tuple[Baseline | None, Step | None, bool, float | None]:
    """First and last entry of a trace, whether it is finished, and its seconds; nothing where it is damaged."""
    try:
        data = read_bytes(path, trace_file.MOST_TRACE_BYTES) if path.is_file() else b""
    except (OSError, ValueError):
        return None, None, False, None
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        entries: list[dict[str, Any]] = [parse_json(line) for line in (*lines[:1], *lines[-2:])]
        baseline = Baseline.model_validate(entries[0]["baseline"])
        steps = [entry["step"] for entry in entries if "step" in entry]
        last = Step.model_validate(steps[-1]) if steps else None
    except (ValueError, ValidationError, KeyError, IndexError, TypeError):
        return None, None, False, None
    seconds = baseline.seconds + sum(_seconds(line) for line in lines[1:])
    return baseline, last, "finished" in entries[-1], seconds


def _seconds(line: bytes) -> float:
    """Of one step, the last of its fields, without reading the rest."""
    with suppress(ValueError):
        return float(line.rpartition(b'"seconds":')[2].rstrip(b"}\n "))
    return 0.0


Signature = tuple[tuple[str, int, int], ...]
"""Name, time and size of files."""


def signature(directory: Path) -> Signature:
    """Changes whenever a file that `run_folder.load` reads does, or a finding comes."""
    found: list[tuple[str, int, int]] = []
    for folder in (directory, directory / "analysis"):
        found += _files(folder)
    found += findings_signature(directory)
    with suppress(OSError):
        for job in sorted(os.scandir(directory / "jobs"), key=lambda each: each.name):
            found += [(f"{job.name}/{name}", changed, size) for name, changed, size in _files(Path(job.path))]
    return tuple(found)


def findings_signature(directory: Path) -> Signature:
    """Changes whenever something was found about a list of the run."""
    return tuple(each for each in _files(directory / findings_folder.FOLDER) if each[0].endswith(".json"))


def _files(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    with suppress(OSError):
        for each in os.scandir(folder):
            if each.name.endswith((".json", ".jsonl", ".txt", ".npz")) and each.is_file() and each.name != "log.txt":
                status = each.stat()
                found.append((each.name, status.st_mtime_ns, status.st_size))
    return sorted(found)
