"""A streamlined model as a folder, proven. Removes the blocks and writes what loads anywhere.

Nothing appears under the name that was asked for until the proof has passed: everything is written into a
folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sleb.errors import StorageError
from sleb.export.contents.carried_files import CARD
from sleb.export.contents.model_folder import Plan, plan_folder, require_as_stored, write_copied, write_saved
from sleb.export.destination import Destination, saving
from sleb.export.proven_folder import Expectation, Origin, expect, let_go, prove, write_expectation
from sleb.export.removal import carry_out, plan_removal
from sleb.export.smaller_config import check_removal_list
from sleb.formats.model_card import with_proof
from sleb.model.block_stack import BlockStack
from sleb.model.inspection.source_folder import SourceFolder
from sleb.model.loading import forget_quantisation
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
    source: SourceFolder | None = None,
    origin: Origin | None = None,
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
) -> Proof:
    """Write the model without these blocks to `out`, and prove that it reloads and answers as the original
    does.

    The model is used up: its blocks are removed in place and its weights are let go before they are loaded
    again. `source` is the folder it was loaded from: its tensors are copied, and what else is in it is carried over or
    named in the proof as left behind. `allow_existing` lets an earlier export at `out` be replaced, and nothing else.
    Raises `ExportError` where the result cannot be expressed or its proof fails; then nothing is left at `out`.
    """
    stack = BlockStack(model)
    check_removal_list(removal_list, len(stack))
    destination = Destination(Path(os.path.abspath(out)), allow_existing)
    destination.require_free()
    removal = plan_removal(model, removal_list)
    plan = plan_folder(model, removal, source)
    require_as_stored(plan)
    _require_space(model, stack, plan, destination.out.parent)

    progress("Recording what the model answers with the blocks skipped")
    expectation = expect(model, tokenizer, removal, origin)
    with destination.writing() as folder:
        progress(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks")
        device = str(stack.device)
        write_checkpoint(model, tokenizer, plan, expectation, folder, card, trust_remote_code=trust_remote_code)
        let_go(model)
        progress("Reloading it in a new process, to compare")
        proof = prove(folder, device, trust_remote_code, memory_budget)
        with saving():
            (folder / CARD).write_text(with_proof(card, proof), encoding="utf-8")
    return proof


def write_checkpoint(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    expectation: Expectation,
    folder: Path,
    card: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Remove the blocks and write the model, with what its proof needs, into an existing folder."""
    carry_out(model, plan.removal)
    forget_quantisation(model)
    if plan.copy is not None:
        contents = write_copied(model, plan, folder, with_code=trust_remote_code)
    else:
        contents = write_saved(model, tokenizer, plan, folder, with_code=trust_remote_code)
    with saving():
        (folder / CARD).write_text(card, encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    write_expectation(folder, plan.removal, expectation, parameters, dtype, contents=contents)


def _require_space(model: nn.Module, stack: BlockStack, plan: Plan, where: Path) -> None:
    removal = plan.removal
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    removed = sum(
        parameter.numel() * parameter.element_size()
        for block in range(removal.num_blocks)
        if block not in removal.kept
        for parameter in stack.blocks[block].parameters()
    )
    needed = (whole - removed if plan.copy is None else plan.copy.size) + SPARE_BYTES
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"The model takes {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left; "
            "free some, or name another folder."
        )
