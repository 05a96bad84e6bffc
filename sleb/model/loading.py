"""A model name, a local folder or a GGUF file -> model and tokenizer. Refuses what it cannot use, in one sentence."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sleb.errors import ModelError, OptionError
from sleb.model import demo
from sleb.model.devices import chosen_dtype, resolve_device
from sleb.model.inspection import gguf_header, model_files, quantisation, tokenizer_growth
from sleb.model.inspection.checkpoint import Checkpoint, require_complete
from sleb.model.inspection.library_errors import loaded_by, quieten_torchao
from sleb.model.inspection.presence import is_path, require_code_elsewhere, require_file
from sleb.model.streamed_loading import load_within
from sleb.model.streaming import streamed_blocks
from sleb.records import is_gguf
from sleb.runtime import run_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    """The commit that was loaded, where the hub names one."""
    dtype: str
    device: str
    checkpoint_dtype: str | None = None
    """The type that most of the stored weights have; None where they are packed, or their files do not say."""
    quantisation: str | None = None
    """What the checkpoint is quantised with, in words; None if it is not."""


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
    only_to_compare: bool = False,
) -> LoadedModel:
    """Load for scoring. `dtype` "auto" is what is fast here (`fast_dtype`), "checkpoint" what the weights have.

    With a `memory_budget` in bytes that the weights exceed, the blocks stay on disk and are read when they are needed.
    `only_to_compare` takes a GGUF file whose rotary positions transformers reads otherwise than llama.cpp: what is cut
    out of it is copied, and read in the same way. Raises `ModelError` for anything but a causal language model that can
    be read here, `OptionError` for a device that is not there, or a budget that is too small.
    """
    quieten_torchao()
    where = resolve_device(device)
    source = _located(name, revision, allow_pickle, trust_remote_code)
    loaded_by(name, lambda: model_files.require_no_adapter(name, source.place, source.revision))
    config, raw = _config(source)
    checkpoint = Checkpoint(name, source.place, config, raw, source.options)
    _inspect(source, config, checkpoint, only_to_compare)
    chosen = chosen_dtype(dtype, config, checkpoint.dtype, where)
    kwargs = dict(source.options, dtype=chosen, use_safetensors=None if allow_pickle or source.header else True)
    if where.type == "cuda" and source.header is None:
        # Straight to the GPU, without a second copy in memory; or where accelerate finds room for it.
        kwargs["device_map"] = "auto" if device == "all" else {"": where}
    is_known = bool(source.header or checkpoint.stored or checkpoint.dtype or getattr(config, "dtype", None))
    if dtype == "checkpoint" and not is_known and memory_budget is None:
        kwargs["dtype"] = "auto"  # the pickle alone knows it
    model, report = _weights(source, config, checkpoint, kwargs, chosen, where, memory_budget)
    quantised = checkpoint.applied(model, report) if source.header is None else _of_gguf(source.header)
    require_complete(name, report)
    checkpoint.require_every_block(model, report)
    chosen = model.dtype if kwargs["dtype"] == "auto" else chosen
    if name == "demo":
        quantised = _of_gguf(gguf_header.check(demo.model_file()))
    tokenizer = loaded_by(name, lambda: _tokenizer(source))
    _make_ready(model, chosen, where if kwargs.get("device_map") is None else None)
    if not getattr(tokenizer, "vocab_size", None):
        raise ModelError(f"{name} has no usable tokenizer; save one beside the weights (tokenizer.json).")
    if quantised is not None:
        log.info("%s is quantised: %s.", name, quantised)
    kind = str(chosen).removeprefix("torch.")
    return LoadedModel(model, tokenizer, name, source.revision, kind, str(where), checkpoint.dtype, quantised)


@dataclass(frozen=True)
class _Source:
    """Where a model's files are, before anything is read from them but the header of a GGUF file."""

    name: str
    place: str
    """A folder, or a name on the hub."""
    options: dict[str, Any]
    """What transformers is given along with the place."""
    header: gguf_header.Header | None = None

    @property
    def revision(self) -> str | None:
        """The commit of a hub model, so that all of its files are of one."""
        revision: str | None = self.options["revision"]
        return revision


