"""A healed model as a folder, proven, or its adapter. Writes what `healing_job` found; trains and measures nothing.

The proof compares the folder with the baseline while its blocks are skipped and the healed weights are in their places.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleb.errors import ExportError
from sleb.evaluation.evaluated_model import Subject
from sleb.export import finished_exports, proof_process
from sleb.export.contents.carried_files import CARD
from sleb.export.contents.model_folder import plan_folder, write_saved
from sleb.export.destination import Destination, saving
from sleb.export.proven_folder import Exporter, Origin, Written, count_parameters, dtype_of
from sleb.export.removal import Removal, plan_removal, streamlined
from sleb.formats.changed_weights_cards import Streamlined, adapter_card, base_card, healed_card
from sleb.model.block_stack import BlockStack
from sleb.model.inspection import licence
from sleb.records import ExportJob, Healing, Proof, RemovalList
from sleb.runtime import origin


@dataclass(frozen=True)
class Healed:
    """The smaller model with healed weights of its own; what was not healed is shared with the baseline."""

    removal_list: RemovalList
    stack: BlockStack


def write_merged(
    subject: Subject, healed: Healed, out: Path, measured: Sequence[Healing], *, allow_existing: bool
) -> Proof:
    """Write the healed model to `out`, and prove that it reloads and answers the same.

    Its weights and the baseline's are let go. Raises `ExportError` where the proof fails; then nothing is at `out`.
    """
    destination = Destination(out, allow_existing)
    destination.require_free()
    removal = plan_removal(subject.model, healed.removal_list)
    whole = in_place(subject.model, removal, healed.stack)
    card = healed_card(_about(subject, healed.removal_list), measured)
    return _exporter(subject, whole, removal, "healed model").export(
        destination, lambda folder: _write(subject, folder, whole, healed.stack.model, removal, card)
    )


def write_adapter(
    subject: Subject,
    adapted: Any,
    removal_list: RemovalList,
    out: Path,
    measured: Sequence[Healing],
    *,
    allow_existing: bool,
) -> None:
    """Write the adapter alone to `out`, naming the streamlined folder that it belongs to.

    That is the run's newest export of this list; where there is none, it is written as `out/base`, and proven. Raises
    `ExportError` where the adapter, loaded again, answers otherwise; then nothing is at `out`.
    """
    out = Path(os.path.abspath(out))
    destination = Destination(out, allow_existing)
    destination.require_free()
    removal = plan_removal(subject.model, removal_list)
    base, about, meter = _exported(subject, removal), _about(subject, removal_list), subject.meter
    with destination.writing() as folder:
        meter.phase("Writing the adapter")
        name = base.name if base else "base"
        adapted.peft_config[
            "default"
        ].base_model_name_or_path = f"./{name}"  # where it lies here says nothing elsewhere
        with saving("adapter"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted.save_pretrained(str(folder), save_embedding_layers=False)
            subject.tokenizer.save_pretrained(folder)
            card = adapter_card(about, measured, name, beside=base is not None)
            (folder / CARD).write_text(card, encoding="utf-8")
            if base is None:
                (folder / "base").mkdir()
        meter.phase("Loading it again, to compare")
        _require_same(folder, adapted, streamlined(subject.model, removal_list))
        if base is None:
            smaller, own = streamlined(subject.model, removal_list), base_card(about)
            _exporter(subject, subject.model, removal, "baseline").fill(
                folder / "base", lambda inner: _write(subject, inner, subject.model, smaller, removal, own)
            )


def in_place(model: nn.Module, removal: Removal, healed: BlockStack) -> nn.Module:
    """The baseline with healed weights in the blocks that stay; `model` itself keeps its own."""
    tensors = (*model.parameters(), *model.buffers())
    whole = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    blocks: Any = whole.get_submodule(removal.path)
    for position, block in enumerate(removal.kept):
        for name, parameter in healed.blocks[position].named_parameters():
            path, _, leaf = name.rpartition(".")
            setattr(blocks[block].get_submodule(path), leaf, parameter)
    return whole


def _exporter(subject: Subject, model: nn.Module, removal: Removal, name: str) -> Exporter:
    return Exporter(
        model,
        subject.tokenizer,
        removal,
        name,
        origin=Origin.of(subject.run),
        trust_remote_code=subject.job.trust_remote_code,
        progress=subject.meter.phase,
    )


def _write(subject: Subject, folder: Path, whole: nn.Module, smaller: Any, removal: Removal, card: str) -> Written:
    """Write `smaller` into an existing folder; it and `whole`, which has all blocks, are used up by the proof."""
    parameters = count_parameters(smaller)
    plan = plan_folder(subject.model, removal, subject.source())
    contents = write_saved(smaller, subject.tokenizer, plan, folder, with_code=subject.job.trust_remote_code)
    return Written(parameters, subject.loaded.dtype, contents, finished=(smaller, whole), card=card)


def _about(subject: Subject, removal_list: RemovalList) -> Streamlined:
    named = licence.of_model(subject.run.spec.model, subject.loaded.revision)
    return Streamlined(subject.run, len(subject.stack), removal_list, named)


@torch.inference_mode()
def _require_same(folder: Path, adapted: Any, smaller: nn.Module) -> None:
    """Loaded from `folder`, the adapter does to a streamlined model what the trained one does. Raises `ExportError`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again: Any = PeftModel.from_pretrained(smaller, str(folder)).eval()
    stack = BlockStack(smaller)
    ids = torch.arange(3, 35, device=stack.device).remainder(stack.config.vocab_size)[None]
    expected = proof_process.last_logits(adapted.get_base_model(), ids, ids.shape[1])
    loaded = proof_process.last_logits(again.get_base_model(), ids, ids.shape[1])
    difference = float((expected - loaded).abs().max())
    tolerance = proof_process.tolerance_of(dtype_of(stack.model), expected)
    if not difference <= tolerance:
        raise ExportError(
            f"The written adapter is not the one that was trained: its logits differ by up to {difference:.3g}; "
            f"{tolerance:.3g} is allowed."
        )


def _exported(subject: Subject, removal: Removal) -> Path | None:
    """The newest folder that the run exported here without these blocks and that still exists."""
    for each in reversed(finished_exports.read_exports(subject.run)):
        spec, ours = each.job.spec, origin.is_written_here(subject.run.run_dir, "jobs", each.job.name)
        ours = ours and isinstance(spec, ExportJob) and spec.out == str(each.out)
        if ours and each.proof.kept_blocks == removal.kept and (each.out / proof_process.PROOF).is_file():
            return each.out
    return None
