"""A streamlined model as a folder, proven. Removes the blocks and writes what loads anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sleb.export.contents.model_folder import Plan, plan_folder, require_as_stored, write_copied, write_saved
from sleb.export.destination import Destination, require_space
from sleb.export.proven_folder import Exporter, Origin, Written, count_parameters, dtype_of
from sleb.export.removal import carry_out, plan_removal
from sleb.export.smaller_config import check_removal_list
from sleb.model.block_stack import BlockStack
from sleb.model.inspection.source_folder import SourceFolder
from sleb.model.loading import forget_quantisation
from sleb.records import Proof


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
    """Write the model without these blocks to `out`, and prove that it reloads and answers as the baseline does.

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
    exporter = Exporter(
        model,
        tokenizer,
        removal,
        origin=origin or Origin(),
        trust_remote_code=trust_remote_code,
        memory_budget=memory_budget,
        progress=progress,
    )
    return exporter.export(
        destination,
        lambda folder: write_checkpoint(model, tokenizer, plan, folder, card, trust_remote_code=trust_remote_code),
    )


def write_checkpoint(
    model: Any, tokenizer: Any, plan: Plan, folder: Path, card: str, *, trust_remote_code: bool = False
) -> Written:
    """Remove the blocks and write the model into an existing folder."""
    carry_out(model, plan.removal)
    forget_quantisation(model)
    if plan.copy is not None:
        contents = write_copied(model, plan, folder, with_code=trust_remote_code)
    else:
        contents = write_saved(model, tokenizer, plan, folder, with_code=trust_remote_code)
    return Written(count_parameters(model), dtype_of(model), contents, finished=(model,), card=card)


def _require_space(model: nn.Module, stack: BlockStack, plan: Plan, where: Path) -> None:
    if plan.copy is not None:
        require_space("The model", plan.copy.size, where)
        return
    removed = [stack.blocks[block] for block in range(plan.removal.num_blocks) if block not in plan.removal.kept]
    require_space("The model", _bytes(model) - sum(map(_bytes, removed)), where)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
