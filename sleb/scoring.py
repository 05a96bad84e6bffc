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

from .blocks import BlockStack, Stream
from .costs import Cost, SkipSet, cost_of
from .memory import in_batches, is_out_of_memory
from .records import SelfCheck

log = logging.getLogger(__name__)

_READ_OUT_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}  # of one chunk of logits in the model's own dtype
_UPCAST_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}  # of one chunk of float32 logits: stays in a CPU's cache
_NOTHING = -100  # the target that `cross_entropy` leaves out
_MODEL_FAILURES = (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError)


class Scorer:
    """Scores skip sets on sequences of token ids; counts what it did.

    `ids` is (sequences, length) int64; every sequence has length - 1 predicted tokens. Out of memory halves the
    batch and goes on. With `plain` every skip set is a forward pass of its own. `watch` hears of the work done, in
    block evaluations, and where it is.
    """

    def __init__(
        self,
        stack: BlockStack,
        ids: np.ndarray,
        *,
        batch_size: int | None = None,
        plain: bool = False,
        watch: Callable[[float, str], None] = lambda units, where: None,
    ) -> None:
        self.stack = stack
        self.ids = torch.from_numpy(np.ascontiguousarray(ids))
        self.plain = plain
        self.batch_size = batch_size or default_batch_size(stack.device, ids.shape[1])
        self.watch = watch
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

        Raises `ScoringError` when a single sequence does not fit into memory.
        """
        return self._scored(skip_sets, sequences, self._score_batch)

    def diverge(self, skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence of each skip set's predictions from the unmodified model's, in the same sweep.

        float64 (skip_sets, sequences), nats, over the positions that `score` predicts; else as `score`.
        """
        return self._scored(skip_sets, sequences, self._diverge_batch)

    @torch.inference_mode()
    def _scored(
        self,
        skip_sets: Sequence[SkipSet],
        sequences: np.ndarray,
        score_batch: Callable[[Sequence[SkipSet], torch.Tensor], np.ndarray],
    ) -> np.ndarray:
        walked = skip_sets if score_batch == self._score_batch else [*skip_sets, ()]
        result = np.empty((len(skip_sets), len(sequences)), dtype=np.float64)

        def work(start: int, stop: int) -> None:
            batch = self.ids[torch.from_numpy(np.asarray(sequences[start:stop]))]
            of = f"sequences {start + 1} to {stop} of {len(sequences)}"
            self._where = f"{len(skip_sets)} candidates on {of}" if len(skip_sets) > 1 else of
            result[:, start:stop] = score_batch(skip_sets, batch)
            cost = self.cost(walked, stop - start)
            self.block_evaluations += cost.block_evaluations
            self.head_evaluations += cost.head_evaluations

        self.batch_size = in_batches(len(sequences), self.batch_size, work)
        return result

    def _score_batch(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> np.ndarray:
        ids = ids.to(self.stack.device, non_blocking=True)
        by_set = self._plain(skip_sets, ids) if self.plain else self._sweep(skip_sets, ids)
        nats = torch.stack([by_set[tuple(sorted(skipped))] for skipped in skip_sets])
        return nats.cpu().numpy()  # the only synchronisation with a GPU

    def _diverge_batch(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> np.ndarray:
        ids = ids.to(self.stack.device, non_blocking=True)
        walked = [(), *skip_sets]
        if self.plain:
            read_out = self._plain_logits(walked, ids)
        else:
            streams = self._streams(walked, ids)
            read_out = {
                skipped: lambda part, hidden=stream.hidden: self.stack.read_out(hidden[..., part, :], ids[:, part])
                for skipped, stream in streams.items()
            }
        divergences = self._kl(read_out, ids)
        nats = torch.stack([divergences[tuple(sorted(skipped))] for skipped in skip_sets])
        return nats.cpu().numpy()

    def _kl(self, read_out: dict[SkipSet, Callable[[slice], torch.Tensor]], ids: torch.Tensor) -> dict[SkipSet, Any]:
        """Divergence from `()`, summed over tokens: float64 (batch,). One piece of everybody's logits at a time."""
        batch, length = ids.shape
        rows = max(1, _UPCAST_BYTES[_kind(ids.device)] // (4 * batch * self.stack.config.vocab_size))
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
                self.watch(self.head_weight * batch * (part.stop - part.start) / length, f"{self._where}, predictions")
        return totals

    def _plain_logits(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, Any]:
        """One forward pass each; NaN where the model cannot run without the blocks."""
        found: dict[SkipSet, Any] = {}
        for skipped in dict.fromkeys(tuple(sorted(skipped)) for skipped in skip_sets):
            try:
                with self.stack.skipping(skipped):
                    logits = self.stack.forward(ids)
            except _MODEL_FAILURES as error:
                if is_out_of_memory(error):
                    raise
                log.warning("The model cannot run without blocks %s: %s", list(skipped), error)
                logits = torch.full((*ids.shape, self.stack.config.vocab_size), float("nan"), device=ids.device)
            found[skipped] = lambda part, logits=logits: logits[:, part]
            self.watch(float((len(self.stack) - len(skipped)) * len(ids)), f"{self._where}, without {list(skipped)}")
        return found

    def _sweep(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, torch.Tensor]:
        nats = {}
        for skipped, stream in self._streams(skip_sets, ids).items():
            nats[skipped] = self._nll(stream.hidden, ids)
            self.watch(self.head_weight * len(ids), f"{self._where}, predictions")
        return nats

    def _streams(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, Stream]:
        """The walk up the stack: each skip set's hidden state after the last block, (batch, sequence, hidden)."""
        inputs = self.stack.capture(ids)
        streams: dict[SkipSet, Stream] = {(): inputs.start()}  # what was skipped so far -> where that leads
        members: dict[SkipSet, set[SkipSet]] = {(): {tuple(sorted(skipped)) for skipped in skip_sets}}
        for block in range(len(self.stack)):
            for prefix in list(streams):
                leaving = {skipped for skipped in members[prefix] if block in skipped}
                if leaving:
                    streams[(*prefix, block)] = streams[prefix].fork()
                    members[(*prefix, block)] = leaving
                    members[prefix] -= leaving
                    if not members[prefix]:
                        del streams[prefix], members[prefix]
                        continue
                self.stack.advance(block, inputs, streams[prefix])
                self.watch(len(ids), f"{self._where}, block {block}")
        return streams

    def _nll(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Summed over tokens: float64 (batch,). Logits of the whole batch never exist at once."""
        batch, length = ids.shape
        chunk = self._read_out_tokens(batch, hidden)
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=_NOTHING)  # nothing follows the last token
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
        return max(1, _READ_OUT_BYTES[_kind(hidden.device)] // row_bytes)

    def _plain(self, skip_sets: Sequence[SkipSet], ids: torch.Tensor) -> dict[SkipSet, torch.Tensor]:
        nats = {}
        for skipped in dict.fromkeys(tuple(sorted(skipped)) for skipped in skip_sets):
            try:
                nats[skipped] = plain_nll(self.stack, skipped, ids)
            except _MODEL_FAILURES as error:
                if is_out_of_memory(error):
                    raise
                log.warning("The model cannot run without blocks %s: %s", list(skipped), error)
                nats[skipped] = torch.full((len(ids),), float("nan"), dtype=torch.float64, device=ids.device)
            cost = cost_of([skipped], len(self.stack), len(ids), plain=True)
            self.watch(cost.units(self.head_weight), f"{self._where}, without {list(skipped)}")
        return nats


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-token negative log-likelihood, float32 like `targets` (batch, sequence), from logits of any dtype.

    Upcast in pieces: `cross_entropy` on bfloat16 logits would return three digits, and all logits in float32 at
    once cost as much time as several blocks.
    """
    flat, goal = logits.flatten(0, -2), targets.flatten()
    rows = max(1, _UPCAST_BYTES[_kind(logits.device)] // (4 * logits.shape[-1]))
    pieces = [
        torch.nn.functional.cross_entropy(part.float(), aim, reduction="none", ignore_index=_NOTHING)
        for part, aim in zip(flat.split(rows), goal.split(rows), strict=True)
    ]
    return torch.cat(pieces).view(targets.shape)


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


@torch.inference_mode()
def self_check(stack: BlockStack, candidates: Sequence[int], ids: np.ndarray) -> SelfCheck:
    """Every candidate on one tiny batch: the sweep, forks interleaved, against a plain forward pass.

    A block whose plain skip raises is protected, with the reason; where sweep and plain differ, the run is scored
    the plain way. `ids` is (sequences, length); two sequences of 16 tokens are used.
    """
    tiny = torch.from_numpy(np.ascontiguousarray(ids[:2, :16])).to(stack.device)
    plain: dict[SkipSet, torch.Tensor] = {(): plain_nll(stack, (), tiny)}
    protected: dict[int, str] = {}
    for block in candidates:
        try:
            plain[(block,)] = plain_nll(stack, (block,), tiny)
        except _MODEL_FAILURES as error:
            protected[block] = f"the model cannot run without it ({type(error).__name__}: {error})"
    tokens = tiny.shape[1] - 1
    tolerance = 1e-5 if next(stack.model.parameters()).dtype == torch.float32 else 0.02
    difference, reason = None, None
    try:
        swept = Scorer(stack, tiny.cpu().numpy(), batch_size=len(tiny))._sweep(list(plain), tiny)
        pairs = [(plain[skipped], swept[skipped]) for skipped in plain]
        pieces = _in_pieces(stack, tiny)
        if not torch.allclose(pieces, plain[()], rtol=0, atol=10 * tolerance * tokens, equal_nan=True):
            reason = "hidden states cannot be read out in pieces"
        difference = max(float((torch.nan_to_num(a) - torch.nan_to_num(b)).abs().max()) for a, b in pairs) / tokens
        if difference > tolerance:
            reason = f"the sweep differs from the plain forward pass by {difference:.3g} nats per token"
    except _MODEL_FAILURES as error:
        reason = f"blocks cannot be replayed ({type(error).__name__}: {error})"
    return SelfCheck(
        scoring="sweep" if reason is None else "plain",
        reason=reason,
        candidates=len(candidates),
        tokens=tiny.numel() - len(tiny),
        max_difference=difference,
        protected=protected,
    )


def _in_pieces(stack: BlockStack, ids: torch.Tensor) -> torch.Tensor:
    """The unmodified model's sums, float64 (batch,), read out five tokens at a time."""

    class InPieces(Scorer):
        def _read_out_tokens(self, batch: int, hidden: torch.Tensor) -> int:
            return 5

    return InPieces(stack, ids.cpu().numpy(), batch_size=len(ids))._sweep([()], ids)[()]


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"
