"""Writing files so that nothing is lost: whole or not at all, and what a disk refuses in one sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb.errors import OptionError, StorageError
from sleb.runtime.unfinished import names

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ARRAYS = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading an `.npz` file that is missing or damaged raises."""
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk can refuse into one sentence; nothing already written is touched."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"The disk is full: {path} could not be written. What was finished is kept; free some space and resume."
            ) from error
        if error.errno in _FORBIDDEN:
            raise StorageError(
                f"{path} cannot be written ({error.strerror}). Choose another folder with --run-dir or SLEB_HOME."
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


def read_json(path: Path) -> Any:
    """A JSON file from anywhere. Raises `ValueError` for what is none, or holds what nobody wrote, else `OSError`."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no regular file")  # a pipe would never end
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """JSON whose numbers are numbers and whose text is text. Raises `ValueError` for everything else."""
    try:
        found = json.loads(data, parse_constant=_refused, parse_float=_finite, parse_int=_bounded)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in data.lower():  # half a character, which no screen and no file takes
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _bounded(text: str) -> int:
    return int(text) if len(text) <= 19 else _refused(text)


def expanded(path: Path) -> Path:
    """With `~` filled in. Raises `OptionError` for a user who is not there."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OptionError(f"{path} names a home folder that is not there.") from error
