"""One run at a glance: what a list of thousands shows of it, without reading its trace whole. Knows files only."""

from __future__ import annotations

import io
import os
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sleb.errors import RunError
from sleb.records import Baseline, JobState, JobStatus, Measured, RunSpec, Step
from sleb.records.base import Record
from sleb.runtime import findings_folder, job_folder, record_files, trace_file
from sleb.runtime.files import inside, parse_json, read_json_inside, read_regular
from sleb.runtime.processes import job_processes


class Standing(Record):
    """Perplexities at one point of a search, and the blocks removed there; the evidence stays in the trace."""

    removal_list: tuple[int, ...] = ()
    calibration: Measured
    held_out: Measured
    held_out_standard_error: float | None = None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the calibration set."""
        return self.calibration.perplexity


class Contents(Record):
    """What a list shows of a run, as its files say it: nothing about processes, nothing about where it lies."""

    spec: RunSpec
    num_blocks: int | None
    baseline: Standing | None
    last: Standing | None
    """Perplexities after the newest finished step."""
    finished: bool
    seconds: float | None
    """Seconds spent on the search itself so far."""
    status: JobStatus | None
    """Status of the newest search or analysis as it was written, without its message and progress."""

    @property
    def state(self) -> JobState:
        """The state of the run now: a process may have been killed without writing one."""
        return job_processes.derived_status(self.status).state if self.status else JobState.QUEUED


@dataclass(frozen=True)
class Outline:
    """One run in a list."""

    run_id: str
    run_dir: Path
    created: float
    """Time of creation in seconds since the epoch."""
    contents: Contents
    state: JobState

    @property
    def spec(self) -> RunSpec:
        """The spec of the run."""
        return self.contents.spec

    @property
    def num_blocks(self) -> int | None:
        """Number of blocks of the model; None until it has been opened."""
        return self.contents.num_blocks

    @property
    def baseline(self) -> Standing | None:
        """The baseline, once it has been measured."""
        return self.contents.baseline

    @property
    def last(self) -> Standing | None:
        """Perplexities after the newest finished step."""
        return self.contents.last

    @property
    def finished(self) -> bool:
        """Whether the trace says why the search ended."""
        return self.contents.finished

    @property
    def seconds(self) -> float | None:
        """Seconds spent on the search itself so far."""
        return self.contents.seconds

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal so far, or those that were given."""
        return self.last.removal_list if self.last else self.spec.given or ()


Stamp = tuple[int, int, int] | None
"""Times in ns at which the content and anything else of a file changed, and its size; None where there is none."""
Stamps = dict[str, Stamp]
"""Stamps of files by their path within a run folder."""
_FILES = ("spec.json", "stack.json", "trace.jsonl", "jobs")
_OF_A_JOB = ("spec.json", "status.json", "attempt.json")
TICK_NS = 2 * 10**9
"""Nanoseconds within which two changes may leave the same stamp: far above the clock of any file system."""


@dataclass(frozen=True)
class Reading:
    """A run folder, read once: its contents, and the stamps of every file on which they depend."""

    stamps: Stamps
    """Stamps of the files, taken before anything was read."""
    contents: Contents | RunError
    settled: bool
    """Whether all those files were older than a tick when they were read; else it may differ with equal stamps."""

    @property
    def changed(self) -> int:
        """The time at which the run's spec was written, in ns since the epoch: the age of the run."""
        stamp = self.stamps["spec.json"]
        return stamp[0] if stamp else 0

    def is_current(self, directory: str) -> bool:
        """Whether reading again would give the same; takes a few system calls."""
        return self.settled and all(_stamp(f"{directory}/{path}") == stamp for path, stamp in self.stamps.items())

    def outline(self, directory: Path) -> Outline | RunError:
        """The run with its state as it is now, or why it cannot be read."""
        if isinstance(self.contents, RunError):
            return self.contents
        return Outline(directory.name, directory, self.changed / 1e9, self.contents, self.contents.state)


def outline(directory: Path) -> Outline:
    """Read what a list shows of one run folder. Raises `RunError` where it is damaged or of another version."""
    result = read(directory, 0).outline(directory)
    if isinstance(result, RunError):
        raise result
    return result


