"""Run folders: create, list, load, append, replace atomically. Knows files; knows no model and no process.

    runs/<run_id>/  spec.json stack.json trace.jsonl scores/ analysis/ jobs/<n>-<kind>/

A line of the trace is written whole or not at all as far as a reader can tell: a torn last line is ignored when
reading, and cut off before the next one is appended.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from .dashboard_files import SAMPLES
from .errors import RunError
from .files import NO_ARRAYS, expanded, parse_json, read_json, replace_file, writing
from .records import (
    FORMAT_VERSION,
    Analysis,
    Attempt,
    Baseline,
    Job,
    JobSpec,
    JobState,
    JobStatus,
    Proof,
    Run,
    RunSpec,
    StackDescription,
    Step,
    Trace,
)

log = logging.getLogger(__name__)

R = TypeVar("R", bound=BaseModel)

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def home() -> Path:
    """Where runs and cache live: `SLEB_HOME`, or a per-user data folder."""
    chosen = os.environ.get("SLEB_HOME")
    if chosen:
        return expanded(Path(chosen)).absolute()
    from platformdirs import user_data_path

    return user_data_path("sleb", appauthor=False)


def reference(run: Run) -> str:
    """What to type to name the run: its id, or the folder it was given."""
    own = is_sample(run.run_dir) or (run.run_dir.parent == runs_folder() and _RUN_ID.fullmatch(run.run_id))
    return shlex.quote(run.run_id if own else str(run.run_dir))


def runs_folder() -> Path:
    """The folder that holds runs which were given no folder of their own."""
    return home() / "runs"


def create(spec: RunSpec, run_dir: Path | None = None) -> Run:
    """A new run folder with what was asked. Raises `RunError` where the folder is taken."""
    directory = expanded(run_dir or runs_folder() / _new_run_id(spec)).absolute()
    with writing(directory):
        if directory.exists() and not directory.is_dir():
            raise RunError(f"{directory} is no folder. Name a new one with --run-dir.")
        if directory.exists() and any(directory.iterdir()):
            raise RunError(
                f"{directory} already holds something. Name a new folder, or continue the run there with: "
                f"sleb resume {shlex.quote(str(directory))}"
            )
        was_there = directory.is_dir()
        directory.mkdir(parents=True, exist_ok=True)
    try:
        replace_file(directory / "spec.json", spec.model_dump_json(indent=1))
        return load(str(directory))
    except BaseException:
        discard(directory, keep_folder=was_there)
        raise


def discard(directory: Path, *, keep_folder: bool) -> None:
    """Take back a run that never began; a folder that somebody had made for it stays."""
    shutil.rmtree(directory, ignore_errors=True)
    if keep_folder:
        with suppress(OSError):
            directory.mkdir()


def locate(run: str | os.PathLike[str]) -> Path:
    """The folder of a run given by its id, by a folder, or by the name of a recorded sample.

    Raises `RunError` where there is none.
    """
    text = os.fspath(run)
    if _RUN_ID.fullmatch(text) and (runs_folder() / text / "spec.json").is_file():
        return runs_folder() / text
    with suppress(OSError, ValueError, RuntimeError):  # names no file system takes
        folder = Path(text).expanduser().absolute()
        if text and (folder / "spec.json").is_file():
            return folder
    if (sample := _sample(text)) is not None:
        return sample
    known = [each.name for each in run_dirs()][:3]
    hint = f"The newest are {', '.join(known)}." if known else "There are none yet: start one with sleb search."
    raise RunError(f"There is no run {text!r}, neither by id nor as a folder with a spec.json. {hint}")


def _sample(name: str) -> Path | None:
    """The recorded sample of that name. Its copy in the runs folder has the same one, and is found before it."""
    return SAMPLES / name if _RUN_ID.fullmatch(name) and (SAMPLES / name / "spec.json").is_file() else None


def is_sample(directory: Path) -> bool:
    """Whether it is a recorded sample: to be looked at, not to be changed."""
    real = directory.resolve()
    return real.parent == SAMPLES and _RUN_ID.fullmatch(real.name) is not None


def refuse_sample(directory: Path) -> None:
    """Raises `RunError` for a recorded sample, before anything would be written into its folder."""
    if is_sample(directory):
        name = directory.resolve().name
        raise RunError(
            f"{name} is a recorded sample, which is only read. Copy it among your runs, and give the same command "
            f"again: sleb import {name}"
        )


def load(run: str | os.PathLike[str]) -> Run:
    """A run folder, read. Raises `RunError` where it is missing, damaged or of another version."""
    directory = locate(run)
    jobs = read_jobs(directory)  # first: what a finished job wrote is then there to be read
    analysis = directory / "analysis" / "analysis.json"
    unavailable = directory / "analysis" / "unavailable.txt"
    stack = _read(directory / "stack.json", StackDescription) if (directory / "stack.json").exists() else None
    trace = read_trace(directory)
    if trace is not None and stack is None:
        raise RunError(f"{directory} has a trace but no stack.json; it is damaged. Restore it, or delete the run.")
    if trace is not None and stack is not None:
        foreign = [block for step in trace.steps for block in step.removal_list if block >= stack.num_blocks]
        if foreign:
            raise RunError(
                f"The trace in {directory} removes block {foreign[0]} of {stack.num_blocks}; it is damaged. "
                "Restore it, or delete the run."
            )
    return Run(
        run_id=directory.name,
        run_dir=directory,
        spec=read_spec(directory),
        stack=stack,
        trace=trace,
        analysis=_fitting(_read_or_none(analysis, Analysis), stack, analysis),
        analysis_unavailable=_sentence(unavailable),
        jobs=jobs,
    )


def list_runs() -> list[Run | RunError]:
    """All runs of the runs folder, newest first; an unreadable one is its error, so that it can be shown."""
    found: list[Run | RunError] = []
    for directory in run_dirs():
        try:
            found.append(load(directory))
        except RunError as error:
            found.append(error)
    return found


def delete(directory: Path) -> None:
    """Remove a run folder, readable or not, for good. The caller makes sure that no process is executing it."""
    with writing(directory):
        if directory.is_symlink():
            directory.unlink()
        else:
            shutil.rmtree(directory)


def bring_in(folder: Path) -> Run:
    """Copy a run folder from elsewhere, or a recorded sample, into the runs folder.

    Raises `RunError` where it cannot be read.
    """
    run = load(elsewhere(folder))
    target = runs_folder() / (run.run_id if _RUN_ID.fullmatch(run.run_id) else _new_run_id(run.spec))
    if target.exists():
        raise RunError(f"A run {target.name} is already there. Rename {folder}, or delete the other first.")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".import."))
        try:
            ignored = shutil.ignore_patterns(".lock")
            shutil.copytree(run.run_dir, partial, dirs_exist_ok=True, symlinks=False, ignore=ignored)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return load(target)


def elsewhere(folder: Path) -> Path:
    """A run folder from elsewhere, absolute; or the recorded sample of that name, where there is no such folder."""
    found = expanded(folder).absolute()
    with suppress(OSError, ValueError):  # names no file system takes
        if found.exists():
            return found
    return _sample(str(folder)) or found


def write_stack(directory: Path, stack: StackDescription) -> None:
    """What the run settled on with its model; written once."""
    replace_file(directory / "stack.json", stack.model_dump_json(indent=1))


def write_analysis(directory: Path, analysis: Analysis) -> None:
    """Both analyses, as pages draw them."""
    replace_file(directory / "analysis" / "analysis.json", analysis.model_dump_json())


def write_no_analysis(directory: Path, reason: str) -> None:
    """Why this model cannot be analysed: the run is finished without."""
    replace_file(directory / "analysis" / "unavailable.txt", reason)


def write_scores(directory: Path, name: str, **arrays: np.ndarray) -> None:
    """Per-sequence sums of a step or of the baseline, beside the trace and before its line."""
    _require_run(directory)
    path = directory / "scores" / f"{name}.npz"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.SpooledTemporaryFile() as buffer:
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            buffer.seek(0)
            replace_file(path, buffer.read())


def read_scores(directory: Path, name: str) -> dict[str, np.ndarray]:
    """What `write_scores` wrote. Raises `RunError` where it is missing or damaged."""
    path = directory / "scores" / f"{name}.npz"
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except NO_ARRAYS as error:
        raise RunError(f"{path} cannot be read; it is missing or damaged.") from error


def append_baseline(directory: Path, baseline: Baseline) -> None:
    """First line of the trace."""
    _append(directory, {"format_version": FORMAT_VERSION, "baseline": baseline.model_dump(mode="json")})


def append_step(directory: Path, step: Step) -> None:
    """One more finished step."""
    _append(directory, {"step": step.model_dump(mode="json")})


def append_finished(directory: Path, reason: str) -> None:
    """The search is over, and why."""
    _append(directory, {"finished": reason})


def read_trace(directory: Path) -> Trace | None:
    """The trace as far as it was written; None before the baseline."""
    path = directory / "trace.jsonl"
    try:
        if path.exists() and not path.is_file():
            raise RunError(f"{path} is no regular file; it is damaged. Restore it, or delete the run.")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    lines = data[: data.rfind(b"\n") + 1].splitlines()  # what follows the last newline was torn off
    baseline, finished = None, None
    steps: list[Step] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            if entry.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                raise RunError(_other_version(path, entry["format_version"]))
            if "baseline" in entry and baseline is None:
                baseline = Baseline.model_validate(entry["baseline"])
            elif "step" in entry:
                step = Step.model_validate(entry["step"])
                before = set(steps[-1].removal_list) if steps else set()
                more = 0 if step.is_swap else 1
                if step.number != len(steps) + 1 or len(step.removal_list) != len(before) + more:
                    raise ValueError("steps follow each other, each with one block more, or one for another")
                if set(step.removal_list) != {*before, *step.removed} - {*step.restored}:
                    raise ValueError("a step removes what it says")
                steps.append(step)
            else:
                finished = str(entry["finished"])
        except (ValueError, ValidationError, KeyError, AttributeError) as error:
            raise RunError(
                f"Line {number} of {path} is damaged. Delete the lines from there on, and resume the run."
            ) from error
    if baseline is None:
        if steps:
            raise RunError(f"{path} has steps but no baseline; it is damaged. Delete the file, and resume the run.")
        return None
    return Trace(baseline=baseline, steps=tuple(steps), finished=finished)


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


def read_spec(directory: Path) -> RunSpec:
    """What was asked. Raises `RunError` where it is damaged or of another version."""
    return _read(directory / "spec.json", RunSpec)


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
    """One job folder, read as it was written; `jobs.watched` derives what a dead process could not write."""
    attempt = directory / "attempt.json"
    status = directory / "status.json"
    return Job(
        name=directory.name,
        directory=directory,
        spec=_read(directory / "spec.json", JobSpec),
        status=_read(status, JobStatus) if status.exists() else JobStatus(),
        attempt=_read(attempt, Attempt) if attempt.exists() else None,
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


def read_proof(run: Run) -> Proof:
    """The proof of the run's newest export."""
    results = [job.directory / "result.json" for job in run.jobs if job.spec.kind == "export"]
    found = [path for path in results if path.exists()]
    if not found:
        raise RunError(f"Run {run.run_id} has no finished export.")
    return Proof.model_validate(read_json(found[-1])["proof"])


