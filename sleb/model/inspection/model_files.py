"""A model's files, checked before a library believes them. Reads JSON, names and sizes; loads no weight."""

from __future__ import annotations

import json
import logging
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from sleb.errors import ModelError, excerpt, quoted
from sleb.model.inspection.stored_tensors import StoredTensor

log = logging.getLogger(__name__)

CONFIG_BYTES = 8 << 20
"""The largest config.json; one with the settings of thousands of quantised matrices has a hundredth."""
_TEXT_BYTES = 256 << 20
"""The largest other file that is read whole; vocabularies take up to 40 MB."""
_TEXTS = (".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken")

_NAMES_PRINTED = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of which the tokenizers library prints the names of settings that it does not know."""

_BLOCKS, _EXPERTS = 1024, 4096
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r".*(top_?k|per_tok|per_layer|per_block|shared).*", 1 << 62),
        (r"((num|n)_)?(\w+_)?(layers?|blocks)|depths?|block_count", _BLOCKS),
        (r"(\w+_)?experts?(_count)?", _EXPERTS),
        (r"(num|n)_(\w+_)?labels", 1 << 20),
        (r"(num|n)_(\w+_)?(heads?|groups|codebooks|quantizers|stages|levels|streams|modules|channels)", 1 << 17),
    )
)
"""The largest value of a setting, by its name; the first that matches. Libraries build so many modules, or list so many
kinds of blocks, before they notice that their weights are missing. The deepest models have 130 blocks,
the widest mixtures 512 experts."""
_MOST_MODULES = 1 << 17
"""The limit for blocks times experts; the largest models have a quarter."""

_TIMES, _SPARE = 2, 1 << 24
"""A config may ask for so many times the weights that are stored, and for some more: those that are tied, or made."""
_BUFFER_BYTES = 1 << 28  # masks and positions of older families
_PACKED_PER_BYTE = 8  # weights, in the densest quantisation

_BLOCK = re.compile(r"(\D+?)\.(\d{1,6})\.")
_FURTHER = re.compile(r"(num_)?(nextn_predict|mtp|mtp_num_hidden|mtp_hidden)_layers?|num_mtp_modules|mtp_num_layers")
_NO_WEIGHT = re.compile(
    r"rotary|inv_freq|masked_bias|attn\.bias$|attention\.bias$|[kvq]_scale$|kv_scale$|_proj\.output_scale$"
)
"""Tables that older versions of a family stored, and scales of a cache that no search keeps."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder. Raises `ModelError` where it is not one, or asks for too much."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder in the Hugging Face layout.")
    config = _json(path, CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object with settings; the folder is damaged.")
    require_modest(str(folder), config)
    return config


def require_modest(name: str, settings: Mapping[str, Any]) -> None:
    """Raises `ModelError` for numbers by which a library would build for hours."""
    blocks = experts = 1
    for key, value in _numbers(settings):
        limit = next((most for pattern, most in _LIMITS if pattern.fullmatch(key)), None)
        if limit is None:
            continue
        if not abs(value) <= limit:  # NaN is refused as well
            raise ModelError(
                f"{name} says {excerpt(key, 60)} = {excerpt(value, 30)} in its config, and at most {limit:,} can be "
                "true; the config is damaged."
            )
        blocks = max(blocks, int(value)) if limit == _BLOCKS else blocks
        experts = max(experts, int(value)) if limit == _EXPERTS else experts
    if blocks * experts > _MOST_MODULES:
        raise ModelError(
            f"{name} says in its config that it has {blocks:,} blocks and {experts:,} experts, more than any model; "
            "the config is damaged."
        )


def require_no_adapter(name: str, source: str, revision: str | None) -> None:
    """Raises `ModelError` for an adapter: libraries obey its settings, wherever its file lies."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source, revision=revision) is not None:
        raise ModelError(
            f"{name} is an adapter, or a model with one beside it (adapter_config.json); merge it into its base model "
            "first, or take that file away if it has been merged."
        )


def require_own_kernels(name: str, settings: Mapping[str, Any]) -> None:
    """Raises `ModelError` for a config that names a repository whose code computes attention in place of torch."""
    for key, value in _leaves(settings, "implementation"):
        if isinstance(value, str) and re.search("[/:]", value):
            raise ModelError(
                f"{name} asks in its config for code from elsewhere to run ({excerpt(key, 60)} = {quoted(value)}); "
                "read that, and allow it with `trust_remote_code=True`."
            )


def require_plain_files(folder: Path) -> None:
    """Raises `ModelError` for files that are too large to be read whole, and for shards outside the folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _TEXTS or path.is_dir():
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file; the folder is damaged.")
        if status.st_size > _TEXT_BYTES:
            raise ModelError(
                f"{path} has {status.st_size / 1e6:,.0f} MB, and at most {_TEXT_BYTES / 1e6:.0f} MB are read of such a "
                "file; the folder is damaged."
            )
        if path.name.endswith(".index.json"):
            _require_own_shards(path)
        if path.name in _NAMES_PRINTED:
            _require_printable_names(path)


def require_stored(
    name: str, config: Any, options: dict[str, Any], stored: Mapping[str, StoredTensor], size: int
) -> None:
    """Raises `ModelError` where the config asks for more than twice the weights that the safetensors files hold.

    `size` is that of the files in bytes. A few missing weights are reported after loading.
    """
    if not stored:
        return
    elements = sum(each.elements for each in stored.values())
    if getattr(config, "quantization_config", None):
        elements = max(elements, _PACKED_PER_BYTE * size)
    require_enough(name, config, options, elements)


def require_every_block(
    name: str,
    path: str,
    num_blocks: int,
    raw: Mapping[str, Any],
    stored: Iterable[str],
    unused: Iterable[str],
    modules: Set[str] = frozenset(),
) -> None:
    """Raises `ModelError` where a weight of a block was left out, or of what is around the blocks.

    `path` is that of the model's blocks, `unused` are stored tensors that the model did not take, `modules` the paths
    of its parts. Blocks behind the stack that predict further tokens (MTP) stay out, as many as the config says, and
    with a warning parts that the model does not have, such as a vision tower.
    """
    further = max((int(value) for key, value in _numbers(raw) if _FURTHER.fullmatch(key)), default=0)
    blocks = {int(match[2]) for key in stored if (match := _BLOCK.match(key)) and _same_stack(match[1], path)}
    highest = max(blocks, default=-1)
    if highest >= num_blocks + further:
        raise ModelError(
            f"{name} stores weights of block {highest} and says in its config that it has {num_blocks} blocks "
            "(num_hidden_layers): the others would be left out. Correct the config, or take their weights away."
        )
    unused = list(unused)
    left = sorted(
        key
        for key in unused
        if (match := _BLOCK.match(key)) and _same_stack(match[1], path) and int(match[2]) < num_blocks
        if not _NO_WEIGHT.search(key)
    )
    if left:
        raise ModelError(
            f"{name} stores {len(left)} weights in its blocks that its config does not ask for ({excerpt(left[0], 100)}"
            ", for one), and without them it computes something else: the config is not this checkpoint's."
        )
    around = sorted(key for key in unused if not _BLOCK.match(key) and not _NO_WEIGHT.search(key))
    if left := [key for key in around if (part := key.rpartition(".")[0]) and part in modules]:
        raise ModelError(
            f"{name} stores {excerpt(left[0], 100)}, and the model that its config describes has that part without it: "
            "it would compute something else. The config is not this checkpoint's."
        )
    if around:
        some = excerpt(around[0], 100)
        log.warning("%s stores %d tensors that its model leaves out (%s, for one).", name, len(around), some)


def _same_stack(prefix: str, path: str) -> bool:
    """Whether both names mean one list of modules: checkpoints leave the first parts of a path out, or have more."""
    return prefix == path or path.endswith(f".{prefix}") or prefix.endswith(f".{path}")


def require_enough(name: str, config: Any, options: dict[str, Any], stored: int) -> None:
    """Raises `ModelError` where the config describes a model of far more weights than are stored."""
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


def _require_own_shards(index: Path) -> None:
    listing = _json(index, _TEXT_BYTES)
    shards = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index} does not say which file each weight is in (weight_map); the folder is damaged.")
    for name in set(shards.values()):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ModelError(f"{index} names the file {excerpt(name)!r} outside the folder; the folder is damaged.")
    if index.name != "model.safetensors.index.json":
        return
    single = index.parent / "model.safetensors"
    missing = sorted(name for name in set(shards.values()) if not (index.parent / name).is_file())
    if single.is_file():
        if single.name not in shards.values() and len(missing) < len(set(shards.values())):
            raise ModelError(
                f"{index.parent} holds its weights twice, in model.safetensors and in the files that {index.name} "
                "names, and programs read the one or the others; take away which are not the model's."
            )
    elif missing:
        raise ModelError(
            f"{index} names {len(set(shards.values()))} files and {len(missing)} of them are not there "
            f"({excerpt(missing[0], 100)}, for one); fetch them again."
        )


