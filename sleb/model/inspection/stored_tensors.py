"""The contents of safetensors files: names, types, shapes, where the bytes lie. Reads headers, no weights. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sleb.errors import ModelError, excerpt

_HEADER_BYTES = 100_000_000  # as the format has it
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Types that a model can be loaded in, by the format's name, as torch calls them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    """The type by the format's name: BF16, F32, U8 and so on."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its bytes in the file."""
    size: int
    """Size in bytes."""

    @property
    def elements(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    @property
    def item_size(self) -> int | None:
        """Bytes of one number; None where several share a byte."""
        bits = _BITS.get(self.dtype, 0)
        return bits // 8 if bits and bits % 8 == 0 else None


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of these files by name. Raises `ModelError` for a file that does not hold what its header says."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        tensors |= _header(path)
    return tensors


def main_dtype(stored: Mapping[str, StoredTensor]) -> str | None:
    """The type that most weights have, as torch calls it; None where they have none that is computed in."""
    counts: Counter[str] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += tensor.elements
    return FLOATS.get(max(counts, key=counts.__getitem__, default=""))


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _HEADER_BYTES):
            raise ModelError(f"{path} is not a whole safetensors file; fetch it again.")
        raw = file.read(length)
    try:
        listing = json.loads(raw)
        listing.pop("__metadata__", None)
        return {name: _entry(path, name, entry, 8 + length, size) for name, entry in listing.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged header ({excerpt(error)}); fetch it again.") from error


def _entry(path: Path, name: str, entry: dict[str, object], data: int, size: int) -> StoredTensor:
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{name} is not described as a tensor is")
    begin, end = offsets
    numbers = (*shape, begin, end)
    sound = all(type(each) is int and each >= 0 for each in numbers) and begin <= end <= size - data
    if not sound or (kind in _BITS and math.prod(shape) * _BITS[kind] != 8 * (end - begin)):
        raise ValueError(f"{name} does not lie where the header says")
    return StoredTensor(path, kind, tuple(shape), data + begin, end - begin)