@dataclass(frozen=True)
class Export:
    """A smaller model that was written and proven."""

    job: Job
    out: Path
    """Where it was written; it may have been moved since."""
    proof: Proof


def read_exports(run: Run) -> list[Export]:
    """The run's finished exports, oldest first; one whose result cannot be read is left out."""
    found = []
    for job in run.jobs:
        if job.spec.kind == "export":
            try:
                result = read_json(job.directory / "result.json")
                found.append(Export(job, Path(result["out"]), Proof.model_validate(result["proof"])))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.debug("No export in %s: %s", job.directory, error)
    return found


def withdraw_job(job: Job) -> None:
    """Take back a job that never began."""
    shutil.rmtree(job.directory, ignore_errors=True)


def _append(directory: Path, entry: dict[str, Any]) -> None:
    _require_run(directory)
    path = directory / "trace.jsonl"
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with writing(path), open(path, "ab+", buffering=0) as file:  # a buffer would be written again on closing
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # a torn last line would swallow the next one
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


def _require_run(directory: Path) -> None:
    """A run that was moved away must not be begun anew at its old place."""
    if not (directory / "spec.json").is_file():
        raise RunError(f"The run folder {directory} is gone: it was moved or deleted. Resume it where it is now.")


def run_dirs(folder: Path | None = None) -> list[Path]:
    """Run folders in a folder (by default the runs folder), newest first."""
    found: list[tuple[float, Path]] = []
    with suppress(OSError):  # no runs folder, or none of ours
        for each in (folder or runs_folder()).iterdir():
            with suppress(OSError):  # one folder that cannot be read must not hide the others
                if _RUN_ID.fullmatch(each.name):
                    found.append(((each / "spec.json").stat().st_mtime, each))
    return [each for _, each in sorted(found, reverse=True)]


