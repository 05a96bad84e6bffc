"""Skip sets and sequences in, nats out: batches, memory, ranks and counts. Knows nothing of searches or runs.

`sweep` walks the stack, `plain_pass` makes forward passes instead, and `readings` says what is read off the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from sleb.errors import ScoringError
from sleb.model.block_stack import BlockStack
from sleb.model.out_of_memory import in_batches
from sleb.model.streaming import size
from sleb.runtime.processes.distributed import Group
from sleb.scoring.plain_pass import plain_logits
from sleb.scoring.readings import Divergence, Logits, NegativeLogLikelihood, Reading
from sleb.scoring.sweep import swept_logits
from sleb.scoring.sweep_plan import Cost, SkipSet, cost_of, itinerary
from sleb.scoring.token_loss import Loss, chunked_cross_entropy


class Scorer:
    """Scores skip sets on sequences of token ids; counts what it did.

    `ids` is (sequences, length) int64; every sequence has length - 1 predicted tokens. Out of memory halves the
    batch and goes on. With `plain` every skip set is a forward pass of its own. `watch` is called with the work done,
    in block evaluations, and where it is. Every rank of a `group` scores its share, and all get the whole.
    """

    def __init__(
        self,
        stack: BlockStack,
        ids: np.ndarray,
        *,
        batch_size: int | None = None,
        plain: bool = False,
        watch: Callable[[float, str], None] = lambda units, where: None,
        group: Group | None = None,
    ) -> None:
        self.stack = stack
        self.ids = torch.from_numpy(np.ascontiguousarray(ids))
        self.plain = plain
        self.batch_size = batch_size or default_batch_size(stack.device, ids.shape[1])
        self.watch = watch
        self.group = group or Group()
        self.loss: Loss = chunked_cross_entropy
        self.block_evaluations = 0
        self.head_evaluations = 0
        self.head_weight = head_weight(stack)

    @property
    def token_counts(self) -> np.ndarray:
        """Predicted tokens per sequence, int64 (sequences,)."""
        return np.full(len(self.ids), self.ids.shape[1] - 1, dtype=np.int64)

    def cost(self, skip_sets: Sequence[SkipSet], sequences: int) -> Cost:
        """What `score` would take."""
        return cost_of(skip_sets, len(self.stack), sequences, plain=self.plain)

    def score(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        """Negative log-likelihood, float64 (skip_sets, sequences), nats; NaN where predictions are not numbers.

        Raises `ScoringError` when a single sequence does not fit into memory, `RankLost` when another rank has ended.
        """
        return self._read(skip_sets, sequences, NegativeLogLikelihood(self.loss))

    def diverge(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence of each skip set's predictions from the baseline's, in the same sweep.

        float64 (skip_sets, sequences), nats, over the positions that `score` predicts; else as `score`.
        """
        return self._read(skip_sets, sequences, Divergence(self.stack.config.vocab_size))

    @contextmanager
    def losses_by(self, loss: Loss) -> Iterator[None]:
        """A context in which `score` takes losses from something that computes the same as `cross_entropy`."""
        before, self.loss = self.loss, loss
        try:
            yield
        finally:
            self.loss = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A context in which work is not counted, since it is on record already or was not requested."""
        before = self.block_evaluations, self.head_evaluations
        try:
            yield
        finally:
            self.block_evaluations, self.head_evaluations = before

    @torch.inference_mode()
    def _read(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray, reading: Reading) -> np.ndarray:
        walked = [*reading.compared_with, *skip_sets]
        result = np.zeros((len(skip_sets), len(sequences)), dtype=np.float64)
        part = self.group.part(len(sequences))
        own = np.asarray(sequences)[part]
        nats = np.empty((len(skip_sets), len(own)), dtype=np.float64)

        def work(start: int, stop: int) -> None:
            ids = self.ids[torch.from_numpy(own[start:stop])].to(self.stack.device, non_blocking=True)
            place = f"sequences {start + 1} to {stop} of {len(own)}"
            place = f"{len(skip_sets)} candidates on {place}" if len(skip_sets) > 1 else place
            sums = self._sums(walked, list(ids.split(self.batch_size)), reading, place)
            nats[:, start:stop] = _in_order(sums, skip_sets)

        round_size = self.round_size(walked)
        fitted = in_batches(len(own), round_size, work)
        if fitted < round_size:  # memory ran out
            self.batch_size = min(self.batch_size, fitted)
        cost = self.cost(walked, len(sequences))
        self.block_evaluations += cost.block_evaluations
        self.head_evaluations += cost.head_evaluations
        result[:, part] = nats
        return self.group.sum(result)

    def _sums(
        self, skip_sets: Sequence[SkipSet], batches: list[torch.Tensor], reading: Reading, place: str
    ) -> list[dict[SkipSet, torch.Tensor]]:
        """Each skip set's sums on each batch: float64 (batch,)."""

        def progress(units: float, where: str) -> None:  # the other ranks do as much meanwhile
            self.watch(units * self.group.size, f"{place}, {where}")

        logits: Iterable[Iterable[tuple[SkipSet, Logits]]]
        if self.plain:
            logits = (plain_logits(self.stack, skip_sets, ids, progress) for ids in batches)
        else:
            logits = swept_logits(self.stack, skip_sets, batches, progress)
        return [
            reading.sums(own, ids, lambda read: progress(self.head_weight * read, "predictions"))
            for own, ids in zip(logits, batches, strict=True)
        ]

    def round_size(self, skip_sets: Sequence[SkipSet]) -> int:
        """Sequences that go up the stack together: one batch, or all that fit where each block must be read first.

        Raises `ScoringError` where not even one fits into what the weights leave of the budget.
        """
        streamed = self.stack.streamed
        if streamed is None or self.plain:
            return self.batch_size
        visits, alive, widest = itinerary(skip_sets, len(self.stack)), 1, 1
        for visit in visits:
            alive += len(visit.forks) - len(visit.ended)
            widest = max(widest, alive)
        hidden = self.ids.shape[1] * self.stack.config.hidden_size * self.stack.model.dtype.itemsize
        needed = (widest + 2) * hidden  # an output is there before its input goes
        fits = streamed.spare_bytes // needed
        if fits < 1:
            raise ScoringError(
                f"The hidden states of one sequence of {self.ids.shape[1]} tokens in {widest} streams take "
                f"{size(needed)}, and `memory_budget` leaves {size(streamed.spare_bytes)} for them. Use "
                f"`memory_budget={size(streamed.budget_for(needed))}` or more, or lower `sequence_length`."
            )
        return fits if fits < self.batch_size else fits // self.batch_size * self.batch_size


def _in_order(batches: list[dict[SkipSet, torch.Tensor]], skip_sets: Sequence[SkipSet]) -> np.ndarray:
    """Sums of batches as float64 (skip_sets, sequences)."""
    names = [tuple(sorted(skipped)) for skipped in skip_sets]
    nats = [torch.stack([sums[name] for name in names]) for sums in batches]
    return torch.cat(nats, dim=1).cpu().numpy()  # the only synchronisation with a GPU


def default_batch_size(device: torch.device, length: int) -> int:
    """Sequences per batch: enough tokens to keep the device busy, few enough for its cache or memory."""
    tokens = 8192 if device.type == "cuda" else 1024
    return max(1, tokens // length)


def head_weight(stack: BlockStack) -> float:
    """What the logits of one skip set cost, in block evaluations: the ratio of their multiplications."""
    config = stack.config
    per_block = sum(stack.parameters_of(block) for block in range(len(stack))) / len(stack)
    return config.vocab_size * config.hidden_size / max(per_block, 1.0)
