"""The plain way: one forward pass for each skip set. Slower than the sweep, and its reference implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sleb.model.block_stack import BlockStack
from sleb.model.out_of_memory import is_out_of_memory
from sleb.scoring.sweep_plan import SkipSet
from sleb.scoring.token_loss import chunked_cross_entropy, token_nll

log = logging.getLogger(__name__)

MODEL_FAILURES = (LookupError, ArithmeticError, TypeError, AttributeError, ValueError, RuntimeError)
"""Exceptions of a model that cannot run without some of its blocks."""


@dataclass(frozen=True)
class ForwardLogits:
    """Logits (batch, sequence, vocabulary) that a forward pass gave."""

    logits: torch.Tensor

    def at(self, positions: slice) -> torch.Tensor:
        """The logits of some positions, (batch, positions, vocabulary)."""
        return self.logits[:, positions]

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All positions but the last, which predicts nothing, in one piece."""
        part = slice(0, self.logits.shape[1] - 1)
        yield part, self.logits[:, part]


def plain_logits(
    stack: BlockStack, skip_sets: Sequence[SkipSet], ids: torch.Tensor, progress: Callable[[float, str], None]
) -> Iterator[tuple[SkipSet, ForwardLogits]]:
    """Each skip set's logits on a batch of token ids (batch, sequence), one forward pass at a time.

    They are NaN where the model cannot run without the blocks. `progress` is called with the work done, in block
    evaluations, and where that was.
    """
    for skipped in dict.fromkeys(tuple(sorted(skipped)) for skipped in skip_sets):
        yield skipped, ForwardLogits(_forward_or_nan(stack, skipped, ids))
        progress(float((len(stack) - len(skipped)) * len(ids)), f"without {list(skipped)}")


def plain_nll(stack: BlockStack, skipped: SkipSet, ids: torch.Tensor) -> torch.Tensor:
    """The reference implementation of scoring: nats (batch,), float64, by one forward pass with the blocks skipped.

    Raises whatever the model raises that cannot run without the blocks (`MODEL_FAILURES`).
    """
    with stack.skipping(skipped):
        logits = stack.forward(ids)
    nll = token_nll(logits[:, :-1], ids[:, 1:].to(logits.device), chunked_cross_entropy)
    return nll.double().sum(dim=1).to(ids.device)


def _forward_or_nan(stack: BlockStack, skipped: SkipSet, ids: torch.Tensor) -> torch.Tensor:
    try:
        with stack.skipping(skipped):
            return stack.forward(ids)
    except MODEL_FAILURES as error:
        if is_out_of_memory(error):
            raise
        log.warning("The model cannot run without blocks %s: %s", list(skipped), error)
        return torch.full((1, 1, 1), float("nan"), device=ids.device).expand(*ids.shape, stack.config.vocab_size)