def _located(name: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> _Source:
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name == "demo":
        return _Source(name, str(demo.model_folder(convert_gguf)), options)
    if is_gguf(name):
        file = Path(name).expanduser()
        header = _header(file)
        return _Source(name, str(file.parent), options | {"gguf_file": file.name}, header)
    if is_path(name):
        folder = Path(name).expanduser()
        _require_folder(folder, allow_pickle)
        return _Source(name, str(folder), options)
    return _Source(name, name, options | {"revision": _commit(name, revision)})


def _inspect(source: _Source, config: Any, checkpoint: Checkpoint, only_to_compare: bool) -> None:
    """Refuse files that do not hold the model that the config describes. Raises `ModelError`."""
    name, header = source.name, source.header
    if header is None:
        loaded_by(name, lambda: checkpoint.inspect())
        return
    model_files.require_enough(name, config, source.options, header.elements)
    if not only_to_compare:
        loaded_by(name, lambda: gguf_header.require_rope(Path(name), header, config))


def _weights(
    source: _Source,
    config: Any,
    checkpoint: Checkpoint,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    memory_budget: int | None,
) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, and the library's report of what was missing or left over."""

    def load(**others: Any) -> Any:
        return _auto_model().from_pretrained(source.place, output_loading_info=True, **(kwargs | others))

    if memory_budget is None:
        model, report = loaded_by(source.name, load, checkpoint.scheme)
    elif source.header is not None:
        raise OptionError(f"{source.name} is dequantised as a whole; `memory_budget` needs a safetensors folder.")
    else:
        scratch = run_folder.home() / "cache" / "offload"
        model, report = loaded_by(
            source.name,
            lambda: load_within(memory_budget, source.place, config, dtype, device, scratch, source.options, load),
            checkpoint.scheme,
        )
    return model, report


def _make_ready(model: Any, dtype: torch.dtype, device: torch.device | None) -> None:
    """Give the model its type and device (None: it has one), and evaluation mode; streamed weights stay on disk."""
    if streamed_blocks(model) is None:
        _cast(model, dtype)
        if device is not None:
            model.to(device)
    model.eval()
    model.requires_grad_(False)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Give 16-bit weights this type: dequantised ones may have another. Float32 stays: some families choose it."""
    if getattr(model, "hf_quantizer", None) is None:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and parameter.dtype is not dtype:
                parameter.data = parameter.data.to(dtype)


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer as a safetensors folder (float32: quantised weights are dequantised)."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = _auto_model().from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer = _auto_tokenizer().from_pretrained(str(source.parent), gguf_file=source.name)
    forget_quantisation(model)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def forget_quantisation(model: Any) -> None:
    """Remove what is left of a quantiser that would refuse to save weights which loading has dequantised (GGUF)."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False


def _config(source: _Source) -> tuple[Any, dict[str, Any]]:
    """The config as a library reads it, and what its file says, which is empty for GGUF files."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    name, options = source.name, source.options
    raw: dict[str, Any] = {}
    if source.header is None:
        raw, _ = loaded_by(name, lambda: PreTrainedConfig.get_config_dict(source.place, **options))
        model_files.require_modest(name, raw)
        if options["trust_remote_code"]:
            require_code_elsewhere(raw)
        else:
            model_files.require_own_kernels(name, raw)
    config = loaded_by(name, lambda: AutoConfig.from_pretrained(source.place, **options))
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({kind}); removing blocks is defined here for decoder-only ones."
        )
    if kind not in CAUSAL and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(f"{name} ({kind}) is not a causal language model; a decoder-only language model is needed.")
    return config, raw


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub model is now, so that all of its files are of one; as asked if unknown."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    config = loaded_by(name, lambda: cached_file(name, "config.json", revision=revision))
    return extract_commit_hash(config, None) or revision


def _require_folder(folder: Path, allow_pickle: bool) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file; a model is a folder with config.json, a .gguf file, or a hub name.")
    model_files.require_no_adapter(str(folder), str(folder), None)  # it may have no config.json
    model_files.read_config(folder)
    model_files.require_plain_files(folder)
    if list(folder.glob("*.safetensors")):
        return
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickles and not allow_pickle:
        raise ModelError(
            f"{folder} has its weights only as a pickle ({pickles[0].name}), which can run any code when it is read. "
            "Convert it to safetensors, or allow it with `allow_pickle=True`."
        )
    if not pickles:
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors).")


def _tokenizer(source: _Source) -> Any:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if source.header is None:
        tokenizer_growth.require_modest_files(source.name, source.place, source.revision)
        if source.options["trust_remote_code"]:
            require_code_elsewhere(get_tokenizer_config(source.place, revision=source.revision))
    tokenizer = _auto_tokenizer().from_pretrained(source.place, **source.options)
    tokenizer_growth.require_modest(source.name, tokenizer)
    return tokenizer


def _header(path: Path) -> gguf_header.Header:
    """The header of a GGUF file that can be a model. Raises `ModelError` for any other."""
    require_file(path)
    header = gguf_header.check(path)
    gguf_header.require_model(path, header)
    own = {
        key.rpartition(".")[2]: value for key, value in header.settings.items() if key.startswith(header.architecture)
    }
    model_files.require_modest(str(path), own)
    return header


def _of_gguf(header: gguf_header.Header) -> str | None:
    """What the weights of a GGUF file are quantised with; None where they are not."""
    kind = header.weight_type
    return None if kind in ("F32", "F16", "BF16", "F64") else f"GGUF ({kind}){quantisation.DEQUANTISED}"


def _auto_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer
