"""What is read off the logits of skip sets: nats of the text, or divergence from the baseline. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from sleb.scoring.sweep_plan import SkipSet
from sleb.scoring.token_loss import NOTHING, UPCAST_BYTES, Loss, chunked_cross_entropy, kind_of, token_nll


class Logits(Protocol):
    """Logits of one batch of token ids (batch, sequence) under one skip set, some positions at a time."""

    def at(self, positions: slice) -> torch.Tensor:
        """The logits of some positions, (batch, positions, vocabulary)."""

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Positions and their logits, in pieces that fit into memory; the last position may be left out."""


class Reading(Protocol):
    """A score of skip sets that is read off their logits."""

    compared_with: ClassVar[tuple[SkipSet, ...]]
    """The skip sets whose logits are needed besides those of the skip sets that are scored."""

    def sums(
        self, logits: Iterable[tuple[SkipSet, Logits]], ids: torch.Tensor, progress: Callable[[float], None]
    ) -> dict[SkipSet, torch.Tensor]:
        """The score of each skip set on a batch `ids` (batch, sequence), summed over tokens: nats, float64 (batch,).

        `progress` is called with the number of sequences whose logits have been read since its last call.
        """


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Negative log-likelihood of the text. Logits of one skip set exist at a time."""

    loss: Loss = chunked_cross_entropy
    compared_with: ClassVar[tuple[SkipSet, ...]] = ()

    def sums(
        self, logits: Iterable[tuple[SkipSet, Logits]], ids: torch.Tensor, progress: Callable[[float], None]
    ) -> dict[SkipSet, torch.Tensor]:
        """Negative log-likelihood of each skip set, summed over tokens: nats, float64 (batch,)."""
        targets = _next_tokens(ids)
        nats = {}
        for skipped, own in logits:
            nats[skipped] = self._sum(own, targets)
            del own  # before the next ones exist
            progress(len(ids))
        return nats

    def of(self, logits: Logits, ids: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood under one skip set, summed over tokens: nats, float64 (batch,)."""
        return self._sum(logits, _next_tokens(ids))

    def _sum(self, logits: Logits, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        for part, chunk in logits.chunks():
            nll = token_nll(chunk, targets[:, part].to(chunk.device), self.loss)
            total += nll.double().sum(dim=1).to(total.device)
        return total


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of the predictions from the baseline's. One piece of all logits exists at a time."""

    vocab_size: int
    compared_with: ClassVar[tuple[SkipSet, ...]] = ((),)

    def sums(
        self, logits: Iterable[tuple[SkipSet, Logits]], ids: torch.Tensor, progress: Callable[[float], None]
    ) -> dict[SkipSet, torch.Tensor]:
        """Divergence of each skip set from `()`, summed over the predicted positions: nats, float64 (batch,)."""
        logits_of = dict(logits)
        batch, length = ids.shape
        rows = max(1, UPCAST_BYTES[kind_of(ids.device)] // (4 * batch * self.vocab_size))
        totals = {skipped: torch.zeros(batch, dtype=torch.float64, device=ids.device) for skipped in logits_of}
        for start in range(0, length - 1, rows):
            part = slice(start, min(start + rows, length - 1))
            base = logits_of[()].at(part).float().log_softmax(dim=-1)
            chances = base.exp()
            for skipped, own in logits_of.items():
                other = base if skipped == () else own.at(part).float().log_softmax(dim=-1)
                # 0 log 0 is 0: where the baseline rules a token out, so may the other.
                terms = torch.where(chances > 0, chances * (base - other), 0.0)
                totals[skipped] += terms.sum(dim=-1).double().sum(dim=1).to(ids.device)
                progress(batch * (part.stop - part.start) / length)
        return totals


def _next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """The targets of each position, int64 (batch, sequence); nothing follows the last token."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NOTHING)
