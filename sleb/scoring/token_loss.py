"""Negative log-likelihood of tokens from logits, in float32 whatever the type of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

UPCAST_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}  # of one chunk of float32 logits: stays in a CPU's cache
NOTHING = -100  # the target that `cross_entropy` leaves out


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-token negative log-likelihood, float32 like `targets` (batch, sequence), from logits of any dtype.

    Upcast in pieces: `cross_entropy` on bfloat16 logits would return three digits, and all logits in float32 at
    once cost as much time as several blocks.
    """
    return _loss(logits.flatten(0, -2), targets.flatten()).view(targets.shape)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each row, float32 (rows,): `logits` are (rows, vocabulary), and upcast whole."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=NOTHING)


def _in_small_parts(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    rows = max(1, UPCAST_BYTES[kind_of(logits.device)] // (4 * logits.shape[-1]))
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([cross_entropy(part, goal) for part, goal in parts])


_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _in_small_parts


@contextmanager
def losses_by(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it `token_nll` calls something that does the same as `cross_entropy`, with many rows at once."""
    global _loss
    before, _loss = _loss, loss
    try:
        yield
    finally:
        _loss = before


def kind_of(device: torch.device) -> str:
    """The kind of device by which limits are set: `cuda` or `cpu`."""
    return "cuda" if device.type == "cuda" else "cpu"
