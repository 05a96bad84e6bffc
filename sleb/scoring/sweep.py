"""The sweep: one walk up the stack for many skip sets. Knows the block stack; nothing of losses, searches or runs.

Skip sets that agree on the blocks seen so far share one stream, so that a greedy step over n alive blocks costs about
n^2/2 block evaluations instead of n^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sleb.model.block_stack import BlockStack, Stream
from sleb.scoring.sweep_plan import SkipSet, itinerary
from sleb.scoring.token_loss import kind_of

# Of one chunk of logits in the model's own dtype. Above 32 MB the C library takes each chunk fresh from the system.
_LOGIT_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}

Progress = Callable[[float, str], None]
"""A function that is called with work done, in block evaluations, and where that was."""


@dataclass(frozen=True)
class HiddenLogits:
    """Logits of a batch from hidden states (batch, sequence, hidden) after the last block, some positions at a time.

    `chunk` is the number of positions in each piece; by default as many as fit into the cache of a CPU, the memory of a
    GPU, or a small part of the memory budget.
    """

    stack: BlockStack
    hidden: torch.Tensor
    ids: torch.Tensor
    chunk: int | None = None

    def at(self, positions: slice) -> torch.Tensor:
        """The logits of some positions, (batch, positions, vocabulary)."""
        return self.stack.logits(self.hidden[..., positions, :], self.ids[:, positions])

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All positions and their logits; those of the whole batch never exist at once."""
        chunk = self.chunk or self._positions_at_once()
        for start in range(0, self.ids.shape[1], chunk):
            part = slice(start, start + chunk)
            yield part, self.at(part)

    def _positions_at_once(self) -> int:
        row_bytes = len(self.ids) * self.stack.config.vocab_size * self.hidden.element_size()
        limit = _LOGIT_BYTES[kind_of(self.hidden.device)]
        if self.stack.streamed is not None:
            limit = min(limit, self.stack.streamed.budget // 32)
        return max(1, limit // row_bytes)


def swept_logits(
    stack: BlockStack, skip_sets: Sequence[SkipSet], batches: Sequence[torch.Tensor], progress: Progress
) -> Iterator[Iterator[tuple[SkipSet, HiddenLogits]]]:
    """Each skip set's logits on each batch of token ids (batch, sequence), after one walk for all batches."""
    streams = walk(stack, skip_sets, batches, progress)
    for ids in batches:
        own = streams.pop(0)  # its hidden states are freed once they are read
        yield ((skipped, HiddenLogits(stack, stream.hidden, ids)) for skipped, stream in own.items())


def walk(
    stack: BlockStack, skip_sets: Sequence[SkipSet], batches: Sequence[torch.Tensor], progress: Progress
) -> list[dict[SkipSet, Stream]]:
    """Each skip set's stream after the last block, for each batch of token ids (batch, sequence).

    Blocks outside, batches inside: the weights of a block are needed once for all batches, and never where every skip
    set skips it.
    """
    inputs = [stack.capture(ids) for ids in batches]
    streams: list[dict[SkipSet, Stream]] = [{(): each.start()} for each in inputs]
    visits = itinerary(skip_sets, len(stack))
    needed = [visit.block for visit in visits if visit.through]
    following = dict(zip(needed, [*needed[1:], *needed[:1]], strict=True))
    for visit in visits:
        for own in streams:
            for prefix, fork in visit.forks:
                own[fork] = own[prefix].fork()
            for prefix in visit.ended:
                del own[prefix]
        if not visit.through:
            continue
        with stack.resident(visit.block, then=following[visit.block]):
            for ids, each, own in zip(batches, inputs, streams, strict=True):
                for prefix in visit.through:
                    stack.advance(visit.block, each, own[prefix])
                    progress(len(ids), f"block {visit.block}")
    return streams
