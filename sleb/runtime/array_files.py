"""Arrays of a run folder, which anybody may have made: read within bounds, and without pickles."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from sleb.errors import RunError
from sleb.runtime.files import inside, read_regular

MOST_ARRAY_BYTES = 2**31
"""Size in bytes above which arrays are not read: the scores of a step take megabytes."""
NO_ARRAYS = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, MemoryError, OverflowError, RecursionError,
    SyntaxError, RuntimeError, zipfile.BadZipFile, zlib.error, RunError,
)  # fmt: skip
"""What reading an `.npz` file raises that is missing, damaged, too large, or was made to do damage."""


def read_arrays(root: Path, *parts: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file of a run folder, by name. Raises one of `NO_ARRAYS`."""
    data = read_regular(inside(root, *parts), MOST_ARRAY_BYTES)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(each.file_size for each in members) > MOST_ARRAY_BYTES:
            raise ValueError(f"its arrays have more than {MOST_ARRAY_BYTES:,} bytes")
        for each in members:
            _require_as_large_as_promised(archive, each)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _require_as_large_as_promised(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """numpy allocates what an array's header promises before it reads what is there."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} promises an array that it does not hold")
