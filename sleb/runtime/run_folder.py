"""Run folders: create, find, load, list, import, delete. Knows files; knows no model and no process.

runs/<run_id>/  spec.json stack.json trace.jsonl scores/ analysis/ evaluation/ jobs/<n>-<kind>/
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import shutil
import time
from contextlib import suppress
from pathlib import Path

from sleb.errors import RunError, StorageError, quoted
from sleb.records import Analysis, Run, RunSpec, StackDescription
from sleb.runtime import origin
from sleb.runtime.dashboard_files import SAMPLES
from sleb.runtime.files import expanded, inside, read_regular, writing
from sleb.runtime.job_folder import read_jobs
from sleb.runtime.places import home as home
from sleb.runtime.record_files import read_record, read_record_or_none, read_spec
from sleb.runtime.trace_file import read_trace
from sleb.runtime.unfinished import names
from sleb.runtime.unfinished.workspaces import NEW, remove, sweep, sweep_below, workspace

log = logging.getLogger(__name__)


LOCK = ".lock"
"""The lock file, whose holder executes the run."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def reference(run: Run) -> str:
    """The name of a run on a command line, quoted: its id, or its folder where it was given one."""
    own = is_sample(run.run_dir) or (run.run_dir.parent == runs_folder() and _RUN_ID.fullmatch(run.run_id))
    return shlex.quote(run.run_id if own else str(run.run_dir))


def runs_folder() -> Path:
    """The folder that holds runs which were given no folder of their own."""
    return home() / "runs"


def create(spec: RunSpec, run_dir: Path | None = None) -> Run:
    """Make a run folder with its spec. Raises `RunError` where the folder holds something already."""
    directory = expanded(run_dir or runs_folder() / _new_run_id(spec)).absolute()
    with writing(directory):
        if directory.exists() and not directory.is_dir():
            raise RunError(f"{directory} is not a folder. Name a new one with `run_dir`.")
        if directory.is_dir():
            sweep(home(), directory)
        begun = (LOCK, origin.SIGNATURE)  # what a process had written that was killed before it wrote the spec
        if directory.exists() and any(each.name not in begun for each in directory.iterdir()):
            raise RunError(
                f"{directory} already holds something. Name a new folder, or continue the run there with: "
                f"sleb resume {shlex.quote(str(directory))}"
            )
    was_there = directory.is_dir()
    try:
        if was_there:
            origin.write_signed(directory, "spec.json", spec.model_dump_json(indent=1))
        else:
            with workspace(home(), directory) as own:  # whole or not at all
                with writing(directory):
                    (own / NEW).mkdir()
                origin.write_signed(own / NEW, "spec.json", spec.model_dump_json(indent=1))
                with writing(directory):
                    os.rename(own / NEW, directory)
        return load(str(directory))
    except BaseException:
        discard(directory, keep_folder=was_there)
        raise


def discard(directory: Path, *, keep_folder: bool) -> None:
    """Remove a run that never began; a folder that somebody had made for it stays."""
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
    if (sample := _sample(text.rstrip("/"))) is not None:
        return sample
    known = [each.name for each in run_dirs()][:3]
    hint = f"The newest are {', '.join(known)}." if known else "There are none yet: start one with sleb search."
    raise RunError(f"There is no run {quoted(text)}, neither by id nor as a folder with a spec.json. {hint}")


def _sample(name: str) -> Path | None:
    """The recorded sample of that name, if there is one. Its copy in the runs folder is looked up before it."""
    return SAMPLES / name if _RUN_ID.fullmatch(name) and (SAMPLES / name / "spec.json").is_file() else None


def is_sample(directory: Path) -> bool:
    """Whether a folder is a recorded sample, which is only read."""
    real = directory.resolve()
    return real.parent == SAMPLES and _RUN_ID.fullmatch(real.name) is not None


def is_link(directory: Path) -> bool:
    """Whether a path is a link in the runs folder: what it leads to is not deleted with it."""
    return directory.is_symlink() and directory.parent == runs_folder()


def refuse_sample(directory: Path) -> None:
    """Raises `RunError` for a recorded sample, before anything would be written into its folder."""
    if is_sample(directory):
        name = directory.resolve().name
        raise RunError(
            f"{name} is a recorded sample, which is only read. Copy it among your runs, and give the same command "
            f"again: sleb import {name}"
        )


def load(run: str | os.PathLike[str]) -> Run:
    """Read a run folder. Raises `RunError` where it is missing, damaged or of another version."""
    directory = locate(run)
    jobs = read_jobs(directory)  # first: what a finished job wrote is then there to be read
    stack = read_record(StackDescription, directory, "stack.json") if (directory / "stack.json").exists() else None
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
        analysis=_fitting(read_record_or_none(Analysis, directory, "analysis", "analysis.json"), stack, directory),
        analysis_unavailable=_sentence(directory, "analysis", "unavailable.txt"),
        jobs=jobs,
    )


def list_runs() -> list[Run | RunError]:
    """All runs of the runs folder, newest first; an unreadable one is its error, so that it can be shown."""
    runs: list[Run | RunError] = []
    for directory in run_dirs():
        try:
            runs.append(load(directory))
        except RunError as error:
            runs.append(error)
    return runs


