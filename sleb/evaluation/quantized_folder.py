"""A quantised model, and without some blocks as a folder, proven. Packs what `quantization` made; measures nothing.

The format is compressed-tensors' `pack-quantized`: four or eight bits a weight in int32 words and a scale for each
group, which transformers loads with the compressed-tensors library. torchao's own format would hold an int4 weight in a
byte. As with an export, nothing appears under the name that was asked for until the folder has been reloaded in a fresh
process and answers as the quantised model with the blocks skipped.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sleb.errors import OptionError
from sleb.evaluation.evaluated_model import Subject
from sleb.export import proof_process
from sleb.export.contents.model_folder import plan_folder, write_saved
from sleb.export.destination import Destination, saving
from sleb.export.proven_folder import Origin, expect, prove, write_expectation
from sleb.export.removal import plan_removal, streamlined
from sleb.formats.list_formats import display_name, in_words
from sleb.formats.model_card import PAPER, accounted_for, base_model, code, escaped, front_matter, licence_line
from sleb.model.block_stack import BlockStack
from sleb.model.inspection import licence
from sleb.model.loading import forget_quantisation
from sleb.records import Proof, Quantization, RemovalList

BITS = {"int8": 8, "int4": 4}
_SHAPE_BYTES = 16  # of a packed matrix's shape: two int64


@dataclass(frozen=True)
class Quantised:
    """A copy of a model whose blocks have quantised linear weights; what was not quantised is shared with it."""

    scheme: str
    stack: BlockStack
    group_sizes: dict[str, int]
    """Of int4: the module's name in the model, and how many of its weights share a scale. Of int8: a whole row."""

    @property
    def bits(self) -> int:
        """Of one quantised weight."""
        return BITS[self.scheme]

    def weight_bytes(self, removal_list: RemovalList) -> tuple[int, int, float]:
        """Bytes of all weights without these blocks, before and as a file holds them now; and the share quantised.

        A scale has the type of the model, as in the file; torchao itself keeps an int4 weight in a byte of memory.
        """
        before = after = total = quantised = 0
        removed = tuple(f"{self.stack.path}.{block}." for block in removal_list)
        for name, tensor in self.stack.model.named_parameters():
            if name.startswith(removed):
                continue
            before += tensor.numel() * tensor.dtype.itemsize
            total += tensor.numel()
            if not is_quantised(tensor):
                after += tensor.numel() * tensor.dtype.itemsize
                continue
            quantised += tensor.numel()
            rows, columns = tensor.shape
            words = math.ceil(columns * self.bits / 32)
            after += rows * words * 4 + tensor.scale.numel() * tensor.dtype.itemsize + _SHAPE_BYTES
        return before, after, quantised / total


def require() -> None:
    """Raises `OptionError` where the library that packs and loads is missing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise OptionError("Writing a quantised model needs compressed-tensors: pip install 'sleb[quantize]'.")


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether torchao holds it as integers and scales."""
    return hasattr(tensor, "qdata")


