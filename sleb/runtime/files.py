"""Writing files so that nothing is lost: whole or not at all, and what a disk refuses in one sentence."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sleb.errors import OptionError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ARRAYS = (
    KeyError, TypeError, EOFError, NotImplementedError, MemoryError, OverflowError, RecursionError, SyntaxError,
    RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading an `.npz` file that is damaged, or was made to do damage, raises beside `ValueError`."""
MOST_BYTES = 64 << 20
"""Of a record: none that a program wrote comes near, and no longer one is read."""
MOST_TEXT_BYTES = 2 << 30
"""Of a text that is read whole."""
MOST_ARRAY_BYTES = 512 << 20
"""Of the arrays in one file, unpacked."""
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
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def read_json(path: Path) -> Any:
    """A JSON file from anywhere. Raises `ValueError` for what is none, or holds what nobody wrote, else `OSError`."""
    return parse_json(read_bytes(path))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A whole file from anywhere. Raises `ValueError` for what is none, or far too long to be ours, else `OSError`."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no regular file")  # a pipe would never end
    with open(path, "rb") as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise ValueError(f"it is longer than {most >> 20} MiB")
    return data


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text that somebody named. Raises `ValueError` where it is longer than any that is used whole, or `OSError`."""
    if path.stat().st_size > MOST_TEXT_BYTES:
        raise ValueError(f"it is longer than {MOST_TEXT_BYTES >> 30} GiB")
    return path.read_text(encoding=encoding)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` file from anywhere. Raises `ValueError` for what is damaged or too large, else `OSError`."""
    file = io.BytesIO(read_bytes(path, MOST_ARRAY_BYTES))
    try:
        with zipfile.ZipFile(file) as packed:
            unpacked = sum(each.file_size for each in packed.infolist())
        if unpacked > MOST_ARRAY_BYTES:
            raise ValueError(f"its arrays are longer than {MOST_ARRAY_BYTES >> 20} MiB")
        with np.load(file) as arrays:
            found = dict(arrays)
    except _NO_ARRAYS as error:
        raise ValueError(f"it holds no arrays ({type(error).__name__})") from error
    if not all(isinstance(each, np.ndarray) for each in found.values()):  # another file comes as its bytes
        raise ValueError("it holds something other than arrays")
    return found


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


def save_text(path: Path, text: str, *, replace: bool) -> None:
    """Write a file that somebody named. Raises `OptionError` where that would lose one, unless it may go."""
    target = expanded(path)
    if target.is_dir() or str(path).endswith(os.sep):
        raise OptionError(f"{path} is a folder; name a file.")
    if target.exists() and not target.is_file():  # a device or a pipe is written to, never replaced
        with writing(target), open(target, "w", encoding="utf-8") as file:
            file.write(text)
        return
    if target.exists() and not replace:
        raise OptionError(f"{path} is there already; name another file, or add --replace.")
    replace_file(target.resolve(), text)


def expanded(path: Path) -> Path:
    """With `~` filled in. Raises `OptionError` for a user who is not there."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OptionError(f"{path} names a home folder that is not there.") from error
