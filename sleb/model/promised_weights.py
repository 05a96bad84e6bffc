"""What a config promises against what the files hold, before memory is taken for it. Knows checkpoints' sizes only."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sleb.errors import ModelError

log = logging.getLogger(__name__)

_TIMES = 2
_SPARE = 1 << 24
"""Weights that need not be stored: what is tied, or made while loading."""
_BUFFER_BYTES = 1 << 28  # masks and positions of older families
_PACKED_PER_BYTE = 8  # weights, in the densest quantisation


def require_stored(name: str, config: Any, options: dict[str, Any], files: Iterable[str]) -> None:
    """The safetensors files hold the weights that the config asks for, as far as their number tells.

    Raises `ModelError` where it asks for more than twice as many; a few that are missing are told after loading.
    """
    paths = [Path(each) for each in dict.fromkeys(files)]
    if not paths:
        return
    stored = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            stored += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    if getattr(config, "quantization_config", None):
        stored = max(stored, _PACKED_PER_BYTE * sum(path.stat().st_size for path in paths))
    require_enough(name, config, options, stored)


def require_enough(name: str, config: Any, options: dict[str, Any], stored: int) -> None:
    """So many stored weights are about those of the model that the config describes. Raises `ModelError`."""
    skeleton = _skeleton(config, bool(options.get("trust_remote_code")))
    if skeleton is None:
        return
    promised = sum(parameter.numel() for parameter in skeleton.parameters())
    buffers = sum(buffer.nbytes for buffer in skeleton.buffers())
    if promised > _TIMES * stored + _SPARE or buffers > 8 * _TIMES * stored + _BUFFER_BYTES:
        raise ModelError(
            f"{name} asks in its config for {promised:,} weights and {buffers:,} bytes beside them, and its files hold "
            f"{stored:,} weights: the config belongs to another model, or is damaged."
        )


def _skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model without memory; None where it cannot be built so, which loading it will tell, too."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a model's code makes of a foreign config
        log.debug("No skeleton: %s", error)
        return None
