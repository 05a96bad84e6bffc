"""A healed model as a folder, proven, or its adapter. Writes what `healing_job` found; trains and measures nothing.

As with an export, nothing appears under the name that was asked for until the folder has been reloaded in a fresh
process and answers as the unmodified model does with the blocks skipped and the healed weights in their places.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleb.errors import ExportError
from sleb.evaluation.evaluated_model import Subject
from sleb.export import finished_exports, proof_process
from sleb.export.contents.model_folder import plan_folder, write_saved
from sleb.export.destination import Destination, saving
from sleb.export.proven_folder import Origin, expect, let_go, prove, write_expectation
from sleb.export.removal import Removal, plan_removal, streamlined
from sleb.formats.findings_tables import healing_notes
from sleb.formats.list_formats import display_name, in_words
from sleb.formats.model_card import PAPER, accounted_for, base_model, code, escaped, front_matter, licence_line
from sleb.model.block_stack import BlockStack
from sleb.model.inspection import licence
from sleb.records import ExportJob, Healing, Proof, RemovalList
from sleb.runtime import origin


@dataclass(frozen=True)
class Healed:
    """The smaller model with healed weights of its own; what was not healed is shared with the unmodified one."""

    removal_list: RemovalList
    stack: BlockStack


def write_merged(
    subject: Subject, healed: Healed, out: Path, measured: Sequence[Healing], *, allow_existing: bool
) -> Proof:
    """Write the healed model to `out`, and prove that it reloads and answers the same.

    Its weights and the unmodified model's are let go. Raises `ExportError` where the proof fails; then nothing is at
    `out`.
    """
    destination = Destination(out, allow_existing)
    destination.require_free()
    removal = plan_removal(subject.model, healed.removal_list)
    whole = in_place(subject.model, removal, healed.stack)
    card = _card(subject, healed.removal_list, measured, adapter=False)
    with destination.writing() as folder:
        proof = _write_proven(subject, folder, whole, healed.stack.model, removal, card, what="healed model")
    return proof


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
    base, meter = _exported(subject, removal), subject.meter
    with destination.writing() as folder:
        meter.phase("Writing the adapter")
        adapted.peft_config["default"].base_model_name_or_path = _relative(base)
        card = _card(subject, removal_list, measured, adapter=True, base=base)
        with saving("adapter"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted.save_pretrained(str(folder), save_embedding_layers=False)
            subject.tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if base is None:
                (folder / "base").mkdir()
        meter.phase("Loading it again, to compare")
        _require_same(folder, adapted, streamlined(subject.model, removal_list))
        if base is None:
            smaller = streamlined(subject.model, removal_list)
            own = _base_card(subject, removal_list)
            _write_proven(subject, folder / "base", subject.model, smaller, removal, own, what="original")


def in_place(model: nn.Module, removal: Removal, healed: BlockStack) -> nn.Module:
    """The unmodified model with healed weights in the blocks that stay; `model` itself keeps its own."""
    tensors = (*model.parameters(), *model.buffers())
    whole = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    blocks: Any = whole.get_submodule(removal.path)
    for position, block in enumerate(removal.kept):
        for name, parameter in healed.blocks[position].named_parameters():
            path, _, leaf = name.rpartition(".")
            setattr(blocks[block].get_submodule(path), leaf, parameter)
    return whole


def _write_proven(
    subject: Subject, folder: Path, whole: nn.Module, smaller: Any, removal: Removal, card: str, *, what: str
) -> Proof:
    """Into an existing folder: `smaller`, proven to answer as `whole` with the blocks skipped. Uses both up."""
    meter, device = subject.meter, str(subject.stack.device)
    meter.phase(f"Recording what the {what} answers with the blocks skipped")
    expectation = expect(whole, subject.tokenizer, removal, Origin.of(subject.run))
    meter.phase(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks")
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    plan = plan_folder(subject.model, removal, subject.source())
    contents = write_saved(smaller, subject.tokenizer, plan, folder, with_code=subject.job.trust_remote_code)
    write_expectation(folder, removal, expectation, parameters, subject.loaded.dtype, contents=contents)
    let_go(smaller)
    let_go(whole)
    meter.phase("Reloading it in a new process, to compare")
    proof = prove(folder, device, subject.job.trust_remote_code)
    with saving():
        (folder / "README.md").write_text(_with_proof(card, proof, what), encoding="utf-8")
    return proof


@torch.inference_mode()
def _require_same(folder: Path, adapted: Any, smaller: nn.Module) -> None:
    """What was written does to a streamlined model what was trained."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again: Any = PeftModel.from_pretrained(smaller, str(folder)).eval()
    stack = BlockStack(smaller)
    ids = torch.arange(3, 35, device=stack.device).remainder(stack.config.vocab_size)[None]
    expected = proof_process.last_logits(adapted.get_base_model(), ids, ids.shape[1])
    found = proof_process.last_logits(again.get_base_model(), ids, ids.shape[1])
    difference = float((expected - found).abs().max())
    tolerance = proof_process.tolerance_of(str(stack.model.dtype).removeprefix("torch."), expected)
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


