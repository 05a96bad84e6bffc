"""What the proof of an exported model says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sleb.records.base import Record


class LeftBehind(Record):
    """Something of a model's folder that its export does not have."""

    name: str
    """Of a file, or of what the tensors are."""
    why: str
    """A clause, such as "it is a program"."""


class Proof(Record):
    """An exported model, reloaded in a fresh process with plain transformers and compared with the skipped original."""

    model: str = ""
    """Name of the model that lost the blocks; empty for a proof by an earlier version."""
    weights_hash: str = ""
    """Of that model, as its run has it."""
    passed: bool
    reasons: tuple[str, ...] = ()
    """Why it did not pass, one sentence each."""
    blocks_before: int
    blocks_after: int
    kept_blocks: tuple[int, ...]
    parameters_before: Annotated[int, Field(gt=0)]
    parameters_after: int
    bytes_before: int | None = None
    """Of the GGUF file the blocks were cut out of; None for a folder, which may be of another type than its origin."""
    bytes_after: int
    """Of the weight files."""
    dtype: str
    tokens: int
    """Positions whose logits were compared."""
    max_logit_difference: float
    tolerance: float
    """Largest difference that passes."""
    generated_tokens: int
    generated_with_cache: tuple[int, ...]
    generated_without_cache: tuple[int, ...]
    generated_by_skipping: tuple[int, ...]
    """By the original model with the blocks skipped, without a cache."""
    seconds: float
    versions: dict[str, str]
    checked: tuple[str, ...] = ()
    """What was compared besides predictions, one clause each; empty for a proof by an earlier version."""
    files: tuple[str, ...] = ()
    """Of the source's folder, carried over."""
    left_behind: tuple[LeftBehind, ...] = ()
    """Of the source's folder, and why."""
    notes: tuple[str, ...] = ()
    """What else somebody who uses the model should know, one sentence each."""
