"""Models of many small files, and budgets that they do not fit in."""

from __future__ import annotations

from pathlib import Path

from sleb.model.block_stack import BlockStack
from sleb.model.loading import LoadedModel
from tests.support import tiny
from tests.support.families import build


def saved(folder: Path, family: str, num_blocks: int = 12) -> Path:
    """A random model of a family as a folder."""
    model = build(family, num_blocks)
    model.save_pretrained(str(folder), max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(str(folder))
    return folder


def tight(loaded: LoadedModel) -> int:
    """A budget that three blocks, what surrounds them and some hidden states fit in, and the whole does not."""
    stack = BlockStack(loaded.model)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in stack.blocks]
    whole = sum(each.nbytes for each in (*loaded.model.parameters(), *loaded.model.buffers()))
    return int((whole - sum(blocks) + 3 * max(blocks)) / 0.8 * 1.15)
