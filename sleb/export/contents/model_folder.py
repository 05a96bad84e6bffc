"""The folder of a smaller model: weights, config, and all else that its source has. Writes; the proof reads it again.

Where the weights are those of the source, they are copied (`tensor_files`); where they are other ones (healed,
quantised, dequantised from a GGUF file), transformers writes them, and what it never loaded is named as left behind.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sleb.errors import ExportError, excerpt, quoted
from sleb.export import proof_process
from sleb.export.config_periods import broken_periods
from sleb.export.contents import carried_files, tensor_files
from sleb.export.destination import saving
from sleb.export.removal import Removal
from sleb.export.smaller_config import changes, further_blocks
from sleb.model.inspection.source_folder import SourceFolder
from sleb.model.inspection.stored_tensors import FLOATS, read_headers
from sleb.model.streaming import streamed_blocks
from sleb.records import LeftBehind

CONFIG = "config.json"
_DTYPES = ("dtype", "torch_dtype")
_QUANTISATION = "quantization_config"
_PACKED = re.compile(r"_(packed|scale|shape)$")  # what compressed-tensors makes of one weight


@dataclass(frozen=True)
class Plan:
    """What is known of the source before the model is changed: the block of each of its tensors."""

    removal: Removal
    source: SourceFolder | None
    copy: tensor_files.Copy | None
    """None where blocks share weights, or the names of the stored tensors do not tell which block each is of."""
    config: Any
    """The config of the model, as it was loaded."""


@dataclass(frozen=True)
class Contents:
    """The contents of a folder that was written, and what of its source it does not have."""

    files: dict[str, str] = field(default_factory=dict)
    """Names of the files that were carried over, and the SHA-256 of each."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] | None = None
    """Type and shape of each tensor that was copied, by name; None where transformers wrote the weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the config's text part that have changed."""
    left_behind: tuple[LeftBehind, ...] = ()
    notes: tuple[str, ...] = ()


def plan_folder(model: Any, removal: Removal, source: SourceFolder | None) -> Plan:
    """Read the source while the model still has all blocks. Raises `ModelError` for a damaged file."""
    copy = None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if source is not None and source.weights and not any(name.startswith(f"{removal.path}.") for name in tied):
        blocks: Any = model.get_submodule(removal.path)
        shapes = [{name: tuple(each.shape) for name, each in block.state_dict().items()} for block in blocks]
        state = model.state_dict()
        packed = {name: (tuple(state[name].shape), dim) for name, dim in removal.packed.items() if name in state}
        stored = read_headers(source.weights)
        copy = tensor_files.without_blocks(stored, removal.path, shapes, packed, removal.kept)
    return Plan(removal, source, copy, model.config)


def require_as_stored(plan: Plan) -> None:
    """Require that a quantised checkpoint can be copied as it is. Raises `ExportError`."""
    if plan.source is None or plan.copy is not None or _QUANTISATION not in plan.source.config():
        return
    raise ExportError(
        "The weights are stored quantised, and which tensor is of which block cannot be told from their names; export "
        "a checkpoint that is not quantised, and quantise what comes out."
    )


