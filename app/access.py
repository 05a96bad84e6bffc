"""What this server may read, write and start: the one place of the rule. Knows names and folders; draws nothing.

On localhost everything that its user may do. As soon as it listens on another address, only what lies below the
folders of `--allow-path`, besides runs, cache and uploads of its own; with `--read-only`, nothing is started. Its
command line and its address decide, nothing in a browser, and no file of the current folder (see `serve`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from sleb.errors import OptionError, RunError, SlebError
from sleb.records import (
    NAMED_TEXTS,
    EvaluateSpec,
    ExportJob,
    HealSpec,
    JobSpec,
    QuantizeSpec,
    QuestionJob,
    Run,
    RunSpec,
    is_gguf,
)
from sleb.runtime import files, run_folder
from sleb.runtime.dashboard_files import ALLOW_PATH, READ_ONLY, SAMPLES, is_local

RESERVED = (*NAMED_TEXTS, "wikitext2-rows")
"""Texts by name, which hide files of the same name."""
SHOWS_ONLY = "This dashboard was started with --read-only: it shows runs, and starts or changes nothing."
_NO_FOLDER = "This dashboard listens beyond localhost and was given no folder, so it takes no path"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95}){0,5}", re.ASCII)
_TEXT_FILE = re.compile(r".*\.(txt|raw|md|jsonl|parquet)", re.IGNORECASE | re.DOTALL)
_MOST_FILES = 10_000


class NotAllowed(OptionError):
    """Raised where the server may not do something, by the options it was started with."""


@dataclass(frozen=True)
class Rule:
    """What the server may read, write and start."""

    folders: tuple[Path, ...] | None
    """Folders below which it may read and write, links followed; None is everywhere."""
    read_only: bool
    """Whether it shows runs only."""


def rule() -> Rule:
    """The server's rule as it is now."""
    given = os.environ.get(ALLOW_PATH, "[]")
    free = given == "[]" and is_local(st.get_option("server.address"))
    return Rule(None if free else _folders(given), os.environ.get(READ_ONLY) == "1")


def _folders(given: str) -> tuple[Path, ...]:
    """Folders from the environment; none of them where it cannot be read."""
    with suppress(ValueError, TypeError):
        paths = json.loads(given)
        return tuple(Path(each).resolve() for each in paths) if isinstance(paths, list) else ()
    return ()


def explained() -> str:
    """The end of a help text: which paths the server takes; empty where it takes all."""
    folders = rule().folders
    if folders is None:
        return ""
    if not folders:
        return f" {_NO_FOLDER}: start it with --allow-path DIR."
    return f" Paths only below {_listed(folders)}, as --allow-path says."


def folder_for_exports() -> str | None:
    """The default folder of exports; None where nothing may be written."""
    folders = rule().folders
    if folders is None:
        return "~/sleb-exports"
    return str(folders[0]) if folders else None


def allows(path: Path) -> bool:
    """Whether a path lies where the server may read, all links followed."""
    folders = rule().folders
    return folders is None or _is_below(path, (*folders, *_own()))


def require_changes() -> None:
    """Raises `NotAllowed` where the server shows runs only."""
    if rule().read_only:
        raise NotAllowed(SHOWS_ONLY)


def require_run(directory: Path) -> None:
    """Raises `RunError` for a link in the runs folder that leads out of what the server may read."""
    if directory.is_symlink() and not allows(directory):
        raise RunError(
            f"Run {directory.name} is a link that leads out of the folders which this dashboard may use "
            "(--allow-path); it is not shown."
        )


def refused_links(folder: Path) -> list[RunError]:
    """Errors about links in a folder that lead out of what the server may read: their runs are not shown."""
    refusals: list[RunError] = []
    if rule().folders is not None:
        with suppress(OSError), os.scandir(folder) as entries:
            for link in sorted(each.path for each in entries if each.is_symlink()):
                try:
                    require_run(Path(link))
                except RunError as error:
                    refusals.append(error)
    return refusals