def write(
    subject: Subject,
    quantised: Quantised,
    removal_list: RemovalList,
    out: Path,
    measured: Sequence[Quantization],
    *,
    allow_existing: bool,
) -> Proof:
    """Write the quantised model without these blocks to `out`, and prove that it reloads and answers the same.

    Raises `ExportError` where the family cannot express the removal or the proof fails; then nothing is at `out`.
    """
    require()
    destination = Destination(out, allow_existing)
    destination.require_free()
    meter = subject.meter
    meter.phase("Recording what the quantised model answers with the blocks skipped")
    removal = plan_removal(subject.model, removal_list)
    expectation = expect(quantised.stack.model, subject.tokenizer, removal, Origin.of(subject.run))
    with destination.writing() as folder:
        meter.phase(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks in {quantised.scheme}")
        smaller: Any = streamlined(quantised.stack.model, removal_list)
        parameters = sum(parameter.numel() for parameter in smaller.parameters())
        tensors = _packed(smaller, quantised.bits)
        forget_quantisation(smaller)
        smaller.config.quantization_config = _config(smaller, quantised.stack.path, quantised.bits)
        card = _card(subject, quantised, removal_list, measured)
        plan = plan_folder(subject.model, removal, subject.source())
        trusted = subject.job.trust_remote_code
        contents = write_saved(smaller, subject.tokenizer, plan, folder, with_code=trusted, state=tensors)
        # A reload counts words and scales until its first forward pass; the numbers of the model are put in below.
        write_expectation(folder, removal, expectation, _stored(folder), subject.loaded.dtype, contents=contents)
        del smaller, tensors
        meter.phase("Reloading it in a new process, to compare")
        proof = prove(folder, str(quantised.stack.device), subject.job.trust_remote_code)
        proof = proof.model_copy(
            update={
                "parameters_after": parameters,
                "versions": proof.versions | {"compressed-tensors": version("compressed-tensors")},
            }
        )
        with saving():
            (folder / proof_process.PROOF).write_text(proof.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(_with_proof(card, proof), encoding="utf-8")
    return proof


def _packed(model: nn.Module, bits: int) -> dict[str, torch.Tensor]:
    """The state of a model as the format has it: names as they are, a quantised weight as words, scales and shape."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not is_quantised(tensor):
            state[name] = tensor
            continue
        held: Any = tensor
        state[f"{name}_packed"] = pack_to_int32(held.qdata.cpu(), bits)
        state[f"{name}_scale"] = held.scale.to(tensor.dtype).cpu()
        state[f"{name}_shape"] = torch.tensor(tensor.shape)
    return state


def _config(model: nn.Module, path: str, bits: int) -> dict[str, Any]:
    """What the model's config says about it: a scheme for each size of group, and the modules that have it."""
    names: dict[int | None, list[str]] = {}
    plain: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight: Any = module.weight
        if not is_quantised(weight):
            plain.append(name)
            continue
        groups = weight.scale.shape[1]
        names.setdefault(None if bits == 8 else module.in_features // groups, []).append(name)
    schemes = {
        f"group_{index}": {
            "targets": _targets(own, [other for each in names.values() if each is not own for other in each], path),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
        }
        for index, (size, own) in enumerate(names.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": plain,
    }


def _targets(own: Sequence[str], others: Sequence[str], path: str) -> list[str]:
    """These modules and not the others: by what they are called in every block, or by name where blocks differ."""
    pattern = re.compile(rf"{re.escape(path)}\.\d+\.(.+)")

    def part(name: str) -> str:
        found = pattern.fullmatch(name)
        return found[1] if found else name

    elsewhere = {part(name) for name in others}
    targets = [
        name if part(name) in elsewhere else rf"re:{re.escape(path)}\.\d+\.{re.escape(part(name))}$" for name in own
    ]
    return list(dict.fromkeys(targets))


def _stored(folder: Path) -> int:
    """Numbers in the files that were written, tied ones once."""
    total = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def _card(subject: Subject, quantised: Quantised, removal_list: RemovalList, measured: Sequence[Quantization]) -> str:
    """Front matter and provenance."""
    run = subject.run
    shown, named = display_name(run.spec.model), licence.of_model(run.spec.model, subject.loaded.revision)
    groups = " or ".join(map(str, sorted(set(quantised.group_sizes.values()))))
    whose = f"each group of {groups} weights" if groups else "each row"
    scheme = f"{quantised.bits} bits a weight, a scale for {whose}"
    found = measured[0]
    lines = [
        *front_matter(run.spec.model, "quantized", named, "compressed-tensors"),
        "",
        f"# {escaped(shown)} without {len(removal_list)} of its {len(subject.stack)} blocks, in {quantised.scheme}",
        "",
        f"Transformer blocks were removed whole ([SLEB]({PAPER})), and the linear weights of the others rounded to the "
        f"nearest of {2**quantised.bits} values ({scheme}, symmetric, {escaped(found.library)}). Embeddings, head and "
        "norms are as they were; nothing was trained.",
        "",
        base_model(run),
        licence_line(named),
        f"- **Removal list:** {code(list(removal_list))}",
        f"- **Blocks:** {escaped(in_words(len(subject.stack), removal_list, in_order=False))}",
        f"- **Weights:** {found.weight_bytes:,} bytes; {found.weight_bytes_before:,} before in {found.dtype}",
        f"- **Run:** {code(run.run_id)}",
        "",
        "| text | perplexity without the blocks | and quantised |",
        "|:---|---:|---:|",
        *(
            f"| {escaped(each.text.description)} | {each.before.perplexity or float('nan'):.4g} "
            f"| {each.measured.perplexity or float('nan'):.4g} |"
            for each in measured
        ),
        "",
        "## How to load it",
        "",
        "```bash",
        f"pip install transformers compressed-tensors=={version('compressed-tensors')}",
        "```",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "transformers unpacks the weights at the first forward pass and then takes the memory of unquantised ones; "
        "tools with kernels for packed weights may keep them packed.",
        "",
    ]
    return "\n".join(lines)


def _with_proof(card: str, proof: Proof) -> str:
    lines = [
        "## Proof",
        "",
        f"Reloaded in a fresh process with plain transformers {escaped(proof.versions.get('transformers', ''))}: "
        f"{proof.blocks_after} of {proof.blocks_before} blocks, {proof.bytes_after:,} bytes of weights. Over "
        f"{proof.tokens} positions its logits differ by at most {proof.max_logit_difference:.3g} from those of the "
        f"quantised model with the blocks skipped ({proof.tolerance:.3g} allowed in {escaped(proof.dtype)}). The "
        "details are in `proof.json`.",
        "",
        *accounted_for(proof),
    ]
    return card.rstrip("\n") + "\n\n" + "\n".join(lines)
