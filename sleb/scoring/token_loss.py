"""Negative log-likelihood of tokens from logits, in float32 whatever the type of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch

UPCAST_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}  # of one chunk of float32 logits: stays in a CPU's cache
NOTHING = -100  # the target that `cross_entropy` leaves out

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of logits (rows, vocabulary) and targets (rows,) that gives nats per row, float32 (rows,)."""


def token_nll(logits: torch.Tensor, targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Nats of each token, float32 with the shape of `targets` (batch, sequence), from logits of any dtype."""
    return loss(logits.flatten(0, -2), targets.flatten()).view(targets.shape)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row in nats, float32 (rows,), from logits (rows, vocabulary) that are upcast at once."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=NOTHING)


def chunked_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy` with few rows upcast at a time.

    On bfloat16 logits the loss would have three digits, and all logits in float32 at once cost as much time as several
    blocks.
    """
    rows = max(1, UPCAST_BYTES[kind_of(logits.device)] // (4 * logits.shape[-1]))
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([cross_entropy(part, goal) for part, goal in parts])


def kind_of(device: torch.device) -> str:
    """The kind of device by which limits are set: `cuda` or `cpu`."""
    return "cuda" if device.type == "cuda" else "cpu"