def delete(directory: Path) -> None:
    """Remove a run folder, readable or not, for good. The caller makes sure that no process is executing it.

    In one move where that can be done; else the spec is removed last, so that the rest can be deleted again.
    """
    with writing(directory):
        if directory.is_symlink():
            directory.unlink()
            return
        try:
            remove(home(), directory)
        except (OSError, StorageError):  # such as the mount point of a file system
            for each in sorted(directory.iterdir(), key=lambda each: each.name == "spec.json"):
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
            directory.rmdir()


def tidy(directory: Path) -> None:
    """Remove what killed processes left in a run folder, and beside it."""
    sweep_below(directory)
    sweep(home(), directory.parent)


def delete_again(run: str) -> bool:
    """Finish a deletion that was killed, of a run given by its id or its folder; whether there was one."""
    folder = runs_folder() / run if _RUN_ID.fullmatch(run) else expanded(Path(run)).absolute()
    return any(names.becomes(path.name, folder.name) for path in sweep(home(), folder.parent))


def bring_in(folder: Path) -> Run:
    """Copy a run folder from elsewhere, or a recorded sample, into the runs folder.

    Raises `RunError` where it cannot be read.
    """
    run = load(elsewhere(folder))
    target = runs_folder() / (run.run_id if _RUN_ID.fullmatch(run.run_id) else _new_run_id(run.spec))
    if target.exists():
        removal = f"delete it first: sleb delete {target.name}" if is_sample(run.run_dir) else "delete it first"
        instead = "Go on with that copy" if is_sample(run.run_dir) else f"Rename {folder}"
        raise RunError(f"A run {target.name} already exists. {instead}, or {removal}.")
    _require_plain_files(run.run_dir)
    with workspace(home(), target) as own, writing(target):
        _require_room(run.run_dir, own)
        ignored = shutil.ignore_patterns(LOCK, ".*.partial")
        shutil.copytree(run.run_dir, own / NEW, ignore=ignored)
        if is_sample(run.run_dir):  # ours, wherever the program was installed from
            origin.sign(own / NEW)
        os.rename(own / NEW, target)
    return load(target)


def _require_plain_files(directory: Path) -> None:
    """Raises `RunError` for a link, a pipe or a device anywhere in a run folder: no part of it may lie elsewhere."""
    for folder, folders, file_names in os.walk(directory):
        for name in (*folders, *file_names):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                kind = "a link" if path.is_symlink() else "a pipe or a device"
                raise RunError(f"{path} is {kind}, and a run folder holds only files of its own. Delete it first.")


def _require_room(folder: Path, where: Path) -> None:
    """Raises `StorageError` for a folder that does not fit, such as one whose files only seem to be long."""
    needed = sum(each.lstat().st_size for each in folder.rglob("*"))
    free = shutil.disk_usage(where).free
    if needed > free:
        raise StorageError(f"{folder} takes {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB left; free some.")


def elsewhere(folder: Path) -> Path:
    """A run folder from elsewhere, absolute; or the recorded sample of that name, where no such folder holds a run."""
    path = expanded(folder).absolute()
    with suppress(OSError, ValueError):  # names no file system takes
        if (path / "spec.json").is_file():
            return path
    return _sample(str(folder)) or path


def is_run_id(name: str) -> bool:
    """Whether a folder of that name in the runs folder can be a run."""
    return _RUN_ID.fullmatch(name) is not None


def run_dirs(folder: Path | None = None) -> list[Path]:
    """Run folders in a folder (by default the runs folder), newest first."""
    dated: list[tuple[float, Path]] = []
    with suppress(OSError):  # no runs folder, or none of ours
        for each in (folder or runs_folder()).iterdir():
            with suppress(OSError):  # one folder that cannot be read must not hide the others
                if is_run_id(each.name):
                    dated.append(((each / "spec.json").stat().st_mtime, each))
    return [each for _, each in sorted(dated, reverse=True)]


def _fitting(analysis: Analysis | None, stack: StackDescription | None, directory: Path) -> Analysis | None:
    """The analysis, if it is of a model with as many blocks."""
    if analysis is None or stack is None:
        return analysis
    blocks, similarity, exits = stack.num_blocks, analysis.similarity, analysis.alignment
    matrices = (similarity.mean, similarity.mean_without_first, similarity.random_token)
    sizes = [len(matrix) - 1 for matrix in matrices] + [len(row) - 1 for matrix in matrices for row in matrix]
    sizes += [len(similarity.metric1), len(similarity.chunk_angular_distance)]
    sizes += [len(row) for row in similarity.chunk_angular_distance]
    for each in (exits.calibration, exits.generated):
        sizes += [len(each.agreement), len(each.first_exit), len(each.settled_exit)] if each else []
    sizes += [len(token.top) for token in analysis.passage.tokens]
    if all(size == blocks for size in sizes):
        return analysis
    log.warning("The analysis in %s is of another model than stack.json; it is left out.", directory)
    return None


def _sentence(directory: Path, *parts: str) -> str | None:
    """The sentence that is a file of a run folder; None without the file."""
    path = inside(directory, *parts)
    try:
        return read_regular(path).decode(errors="replace")[:2000] if path.exists() else None
    except (OSError, ValueError) as error:
        return f"{path} cannot be read ({error})."


def _new_run_id(spec: RunSpec) -> str:
    """An id that sorts by time, names the model and is unlikely to collide."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(spec.model).name or spec.model).strip("-").lower()[:32] or "model"
    label = spec.method_or_kind
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{label}-{secrets.token_hex(2)}"
