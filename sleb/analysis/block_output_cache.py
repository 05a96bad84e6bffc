"""Block outputs on disk, keyed by what they depend on. Knows files and arrays; never sees a model or torch.

An entry is a folder `<home>/cache/block-outputs/<key>/` that appears whole (written beside and renamed), is
verified when read, and is never changed afterwards but for the time of its last use. One writer works at a time
(file lock), readers need no lock: what they have mapped stays readable after an eviction.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sleb.analysis.cache_folder import FOLDER, META, describe, lock_of, remove, root_of
from sleb.errors import OptionError, quoted
from sleb.records import Record
from sleb.runtime.unfinished.names import is_unfinished, temporary

log = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Version of an entry's layout; part of the key, so that entries of another version are never met."""

DEFAULT_LIMIT_GB = 20.0
LIMIT_VARIABLE = "SLEB_CACHE_LIMIT"  # gigabytes; 0 turns the cache off
MOST_TOKENS = 4096
FEWEST_TOKENS = 256
LARGEST_SHARE = 4  # an entry takes at most one in so many parts of the limit

_UNFINISHED = ".tmp-"  # as earlier versions named what they were writing
_FILES: dict[str, tuple[str, ...]] = {
    "outputs.safetensors": ("outputs",),
    "cosine.safetensors": ("cosine",),
    "predictions.safetensors": (
        *("predictions", "token_ids", "sequence", "position", "random_cosine", "passage_top"),
        *("passage_probability", "generated_predictions", "generated_ids", "generated_sequence"),
    ),
}


@dataclass(frozen=True, eq=False)
class BlockOutputs:
    """The output of every block for the sampled tokens: N blocks, T tokens, H hidden size, G generated tokens.

    Read from disk, the arrays are memory-mapped and read-only: slicing `outputs` reads that slice alone.
    """

    model: str
    """The name that the model was loaded by, for the screen; not part of the key."""
    sequences: int
    """Sampled sequences; the last one may be cut."""
    sequence_length: int
    outputs: np.ndarray  # float32 (N+1, T, H): 0 is the embedding output, i + 1 is block i, before the norm
    cosine: np.ndarray  # float32 (T, N+1, N+1), per token
    predictions: np.ndarray  # int32 (N, T): most likely next token after each block; last: the model's own
    token_ids: np.ndarray  # int32 (T,)
    sequence: np.ndarray  # int32 (T,): index in the calibration set
    position: np.ndarray  # int32 (T,): index in the sequence
    random_token_id: int
    random_cosine: np.ndarray  # float32 (N+1, N+1): one random token fed alone
    generated_predictions: np.ndarray  # int32 (N, G): after each block, where a generated token was predicted
    generated_ids: np.ndarray  # int32 (G,)
    generated_sequence: np.ndarray  # int32 (G,): which prompt it continues
    generated_reason: str | None
    """The sentence that says why there are not any generated tokens; None where there are."""
    passage_top: np.ndarray  # int32 (P, N, 5): the first P sampled tokens, most likely next tokens first
    passage_probability: np.ndarray  # float32 (P, N, 5)
    versions: dict[str, str]
    """Versions of the libraries it was computed with: for the screen, not part of the key."""


class _FileCheck(Record):
    bytes: int
    xxh3: str


class _Meta(Record):
    """The facts of an entry that no array holds, and the checksums of its arrays."""

    cache_version: int
    key: str
    model: str
    depends: dict[str, str]
    """The parts of the key, in words."""
    versions: dict[str, str] = Field(default={})
    created: float
    """Seconds since the epoch."""
    sequences: int
    sequence_length: int
    random_token_id: int
    generated_reason: str | None
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, _FileCheck]


class _Damaged(ValueError):
    """An entry that is not what was written."""


def key_of(**parts: Any) -> str:
    """Key of an entry: 32 hexadecimal digits over everything it depends on. Arrays count by content."""
    hasher = xxhash.xxh3_128(f"version {CACHE_VERSION}\n".encode())
    for name, value in sorted(parts.items()):
        if isinstance(value, np.ndarray):
            digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(value).data)
            value = f"{value.dtype} {value.shape} {digest}"
        hasher.update(json.dumps([name, value], sort_keys=True, default=str).encode() + b"\n")
    return hasher.hexdigest()


def limit_bytes() -> int:
    """Size limit of all entries together, from `SLEB_CACHE_LIMIT` in gigabytes; 0 turns the cache off."""
    text = os.environ.get(LIMIT_VARIABLE, "").strip() or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < 1e9:
        raise OptionError(f"{LIMIT_VARIABLE} is {quoted(text)}; give gigabytes, or 0 to turn the cache off.")
    return int(limit * 1e9)


