"""Similarity and predictions token by token, for a sample small enough to travel with a run. numpy only.

The cache holds every sampled token, on the machine that made it; a run folder is carried elsewhere, or kept for
years. So it takes some tokens along, and pages can always ask for another choice of them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sleb.analysis import block_output_cache
from sleb.runtime.array_files import NO_ARRAYS, read_arrays
from sleb.runtime.files import inside, replace_file

FILE = "tokens.npz"
SAMPLE_BYTES = 1 << 20  # about a megabyte, before compression
_MOST_BYTES = 64 << 20

_LEVELS = 65535  # of a stored cosine: steps of 3e-5, finer than bfloat16 outputs can tell


@dataclass(frozen=True, eq=False)
class Tokens:
    """T tokens of the calibration set; N blocks."""

    cosine: np.ndarray  # float32 (T, N+1, N+1)
    predictions: np.ndarray  # int32 (N, T): most likely next token after each block
    sequence: np.ndarray  # int32 (T,): index in the calibration set
    position: np.ndarray  # int32 (T,): index in the sequence

    def __len__(self) -> int:
        return len(self.sequence)


def of(outputs: block_output_cache.BlockOutputs) -> Tokens:
    """All tokens of a cache entry; the arrays stay memory-mapped."""
    return Tokens(outputs.cosine, outputs.predictions, outputs.sequence, outputs.position)


def sample(tokens: Tokens, size: int = SAMPLE_BYTES) -> Tokens:
    """Tokens drawn at random, as many as fit into `size` bytes: a fair sample for any choice among them."""
    points = tokens.cosine.shape[1]
    fitting = max(64, size // (points * (points - 1) + 4 * points))
    if len(tokens) <= fitting:
        return tokens
    # Evenly spaced ones would always sit at the same positions where the spacing divides the length.
    chosen = np.sort(np.random.default_rng(0).choice(len(tokens), fitting, replace=False))
    return Tokens(
        np.asarray(tokens.cosine[chosen]),
        np.asarray(tokens.predictions[:, chosen]),
        np.asarray(tokens.sequence[chosen]),
        np.asarray(tokens.position[chosen]),
    )


def write(run_dir: Path, tokens: Tokens) -> None:
    """Keep tokens in a run folder. Cosines are symmetric: one triangle, in 65,536 levels."""
    points = tokens.cosine.shape[1]
    upper = np.asarray(tokens.cosine)[(slice(None), *np.triu_indices(points, 1))]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        cosine=np.round((upper + 1.0) * (_LEVELS / 2)).astype(np.uint16),
        predictions=tokens.predictions,
        sequence=tokens.sequence,
        position=tokens.position,
    )
    replace_file(inside(run_dir, "analysis", FILE), buffer.getvalue())


def read(run_dir: Path, num_blocks: int) -> Tokens | None:
    """The tokens that `write` kept; None where there are none, or none that fit the run."""
    try:
        arrays = read_arrays(run_dir, "analysis", FILE, most=_MOST_BYTES)
        stored = {name: arrays[name] for name in ("cosine", "predictions", "sequence", "position")}
    except NO_ARRAYS:
        return None
    integers = all(stored[name].dtype.kind in "iu" for name in stored)
    if not integers or stored["sequence"].ndim != 1 or stored["cosine"].dtype != np.uint16:
        return None
    tokens, points = len(stored["sequence"]), num_blocks + 1
    shapes = {"cosine": (tokens, points * num_blocks // 2), "predictions": (num_blocks, tokens), "position": (tokens,)}
    if not tokens or any(stored[name].shape != shape for name, shape in shapes.items()):
        return None
    if any(stored[name].min() < 0 or stored[name].max() >= 2**31 for name in ("position", "sequence")):
        return None
    rows, columns = np.triu_indices(points, 1)
    cosine = np.ones((tokens, points, points), dtype=np.float32)
    values = stored.pop("cosine").astype(np.float32) * (2 / _LEVELS) - 1
    cosine[:, rows, columns] = cosine[:, columns, rows] = values
    return Tokens(cosine, **stored)
