"""The sweep: skip sets and sequences in, nats out. Knows the block stack; knows nothing of searches or runs.

The stack is walked once for all skip sets of a batch; those that agree on the blocks seen so far share one stream,
so that a greedy step over n alive blocks costs about n^2/2 block evaluations instead of n^2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sleb.errors import ScoringError
from sleb.model.block_stack import BlockStack, Stream
from sleb.model.out_of_memory import in_batches, is_out_of_memory
from sleb.model.streaming import size
from sleb.runtime.processes.distributed import Group
from sleb.scoring.sweep_plan import Cost, SkipSet, cost_of, itinerary
from sleb.scoring.token_loss import NOTHING, UPCAST_BYTES, kind_of, token_nll

log = logging.getLogger(__name__)


# Of one chunk of logits in the model's own dtype. Above 32 MB the C library takes each chunk fresh from the system.
_READ_OUT_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}

MODEL_FAILURES = (LookupError, ArithmeticError, TypeError, AttributeError, ValueError, RuntimeError)


class Scorer:
    """Scores skip sets on sequences of token ids; counts what it did.

    `ids` is (sequences, length) int64; every sequence has length - 1 predicted tokens. Out of memory halves the
    batch and goes on. With `plain` every skip set is a forward pass of its own. `watch` hears of the work done, in
    block evaluations, and where it is. Every rank of a `group` scores its share, and all get the whole.
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
        self.block_evaluations = 0
        self.head_evaluations = 0
        self.head_weight = head_weight(stack)
        self._where = ""

    @property
    def token_counts(self) -> np.ndarray:
        """Predicted tokens per sequence, int64 (sequences,)."""
        return np.full(len(self.ids), self.ids.shape[1] - 1, dtype=np.int64)

    def cost(self, skip_sets: Sequence[SkipSet], sequences: int) -> Cost:
        """What `score` would take."""
        return cost_of(skip_sets, len(self.stack), sequences, plain=self.plain)

    def score(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        """Negative log-likelihood, float64 (skip_sets, sequences), nats; NaN where predictions are not numbers.

        Raises `ScoringError` when a single sequence does not fit into memory, `RankLost` when another rank is gone.
        """
        return self._scored(skip_sets, sequences, self._score_round)

    def diverge(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence of each skip set's predictions from the unmodified model's, in the same sweep.

        float64 (skip_sets, sequences), nats, over the positions that `score` predicts; else as `score`.
        """
        return self._scored(skip_sets, sequences, self._diverge_round)

    @torch.inference_mode()
    def _scored(
        self,
        skip_sets: Sequence[SkipSet],
        sequences: np.ndarray,
        score_round: Callable[[Sequence[SkipSet], list[torch.Tensor]], np.ndarray],
    ) -> np.ndarray:
        walked = skip_sets if score_round == self._score_round else [*skip_sets, ()]
        result = np.zeros((len(skip_sets), len(sequences)), dtype=np.float64)
        part = self.group.part(len(sequences))
        own = np.asarray(sequences)[part]
        found = np.empty((len(skip_sets), len(own)), dtype=np.float64)

        def work(start: int, stop: int) -> None:
            ids = self.ids[torch.from_numpy(own[start:stop])].to(self.stack.device, non_blocking=True)
            of = f"sequences {start + 1} to {stop} of {len(own)}"
            self._where = f"{len(skip_sets)} candidates on {of}" if len(skip_sets) > 1 else of
            found[:, start:stop] = score_round(skip_sets, list(ids.split(self.batch_size)))

        round_size = self.round_size(walked)
        fitted = in_batches(len(own), round_size, work)
        if fitted < round_size:  # memory ran out
            self.batch_size = min(self.batch_size, fitted)
        cost = self.cost(walked, len(sequences))
        self.block_evaluations += cost.block_evaluations
        self.head_evaluations += cost.head_evaluations
        result[:, part] = found
        return self.group.sum(result)

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
                f"{size(needed)}, and --memory-budget leaves {size(streamed.spare_bytes)} for them. Use "
                f"--memory-budget {size(streamed.budget_for(needed))} or more, or lower --sequence-length."
            )
        return fits if fits < self.batch_size else fits // self.batch_size * self.batch_size

    def _tell(self, units: float, where: str) -> None:
        """The other ranks do as much meanwhile."""
        self.watch(units * self.group.size, where)

    def _score_round(self, skip_sets: Sequence[SkipSet], batches: list[torch.Tensor]) -> np.ndarray:
        if self.plain:
            found = [self._plain(skip_sets, ids) for ids in batches]
        else:
            found = self._sweep(skip_sets, batches)
        return _in_order(found, skip_sets)

    def _diverge_round(self, skip_sets: Sequence[SkipSet], batches: list[torch.Tensor]) -> np.ndarray:
        walked = [(), *skip_sets]
        if self.plain:
            found = [self._kl(self._plain_logits(walked, ids), ids) for ids in batches]
        else:
            streams = self._streams(walked, batches)
            found = []
            for ids in batches:
                last = {skipped: stream.hidden for skipped, stream in streams.pop(0).items()}
                found.append(self._kl({skipped: self._reader(hidden, ids) for skipped, hidden in last.items()}, ids))
        return _in_order(found, skip_sets)

    def _reader(self, hidden: torch.Tensor, ids: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """Logits of some positions, when they are asked for."""
        return lambda part: self.stack.read_out(hidden[..., part, :], ids[:, part])

    def _kl(self, read_out: dict[SkipSet, Callable[[slice], torch.Tensor]], ids: torch.Tensor) -> dict[SkipSet, Any]:
        """Divergence from `()`, summed over tokens: float64 (batch,). One piece of everybody's logits at a time."""
        batch, length = ids.shape
        rows = max(1, UPCAST_BYTES[kind_of(ids.device)] // (4 * batch * self.stack.config.vocab_size))
        totals = {skipped: torch.zeros(batch, dtype=torch.float64, device=ids.device) for skipped in read_out}
        for start in range(0, length - 1, rows):
            part = slice(start, min(start + rows, length - 1))
            base = read_out[()](part).float().log_softmax(dim=-1)
            chances = base.exp()
            for skipped, logits_of in read_out.items():
                own = base if skipped == () else logits_of(part).float().log_softmax(dim=-1)
                # 0 log 0 is 0: where the base model rules a token out, so may the other.
                terms = torch.where(chances > 0, chances * (base - own), 0.0)
                totals[skipped] += terms.sum(dim=-1).double().sum(dim=1).to(ids.device)
                self._tell(self.head_weight * batch * (part.stop - part.start) / length, f"{self._where}, predictions")
        return totals

    def _plain_logits(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, Any]:
        """One forward pass each; NaN where the model cannot run without the blocks."""
        found: dict[SkipSet, Any] = {}
        for skipped in dict.fromkeys(tuple(sorted(skipped)) for skipped in skip_sets):
            try:
                with self.stack.skipping(skipped):
                    logits = self.stack.forward(ids)
            except MODEL_FAILURES as error:
                if is_out_of_memory(error):
                    raise
                log.warning("The model cannot run without blocks %s: %s", list(skipped), error)
                logits = torch.full((*ids.shape, self.stack.config.vocab_size), float("nan"), device=ids.device)
            found[skipped] = lambda part, logits=logits: logits[:, part]
            self._tell(float((len(self.stack) - len(skipped)) * len(ids)), f"{self._where}, without {list(skipped)}")
        return found

    def _sweep(self, skip_sets: Sequence[SkipSet], batches: list[torch.Tensor]) -> list[dict[SkipSet, torch.Tensor]]:
        """Per batch, each skip set's sums: float64 (batch,)."""
        streams, found = self._streams(skip_sets, batches), []
        for ids in batches:
            nats = {}
            for skipped, stream in streams.pop(0).items():
                nats[skipped] = self._nll(stream.hidden, ids)
                self._tell(self.head_weight * len(ids), f"{self._where}, predictions")
            found.append(nats)
        return found

    def _streams(self, skip_sets: Sequence[SkipSet], batches: list[torch.Tensor]) -> list[dict[SkipSet, Stream]]:
        """Per batch, each skip set's hidden state after the last block: (batch, sequence, hidden).

        Blocks outside, batches inside: the weights of a block are needed once for a whole round, and never where
        everybody skips it.
        """
        inputs = [self.stack.capture(ids) for ids in batches]
        streams: list[dict[SkipSet, Stream]] = [{(): each.start()} for each in inputs]
        visits = itinerary(skip_sets, len(self.stack))
        needed = [visit.block for visit in visits if visit.through]
        following = dict(zip(needed, [*needed[1:], *needed[:1]], strict=True))
        for visit in visits:
            for own in streams:
                for prefix, twin in visit.forks:
                    own[twin] = own[prefix].fork()
                for prefix in visit.ended:
                    del own[prefix]
            if not visit.through:
                continue
            with self.stack.resident(visit.block, then=following[visit.block]):
                for ids, each, own in zip(batches, inputs, streams, strict=True):
                    for prefix in visit.through:
                        self.stack.advance(visit.block, each, own[prefix])
                        self._tell(len(ids), f"{self._where}, block {visit.block}")
        return streams

    def _nll(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Summed over tokens: float64 (batch,). Logits of the whole batch never exist at once."""
        batch, length = ids.shape
        chunk = self._read_out_tokens(batch, hidden)
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NOTHING)  # nothing follows the last token
        total = torch.zeros(batch, dtype=torch.float64, device=ids.device)
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            logits = self.stack.read_out(hidden[..., part, :], ids[:, part])
            nll = token_nll(logits, targets[:, part].to(logits.device))
            total += nll.double().sum(dim=1).to(total.device)
        return total

    def _read_out_tokens(self, batch: int, hidden: torch.Tensor) -> int:
        """Tokens of a sequence to read out at once."""
        row_bytes = batch * self.stack.config.vocab_size * hidden.element_size()
        limit = _READ_OUT_BYTES[kind_of(hidden.device)]
        if self.stack.streamed is not None:
            limit = min(limit, self.stack.streamed.budget // 32)
        return max(1, limit // row_bytes)

    def _plain(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, torch.Tensor]:
        nats = {}
        for skipped in dict.fromkeys(tuple(sorted(skipped)) for skipped in skip_sets):
            try:
                nats[skipped] = plain_nll(self.stack, skipped, ids)
            except MODEL_FAILURES as error:
                if is_out_of_memory(error):
                    raise
                log.warning("The model cannot run without blocks %s: %s", list(skipped), error)
                nats[skipped] = torch.full((len(ids),), float("nan"), dtype=torch.float64, device=ids.device)
            cost = cost_of([skipped], len(self.stack), len(ids), plain=True)
            self._tell(cost.units(self.head_weight), f"{self._where}, without {list(skipped)}")
        return nats


def _in_order(batches: list[dict[SkipSet, torch.Tensor]], skip_sets: Sequence[SkipSet]) -> np.ndarray:
    """Sums of batches as float64 (skip_sets, sequences)."""
    names = [tuple(sorted(skipped)) for skipped in skip_sets]
    nats = [torch.stack([found[name] for name in names]) for found in batches]
    return torch.cat(nats, dim=1).cpu().numpy()  # the only synchronisation with a GPU


def plain_nll(stack: BlockStack, skipped: SkipSet, ids: torch.Tensor) -> torch.Tensor:
    """The twin: one plain forward pass with the blocks skipped. float64 (batch,), nats."""
    with stack.skipping(skipped):
        logits = stack.forward(ids)
    return token_nll(logits[:, :-1], ids[:, 1:].to(logits.device)).double().sum(dim=1).to(ids.device)


def default_batch_size(device: torch.device, length: int) -> int:
    """Sequences per batch: enough tokens to keep the device busy, few enough for its cache or memory."""
    tokens = 8192 if device.type == "cuda" else 1024
    return max(1, tokens // length)


def head_weight(stack: BlockStack) -> float:
    """What reading out one skip set costs, in block evaluations: the ratio of their multiplications."""
    config = stack.config
    per_block = sum(stack.parameters_of(block) for block in range(len(stack))) / len(stack)
    return config.vocab_size * config.hidden_size / max(per_block, 1.0)
