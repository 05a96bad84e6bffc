"""Before every run: each candidate by the sweep and by a plain forward pass, on one tiny batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sleb.model.block_stack import BlockStack
from sleb.records import SelfCheck
from sleb.scoring.sweep import MODEL_FAILURES, Scorer, plain_nll
from sleb.scoring.sweep_plan import SkipSet


@torch.inference_mode()
def self_check(stack: BlockStack, candidates: Sequence[int], ids: np.ndarray) -> SelfCheck:
    """Every candidate on one tiny batch: the sweep, forks interleaved, against a plain forward pass.

    A block whose plain skip raises is protected, with the reason; where sweep and plain differ, the run is scored
    the plain way. What gives no numbers either way is not compared. `ids` is (sequences, length); two sequences of 16
    tokens are used.
    """
    tiny = torch.from_numpy(np.ascontiguousarray(ids[:2, :16])).to(stack.device)
    twin = _plain_twin if stack.streamed is None else _streamed_twin
    plain, protected = twin(stack, candidates, tiny)
    tokens = tiny.shape[1] - 1
    tolerance = 1e-5 if stack.model.dtype == torch.float32 else 0.02
    difference, reason = None, None
    try:
        scorer, pieces = Scorer(stack, tiny.cpu().numpy(), batch_size=len(tiny)), _InPieces(stack, tiny.cpu().numpy())
        streams = scorer._streams(list(plain), [tiny])[0]
        swept = {skipped: scorer._nll(stream.hidden, tiny) for skipped, stream in streams.items()}
        in_pieces = pieces._nll(streams[()].hidden, tiny)
        if not torch.allclose(in_pieces, plain[()], rtol=0, atol=10 * tolerance * tokens, equal_nan=True):
            reason = "hidden states cannot be read out in pieces"
        ours, theirs = (torch.stack([found[skipped] for skipped in plain]) for found in (swept, plain))
        numbers = theirs.isfinite()
        apart = (ours - theirs)[numbers].abs()
        difference = float(apart.max()) / tokens if len(apart) else None
        if not torch.equal(numbers, ours.isfinite()):
            reason = "the sweep and the plain forward pass do not give numbers for the same candidates"
        elif difference is not None and difference > tolerance:
            reason = f"the sweep differs from the plain forward pass by {difference:.3g} nats per token"
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


def _plain_twin(
    stack: BlockStack, candidates: Sequence[int], ids: torch.Tensor
) -> tuple[dict[SkipSet, torch.Tensor], dict[int, str]]:
    """Nats (batch,) of each candidate by a forward pass of its own; and the blocks that the model needs, with why."""
    plain: dict[SkipSet, torch.Tensor] = {(): plain_nll(stack, (), ids)}
    protected: dict[int, str] = {}
    for block in candidates:
        try:
            plain[(block,)] = plain_nll(stack, (block,), ids)
        except MODEL_FAILURES as error:
            protected[block] = f"the model cannot run without it ({type(error).__name__}: {error})"
    return plain, protected


def _streamed_twin(
    stack: BlockStack, candidates: Sequence[int], ids: torch.Tensor
) -> tuple[dict[SkipSet, torch.Tensor], dict[int, str]]:
    """The same in one forward pass for all candidates: each has rows of its own, in which its block is undone.

    A pass of its own for each would read the whole model as often. A block that others need is not found out by its
    failing here, but by the difference.
    """
    plain: dict[SkipSet, torch.Tensor] = {(): plain_nll(stack, (), ids)}
    count, batch = len(candidates), len(ids)
    undone = torch.zeros(len(stack), count * batch, dtype=torch.bool, device=ids.device)
    for row, block in enumerate(candidates):
        undone[block, row * batch : (row + 1) * batch] = True
    hidden = stack.last_output(ids.repeat(count, 1), undone)
    reader = Scorer(stack, ids.cpu().numpy(), batch_size=batch)
    for row, block in enumerate(candidates):
        plain[(block,)] = reader._nll(hidden[row * batch : (row + 1) * batch], ids)
    return plain, {}


class _InPieces(Scorer):
    """Reads out five tokens at a time."""

    def _read_out_tokens(self, batch: int, hidden: torch.Tensor) -> int:
        return 5
