"""Before every run: each candidate by the sweep and by a plain forward pass, on one tiny batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sleb.model.block_stack import BlockStack
from sleb.records import SelfCheck
from sleb.scoring.plain_pass import MODEL_FAILURES, plain_nll
from sleb.scoring.readings import NegativeLogLikelihood
from sleb.scoring.sweep import HiddenLogits, walk
from sleb.scoring.sweep_plan import SkipSet

_PIECE = 5  # positions, of those that are compared with all at once

Nats = dict[SkipSet, torch.Tensor]
"""The nats of each sequence, float64 (batch,), by skip set."""


@torch.inference_mode()
def self_check(stack: BlockStack, candidates: Sequence[int], ids: np.ndarray) -> SelfCheck:
    """Every candidate on one tiny batch: the sweep, forks interleaved, against a plain forward pass.

    A block whose plain skip raises is protected, with the reason; where sweep and plain differ, the run is scored
    the plain way. What gives no numbers either way is not compared. `ids` is (sequences, length); two sequences of 16
    tokens are used.
    """
    tiny = torch.from_numpy(np.ascontiguousarray(ids[:2, :16])).to(stack.device)
    reference = _plain_reference if stack.streamed is None else _streamed_reference
    plain, protected = reference(stack, candidates, tiny)
    difference, reason = None, None
    try:
        difference, reason = _compare_sweep(stack, plain, tiny)
    except MODEL_FAILURES as error:
        reason = f"blocks cannot be replayed ({type(error).__name__}: {error})"
    return SelfCheck(
        scoring="sweep" if reason is None else "plain",
        reason=reason,
        candidates=len(candidates),
        tokens=tiny.numel() - len(tiny),
        max_difference=difference,
        protected=protected,
    )


def _compare_sweep(stack: BlockStack, plain: Nats, ids: torch.Tensor) -> tuple[float | None, str | None]:
    """The largest difference in nats per token, None without numbers; and why the sweep cannot be used, if so."""
    tokens = ids.shape[1] - 1
    tolerance = 1e-5 if stack.model.dtype == torch.float32 else 0.02
    (streams,) = walk(stack, list(plain), [ids], lambda units, where: None)
    nll = NegativeLogLikelihood()
    swept = {skipped: nll.of(HiddenLogits(stack, stream.hidden, ids), ids) for skipped, stream in streams.items()}
    in_pieces = nll.of(HiddenLogits(stack, streams[()].hidden, ids, _PIECE), ids)
    reason = None
    if not torch.allclose(in_pieces, plain[()], rtol=0, atol=10 * tolerance * tokens, equal_nan=True):
        reason = "logits of some positions differ from those of a whole sequence"
    ours, theirs = (torch.stack([nats[skipped] for skipped in plain]) for nats in (swept, plain))
    numbers = theirs.isfinite()
    distances = (ours - theirs)[numbers].abs()
    difference = float(distances.max()) / tokens if len(distances) else None
    if not torch.equal(numbers, ours.isfinite()):
        reason = "the sweep and the plain forward pass do not give numbers for the same candidates"
    elif difference is not None and difference > tolerance:
        reason = f"the sweep differs from the plain forward pass by {difference:.3g} nats per token"
    return difference, reason


def _plain_reference(stack: BlockStack, candidates: Sequence[int], ids: torch.Tensor) -> tuple[Nats, dict[int, str]]:
    """Nats of each candidate by a forward pass of its own; and the blocks that the model needs, with why."""
    plain: Nats = {(): plain_nll(stack, (), ids)}
    protected: dict[int, str] = {}
    for block in candidates:
        try:
            plain[(block,)] = plain_nll(stack, (block,), ids)
        except MODEL_FAILURES as error:
            protected[block] = f"the model cannot run without it ({type(error).__name__}: {error})"
    return plain, protected


def _streamed_reference(stack: BlockStack, candidates: Sequence[int], ids: torch.Tensor) -> tuple[Nats, dict[int, str]]:
    """Nats of all candidates by one forward pass: each has rows of its own, in which its block is undone.

    One pass for each would read all weights as many times. A block that others need is not noticed by its
    failing here, but by the difference.
    """
    count, batch = len(candidates), len(ids)
    undone = torch.zeros(len(stack), count * batch, dtype=torch.bool, device=ids.device)
    for row, block in enumerate(candidates):
        undone[block, row * batch : (row + 1) * batch] = True
    plain: Nats = {(): plain_nll(stack, (), ids)}
    hidden = stack.last_output(ids.repeat(count, 1), undone).unflatten(0, (count, batch))
    nll = NegativeLogLikelihood()
    for block, own in zip(candidates, hidden, strict=True):
        plain[(block,)] = nll.of(HiddenLogits(stack, own, ids), ids)
    return plain, {}
