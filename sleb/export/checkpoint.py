"""A streamlined model as a folder, proven. Removes the blocks and writes what loads anywhere.

Nothing appears under the name that was asked for until the proof has passed: everything is written into a
folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sleb.errors import StorageError
from sleb.export.destination import Destination, saving
from sleb.export.proven_folder import Expectation, expect, let_go, prove, write_expectation
from sleb.export.removal import Removal, carry_out, plan_removal
from sleb.export.smaller_config import check_removal_list
from sleb.formats.model_card import with_proof
from sleb.model.block_stack import BlockStack
from sleb.model.loading import forget_quantisation
from sleb.model.streaming import streamed_blocks
from sleb.records import Proof

SPARE_BYTES = 64 * 1024**2  # tokenizer, card and what the file system takes


def export_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    removal_list: Sequence[int],
    out: Path,
    card: str,
    allow_existing: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    *,
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
) -> Proof:
    """Write the model without these blocks to `out`, and prove that it reloads and answers as the original
    does.

    The model is used up: its blocks are removed in place and its weights are let go before they are loaded
    again. `allow_existing` lets an earlier export at `out` be replaced, and nothing else. Raises
    `ExportError` where the result cannot be expressed or its proof fails; then nothing is left at `out`.
    """
    stack = BlockStack(model)
    check_removal_list(removal_list, len(stack))
    destination = Destination(Path(os.path.abspath(out)), allow_existing)
    destination.require_free()
    removal = plan_removal(model, removal_list)
    _require_space(model, stack, removal, destination.out.parent)

    progress("Recording what the model answers with the blocks skipped")
    expectation = expect(model, tokenizer, removal)
    with destination.writing() as folder:
        progress(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks")
        write_checkpoint(model, tokenizer, removal, expectation, folder, card)
        device = str(stack.device)
        let_go(model)
        progress("Reloading it in a new process, to compare")
        proof = prove(folder, device, trust_remote_code, memory_budget)
        with saving():
            (folder / "README.md").write_text(with_proof(card, proof), encoding="utf-8")
    return proof


def write_checkpoint(
    model: Any, tokenizer: Any, removal: Removal, expectation: Expectation, folder: Path, card: str
) -> None:
    """Remove the blocks and write the model, with what its proof needs, into an existing folder."""
    carry_out(model, removal)
    forget_quantisation(model)
    with saving():
        mend_generation_config(model, folder)
        streamed = streamed_blocks(model)
        if streamed is not None:
            streamed.forget()  # saving reads shard by shard, and has the room for itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, **({} if streamed is None else {"max_shard_size": streamed.budget // 3}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_expectation(folder, removal, expectation, parameters, str(model.dtype).removeprefix("torch."))


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def mend_generation_config(model: Any, folder: Path) -> None:
    """Some published defaults set a temperature without sampling; saving refuses what generating ignores."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError:
        if config.do_sample is not True:
            for name in _SAMPLING:
                setattr(config, name, None)


def _require_space(model: nn.Module, stack: BlockStack, removal: Removal, where: Path) -> None:
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    removed = sum(
        parameter.numel() * parameter.element_size()
        for block in range(removal.num_blocks)
        if block not in removal.kept
        for parameter in stack.blocks[block].parameters()
    )
    needed = whole - removed + SPARE_BYTES
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"The model takes {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left; "
            "free some, or name another folder."
        )
