"""The problem that a search solves: the score function, the blocks it may remove, and when it has to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sleb.errors import OptionError
from sleb.records import Method, RunSpec, Step
from sleb.scoring.sweep_plan import SkipSet

Score = Callable[[Sequence[SkipSet], np.ndarray], np.ndarray]
"""score(skip_sets, sequences) -> float64 (skip_sets, sequences), nats."""


@dataclass(frozen=True)
class Problem:
    """Everything that a search needs to know beside the scores."""

    num_blocks: int
    num_remove: int
    protected: tuple[int, ...]
    calibration: np.ndarray
    """Indices of the sequences that choose."""
    held_out: np.ndarray
    """Indices of the sequences that take no part in any choice."""
    token_counts: np.ndarray
    """Predicted tokens of every sequence, int64."""
    confidence: float = 0.95
    until_perplexity: float | None = None
    objective: Literal["nll", "kl"] = "nll"
    """The score: negative log-likelihood, or divergence from the baseline."""
    racing: bool = False
    """Whether candidates that cannot win are dropped before they have seen the whole calibration set."""
    seed: int = 0
    """Seed of the order in which a race sees the sequences."""
    refine: Literal["none", "swap"] = "none"
    """The refinement that follows once `num_remove` blocks are removed."""
    dtype: str = "its type"
    """Type of the model, which a message names where its predictions are not numbers."""

    @property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may be removed, ascending."""
        return tuple(block for block in range(self.num_blocks) if block not in set(self.protected))


@dataclass(frozen=True)
class Decision:
    """A step without its costs, and the scores behind it: float64 (candidates, calibration sequences)."""

    step: Step
    scores: np.ndarray
    held_out: np.ndarray
    """Nats of the held-out sequences under the model this step leaves."""
    seen: np.ndarray | None = None
    """The scores that were taken, where candidates left a race; None is all of them."""


def protected_blocks(spec: RunSpec, num_blocks: int) -> tuple[int, ...]:
    """Blocks that are never candidates, ascending. Raises `OptionError` for one that the model does not have."""
    protected = spec.protected
    if protected is None:
        protected = (0, num_blocks - 1) if spec.method.protects_ends else ()
    _require_within("protect", protected, num_blocks)
    kept = set(protected)
    if spec.candidates is not None:
        _require_within("candidates", spec.candidates, num_blocks)
        kept |= set(range(num_blocks)).difference(spec.candidates)
        if len(kept) == num_blocks:
            raise OptionError(
                "`candidates` names no block that can be removed (those of `protect` are kept): name others, or "
                "shorten `protect`."
            )
    return tuple(sorted(kept))


def _require_within(option: str, blocks: Sequence[int], num_blocks: int) -> None:
    outside = next((block for block in blocks if not 0 <= block < num_blocks), None)
    if outside is not None:
        raise OptionError(f"`{option}` names block {outside}; the model has blocks 0 to {num_blocks - 1}.")


def number_to_remove(num_blocks: int, available: int, num_remove: int | None, ratio: float | None) -> int:
    """The number of blocks to remove; a ratio is rounded up (paper, 4.1). Raises `OptionError` out of range."""
    if num_remove is not None:
        wanted = num_remove
    elif ratio is not None:
        wanted = math.ceil(round(ratio * num_blocks, 9))  # 0.1 * 30 is 3.0000000000000004
    else:
        wanted = min(available, num_blocks - 1)
    if available == 0:
        raise OptionError(f"All {num_blocks} blocks are protected: nothing can be removed. Shorten `protect`.")
    if not 1 <= wanted <= min(available, num_blocks - 1):
        raise OptionError(
            f"Asked to remove {wanted} of {num_blocks} blocks; {min(available, num_blocks - 1)} may be removed "
            f"({num_blocks - available} protected or not among the candidates, at least one must stay). "
            "Lower `remove` or `ratio`."
        )
    return wanted


def require_possible(method: Method, num_blocks: int, num_remove: int, protected: Sequence[int]) -> None:
    """Raises `OptionError`, before anything is scored, where the method cannot remove so many blocks at all."""
    kept = set(protected)
    if method is Method.EARLY_EXIT:
        hit = [block for block in range(num_blocks - num_remove, num_blocks) if block in kept]
        if hit:
            last = "the last block" if num_remove == 1 else f"the last {num_remove} blocks"
            raise OptionError(
                f"Early exit removes {last}, and block {hit[-1]} is protected. Leave it out of `protect`, or lower "
                "`remove`."
            )
    if method is Method.BEST_CHUNK and not contiguous_chunks(num_blocks, num_remove, kept):
        raise OptionError(
            f"No {num_remove} neighbouring blocks are all unprotected. Shorten `protect`, or lower `remove`."
        )


def contiguous_chunks(num_blocks: int, length: int, protected: set[int]) -> list[SkipSet]:
    """Contiguous runs of unprotected blocks, by their start."""
    runs = (tuple(range(start, start + length)) for start in range(num_blocks - length + 1))
    return [run for run in runs if protected.isdisjoint(run)]