def tokens_that_fit(num_blocks: int, hidden_size: int, *, limit: int | None = None) -> int:
    """How many tokens to sample so that their entry stays below a quarter of the limit; at most 4,096.

    Below 256 tokens an analysis means little: then 256 are sampled, and `write` declines the entry.
    """
    per_token = 4 * (num_blocks + 1) * (hidden_size + num_blocks + 1) + 4 * (num_blocks + 3)
    limit = limit_bytes() if limit is None else limit
    if limit == 0:
        return MOST_TOKENS
    room = limit // LARGEST_SHARE - (4 << 20)  # generated tokens, the passage and the file headers
    return max(FEWEST_TOKENS, min(MOST_TOKENS, room // per_token))


def read(home: Path, key: str, *, verify: bool = True) -> BlockOutputs | None:
    """The entry, memory-mapped, or None. A damaged or incomplete one is removed, with a warning in the log.

    Marks the entry as used. Without `verify` only sizes and shapes are checked, not the content.
    """
    if not re.fullmatch("[0-9a-f]{32}", key):
        return None
    entry = root_of(home) / key
    if not entry.is_dir():
        return None
    outputs: BlockOutputs | None
    try:
        outputs = _open(entry, verify=verify)
    except (OSError, _Damaged):
        try:
            with lock_of(home):  # once more, with no writer at work: it may have been replaced meanwhile
                outputs = _open_or_remove(entry, verify=verify)
        except OSError as failure:
            log.warning("The damaged cache entry %s could not be removed: %s", entry, failure)
            return None
    if outputs is not None:
        with contextlib.suppress(OSError):  # a read-only cache can still be read
            os.utime(entry / META)
    return outputs


def write(home: Path, key: str, outputs: BlockOutputs, depends: dict[str, str]) -> bool:
    """Keep an entry, evicting the least recently used ones to make room; whether it was kept.

    A full disk, a read-only folder or an entry too large is a warning in the log, never an error: what was
    computed is in the caller's hands.
    """
    limit = limit_bytes()
    arrays = {name: np.ascontiguousarray(getattr(outputs, name)) for names in _FILES.values() for name in names}
    size = sum(array.nbytes for array in arrays.values())
    if size > limit // LARGEST_SHARE:
        if limit:
            sizes = f"{size / 1e9:.2f} GB are more than a quarter of {LIMIT_VARIABLE}, {limit / 1e9:.2f} GB"
            log.warning("The block outputs are not cached: %s.", sizes)
        return False
    root = root_of(home)
    partial = temporary(root / key)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock_of(home):
            _make_room(root, limit - size, spare=key)
            partial.mkdir()
            checks = {}
            for file, names in _FILES.items():
                path = partial / file
                save_file({name: arrays[name] for name in names}, path)
                checks[file] = _FileCheck(bytes=path.stat().st_size, xxh3=_hash_file(path))
            meta = _Meta(
                cache_version=CACHE_VERSION,
                key=key,
                model=outputs.model,
                depends=depends,
                versions=outputs.versions,
                created=time.time(),
                sequences=outputs.sequences,
                sequence_length=outputs.sequence_length,
                random_token_id=outputs.random_token_id,
                generated_reason=outputs.generated_reason,
                shapes={name: array.shape for name, array in arrays.items()},
                files=checks,
            )
            content = meta.model_dump(mode="json")
            text = json.dumps({"content": content, "xxh3": _hash_json(content)}, indent=1)
            (partial / META).write_text(text, encoding="utf-8")
            remove(root / key)
            os.replace(partial, root / key)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        log.warning("The block outputs could not be cached in %s: %s", root, error)
        return False
    return True


def _open(entry: Path, *, verify: bool) -> BlockOutputs:
    try:
        document = json.loads((entry / META).read_text(encoding="utf-8"))
        content, digest = document["content"], document["xxh3"]
        meta = _Meta.model_validate(content)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise _Damaged(f"{META} cannot be read") from error
    if _hash_json(content) != digest or meta.key != entry.name or meta.cache_version != CACHE_VERSION:
        raise _Damaged(f"{META} was changed")
    arrays: dict[str, np.ndarray] = {}
    for file, names in _FILES.items():
        check = meta.files.get(file)
        if check is None or (entry / file).stat().st_size != check.bytes:
            raise _Damaged(f"{file} has the wrong size")
        if verify and _hash_file(entry / file) != check.xxh3:
            raise _Damaged(f"{file} has the wrong content")
        mapped = _map(entry / file)
        for name in names:
            if name not in mapped or mapped[name].shape != tuple(meta.shapes[name]):
                raise _Damaged(f"{name} has the wrong shape")
            arrays[name] = mapped[name]
    return BlockOutputs(
        model=meta.model,
        sequences=meta.sequences,
        sequence_length=meta.sequence_length,
        random_token_id=meta.random_token_id,
        generated_reason=meta.generated_reason,
        versions=meta.versions,
        **arrays,
    )


def _open_or_remove(entry: Path, *, verify: bool) -> BlockOutputs | None:
    """Under the lock: read the entry once more, and remove it if it is damaged."""
    if not entry.is_dir():  # evicted a moment ago
        return None
    try:
        return _open(entry, verify=verify)
    except (OSError, _Damaged) as error:
        log.warning("Cached block outputs in %s are damaged (%s); they will be computed again.", entry, error)
        remove(entry)
        return None


def _map(path: Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file without reading it: its header is 8 bytes of length, then JSON."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        body = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:body].tobytes())
        kinds = {"F32": np.float32, "I32": np.int32}
        return {
            name: raw[body + tensor["data_offsets"][0] : body + tensor["data_offsets"][1]]
            .view(kinds[tensor["dtype"]])
            .reshape(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _Damaged(f"{path.name} is not a safetensors file") from error


def _make_room(root: Path, room: int, *, spare: str) -> None:
    """Under the lock: evict the least recently used entries until the rest fits into `room` bytes."""
    entries = []
    for child in root.iterdir():
        if is_unfinished(child.name) or child.name.startswith(_UNFINISHED):
            shutil.rmtree(child, ignore_errors=True)  # its writer was killed: this process has the lock
        elif child.is_dir() and child.name != spare:
            entries.append(describe(child, FOLDER))
    total = sum(entry.bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.last_used):
        if total <= room:
            return
        log.info("Evicting the block outputs of %s (%.2f GB) from the cache.", entry.model, entry.bytes / 1e9)
        remove(entry.path)
        total -= entry.bytes


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            hasher.update(piece)
    return hasher.hexdigest()


def _hash_json(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
