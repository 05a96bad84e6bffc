"""A GGUF file's header, walked within bounds that follow from the file's size. Decodes no weight; needs no torch.

The gguf library believes what a header announces: 49 bytes that announce 2^40 entries take all the memory there is.
So every file is walked here before that library opens it, by offsets, without making an object for each entry.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.errors import ModelError, excerpt, quoted
from sleb.model.inspection import model_files

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
"""Number of a type in the file -> its letter in `struct`."""
_STRING, _ARRAY = 8, 9

_MOST_SETTINGS = 1 << 16
_MOST_TENSORS = 1 << 17
_MOST_ENTRIES = 3_000_000
"""The most entries of all lists together; the library takes 1 kB for each. Vocabularies have up to a third."""
_DEEPEST_LIST = 4
_LONGEST_NAME = 1 << 16  # bytes, as the format has it
_LONGEST_KEPT = 1 << 12  # bytes of a string setting that is handed on
_MOST_DIMENSIONS = 8
_LARGEST_ALIGNMENT = 1 << 20
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_SIZES = (
    ("block_count",),
    ("embedding_length",),
    ("attention.head_count", "ssm.state_size"),
    ("feed_forward_length", "expert_feed_forward_length", "ssm.inner_size"),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
"""Names of sizes that llama.cpp needs from every file, too: one of each."""
_FAILURES = (OSError, ValueError, struct.error, OverflowError, UnicodeDecodeError)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header announces it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """`gguf.GGMLQuantizationType`."""
    offset: int
    """Offset in bytes from where the tensors begin."""


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file, checked to fit into the file."""

    settings: dict[str, Any]
    """Numbers, and texts that are short; lists are left out."""
    tensors: tuple[TensorInfo, ...]
    keys: frozenset[str] = frozenset()
    """Names of all settings, lists included."""

    @property
    def architecture(self) -> str:
        """The family of models that it is of; empty where it does not say."""
        name = self.settings.get("general.architecture")
        return name if isinstance(name, str) else ""

    @property
    def elements(self) -> int:
        """Weights in the file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def weight_type(self) -> str:
        """The type that most weights have, as llama.cpp calls it."""
        from gguf.constants import GGMLQuantizationType

        counts: Counter[int] = Counter()
        for tensor in self.tensors:
            counts[tensor.kind] += math.prod(tensor.shape)
        return GGMLQuantizationType(max(counts, key=counts.__getitem__)).name


def check(path: Path) -> Header:
    """The header of a file that the gguf library may open. Raises `ModelError` for every other file."""
    try:
        with _opened(path) as cursor:
            stored, tensors = cursor.settings(cursor.counts()), cursor.tensors()
            settings = _kept(stored)
            cursor.require_inside(settings.get("general.alignment", 32), tensors)
    except _Refused as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}; fetch it again.") from error
    except _FAILURES as error:
        raise ModelError(f"{path} is damaged or truncated; fetch it again ({type(error).__name__}).") from error
    header = Header(settings, tensors, frozenset(stored))
    own = ((key, value) for key, value in settings.items() if key.startswith(header.architecture))
    model_files.require_modest(str(path), {key.rpartition(".")[2]: value for key, value in own})
    return header


def settings(path: Path) -> dict[str, Any]:
    """The settings alone, of a file that may be cut off behind them. Raises `ModelError`."""
    try:
        with _opened(path) as cursor:
            return _kept(cursor.settings(cursor.counts()))
    except (_Refused, *_FAILURES) as error:
        raise ModelError(f"{path} cannot be read as GGUF ({excerpt(error)}); fetch it again.") from error


def require_single(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises `ModelError` for one of several parts of a model, by its name or by what it says."""
    count = settings.get("split.count")
    if _PART.search(path.name) or (isinstance(count, int) and count > 1):
        raise ModelError(
            f"{path} is one of several parts; merge them into one file first: llama-gguf-split --merge {path.name} "
            "OUT.gguf"
        )


def require_model(path: Path, header: Header) -> None:
    """Raises `ModelError` for a file that is not a complete model, or leaves out sizes, which would be guessed."""
    require_single(path, header.settings)
    if not header.architecture:
        raise ModelError(f"{path} does not say of which architecture it is (general.architecture); fetch it again.")
    if header.settings.get("general.type", "model") != "model":
        raise ModelError(f"{path} is not a model but a file of type {quoted(header.settings['general.type'])}.")
    if not header.tensors:
        raise ModelError(f"{path} holds no tensors; fetch it again.")
    for names in _SIZES:
        if not any(f"{header.architecture}.{name}" in header.keys for name in names):
            raise ModelError(
                f"{path} does not say its {header.architecture}.{names[0]}, and transformers would take another "
                "model's; fetch it again."
            )
    count = header.settings.get(f"{header.architecture}.block_count")
    blocks = {int(block[1]) for each in header.tensors if (block := _BLOCK.match(each.name))}
    if blocks != set(range(count if isinstance(count, int) else 0)):
        raise ModelError(
            f"{path} says it has {excerpt(count, 30)} blocks and holds tensors of {len(blocks)}; fetch it again."
        )