def _require_printable_names(path: Path) -> None:
    left: list[Any] = [_json(path, _TEXT_BYTES)]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            unprintable = next((name for name in value if not name.isprintable()), None)
            if unprintable is not None:
                raise ModelError(f"{path} has a setting named {quoted(unprintable)}; the folder is damaged.")
            left += value.values()
        elif isinstance(value, list):
            left += value


def read_text_json(path: Path) -> Any:
    """A JSON file that libraries read as a whole, such as a vocabulary. Raises `ModelError`."""
    return _json(path, _TEXT_BYTES)


def _json(path: Path, most: int) -> Any:
    """A JSON file of at most so many bytes. Numbers may be infinite: some configs say so."""
    if path.stat().st_size > most:
        raise ModelError(f"{path} has more than {most / 1e6:.0f} MB; the folder is damaged.")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ModelError(f"{path} is not JSON (it is nested too deeply); the folder is damaged.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({excerpt(error)}); the folder is damaged.") from error


def _numbers(settings: Any) -> Iterator[tuple[str, float]]:
    """Every number of a config and its key."""
    for key, value in _leaves(settings):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _leaves(settings: Any, below: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config and its key, however deep it lies; those in lists have the key of the list.

    Those below a key with the word in it have that key.
    """
    left: list[tuple[str, Any]] = [("", settings)]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            keep = below and below in key
            left += [(key if keep else str(name), each) for name, each in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, each) for each in value]
        elif below in key:
            yield key, value


def _skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model without memory for its weights; None where it cannot be built so, and loading it will fail as well."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a model's code makes of a foreign config
        log.debug("No skeleton: %s", error)
        return None
