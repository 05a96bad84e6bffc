"""The weights of a checkpoint without some blocks, copied byte for byte. Knows tensors by name; never sees a model.

A tensor of a block that stays has the block's new number in its name and the type in which it was stored. What belongs
to no block is copied as it is; so are the further blocks that some checkpoints hold behind the last one, to predict
several tokens at once (GLM, DeepSeek-V3), which are moved up to where the stack now ends.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sleb.errors import StorageError
from sleb.export.destination import saving
from sleb.model.inspection.stored_tensors import StoredTensor

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
_CHUNK = 1 << 24  # bytes
_Slices = tuple[int, int, tuple[int, ...]]  # the dimension, blocks before, blocks that stay

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: which stored one it is, and the slices of it that stay."""

    name: str
    stored_as: str
    """The name it had in the source."""
    source: StoredTensor
    slices: _Slices | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is written."""
        if self.slices is None:
            return self.source.shape
        dim, before, kept = self.slices
        return tuple(
            size // before * len(kept) if index == dim else size for index, size in enumerate(self.source.shape)
        )

    @property
    def size(self) -> int:
        """Size of what is written, in bytes."""
        if self.slices is None:
            return self.source.size
        _, before, kept = self.slices
        return self.source.size // before * len(kept)

    def chunks(self) -> Iterator[bytes]:
        """The bytes that are written, in order."""
        if self.slices is None:
            yield from _chunks(self.source.file, self.source.begin, self.source.size)
            return
        dim, before, kept = self.slices
        item, shape = self.source.item_size, self.source.shape
        assert item is not None  # or `without_blocks` had said None
        data = np.memmap(self.source.file, np.uint8, "r", self.source.begin, self.source.size)
        outer = int(np.prod(shape[:dim], dtype=np.int64))
        for row in data.reshape(outer, before, -1):
            for block in kept:
                yield row[block].tobytes()


@dataclass(frozen=True)
class Copy:
    """All tensors of a smaller checkpoint."""

    tensors: tuple[Tensor, ...]
    prefix: str
    """What the names of the blocks' tensors begin with, before their number."""
    further: tuple[tuple[int, int], ...]
    """Blocks behind the last one of the stack: the number they had, and the one they have now."""

    @property
    def size(self) -> int:
        """Size of what is written, in bytes."""
        return sum(tensor.size for tensor in self.tensors)


def without_blocks(
    stored: Mapping[str, StoredTensor],
    path: str,
    blocks: Sequence[Shapes],
    packed: Mapping[str, tuple[tuple[int, ...], int]],
    kept: Sequence[int],
) -> Copy | None:
    """The tensors to write for the blocks `kept`; None where the names do not show which tensor is of which block.

    `blocks` holds the shapes of each block's own tensors; `packed` those of tensors outside the stack at `path` that
    hold a slice for each block, with the dimension these are packed along.
    """
    prefix = _prefix(stored, path, blocks)
    if prefix is None:
        return None
    slices: dict[str, _Slices] = {}
    for name, (shape, dim) in packed.items():
        origin = _stored_as(name, shape, stored)
        if origin is None or stored[origin].item_size is None:
            return None
        slices[origin] = (dim, len(blocks), tuple(kept))
    position = {block: index for index, block in enumerate(kept)}
    tensors, further = [], {}
    for name, tensor in stored.items():
        number, rest = _number(name, prefix)
        if number is None:
            tensors.append(Tensor(name, name, tensor, slices.get(name)))
            continue
        if number >= len(blocks):
            further[number] = number - len(blocks) + len(kept)
        elif number not in position:
            continue
        new = further.get(number, position.get(number))
        tensors.append(Tensor(f"{prefix}.{new}.{rest}", name, tensor))
    return Copy(tuple(tensors), prefix, tuple(sorted(further.items())))


