"""The record of a model's blocks, for runs that search nothing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from sleb.model.block_stack import BlockStack
from sleb.model.identity import identity_of, weights_hash
from sleb.model.loading import LoadedModel
from sleb.records import SCORING_VERSION, StackDescription
from sleb.scoring.self_check import self_check


def describe(stack: BlockStack, loaded: LoadedModel) -> StackDescription:
    """Describe a model for a run without a search: without calibration text, and with every block checked."""
    ids = np.random.default_rng(0).integers(0, stack.config.vocab_size, (2, 16))
    return StackDescription(
        **facts_of(stack, loaded),
        tokens_hash="",
        sequences=0,
        held_out=0,
        sequence_length=0,
        bos=False,
        text="none",
        num_remove=0,
        protected=(),
        self_check=self_check(stack, list(range(len(stack))), ids),
    )


def facts_of(stack: BlockStack, loaded: LoadedModel) -> dict[str, Any]:
    """The fields of a `StackDescription` that the model alone decides."""
    return dict(
        model_class=type(loaded.model).__name__,
        path=stack.path,
        block_class=type(stack.blocks[0]).__name__,
        num_blocks=len(stack),
        block_parameters=tuple(stack.parameters_of(block) for block in range(len(stack))),
        total_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        hidden_size=stack.config.hidden_size,
        vocab_size=stack.config.vocab_size,
        dtype=loaded.dtype,
        checkpoint_dtype=loaded.checkpoint_dtype,
        quantisation=loaded.quantisation,
        per_block_lists=_per_block_lists(stack),
        revision=loaded.revision,
        weights_hash=weights_hash(loaded.model),
        identity=identity_of(loaded),
        scoring_version=SCORING_VERSION,
    )


def _per_block_lists(stack: BlockStack) -> tuple[str, ...]:
    """The settings that have an entry for each block."""
    settings = stack.config.to_dict()
    names = (key for key, value in settings.items() if isinstance(value, list | tuple) and len(value) == len(stack))
    return tuple(sorted(key for key in names if re.fullmatch(r"\w{1,80}", key) and "token" not in key))
