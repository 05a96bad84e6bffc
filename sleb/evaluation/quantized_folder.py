"""A quantised model, and without some blocks as a folder, proven. Packs what `quantization` made; measures nothing.

The format is compressed-tensors' `pack-quantized`: four or eight bits a weight in int32 words and a scale for each
group, which transformers loads with the compressed-tensors library. torchao's own format would hold an int4 weight in a
byte. The proof compares the folder with the quantised model while its blocks are skipped.
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
from sleb.export.contents.model_folder import plan_folder, write_saved
from sleb.export.destination import Destination
from sleb.export.proven_folder import Exporter, Origin, Written, count_parameters
from sleb.export.removal import plan_removal, streamlined
from sleb.formats.changed_weights_cards import Streamlined, quantized_card
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
    """In int4, how many weights share a scale, by the module's name in the model; in int8 a whole row does."""

    @property
    def bits(self) -> int:
        """Bits of one quantised weight."""
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
    """Require the library that packs and loads. Raises `OptionError` where it is missing."""
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
    removal, job = plan_removal(subject.model, removal_list), subject.job
    named = licence.of_model(subject.run.spec.model, subject.loaded.revision)
    about = Streamlined(subject.run, len(subject.stack), removal_list, named)

    def fill(folder: Path) -> Written:
        smaller: Any = streamlined(quantised.stack.model, removal_list)
        parameters, tensors = count_parameters(smaller), _packed(smaller, quantised.bits)
        forget_quantisation(smaller)
        smaller.config.quantization_config = _config(smaller, quantised.stack.path, quantised.bits)
        plan = plan_folder(subject.model, removal, subject.source())
        with_code = job.trust_remote_code
        contents = write_saved(smaller, subject.tokenizer, plan, folder, with_code=with_code, state=tensors)
        # A reload counts words and scales until its first forward pass: the proof is told the model's own numbers.
        return Written(
            _stored(folder),
            subject.loaded.dtype,
            contents,
            card=quantized_card(about, measured, quantised.bits),
            corrections={"parameters_after": parameters},
            versions={"compressed-tensors": version("compressed-tensors")},
        )

    exporter = Exporter(
        quantised.stack.model,
        subject.tokenizer,
        removal,
        "quantised model",
        origin=Origin.of(subject.run),
        trust_remote_code=job.trust_remote_code,
        progress=subject.meter.phase,
    )
    return exporter.export(destination, fill)


def _packed(model: nn.Module, bits: int) -> dict[str, torch.Tensor]:
    """The state of a model in the format: names as they are, a quantised weight as words, scales and shape."""
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
        match = pattern.fullmatch(name)
        return match[1] if match else name

    elsewhere = {part(name) for name in others}
    targets = [
        name if part(name) in elsewhere else rf"re:{re.escape(path)}\.\d+\.{re.escape(part(name))}$" for name in own
    ]
    return list(dict.fromkeys(targets))


def _stored(folder: Path) -> int:
    """How many numbers the written files hold, tied ones once."""
    total = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total
