"""How similar block outputs are: the paper's Figure 6 and Metric1. Sums are done here, charts elsewhere.

Everything but `block_influence` is numpy on the per-token cosine matrices of a cache entry, so that a page
can ask for any choice of tokens; torch is imported by `block_influence` alone, when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sleb.model.out_of_memory import in_batches
from sleb.records import Analysis, Similarity

if TYPE_CHECKING:
    from sleb.model.block_stack import BlockStack

_CHUNK_BYTES = 32 << 20
_DIGITS = 6  # of the matrices in a record: finer than bfloat16 outputs can tell, and half the file


@dataclass(frozen=True, eq=False)
class TokenSimilarity:
    """Similarity over one choice of tokens, float64; index 0 is the embedding output, index i + 1 is block i."""

    token_count: int
    mean: np.ndarray  # (N+1, N+1) mean cosine
    angular: np.ndarray  # (N+1, N+1) mean angular distance arccos(cosine) / pi, in [0, 1]

    @property
    def metric1(self) -> np.ndarray:
        """Metric1 of each block: 1 - mean cosine of its input and output (paper, equation 3)."""
        return 1.0 - np.diagonal(self.mean, offset=1)

    @property
    def chunk_angular_distance(self) -> np.ndarray:
        """Angular distance between a chunk's input and output, (N, N) [length - 1][start]; NaN where no chunk fits."""
        num_blocks = len(self.mean) - 1
        chunks = np.full((num_blocks, num_blocks), np.nan)
        for length in range(1, num_blocks + 1):
            chunks[length - 1, : num_blocks + 1 - length] = np.diagonal(self.angular, offset=length)
        return chunks


def recorded(analysis: Analysis, tokens: Literal["all", "without first", "random"]) -> TokenSimilarity:
    """The similarity that a run recorded, for the choices of tokens that it recorded.

    Angular distances were recorded over all tokens, and follow exactly from the random token's cosine. Without first
    tokens they are those of the mean cosine: an approximation, a little larger where cosines are positive.
    """
    record = analysis.similarity
    if tokens == "all":
        angular = np.zeros((len(record.mean), len(record.mean)))
        for length, row in enumerate(record.chunk_angular_distance, start=1):
            distances = np.array(row[: len(row) + 1 - length], dtype=np.float64)
            starts = np.arange(len(distances))
            angular[starts, starts + length] = angular[starts + length, starts] = distances
        return TokenSimilarity(record.token_count, np.array(record.mean), angular)
    mean = np.array(record.random_token if tokens == "random" else record.mean_without_first)
    count = 1 if tokens == "random" else max(1, record.token_count - analysis.description.sequences)
    return TokenSimilarity(count, mean, np.arccos(np.clip(mean, -1.0, 1.0)) / np.pi)


def best_chunks(distances: np.ndarray) -> np.ndarray:
    """The start of the chunk of each length that turns least, int64 (N,), from distances (N, N) [length - 1][start]."""
    return np.where(np.isnan(distances), np.inf, distances).argmin(axis=1)


