"""One method of llm-compressor on one model folder: writes a dense model folder that any transformers loads.

    python compress.py MODEL METHOD IDS.npy OUT [--group-size 64]

Runs in the environment of `requirements.txt` beside it, and imports nothing of sleb. IDS holds token ids, int64
(sequences, length), the calibration text that everything else is calibrated on. Prints one line of JSON: seconds, how
many weights are zero, and what the method was told.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = ["re:.*lm_head"]


def main() -> None:
    """Load, compress, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("method", choices=["sparsegpt", "wanda", "awq"])
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = np.load(args.ids)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    pin_nothing_without_a_gpu()
    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe(args.method, args.group_size),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    make_dense(model)
    linear = [module.weight for name, module in model.named_modules() if of_blocks(name, module)]
    zeros, total = sum(int((weight == 0).sum()) for weight in linear), sum(weight.numel() for weight in linear)
    # The class's own method: llm-compressor wraps the model's to pack what it compressed.
    type(model).save_pretrained(model, args.out)
    tokenizer.save_pretrained(args.out)
    facts = {"seconds": seconds, "zeros": zeros / total, "pattern": holds_pattern(linear)}
    print(json.dumps(facts | {"library": f"llm-compressor {version('llmcompressor')}"}))


def recipe(method: str, group_size: int) -> list[Any]:
    """The recipe of each paper: half of the weights in groups of four; int4 with a zero point for each group."""
    if method == "sparsegpt":
        return [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=IGNORE)]
    if method == "wanda":
        return [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=IGNORE)]
    weights = dict(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size, observer="minmax")
    groups = {"group_0": dict(targets=["Linear"], weights=weights)}
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORE)]


def pin_nothing_without_a_gpu() -> None:
    """Keep llm-compressor 0.14 from pinning memory where torch refuses; pinned memory holds the same numbers."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor


@torch.no_grad()
def make_dense(model: torch.nn.Module) -> None:
    """Quantised weights as the numbers that they stand for; nothing of the library stays on the model."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    for module in model.modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme.weights)
        module.weight.data.copy_(rounded)
        for name in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]:
            delattr(module, name)
        for name in ("quantization_scheme", "quantization_status"):
            vars(module).pop(name, None)
        vars(module).pop("forward", None)
    vars(model.config).pop("quantization_config", None)


def of_blocks(name: str, module: torch.nn.Module) -> bool:
    """Whether a method was to change it."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def holds_pattern(weights: list[torch.Tensor]) -> bool:
    """Whether in every matrix two of each four neighbours are zero."""
    return all(bool(((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all()) for weight in weights)


if __name__ == "__main__":
    main()
