"""Arrays of a run folder, which anybody may have made: read within bounds, and without pickles."""

from __future__ import annotations

import io
import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sleb.errors import RunError
from sleb.runtime.files import inside, read_regular

MOST_ARRAY_BYTES = 512 << 20
"""Size in bytes above which arrays are not read: the scores of a step take megabytes."""
NO_ARRAYS = (OSError, ValueError, RunError, KeyError, TypeError)
"""Exceptions of reading an `.npz` file, or a name or a type in it, that is missing or damaged."""
_DAMAGED = (
    KeyError, TypeError, EOFError, NotImplementedError, MemoryError, OverflowError, RecursionError, SyntaxError,
    RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip
"""Exceptions, besides `ValueError`, of reading an `.npz` file that is damaged or made to do damage."""


def read_arrays(root: Path, *parts: str, most: int = MOST_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file of a run folder, by name. Raises `ValueError`, `OSError` or `RunError`."""
    data = io.BytesIO(read_regular(inside(root, *parts), most))
    try:
        with zipfile.ZipFile(data) as archive:
            members = archive.infolist()
            if sum(each.file_size for each in members) > most:
                raise ValueError(f"its arrays are longer than {most >> 20} MiB")
            for each in members:
                _require_as_large_as_promised(archive, each)
        data.seek(0)
        with np.load(data, allow_pickle=False) as arrays:
            return dict(arrays)
    except _DAMAGED as error:
        raise ValueError(f"it holds no arrays ({type(error).__name__})") from error


def _require_as_large_as_promised(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises `ValueError` for an array whose header promises more than there is: numpy would allocate that first."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} promises an array that it does not hold")