def read(directory: Path, now_ns: int) -> Reading:
    """Read one run folder, readable or not, at a time in ns since the epoch."""
    stamps = {name: _stamp(f"{directory}/{name}") for name in _FILES}
    newest: str | None = None
    contents: Contents | RunError
    try:
        for job_dir in job_folder.job_dirs(directory):
            stamps |= {f"jobs/{job_dir.name}/{name}": _stamp(f"{job_dir}/{name}") for name in _OF_A_JOB}
        contents, newest = _contents(directory)
    except RunError as error:
        contents = error
    stamps = {path: stamp for path, stamp in stamps.items() if _matters(path, newest)}
    settled = all(stamp is None or stamp[1] < now_ns - TICK_NS for stamp in stamps.values())
    return Reading(stamps, contents, settled)


def _contents(directory: Path) -> tuple[Contents, str | None]:
    """What a list shows, and the name of the job whose state it is."""
    spec = record_files.read_spec(directory)
    own = [job for job in job_folder.read_jobs(directory) if job.is_own(spec)]
    baseline, last, finished, seconds = _ends(directory)
    num_blocks = None
    with suppress(OSError, ValueError, KeyError, TypeError, RunError):
        num_blocks = int(read_json_inside(directory, "stack.json")["num_blocks"])
    status = own[-1].status.model_copy(update={"message": "", "progress": None}) if own else None
    contents = Contents(
        spec=spec,
        num_blocks=num_blocks,
        baseline=baseline,
        last=last,
        finished=finished,
        seconds=seconds,
        status=status,
    )
    return contents, own[-1].name if own else None


def _matters(path: str, newest: str | None) -> bool:
    """Whether a file can change an outline: of jobs, all of the newest own one, and the specs of later ones."""
    if not path.startswith("jobs/") or newest is None:
        return True
    _, job, name = path.split("/")
    return job == newest or (name == "spec.json" and job_folder.number_of(job) >= job_folder.number_of(newest))


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _ends(directory: Path) -> tuple[Standing | None, Standing | None, bool, float | None]:
    """First and last entry of a trace, whether it is finished, and its seconds; nothing where it is damaged."""
    try:
        data = read_regular(inside(directory, "trace.jsonl"), trace_file.MOST_TRACE_BYTES)
    except (OSError, ValueError, RunError):
        return None, None, False, None
    lines = io.BytesIO(data[: data.rfind(b"\n") + 1])
    head, tail, seconds = next(lines, b""), deque[bytes](maxlen=2), 0.0
    for line in lines:
        seconds += _seconds(line)
        tail.append(line)
    try:
        entries: list[dict[str, Any]] = [parse_json(line) for line in (head, *tail)]
        baseline = Baseline.model_validate(entries[0]["baseline"])
        steps = [entry["step"] for entry in entries if "step" in entry]
        last = Step.model_validate(steps[-1]) if steps else None
    except (ValueError, ValidationError, KeyError, IndexError, TypeError):
        return None, None, False, None
    finished = "finished" in entries[-1]
    return _standing(baseline), _standing(last) if last else None, finished, baseline.seconds + seconds


def _standing(entry: Baseline | Step) -> Standing:
    if isinstance(entry, Baseline):
        return Standing(calibration=entry.calibration, held_out=entry.held_out)
    return Standing(
        removal_list=entry.removal_list,
        calibration=entry.calibration,
        held_out=entry.held_out,
        held_out_standard_error=entry.held_out_standard_error,
    )


def _seconds(line: bytes) -> float:
    """Seconds of one step, the last of its fields, without reading the rest."""
    with suppress(ValueError):
        return float(line.rpartition(b'"seconds":')[2].rstrip(b"}\n "))
    return 0.0


Signature = tuple[tuple[str, int, int], ...]
"""Names, times and sizes of files."""


def signature(directory: Path) -> Signature:
    """Changes whenever a file that `run_folder.load` reads does, or a finding comes."""
    files: list[tuple[str, int, int]] = []
    for folder in (directory, directory / "analysis"):
        files += _files(folder)
    files += findings_signature(directory)
    with suppress(OSError):
        for job in sorted(os.scandir(directory / "jobs"), key=lambda each: each.name):
            files += [(f"{job.name}/{name}", changed, size) for name, changed, size in _files(Path(job.path))]
    return tuple(files)


def findings_signature(directory: Path) -> Signature:
    """Changes whenever a finding about a list of the run comes."""
    return tuple(each for each in _files(directory / findings_folder.FOLDER) if each[0].endswith(".json"))


def _files(folder: Path) -> list[tuple[str, int, int]]:
    files = []
    with suppress(OSError):
        for each in os.scandir(folder):
            if each.name.endswith((".json", ".jsonl", ".txt", ".npz")) and each.is_file() and each.name != "log.txt":
                status = each.stat()
                files.append((each.name, status.st_mtime_ns, status.st_size))
    return sorted(files)