def cosine_matrices(outputs: np.ndarray) -> np.ndarray:
    """Cosine similarity of all pairs of block outputs, per token: (N+1, T, H) -> float32 (T, N+1, N+1)."""
    points, tokens, hidden_size = outputs.shape
    cosine = np.empty((tokens, points, points), dtype=np.float32)
    chunk = max(1, _CHUNK_BYTES // (4 * points * hidden_size))
    for start in range(0, tokens, chunk):
        rows = np.ascontiguousarray(outputs[:, start : start + chunk].swapaxes(0, 1), dtype=np.float32)
        # Scaled first: squares of a large hidden state would leave float32's range.
        rows = rows / np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        np.matmul(rows, rows.swapaxes(1, 2), out=cosine[start : start + chunk])
    np.clip(cosine, -1.0, 1.0, out=cosine)
    cosine[:, np.arange(points), np.arange(points)] = 1.0
    return cosine


def choose_tokens(
    sequence: np.ndarray,
    position: np.ndarray,
    *,
    sequences: Sequence[int] | None = None,
    start: int = 0,
    stop: int | None = None,
    without_first: bool = False,
) -> np.ndarray:
    """Indices of the sampled tokens at positions start <= p < stop of some sequences, by default of all.

    `without_first` leaves out each sequence's first token, whose huge norm hides the rest.
    """
    chosen = position >= max(start, 1 if without_first else 0)
    if stop is not None:
        chosen &= position < stop
    if sequences is not None:
        chosen &= np.isin(sequence, list(sequences))
    return np.flatnonzero(chosen)


def over_tokens(cosine: np.ndarray, tokens: np.ndarray | None = None) -> TokenSimilarity:
    """Mean cosine and angular distance over some tokens of (T, N+1, N+1), by their indices; by default all.

    Raises `ValueError` when no token is chosen: a page has an empty state for that.
    """
    tokens = np.arange(len(cosine)) if tokens is None else np.asarray(tokens)
    if len(tokens) == 0:
        raise ValueError("No token is chosen.")
    points = cosine.shape[1]
    total, angles = np.zeros((points, points)), np.zeros((points, points))
    chunk = max(1, _CHUNK_BYTES // (4 * points * points))
    for start in range(0, len(tokens), chunk):
        part = np.asarray(cosine[tokens[start : start + chunk]])
        total += part.sum(axis=0, dtype=np.float64)
        angles += np.arccos(np.clip(part, -1.0, 1.0)).sum(axis=0, dtype=np.float64)
    return TokenSimilarity(len(tokens), total / len(tokens), angles / (np.pi * len(tokens)))


def similarity_from(
    cosine: np.ndarray, positions: np.ndarray, random_cosine: np.ndarray, random_token_id: int
) -> Similarity:
    """The record of a run: all sampled tokens, and the paper's single random token (3.1)."""
    everything = over_tokens(cosine)
    later = np.flatnonzero(positions > 0)
    without_first = over_tokens(cosine, later) if len(later) else everything
    return Similarity(
        token_count=everything.token_count,
        mean=_rounded(everything.mean),
        mean_without_first=_rounded(without_first.mean),
        random_token=_rounded(np.asarray(random_cosine, dtype=np.float64)),
        random_token_id=random_token_id,
        metric1=tuple(everything.metric1.tolist()),
        chunk_angular_distance=tuple(
            tuple(None if np.isnan(value) else round(value, _DIGITS) for value in row)
            for row in everything.chunk_angular_distance.tolist()
        ),
    )


def block_influence(
    stack: BlockStack,
    ids: np.ndarray,
    batch_size: int | None = None,
    watch: Callable[[int], None] = lambda sequences: None,
) -> np.ndarray:
    """Metric1's sums: 1 - cosine of a block's input and output, summed over all tokens of each sequence.

    `ids` is int64 (sequences, length); the result is float64 (blocks, sequences). `watch` is called with
    the number of sequences done. Out of memory halves the batch.
    """
    import torch

    influence = np.empty((len(stack), len(ids)), dtype=np.float64)

    def measure(start: int, stop: int) -> None:
        with torch.inference_mode():
            outputs = stack.outputs(torch.as_tensor(ids[start:stop], device=stack.device))
            before = outputs[0].float()
            for block in range(len(stack)):
                after = outputs[block + 1].to(before.device).float()
                cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)  # (batch, sequence)
                influence[block, start:stop] = (1.0 - cosine).double().sum(dim=1).cpu().numpy()
                before = after
        watch(stop - start)

    in_batches(len(ids), batch_size or max(1, batch_tokens(stack) // ids.shape[1]), measure)
    return influence


def batch_tokens(stack: BlockStack) -> int:
    """Tokens of a batch whose block outputs are all held at once: enough to keep the device busy."""
    return 4096 if stack.device.type == "cuda" else 1024


def _rounded(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.round(matrix, _DIGITS).tolist())
