"""Checkpoints quantised by hand, whose true weights are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def eight_bits(plain: Path, scale_name: str = "weight_scale_inv") -> tuple[Tensors, Tensors]:
    """Weights in 8-bit floats with their scales, as they are stored; and what they mean."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", scale_name)] = scale.reshape(1, 1)
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = weight.to(torch.bfloat16)
            meant[name] = stored[name].float()
    return stored, meant


def fp8(plain: Path, folder: Path) -> Path:
    """A copy of a model with 8-bit weights, as DeepSeek stores them."""
    shutil.copytree(plain, folder)
    save_file(eight_bits(plain)[0], folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": FP8}))
    return folder