def _job_dirs(directory: Path) -> list[Path]:
    jobs = directory / "jobs"
    if not jobs.is_dir():
        return []
    found = [each for each in jobs.iterdir() if re.fullmatch(r"\d+-[a-z]+", each.name)]
    return sorted(found, key=lambda each: int(each.name.split("-")[0]))


def _read(path: Path, record: type[R]) -> R:
    try:
        data = read_json(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON. Restore it, or delete the run.") from error
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise RunError(_other_version(path, version))
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path} is damaged: {where}: {first['msg']}. Restore it, or delete the run.") from error


def _read_or_none(path: Path, record: type[R]) -> R | None:
    """What can be made again is made again when it cannot be read."""
    try:
        return _read(path, record) if path.exists() else None
    except RunError as error:
        log.warning("%s", error)
        return None


def _fitting(analysis: Analysis | None, stack: StackDescription | None, path: Path) -> Analysis | None:
    """The analysis, if it is of a model with as many blocks."""
    if analysis is None or stack is None:
        return analysis
    blocks, found, exits = stack.num_blocks, analysis.similarity, analysis.alignment
    matrices = (found.mean, found.mean_without_first, found.random_token)
    sizes = [len(matrix) - 1 for matrix in matrices] + [len(row) - 1 for matrix in matrices for row in matrix]
    sizes += [len(found.metric1), len(found.chunk_angular_distance)]
    sizes += [len(row) for row in found.chunk_angular_distance]
    for each in (exits.calibration, exits.generated):
        sizes += [len(each.agreement), len(each.first_exit), len(each.settled_exit)] if each else []
    sizes += [len(token.top) for token in analysis.passage.tokens]
    if all(size == blocks for size in sizes):
        return analysis
    log.warning("%s is of another model than stack.json; it is left out.", path)
    return None


def _sentence(path: Path) -> str | None:
    """A file with one sentence in it, if it is there."""
    try:
        return path.read_text(errors="replace")[:2000] if path.is_file() else None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."


def _other_version(path: Path, version: object) -> str:
    return (
        f"{path} is of version {version}, and this program reads version {FORMAT_VERSION}. "
        "Open it with the version of sleb that wrote it."
    )


def _new_run_id(spec: RunSpec) -> str:
    """Sortable by time, telling by name, unlikely to collide."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(spec.model).name or spec.model).strip("-").lower()[:32] or "model"
    what = spec.what
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{what}-{secrets.token_hex(2)}"