def require_rope(path: Path, header: Header, config: Any) -> None:
    """Raises `ModelError` where the file scales rotary positions, and the config read from it does not.

    transformers reads that for few architectures, and computes with plain positions for the others.
    """
    named = header.settings.get(f"{header.architecture}.rope.scaling.type", "none")
    is_named = named not in ("none", "")
    scaled = is_named or any(each.name.startswith("rope_f") for each in header.tensors)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each.get("rope_type", "default") for each in (rope, *rope.values()) if isinstance(each, Mapping)]
    base = header.settings.get(f"{header.architecture}.rope.freq_base", 10_000.0)
    theta = rope.get("rope_theta", base)  # some families have several
    if scaled and set(kinds) <= {"default"}:
        difference = (
            f"{excerpt(named, 30)} scaling" if is_named else "factors of their own (rope_freqs.weight, for one)"
        )
    elif not math.isclose(theta, base, rel_tol=1e-6):
        difference = f"a base of {base:,.0f}"
    else:
        return
    raise ModelError(
        f"{path} has rotary positions with {difference}, which transformers does not read from a GGUF file of the "
        f"architecture {excerpt(header.architecture, 40)}: its numbers would be another model's. Use the model's "
        "safetensors."
    )


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


class _Refused(Exception):
    """Raised, with a clause, for a header that cannot be true; never leaves this file."""


@contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise ModelError(f"{path} is not a GGUF file (it begins with {magic!r}).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Cursor(data)


class _Cursor:
    """A place in the file, which moves on over what is read or skipped."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = len(MAGIC)
        self.order = "<"
        self.entries = 0
        self.tensor_count = 0

    def counts(self) -> int:
        """The number of settings; that of tensors is kept."""
        version = self.number("I")
        if version & 0xFFFF == 0:  # written for machines of the other byte order
            self.order = ">"
            self.place = len(MAGIC)
            version = self.number("I")
        if version not in _VERSIONS:
            raise _Refused(f"it is of version {version}, and {' and '.join(map(str, _VERSIONS))} are known")
        self.tensor_count, count = self.number("Q"), self.number("Q")
        self.require(self.tensor_count, 24, _MOST_TENSORS, "tensors")
        self.require(count, 13, _MOST_SETTINGS, "settings")
        return count

    def settings(self, count: int) -> dict[str, Any]:
        """All settings; of lists only that they end inside the file, and None."""
        settings: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(_LONGEST_NAME, "a setting's name")
            if key in settings:
                raise _Refused(f"it says {excerpt(key)!r} twice")
            settings[key] = self.value(self.number("I"))
        return settings

    def value(self, kind: int, depth: int = 0) -> Any:
        """A setting's value; None for a list, and for a text that is long."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            size = self.number("Q")
            start = self.skip(size, 1, "a text")
            return self.data[start : self.place].decode("utf-8", "replace") if size <= _LONGEST_KEPT else None
        if kind != _ARRAY:
            raise _Refused(f"a setting is of type {kind}, which is not known")
        if depth == _DEEPEST_LIST:
            raise _Refused("a list is nested too deeply")
        of, count = self.number("I"), self.number("Q")
        self.entries += count
        if self.entries > _MOST_ENTRIES:
            raise _Refused(f"its lists announce more than {_MOST_ENTRIES:,} entries")
        if of in _SCALARS:
            self.skip(count, struct.calcsize(f"<{_SCALARS[of]}"), "a list")
            return None
        self.require(count, 8, _MOST_ENTRIES, "entries of a list")
        for _ in range(count):
            if of == _STRING:
                self.skip(self.number("Q"), 1, "a text")
            else:
                self.value(of, depth + 1)
        return None

    def tensors(self) -> tuple[TensorInfo, ...]:
        """What the header says of each tensor."""
        tensors: dict[str, TensorInfo] = {}
        for _ in range(self.tensor_count):
            name = self.text(_LONGEST_NAME, "a tensor's name")
            dimensions = self.number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise _Refused(f"a tensor has {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            if name in tensors or 0 in shape:
                raise _Refused(f"the tensor {excerpt(name)!r} is there twice, or empty")
            tensors[name] = TensorInfo(name, shape, self.number("I"), self.number("Q"))
        return tuple(tensors.values())

    def require_inside(self, alignment: Any, tensors: tuple[TensorInfo, ...]) -> None:
        """Every tensor lies in the file. Raises `_Refused`, or `ValueError` for a type that is not known."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise _Refused(f"its alignment is {excerpt(alignment)}")
        room = len(self.data) - -(-self.place // alignment) * alignment
        for tensor in tensors:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
            end = tensor.offset + math.prod(tensor.shape) * size // block
            if end > room:
                raise _Refused(f"the tensor {excerpt(tensor.name)!r} ends {end - room:,} bytes behind the file's end")

    def number(self, letter: str) -> Any:
        """The next scalar of the header."""
        form = self.order + letter
        (number,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return number

    def text(self, most: int, subject: str) -> str:
        """A short text."""
        size = self.number("Q")
        if size > most:
            raise _Refused(f"{subject} has {size:,} bytes")
        start = self.skip(size, 1, subject)
        return self.data[start : self.place].decode()

    def skip(self, count: int, size: int, subject: str) -> int:
        """Move over `count` things of `size` bytes; where they begin."""
        left = len(self.data) - self.place
        if count > left // size:
            raise _Refused(f"{subject} announces {count:,} entries of {size} bytes, and {left:,} bytes are left")
        self.place += count * size
        return self.place - count * size

    def require(self, count: int, size: int, most: int, subject: str) -> None:
        """Raises `_Refused` where `count` things of at least `size` bytes cannot follow."""
        left = len(self.data) - self.place
        if count > min(most, left // size):
            raise _Refused(f"it announces {count:,} {subject}, and {left:,} bytes are left")
