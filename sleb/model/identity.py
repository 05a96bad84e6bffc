"""What a loaded model is: its weights, config, tokenizer, chat template and code. Reads; changes nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from sleb.model.generation import ends_of
from sleb.model.loading import LoadedModel
from sleb.model.streaming import streamed_blocks
from sleb.records import ModelIdentity

_ASIDE = frozenset(
    {
        *("transformers_version", "architectures", "auto_map", "use_cache", "return_dict", "dtype", "torch_dtype"),
        *("_name_or_path", "_commit_hash", "tie_last_hidden_states", "initializer_range", "tokenizer_class"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    }
)
"""Fields of a config that no prediction depends on: names, labels, and how weights were made before training."""
_STARTS_ASIDE = ("output_", "_attn_implementation", "_experts_implementation")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # GenerationConfig has them as well
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_KINDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
"""Kinds of blocks (`layer_types`) that versions of transformers name differently."""
_DYNAMIC = "transformers_modules."  # where transformers imports a model's own code to


def identity_of(loaded: LoadedModel) -> ModelIdentity:
    """The parts of this model that its numbers depend on besides weights and type."""
    template = getattr(loaded.tokenizer, "chat_template", None)
    return ModelIdentity(
        config=computing_fields(loaded.model.config),
        tokenizer=tokenizer_hash(loaded.tokenizer),
        chat_template=_hash(template) if template else None,
        end_tokens=tuple(sorted(ends_of(loaded.model))),
        remote_code=_remote_code(loaded),
    )


def weights_hash(model: nn.Module, dtype: str | None = None) -> str:
    """xxh3-128 of every tensor's name, type, shape and bytes: equal means the same weights.

    With `dtype`, of what they would be in that type.
    """
    cast = getattr(torch, dtype) if dtype else None
    digest = xxhash.xxh3_128()
    seen: set[int] = set()
    streamed = streamed_blocks(model)
    for name, tensor in sorted(model.state_dict().items()):
        kind = cast if cast is not None and tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name}{tuple(tensor.shape)}{kind}".encode())
        if streamed is not None and tensor.is_meta:
            tensor = streamed.tensor(name)
        elif tensor.data_ptr() in seen:  # tied
            continue
        else:
            seen.add(tensor.data_ptr())
        plain = (tensor.dequantize() if hasattr(tensor, "tensor_impl") else tensor).to(kind)
        digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def computing_fields(config: Any) -> dict[str, Any]:
    """Fields of a config that take part in computing and differ from the default of its class, as JSON has them.

    The kind of model, by which a default means what it does, always stands there. However the rotary embedding was
    written down, it stands under `rope`. So versions of transformers that know more fields than others agree on a model
    that does not use them.
    """
    fields, defaults = _fields(config), default_fields(config)
    kind = {"model_type": config.model_type} if getattr(config, "model_type", "") else {}
    return kind | {
        name: value
        for name, value in sorted(fields.items())
        if (value is not None if name not in defaults else value != defaults[name])
    }


def default_fields(config: Any) -> dict[str, Any]:
    """The defaults of a config's class, which `computing_fields` leaves out."""
    try:
        return _fields(type(config)())
    except Exception:  # a class from elsewhere may need arguments: then every field counts
        return {}


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all that decides which token ids a text becomes; padding and truncation are left to callers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {
            name: value
            for name, value in json.loads(backend.to_str()).items()
            if name not in ("version", "truncation", "padding")
        }
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        file = getattr(tokenizer, "vocab_file", None)
        if file and Path(file).is_file():
            rules["file"] = _hash_file(Path(file))
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _hash([rules, special])


def _fields(config: Any) -> dict[str, Any]:
    """Everything of a config that computes, nested configs included, with the rotary embedding under one name."""
    from transformers import GenerationConfig, PreTrainedConfig

    generation = GenerationConfig().to_dict().keys() - set(_TOKENS)
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in _ASIDE or name.startswith(_STARTS_ASIDE) or name in generation:
            continue
        nested = vars(config).get(name)
        fields[name] = computing_fields(nested) if isinstance(nested, PreTrainedConfig) else _plain(value)
        if name.endswith("layer_types") and isinstance(value, list | tuple):
            fields[name] = [_KINDS.get(kind, kind) for kind in value]
    rope = _rope({name: fields.pop(name, None) for name in _ROPE})
    return fields | ({"rope": rope} if rope else {})


def _rope(written: Mapping[str, Any]) -> dict[str, Any]:
    """One way of writing a rotary embedding, or one for each kind of block (Gemma 3)."""
    shared = {name: written[name] for name in ("rope_theta", "partial_rotary_factor") if written[name] is not None}
    rules = written["rope_parameters"] or written["rope_scaling"] or {}
    if rules and all(isinstance(value, dict) for value in rules.values()):
        return {kind: _one_rope(value) for kind, value in sorted(rules.items())}
    return _one_rope(shared | rules)


def _one_rope(rules: Mapping[str, Any]) -> dict[str, Any]:
    kind = rules.get("rope_type", rules.get("type", "default"))
    others = {
        name: _plain(value)
        for name, value in rules.items()
        if name not in ("type", "rope_type") and value is not None and (name, value) != ("partial_rotary_factor", 1)
    }
    if kind == "default" and not others:
        return {}
    return dict(sorted(others.items())) | ({} if kind == "default" else {"rope_type": kind})


def _plain(value: Any) -> Any:
    """A value as JSON has it, where equal numbers are written alike."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if value is None or isinstance(value, bool | int | str) else _number(value)


def _number(value: Any) -> Any:
    return value if isinstance(value, float) and value == value and abs(value) != float("inf") else str(value)


def _remote_code(loaded: LoadedModel) -> str | None:
    """Hash of the Python files that came with a model, where they run."""
    hashes: dict[str, str] = {}
    for each in (loaded.model, loaded.model.config, loaded.tokenizer):
        for path in _own_files(type(each).__module__):
            hashes[path.name] = _hash_file(path)
    return _hash(hashes) if hashes else None


def _own_files(module: str) -> Iterator[Path]:
    """The files beside a module of a model's own code: each may import the others."""
    if not module.startswith(_DYNAMIC):
        return
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None:
        yield from sorted(path for path in Path(file).parent.glob("*.py") if path.name != "__init__.py")


def _hash_file(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass"))
