"""A model whose blocks stay on disk, built without its weights. Knows checkpoints; never computes.

Where the checkpoint names its tensors as the model does, only what surrounds the blocks is read. Other checkpoints
(renamed or merged while loading, as those of mixtures of experts) go through transformers once, which writes what it
had to change into a scratch folder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sleb.errors import ModelError, OptionError
from sleb.model.inspection.checkpoint import files_by_key
from sleb.model.stack_discovery import find_stack
from sleb.model.streaming import fits, give_memory_back, stream_blocks
from sleb.runtime import run_folder
from sleb.runtime.unfinished import names
from sleb.runtime.unfinished.workspaces import sweep


def load_within(
    budget: int,
    source: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    scratch_home: Path,
    options: dict[str, Any],
    load: Callable[..., tuple[Any, dict[str, Any]]],
) -> tuple[Any, dict[str, Any]]:
    """A model and its loading report, within `budget` bytes; wholly in memory where it fits.

    `load(**kwargs)` is `from_pretrained` with everything that is always the same. Raises `OptionError` for a budget
    that is too small.
    """
    from accelerate import dispatch_model, init_empty_weights
    from transformers import AutoModelForCausalLM

    give_memory_back()
    trust = bool(options.get("trust_remote_code"))
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if fits(total, budget):
        return load(device_map={"": device} if device.type == "cuda" else None)
    if any(getattr(each, "quantization_config", None) for each in (config, config.get_text_config(decoder=True))):
        raise OptionError(
            f"{source} is quantised, and `memory_budget` needs plain weights where they do not fit into it."
        )
    path, _ = find_stack(model)
    places = _device_map(model, path, device)
    scratch = _scratch(scratch_home)
    files = files_by_key(source, options)
    index = _index(model, path, dtype, files)
    if index is None:
        with _quiet("accelerate.big_modeling"):
            model, report = load(device_map=places, offload_folder=scratch.name)
    else:
        _require_ties(model, source, files)
        report = _read_surroundings(model, files, index, device)
        model.tie_weights()
        _generation_config(model, source, options)
        skipped = getattr(model, "_skip_keys_device_placement", None)
        with _quiet("accelerate.big_modeling"):
            dispatch_model(model, places, offload_dir=scratch.name, offload_index=index, skip_keys=skipped)
    stream_blocks(model, path, device, budget, scratch)
    return model, report


def _device_map(model: nn.Module, path: str, device: torch.device) -> dict[str, Any]:
    """The stack on disk, everything around it on the device, name by name."""
    where: Any = "cpu" if device.type == "cpu" else device
    places: dict[str, Any] = {path: "disk"}
    prefix, owner = "", model
    for part in path.split("."):
        places |= {f"{prefix}{name}": where for name, _ in owner.named_children() if name != part}
        places |= {f"{prefix}{name}": where for name, _ in owner.named_parameters(recurse=False)}
        places |= {f"{prefix}{name}": where for name, _ in owner.named_buffers(recurse=False)}
        prefix, owner = f"{prefix}{part}.", getattr(owner, part)
    return places


def _index(model: Any, path: str, dtype: torch.dtype, files: dict[str, str]) -> dict[str, dict[str, str]] | None:
    """The places of the blocks' weights, as accelerate wants them; None where names, shapes or types must change."""
    plan = getattr(model, "_get_dtype_plan", None)
    if plan is None or plan(dtype) or getattr(model.config, "quantization_config", None):
        return None
    if not any(name in files for name in model.state_dict()):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(files.values()):
        with safe_open(name, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    index = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{path}."):
            if shapes.get(name) != tuple(parameter.shape):
                return None
            index[name] = {
                "safetensors_file": files[name],
                "weight_name": name,
                "dtype": str(parameter.dtype).removeprefix("torch."),
            }
    return index


def _require_ties(model: Any, source: str, files: dict[str, str]) -> None:
    """Raises `ModelError` where stored weights differ that the config ties: transformers would only warn."""
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if one in files and other in files and not torch.equal(_stored(files, one), _stored(files, other)):
            raise ModelError(
                f"{source} stores {one} and {other} with different values, and its config ties them; say "
                '"tie_word_embeddings": false in config.json, or take the one away that is not the model\'s.'
            )


def _stored(files: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt", backend="pread") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _read_surroundings(
    model: Any, files: dict[str, str], index: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Read what is not a parameter of a block. Returns what `from_pretrained` would report."""
    from accelerate.utils import set_module_tensor_to_device

    wanted = dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name, empty in wanted.items():
        if name in index or name not in files:
            continue
        set_module_tensor_to_device(model, name, device, value=_stored(files, name), dtype=empty.dtype)
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            set_module_tensor_to_device(model, name, device, value=buffer)
    return {
        "missing_keys": {name for name in wanted if name not in files and name not in tied},
        "unexpected_keys": {name for name in files if name not in wanted},
    }


def _generation_config(model: Any, source: str, options: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    with suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(source, revision=options.get("revision") or "main")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A context in which a logger does not warn of parameters on the meta device, which are intended."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scratch(home: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for converted weights, named after its process; what killed processes left is cleared away."""
    home.mkdir(parents=True, exist_ok=True)
    sweep(run_folder.home(), home)
    return tempfile.TemporaryDirectory(
        prefix=names.prefix("weights"), suffix=names.SUFFIX, dir=home, ignore_cleanup_errors=True
    )