def _relative(base: Path | None) -> str:
    """The streamlined model's folder as an adapter names it: where it lies here says nothing elsewhere."""
    return f"./{base.name if base else 'base'}"


def _heading(subject: Subject, title: str, *tags: str, peft: bool = False) -> list[str]:
    model = subject.run.spec.model
    front = front_matter(
        model, "adapter" if peft else "finetune", _licence(subject), *tags, library="peft" if peft else "transformers"
    )
    return [*front, "", f"# {title}", ""]


def _licence(subject: Subject) -> dict[str, str]:
    return licence.of_model(subject.run.spec.model, subject.loaded.revision)


def _shown(subject: Subject) -> str:
    return escaped(display_name(subject.run.spec.model))


def _provenance(subject: Subject, removal_list: RemovalList) -> list[str]:
    return [
        base_model(subject.run),
        licence_line(_licence(subject)),
        f"- **Removal list:** {code(list(removal_list))}",
        f"- **Blocks:** {escaped(in_words(len(subject.stack), removal_list, in_order=False))}",
        f"- **Run:** {code(subject.run.run_id)}",
    ]


def _card(
    subject: Subject, removal_list: RemovalList, measured: Sequence[Healing], *, adapter: bool, base: Path | None = None
) -> str:
    """Front matter and provenance."""
    found = measured[0]
    ask = found.ask
    tokens = f"{ask.sequences:,} sequences of {ask.sequence_length} tokens from {escaped(found.healing_text)}"
    fitted = (
        "the last linear layer before each cut was fitted anew, by least squares, to give out what the removed blocks "
        "gave out in the base model"
    )
    trained = (
        f"low-rank adapters (LoRA, rank {ask.rank}, peft {_peft()}) were trained on every linear layer inside "
        f"the blocks for {ask.epochs} epoch{'s' if ask.epochs > 1 else ''}, learning rate {ask.learning_rate:g}, "
        f"{ask.batch_sequences} sequences an update, seed {ask.seed}"
        + ("" if adapter else ", and merged into the weights")
    )
    how = {"lora": trained, "linear": fitted, "both": f"{fitted}; and {trained}"}[ask.how]
    how += f". The text: {tokens}."
    if ask.how == "linear":
        how += " Nothing was trained."
    title = f"{_shown(subject)} without {len(removal_list)} of its {len(subject.stack)} blocks, healed"
    lines = [
        *_heading(subject, title + (": the adapter" if adapter else ""), "healed", peft=adapter),
        f"Transformer blocks were removed whole ([SLEB]({PAPER})); then {how}",
        "",
        *_provenance(subject, removal_list),
        "",
        "| text | perplexity of the base model | without the blocks | and healed |",
        "|:---|---:|---:|---:|",
        *(
            f"| {escaped(each.text.description)} | {_number(each.baseline.perplexity)} "
            f"| {_number(each.before.perplexity)} | {_number(each.after.perplexity)} |"
            for each in measured
        ),
        "",
        f"Measured in {found.dtype}" + (", with the adapter merged." if adapter else "."),
        "",
        *(f"- {escaped(each)}" for each in healing_notes(measured)),
        "",
        "## How to load it",
        "",
    ]
    if adapter:
        where = "`base` in this folder" if base is None else f"{code(base.name)}, which the same run exported"
        lines += [
            f"The adapter belongs to the streamlined model in {where}, and to no other: the base model itself has "
            "other blocks in these places. Hand both on together. `adapter_config.json` names it as "
            f"{code(_relative(base))} (`base_model_name_or_path`), which is looked for in the folder that Python is "
            "started in: move it there, write into that field where it lies or what it is called on the "
            "hub, or load it by hand:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/the/streamlined/model")',
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            "```",
            "",
        ]
    else:
        lines += _loading()
    return "\n".join(lines)


def _peft() -> str:
    try:
        return version("peft")
    except PackageNotFoundError:  # it was there when the adapters were trained
        return "of an unknown version"


def _base_card(subject: Subject, removal_list: RemovalList) -> str:
    title = f"{_shown(subject)} without {len(removal_list)} of its {len(subject.stack)} blocks"
    lines = [
        *_heading(subject, title),
        f"Transformer blocks were removed whole ([SLEB]({PAPER})); nothing was trained. The adapter beside this folder "
        "heals it.",
        "",
        *_provenance(subject, removal_list),
        "",
        "## How to load it",
        "",
        *_loading(),
    ]
    return "\n".join(lines)


def _loading() -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]


def _with_proof(card: str, proof: Proof, what: str) -> str:
    lines = [
        "## Proof",
        "",
        f"Reloaded in a fresh process with plain transformers {escaped(proof.versions.get('transformers', ''))}: "
        f"{proof.blocks_after} of {proof.blocks_before} blocks, {proof.parameters_after:,} of "
        f"{proof.parameters_before:,} parameters. Over {proof.tokens} positions its logits differ by at most "
        f"{proof.max_logit_difference:.3g} from those of the {what} with the blocks skipped ({proof.tolerance:.3g} "
        f"allowed in {escaped(proof.dtype)}). The details are in `proof.json`.",
        "",
        *accounted_for(proof),
    ]
    return card.rstrip("\n") + "\n\n" + "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