def require_start(spec: RunSpec, job: JobSpec, run: Run | None = None) -> None:
    """Raises `NotAllowed` where a job would read or write what the server may not.

    The job may come from a form, or from the files of any run folder.
    """
    require_changes()
    if rule().folders is None:
        return
    if run is not None:
        require_run(run.run_dir)
    _require_model(spec.model)
    for revision in (spec.revision, run.stack.revision if run and run.stack else None):
        if revision is not None and not _REVISION.fullmatch(revision):
            raise NotAllowed(f"The revision {revision[:200]!r} is not a branch, tag or commit.")
    if job.kind in ("search", "analyze"):
        _require_source(spec.calibration.source)
    if isinstance(job, ExportJob):
        if job.gguf is not None:
            _require_readable(job.gguf)
        require_destination(job.out)
    if isinstance(job, QuestionJob):
        for name in job.ask.sources:
            if name not in NAMED_TEXTS:
                _require_source(name)
        if isinstance(job.ask, EvaluateSpec) and job.ask.task_folder is not None:
            _require_readable(job.ask.task_folder)
        if isinstance(job.ask, QuantizeSpec | HealSpec):
            require_destination(job.ask.out)


def require_destination(out: str | None) -> None:
    """Raises `NotAllowed` where nothing may be written; the server's own folders never take a model."""
    folders = rule().folders
    if out is not None and folders is not None and not _is_below(Path(out), folders):
        raise NotAllowed(_refusal(out, folders))


def may_inspect(model: str) -> bool:
    """Whether the server may read a model's files."""
    try:
        _require_model(model)
    except NotAllowed:
        return False
    return True


def _require_model(name: str) -> None:
    if rule().folders is None or name == "demo":
        return
    if is_gguf(name) or not _is_hub_name(name):
        _require_readable(name)


def _require_source(source: str) -> None:
    """Raises `NotAllowed` for a text that is neither reserved, nor OWNER/NAME on the hub, nor an allowed file."""
    if source in RESERVED:
        return
    name, *parts = source.split(":")
    prefixes = [":".join((name, *parts[:count])) for count in range(len(parts) + 1)]
    files_of_it = [each for each in prefixes if _TEXT_FILE.fullmatch(each) or _exists(each)]
    # A name without an owner may be a reader of files (json, text ...), which takes those of the current folder.
    if not files_of_it and "/" in name and _is_hub_name(name) and not any(_leads_up(each) for each in parts):
        return
    if not files_of_it and "/" not in source:
        raise NotAllowed(f"The data set {source[:200]!r} needs its owner's name here, as in OWNER/NAME." + explained())
    for each in {source, *files_of_it}:
        _require_readable(each)


def _is_hub_name(name: str) -> bool:
    """Whether a name can only be one on the hub: all readers take what the current folder holds for a path."""
    return bool(_HUB_NAME.fullmatch(name)) and not _leads_up(name) and not _exists(name)


def _leads_up(part: str) -> bool:
    return ".." in part or part.startswith(("/", "~", "\\"))


def _exists(name: str) -> bool:
    with suppress(OSError, ValueError, SlebError):
        return os.path.lexists(files.expanded(Path(name)))
    return False


def _require_readable(name: str) -> None:
    folders = rule().folders
    if folders is None:
        return
    within = (*folders, *_own())
    if not _is_below(Path(name), within):
        raise NotAllowed(_refusal(name, folders))
    for link in _links_in(Path(name)):
        if not _is_below(link, within):
            raise NotAllowed(_refusal(str(link), folders))


def _links_in(path: Path) -> Iterator[Path]:
    """Links below a folder. Raises `NotAllowed` where there is too much to look through."""
    seen = 0
    for folder, folders, names in os.walk(files.expanded(path)):
        seen += len(folders) + len(names)
        if seen > _MOST_FILES:
            raise NotAllowed(f"{path} holds more than {_MOST_FILES:,} files; name the model's own folder.")
        yield from (each for name in (*folders, *names) if (each := Path(folder, name)).is_symlink())


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    try:
        real = files.expanded(path).resolve()
    except (OSError, RuntimeError, ValueError, SlebError):  # a loop of links, or what no file system takes
        return False
    return any(real.is_relative_to(each) for each in folders)


def _own() -> tuple[Path, ...]:
    """Folders of the server itself and of its samples."""
    home = run_folder.home().resolve()
    return (home / "runs", home / "cache", home / "uploads", SAMPLES)


def _refusal(name: str, folders: tuple[Path, ...]) -> str:
    shown = name if len(name) <= 200 else name[:200] + "…"
    if not folders:
        return f"{_NO_FOLDER} ({shown}): start it with --allow-path DIR."
    return f"{shown} is not below {_listed(folders)}: start the dashboard with --allow-path for other folders."


def _listed(folders: tuple[Path, ...]) -> str:
    return ", ".join(map(str, folders))
