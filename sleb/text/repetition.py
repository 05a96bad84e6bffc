"""Which windows of token ids repeat each other, or a passage of each other. Knows arrays of ids; no text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import xxhash

from sleb.runtime.array_files import NO_ARRAYS, read_arrays
from sleb.runtime.files import inside, replace_file

_PASSAGE, _PASSAGES_FILE = 32, "calibration.npz"  # tokens


def distinct_first(windows: np.ndarray, order: np.ndarray | None, *, all_of_them: bool) -> tuple[np.ndarray, int]:
    """Indices of windows in the order in which they are taken, the first of equal ones; and how many are distinct."""
    ordered = np.arange(len(windows)) if order is None else order
    seen: set[bytes] = set()
    first = []
    for index in ordered.tolist():
        digest = xxhash.xxh3_128_digest(windows[index].tobytes())
        if digest not in seen:
            seen.add(digest)
            first.append(index)
    return (ordered if all_of_them else np.asarray(first, dtype=np.int64)), len(seen)


def count_distinct(windows: np.ndarray) -> int:
    """The number of different windows (count, length)."""
    return distinct_first(windows, None, all_of_them=True)[1]


def keep_passages(run_dir: Path, ids: np.ndarray) -> None:
    """Keep in a run folder hashes, not text, by which another text is found to repeat these windows."""
    size = max(1, min(_PASSAGE, ids.shape[1] // 2))
    passages = _passages(ids[:, 1:], size)[:, ::size]  # the first may be a BOS that another reading has not
    buffer = io.BytesIO()
    np.savez_compressed(buffer, passages=np.unique(passages), size=np.int64(size), length=np.int64(ids.shape[1]))
    replace_file(inside(run_dir, _PASSAGES_FILE), buffer.getvalue())


def count_repeating(windows: np.ndarray, run_dir: Path) -> int:
    """The number of windows that repeat about half of one that a run chose on, or more; 0 where it kept no passages."""
    try:
        kept = read_arrays(run_dir, _PASSAGES_FILE)
        passages, size, length = kept["passages"], int(kept["size"]), int(kept["length"])
    except NO_ARRAYS:
        return 0
    if passages.dtype != np.uint64 or passages.ndim != 1 or not 0 < size <= windows.shape[1]:
        return 0
    needed = max(1, min(length, windows.shape[1]) // 2 // size - 1)
    return int((np.isin(_passages(windows, size), passages).sum(axis=1) >= needed).sum())


def count_sharing(windows: np.ndarray, others: np.ndarray) -> int:
    """The number of windows (count, length) that have a passage in common with any of the others, at any place.

    A passage is half a window, of the shorter ones, and at least eight tokens.
    """
    if not len(windows) or not len(others):
        return 0
    size = max(8, min(windows.shape[1], others.shape[1]) // 2)
    if size > min(windows.shape[1], others.shape[1]):
        return 0
    return int(np.isin(_passages(windows, size), _passages(others, size)).any(axis=1).sum())


def _passages(windows: np.ndarray, size: int) -> np.ndarray:
    """A rolling hash of every `size` tokens in a row, uint64 (count, length - size + 1)."""
    base, inverse = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    length = windows.shape[1]
    powers, back = (_powers(each, length) for each in (base, inverse))
    mixed = windows.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    sums = np.zeros((len(windows), length + 1), dtype=np.uint64)
    np.cumsum(mixed * powers, axis=1, out=sums[:, 1:])
    return (sums[:, size:] - sums[:, :-size]) * back[: length - size + 1]


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.ones(count, dtype=np.uint64)
    powers[1:] = np.multiply.accumulate(np.full(count - 1, base, dtype=np.uint64))
    return powers