def write_copied(model: Any, plan: Plan, folder: Path, *, with_code: bool) -> Contents:
    """Write the smaller model with the tensors of its source; `model` has lost the blocks already."""
    assert plan.source is not None
    assert plan.copy is not None
    streamed = streamed_blocks(model)
    tensor_files.write(plan.copy, folder, None if streamed is None else streamed.budget // 3)
    _write_config(model, plan, folder, with_code, copied=True)
    carried = carried_files.carry_over(plan.source, folder, plan.removal.num_blocks, with_code=with_code)
    return Contents(
        files=carried.files,
        tensors={tensor.name: (tensor.source.dtype, tensor.shape) for tensor in plan.copy.tensors},
        config=changes(plan.config, model.config),
        left_behind=carried.left_behind,
        notes=(*_notes(plan.copy), *_periods(plan, model)),
    )


def write_saved(
    model: Any, tokenizer: Any, plan: Plan, folder: Path, *, with_code: bool, state: Mapping[str, Any] | None = None
) -> Contents:
    """Write the smaller model by transformers' own means, and carry over what else its source has.

    `state` are the tensors to write where they are not the model's parameters.
    """
    with saving():
        _repair_generation_config(model, folder)
        streamed = streamed_blocks(model)
        if streamed is not None:
            streamed.forget()  # saving reads shard by shard, and has the room for itself
        options: dict[str, Any] = {} if streamed is None else {"max_shard_size": streamed.budget // 3}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, **options, **({} if state is None else {"state_dict": state}))
        if plan.source is None and tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if plan.source is None:
        return Contents(config=changes(plan.config, model.config))
    lost = _not_written(plan, folder, set(model.state_dict()))
    counts = further_blocks(model.config.get_text_config().to_dict()) if lost else {}
    notes = [f"{name} is set to 0 in the config: no further block was carried over." for name in counts]
    for name in counts:
        setattr(model.config.get_text_config(), name, 0)
    if _QUANTISATION in plan.source.config():
        notes.append("The source is stored quantised; these weights were dequantised when they were loaded.")
    _write_config(model, plan, folder, with_code, copied=False)
    carried = carried_files.carry_over(plan.source, folder, plan.removal.num_blocks, with_code=with_code)
    return Contents(
        files=carried.files,
        config=changes(plan.config, model.config),
        left_behind=(*lost, *carried.left_behind),
        notes=(*notes, *_periods(plan, model)),
    )


def _notes(copy: tensor_files.Copy) -> list[str]:
    """Notes on what is carried over that predicts further tokens: transformers does not load it by itself."""
    notes = [
        f"{copy.prefix}.{old}, which stands behind the last block and predicts further tokens, is carried over as "
        f"{copy.prefix}.{new}."
        for old, new in copy.further
    ]
    extra = sorted(tensor.name for tensor in copy.tensors if re.search(r"(^|[._])mtp", tensor.name))
    if extra:
        notes.append(
            f"{len(extra)} tensors that predict further tokens, such as {excerpt(extra[0])}, are carried over."
        )
    return notes


def _periods(plan: Plan, model: Any) -> Iterator[str]:
    """Notes on periods that no longer hold: transformers reads the list; other tools may read the period."""
    for name, other in broken_periods(plan.config, model.config).items():
        yield f"{name} in the config no longer says of which kind each block is; {other} does."


def _not_written(plan: Plan, folder: Path, loaded: set[str]) -> list[LeftBehind]:
    """The tensors of the source that belong to no block that was removed, and were not written."""
    assert plan.source is not None
    if plan.copy is None:
        shared = "blocks share weights, or the names of the stored tensors do not tell which block each is of"
        why = shared if plan.source.weights else "only transformers reads a pickle"
        return [LeftBehind(name="tensors that transformers does not load, if any", why=why)]
    written = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            written |= {_PACKED.sub("", name) for name in file.keys()}  # noqa: SIM118
    lost = sorted(tensor.stored_as for tensor in plan.copy.tensors if tensor.name not in written | loaded)
    if not lost:
        return []
    name = f"{len(lost)} tensor{'s' if len(lost) > 1 else ''}, such as {excerpt(lost[0])}"
    return [LeftBehind(name=name, why="transformers does not load them")]


def _write_config(model: Any, plan: Plan, folder: Path, with_code: bool, *, copied: bool) -> None:
    """Write the config, with what the source's says about other things than its size."""
    assert plan.source is not None
    raw = plan.source.config()
    config = _whole(model.config, raw, plan.source.folder, with_code) if copied else model.config
    data = json.loads(config.to_json_string(use_diff=True))
    _keep_explicit(data, raw, config.to_dict())
    classes = {
        "architectures": raw.get("architectures") if copied else [type(model).__name__],
        "auto_map": raw.get("auto_map") if with_code else None,
    }
    for name, value in classes.items():
        data.pop(name, None)
        if value is not None:
            data[name] = value
    if copied and _QUANTISATION in raw:
        assert plan.copy is not None
        data[_QUANTISATION] = renumbered_names(raw[_QUANTISATION], plan.copy.prefix, plan.removal, plan.copy.further)
    else:
        data.pop(_QUANTISATION, None)
        if not copied and getattr(model.config, _QUANTISATION, None):
            data[_QUANTISATION] = model.config.quantization_config
    if copied and not _names_dtype(raw) and len(_float_types(plan.copy)) == 1:
        _forget(data, *_DTYPES)  # so that the weights decide, as they did
    _forget(data, "_name_or_path")  # where the source lies is private
    with saving():
        (folder / CONFIG).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _whole(config: Any, raw: dict[str, Any], folder: Path, with_code: bool) -> Any:
    """The config of the whole checkpoint, where transformers loads only its text part."""
    from transformers import AutoConfig

    if raw.get("model_type") in (None, config.model_type):
        return config
    whole = AutoConfig.from_pretrained(str(folder), trust_remote_code=with_code)
    text = whole.get_text_config()
    names = [name for name, value in vars(whole).items() if value is text]
    if type(whole) is type(config) or type(text) is not type(config) or not names:
        return config
    setattr(whole, names[0], config)
    return whole


def _keep_explicit(data: dict[str, Any], raw: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Keep what the source says although it is the default: other tools have other defaults."""
    for name, value in raw.items():
        if name in settings and name not in data:
            data[name] = settings[name]
        elif isinstance(value, dict) and isinstance(data.get(name), dict) and isinstance(settings.get(name), dict):
            _keep_explicit(data[name], value, settings[name])


def _names_dtype(raw: Mapping[str, Any]) -> bool:
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return any(part.get(name) for part in parts for name in _DTYPES)


def _forget(data: dict[str, Any], *names: str) -> None:
    for name in names:
        data.pop(name, None)
    for value in data.values():
        if isinstance(value, dict):
            _forget(value, *names)


def _float_types(copy: tensor_files.Copy | None) -> set[str]:
    return {tensor.source.dtype for tensor in copy.tensors} & FLOATS.keys() if copy is not None else set()


def renumbered_names(value: Any, prefix: str, removal: Removal, further: tuple[tuple[int, int], ...]) -> Any:
    """Settings in which modules are named, with the numbers that the blocks have now, without those of removed ones.

    Raises `ExportError` where a pattern is about certain blocks.
    """
    stack = re.escape(prefix.rpartition(".")[2])
    position = {block: index for index, block in enumerate(removal.kept)} | dict(further)
    numbered = re.compile(rf"((?:^|[^\w]){stack}\\?\.)(\d+)(?![\d])")
    pattern = re.compile(rf"(^|[^\w]){stack}\\?\.[(\[]")

    def moved(text: str) -> str | None:
        if re.search("vision|visual|audio", text):
            return text
        if pattern.search(text) and re.search(r"\d", text):
            raise ExportError(
                f"The config names blocks in its settings for quantisation by a pattern ({quoted(text)}), which cannot "
                "be followed; export a checkpoint that is not quantised."
            )
        numbers = [int(match[2]) for match in numbered.finditer(text)]
        if any(number not in position for number in numbers):
            return None
        return numbered.sub(lambda match: f"{match[1]}{position[int(match[2])]}", text)

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            named = {name: moved(name) for name in part}
            return {new: walk(part[name]) for name, new in named.items() if new is not None}
        if isinstance(part, list):
            return [walk(entry) for entry in part if not isinstance(entry, str) or moved(entry) is not None]
        return moved(part) if isinstance(part, str) else part

    return walk(value)


def _repair_generation_config(model: Any, folder: Path) -> None:
    """Drop what saving refuses and generating ignores, such as a temperature without sampling."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError:
        if config.do_sample is not True:
            for name in proof_process.SAMPLING:
                setattr(config, name, None)