def write(copy: Copy, folder: Path, most: int | None = None) -> None:
    """Write the tensors in as many files as they came from, and check that every byte has arrived.

    With `most`, in more files where one would have more bytes and more than one tensor.
    """
    shards: dict[tuple[Path, int], list[Tensor]] = {}
    part = size = 0
    for tensor in sorted(copy.tensors, key=lambda tensor: tensor.source.file):
        own = (tensor.source.file, part)
        if most is not None and shards.get(own) and size + tensor.size > most:
            part += 1
        elif own not in shards:
            part = 0
        own = (tensor.source.file, part)
        size = tensor.size + (size if own in shards else 0)
        shards.setdefault(own, []).append(tensor)
    number = len(shards)
    names = [SINGLE]
    if number > 1:
        names = [f"model-{index:05}-of-{number:05}.safetensors" for index in range(1, number + 1)]
    weight_map: dict[str, str] = {}
    with saving():
        for name, tensors in zip(names, shards.values(), strict=True):
            # The order of the reference implementation: in it no number lies across its own alignment.
            tensors.sort(key=lambda tensor: (-(tensor.source.item_size or 0), tensor.name))
            data = _write_file(folder / name, tensors)
            _require_copied(folder / name, data, tensors)
            weight_map |= {tensor.name: name for tensor in tensors}
        if len(names) > 1:
            index = {"metadata": {"total_size": copy.size}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[Tensor]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        offsets = [begin, begin + tensor.size]
        header[tensor.name] = {"dtype": tensor.source.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        begin += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk)
    return 8 + len(raw)


def _require_copied(path: Path, data: int, tensors: Sequence[Tensor]) -> None:
    with open(path, "rb") as file:
        file.seek(data)
        for tensor in tensors:
            if any(file.read(len(chunk)) != chunk for chunk in tensor.chunks()):
                raise StorageError(
                    f"{tensor.name} has not arrived as it was; try again, on another disk if it stays so."
                )


def _chunks(path: Path, begin: int, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(begin)
        left = size
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise StorageError(f"{path} became shorter while it was read; fetch it again.")
            left -= len(chunk)
            yield chunk


def _number(name: str, prefix: str) -> tuple[int | None, str]:
    """Which block a tensor is of, and its name there."""
    if not name.startswith(f"{prefix}."):
        return None, ""
    number, _, rest = name[len(prefix) + 1 :].partition(".")
    return (int(number), rest) if number.isdecimal() and number.isascii() and rest else (None, "")


def _prefix(stored: Mapping[str, StoredTensor], path: str, blocks: Sequence[Shapes]) -> str | None:
    """The part of a tensor's name before the block's number: of all candidates, the one that most tensors have."""
    matches: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for name, tensor in stored.items():
        parts = name.split(".")
        for index, part in enumerate(parts[1:-1], 1):
            if not (part.isdecimal() and part.isascii()) or len(part) > 6:
                continue
            prefix, number = ".".join(parts[:index]), int(part)
            numbers.setdefault(prefix, set()).add(number)
            if number < len(blocks):
                same = blocks[number].get(".".join(parts[index + 1 :])) == tensor.shape
                matches[prefix] = matches.get(prefix, 0) + same
    complete = [prefix for prefix, blocks_of in numbers.items() if blocks_of >= set(range(len(blocks)))]
    best = max((matches.get(prefix, 0) for prefix in complete), default=0)
    likeliest = [prefix for prefix in complete if matches.get(prefix, 0) == best]
    if best == 0:
        return None
    if path in likeliest:
        return path
    return likeliest[0] if len(likeliest) == 1 else None


def _stored_as(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> str | None:
    """The stored name of a tensor outside the stack: its own, or the only one with its end and shape."""
    if name in stored:
        return name if stored[name].shape == shape else None
    end = ".".join(name.split(".")[-2:])
    likely = [each for each, tensor in stored.items() if each.endswith(end) and tensor.shape == shape]
    return likely[0] if len(likely) == 1 else None
