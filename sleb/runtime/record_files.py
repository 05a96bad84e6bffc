"""Records as JSON files of a run folder, with one sentence for each way in which one can be damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sleb.errors import RunError
from sleb.records import FORMAT_VERSION, Analysis, RunSpec
from sleb.runtime.files import MOST_BYTES, inside, read_json_inside, replace_file

_MOST_BYTES = 4 << 20
"""Of a spec, a status and the like: parsed, JSON can take thirty times the memory of its file."""

R = TypeVar("R", bound=BaseModel)
log = logging.getLogger(__name__)


def write_analysis(directory: Path, analysis: Analysis) -> None:
    """Both analyses, as pages draw them."""
    replace_file(inside(directory, "analysis", "analysis.json"), analysis.model_dump_json())


def write_no_analysis(directory: Path, reason: str) -> None:
    """Why this model cannot be analysed: the run is finished without."""
    replace_file(inside(directory, "analysis", "unavailable.txt"), reason)


def read_spec(directory: Path) -> RunSpec:
    """What was asked. Raises `RunError` where it is damaged or of another version."""
    return read_record(RunSpec, directory, "spec.json")


def require_run(directory: Path) -> None:
    """A run that was moved away must not be begun anew at its old place."""
    if not (directory / "spec.json").is_file():
        raise RunError(f"The run folder {directory} is gone: it was moved or deleted. Resume it where it is now.")


def read_record(record: type[R], root: Path, *parts: str) -> R:
    """A record from its file in a run folder. Raises `RunError` where it is missing, damaged or of another version."""
    path = root.joinpath(*parts)
    try:
        data = read_json_inside(root, *parts, most=MOST_BYTES if record is Analysis else _MOST_BYTES)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON. Restore it, or delete the run.") from error
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise RunError(other_version(path, version))
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path} is damaged: {where}: {first['msg']}. Restore it, or delete the run.") from error


def read_record_or_none(record: type[R], root: Path, *parts: str) -> R | None:
    """What can be made again is made again when it cannot be read."""
    try:
        return read_record(record, root, *parts) if root.joinpath(*parts).exists() else None
    except RunError as error:
        log.warning("%s", error)
        return None


def other_version(path: Path, version: object) -> str:
    """The sentence about a file of a version that this program does not read."""
    return (
        f"{path} is of version {version}, and this program reads version {FORMAT_VERSION}. "
        "Open it with the version of sleb that wrote it."
    )
