"""What the headers of a model's safetensors files announce: names, types and sizes of tensors. Reads no weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of plain weights: as the header has them, and as torch calls them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header announces it."""

    kind: str
    """As safetensors calls it, such as BF16 or F8_E4M3."""
    elements: int


def read(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Name of each tensor in these files -> what its header says."""
    from safetensors import safe_open

    found: dict[str, StoredTensor] = {}
    for path in dict.fromkeys(files):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = StoredTensor(str(part.get_dtype()), math.prod(part.get_shape()))
    return found


def main_dtype(stored: Mapping[str, StoredTensor]) -> str | None:
    """The type that most weights have, as torch calls it; None where they have none that is computed in."""
    counts: Counter[str] = Counter()
    for tensor in stored.values():
        counts[tensor.kind] += tensor.elements
    return FLOATS.get(max(counts, key=counts.__getitem__, default=""))
