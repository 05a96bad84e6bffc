"""Records as JSON files of a run folder, with one sentence for each way in which one can be damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sleb.errors import RunError, quoted
from sleb.records import FORMAT_VERSION, JOB_SPEC, Analysis, JobSpec, RunSpec
from sleb.runtime.files import MOST_BYTES, inside, read_json_inside, replace_file

_MOST_BYTES = 4 << 20
"""Size in bytes above which specs, statuses and the like are not read: JSON can take thirty times that in memory."""

R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")
log = logging.getLogger(__name__)


def write_analysis(directory: Path, analysis: Analysis) -> None:
    """Write both analyses, as pages draw them."""
    replace_file(inside(directory, "analysis", "analysis.json"), analysis.model_dump_json())


def write_no_analysis(directory: Path, reason: str) -> None:
    """Write why this model cannot be analysed: the run is finished without."""
    replace_file(inside(directory, "analysis", "unavailable.txt"), reason)


def read_spec(directory: Path) -> RunSpec:
    """The spec of a run. Raises `RunError` where it is damaged or of another version."""
    return read_record(RunSpec, directory, "spec.json")


def require_run(directory: Path) -> None:
    """Raises `RunError` for a folder that was moved away: the run must not begin again at its old place."""
    if not (directory / "spec.json").is_file():
        raise RunError(
            f"The run folder {directory} no longer exists: it was moved or deleted. Resume it where it is now."
        )


def read_job_spec(root: Path, *parts: str) -> JobSpec:
    """A job of any kind from its file in a run folder. Raises `RunError` as `read_record` does."""
    return _read(JOB_SPEC.validate_python, _MOST_BYTES, root, *parts)


def read_record(record: type[R], root: Path, *parts: str) -> R:
    """A record from its file in a run folder. Raises `RunError` where it is missing, damaged or of another version."""
    return _read(record.model_validate, MOST_BYTES if record is Analysis else _MOST_BYTES, root, *parts)


def _read(validate: Callable[[Any], T], most: int, root: Path, *parts: str) -> T:
    path = root.joinpath(*parts)
    try:
        data = read_json_inside(root, *parts, most=most)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON. Restore it, or delete the run.") from error
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise RunError(other_version(path, version))
    try:
        return validate(data)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {_fault(error, data)}. Restore it, or delete the run.") from error


def _fault(error: ValidationError, data: Any) -> str:
    """What pydantic refused of a file, by the names that the file has."""
    first = error.errors()[0]
    where = list(first["loc"])
    if first["type"].startswith("union_tag"):  # pydantic names neither the field nor, readably, what it takes
        field = str(first["ctx"]["discriminator"]).strip("'")
        expected = first["ctx"].get("expected_tags")
        where.append(field)
        message = f"Input should be one of {expected}" if expected else "Field required"
    else:
        message = first["msg"]
    if isinstance(data, dict) and where[:1] == [data.get("kind")] and where[0] not in data:
        where = where[1:]  # a member of a union, which the file does not name
    return f"{'.'.join(map(str, where))}: {message}"


def read_record_or_none(record: type[R], root: Path, *parts: str) -> R | None:
    """A record that can be made again; None where it is missing or cannot be read."""
    try:
        return read_record(record, root, *parts) if root.joinpath(*parts).exists() else None
    except RunError as error:
        log.warning("%s", error)
        return None


def other_version(path: Path, version: object) -> str:
    """The sentence about a file of a version that this program does not read."""
    return (
        f"{path} is of version {quoted(version)}, and this program reads version {FORMAT_VERSION}. "
        "Open it with the version of sleb that wrote it."
    )
