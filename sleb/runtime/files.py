"""Writing files so that nothing is lost, and reading and opening those of a folder that anybody may have made.

A file is written whole or not at all, and what a disk refuses is one sentence. In a run folder, which may be a
stranger's, no link is followed, nothing but a regular file is opened, and no more is read than a file of ours can hold.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sleb.errors import OptionError, RunError, StorageError
from sleb.runtime.unfinished import names

MOST_BYTES = 32 << 20
"""Size in bytes above which a JSON or text file is not read: far above all that is written here."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk can refuse into a `StorageError` of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"The disk is full: {path} could not be written. What was finished is kept; free some space and resume."
            ) from error
        if error.errno in _FORBIDDEN:
            raise StorageError(
                f"{path} cannot be written ({error.strerror}). Choose another folder with `run_dir` or SLEB_HOME."
            ) from error
        raise StorageError(f"{path} could not be written: {error.strerror or error}.") from error


def replace_file(path: Path, content: str | bytes, *, make_folder: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = names.temporary(path)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def inside(root: Path, *parts: str) -> Path:
    """A path in a folder that anybody may have made, provided that no part of it below `root` is a link.

    Raises `RunError` for a link: what it leads to is not part of the folder.
    """
    path = root
    for part in parts:
        path /= part
        if path.is_symlink():
            raise RunError(f"{path} is a link, and a run folder holds none. Delete it, or put the file itself there.")
    return path


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file that is not a link. Raises `OSError`, and `ValueError` for a pipe or device."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")  # a pipe would never end
    return descriptor


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file that is not a link. Raises `OSError`, and `ValueError` for one above `most` bytes."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise ValueError(f"it is longer than {most >> 20} MiB")
    return data


def open_to_append(root: Path, *parts: str) -> IO[bytes]:
    """A file of a run folder, unbuffered, to be read and appended to. Raises `StorageError` or `RunError`."""
    path = inside(root, *parts)
    try:
        with writing(path):
            return os.fdopen(open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "ab+", buffering=0)
    except ValueError as error:
        raise RunError(f"{path} is not a regular file; delete it.") from error


def read_json(path: Path) -> Any:
    """A JSON file that a user named, links followed. Raises `ValueError` for what is not sound JSON, else `OSError`."""
    return parse_json(read_regular(path.resolve()))


def read_json_inside(root: Path, *parts: str, most: int = MOST_BYTES) -> Any:
    """A JSON file of a run folder. Raises `ValueError` for what is not sound JSON, `OSError`, or `RunError`."""
    return parse_json(read_regular(inside(root, *parts), most))


def parse_json(data: bytes) -> Any:
    """JSON whose numbers are numbers and whose text is text. Raises `ValueError` for everything else."""
    try:
        value = json.loads(data, parse_constant=_refused, parse_float=_finite, parse_int=_bounded)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in data.lower():  # half a character, which no screen and no file takes
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _bounded(text: str) -> int:
    return int(text) if len(text) <= 19 else _refused(text)


def expanded(path: Path) -> Path:
    """A path with `~` filled in. Raises `OptionError` for a user who does not exist."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OptionError(f"{path} names a home folder that does not exist.") from error
