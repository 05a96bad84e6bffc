"""Removing blocks from a model in memory. Writes nothing, scores nothing.

Before anything is touched, the smaller model is built from its config without memory (on the meta device),
and every block that stays is compared with what it would become: modules, shapes and plain attributes. What a
family cannot express is discovered there, whatever the family, and the first difference is the reason of the
refusal.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sleb.errors import ExportError
from sleb.export.smaller_config import check_removal_list, readings, rebuilt, undecided
from sleb.model.stack_discovery import find_stack

_PASSING = frozenset({"training", "gradient_checkpointing"})  # how a module is used, not what it is
_NAMING_WEIGHTS = frozenset({"_tied_weights_keys", "_keys_to_ignore_on_load_unexpected"})  # may name blocks


@dataclass(frozen=True)
class Removal:
    """What a removal list makes of a model; known to change nothing about the blocks that stay."""

    path: str
    num_blocks: int
    kept: tuple[int, ...]
    skeleton: nn.Module
    """The smaller model on the meta device: structure, attributes and config, without weights."""
    packed: dict[str, int]
    """Tensors outside the stack that hold a slice for each block, and the dimension they are packed along."""


def plan_removal(model: nn.Module, removal_list: Sequence[int]) -> Removal:
    """Find the config under which every kept block stays what it is; `ExportError` says why there is none."""
    path, blocks = find_stack(model)
    check_removal_list(removal_list, len(blocks))
    removed = set(removal_list)
    kept = tuple(block for block in range(len(blocks)) if block not in removed)
    reasons: list[str] = []
    config: Any = model.config
    for data in readings(config, removal_list):
        try:
            skeleton = _skeleton(model, rebuilt(config, data, removal_list))
            packed = _compare(model, skeleton, path, kept)
        except ExportError as error:
            reasons.append(str(error))
            continue
        _require_decided(model, data, removal_list, path, kept)
        return Removal(path, len(blocks), kept, skeleton, packed)
    if any(parameter.numel() and not parameter.is_floating_point() for parameter in model.parameters()):
        raise ExportError(
            f"{type(model).__name__} is quantised ({reasons[0]}); "
            "load it without quantisation to save it with fewer blocks."
        )
    raise ExportError(
        f"{type(model).__name__} cannot be saved without blocks {sorted(removed)}: {reasons[0]}. "
        "Choose other blocks, such as the last ones (nothing moves then), or skip them while running instead."
    )


def _require_decided(
    model: Any, data: dict[str, Any], removal_list: Sequence[int], path: str, kept: tuple[int, ...]
) -> None:
    """Require that config or model show from where lists of block numbers count. Raises `ExportError`."""
    for name, other in undecided(model.config, removal_list, data):
        try:
            _compare(model, _skeleton(model, rebuilt(model.config, other, removal_list)), path, kept)
        except ExportError:
            continue
        raise ExportError(
            f"{type(model).__name__} cannot be saved without blocks {sorted(removal_list)}: {name} in its config lists "
            "block numbers, and nothing tells whether they count from 0 or from 1. Choose blocks behind all that it "
            "lists, or take the list out of config.json if nothing reads it."
        )


def require_same_blocks(model: nn.Module, config: Any, removal: Removal) -> None:
    """Require that a smaller model of this config keeps every block that stays as it is in `model`.

    For a config that something else made, such as a GGUF file's settings. Raises `ExportError` with the difference.
    """
    whole: Any = model
    for name in ("_attn_implementation", "_experts_implementation"):  # chosen while loading, never saved
        if getattr(whole.config, name, None) is not None:
            setattr(config, name, getattr(whole.config, name))
    packed = _compare(model, _skeleton(model, config), removal.path, removal.kept)
    if packed != removal.packed:
        raise ExportError(f"{min(packed.keys() ^ removal.packed.keys())} would have another shape")


def remove_blocks(model: nn.Module, removal_list: Sequence[int]) -> None:
    """Remove the blocks from the model for good: list, layer indices, config, and tensors packed per block.

    Raises `ExportError` and leaves the model as it was where its config cannot express the result.
    """
    carry_out(model, plan_removal(model, removal_list))


def streamlined(model: nn.Module, removal_list: Sequence[int]) -> nn.Module:
    """A model without these blocks that shares its weights with the baseline, which stays as it is.

    Raises `ExportError` where the family's config cannot express the removal.
    """
    removal = plan_removal(model, removal_list)
    tensors = (*model.parameters(), *model.buffers())
    smaller = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    carry_out(smaller, removal)
    return smaller


@torch.no_grad()
def carry_out(model: nn.Module, removal: Removal) -> None:
    """Remove the planned blocks from the model for good."""
    blocks: Any = model.get_submodule(removal.path)
    for block in reversed(range(removal.num_blocks)):
        if block not in removal.kept:
            del blocks[block]
    for name, dim in removal.packed.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor = getattr(owner, leaf)
        slices = tensor.unflatten(dim, (removal.num_blocks, -1))
        indices = torch.tensor(removal.kept, device=tensor.device)
        kept = slices.index_select(dim, indices).flatten(dim, dim + 1)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(owner, leaf, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)
    for path, shadow in removal.skeleton.named_modules():
        names = {name: vars(shadow)[name] for name in _NAMING_WEIGHTS & vars(shadow).keys()}
        vars(model.get_submodule(path)).update(_attributes(shadow) | _configs(shadow) | names)


def _skeleton(model: Any, config: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return type(model)._from_config(copy.deepcopy(config), dtype=model.dtype)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, StopIteration, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"no model can be built from the config that is left ({reason[:300]})") from error


def _compare(model: nn.Module, skeleton: nn.Module, path: str, kept: tuple[int, ...]) -> dict[str, int]:
    """Require that nothing changes; returns the tensors outside the stack that are packed per block."""
    old_blocks: Any = model.get_submodule(path)
    new_blocks: Any = skeleton.get_submodule(path)
    if len(new_blocks) != len(kept):
        raise ExportError(f"its config gives {len(new_blocks)} blocks where {len(kept)} stay")
    for position, block in enumerate(kept):
        where = f"block {block} would change as block {position}"
        old, new = dict(old_blocks[block].named_modules()), dict(new_blocks[position].named_modules())
        _require_same_modules(old, new, where)
        for name in old:
            label = f"{where}: {name or type(old[name]).__name__}"
            _require_same_tensors(old[name], new[name], label)
            _require_same_attributes(old[name], new[name], label, kept, (block, position), len(old_blocks))
    prefix = f"{path}."
    old, new = (
        {name: module for name, module in whole.named_modules() if not name.startswith(prefix)}
        for whole in (model, skeleton)
    )
    _require_same_modules(old, new, "what surrounds the blocks would change")
    packed: dict[str, int] = {}
    for name in old:
        for leaf, shape in _shapes(old[name]).items():
            becomes = _shapes(new[name]).get(leaf)
            if becomes is None and leaf in old[name]._non_persistent_buffers_set:
                continue  # never saved: the rotary table of a kind of block of which none stays
            dim = _packed_dimension(shape, becomes, len(old_blocks), len(kept))
            full_name = f"{name}.{leaf}" if name else leaf
            if dim is None:
                raise ExportError(f"{full_name} has shape {shape} and would have {becomes}")
            if dim >= 0:
                packed[full_name] = dim
    return packed


def _packed_dimension(old: tuple[int, ...], new: tuple[int, ...] | None, num_blocks: int, num_kept: int) -> int | None:
    """The dimension with a slice per block; -1 where nothing changes, None where something else does."""
    if old == new:
        return -1
    if new is None or len(old) != len(new):
        return None
    changed = [dim for dim in range(len(old)) if old[dim] != new[dim]]
    dim = changed[0]
    fits = len(changed) == 1 and old[dim] % num_blocks == 0 and old[dim] // num_blocks * num_kept == new[dim]
    return dim if fits else None


def _require_same_modules(old: dict[str, nn.Module], new: dict[str, nn.Module], where: str) -> None:
    for name in [*old, *(name for name in new if name not in old)]:
        was, becomes = (type(modules[name]) if name in modules else None for modules in (old, new))
        if was is not becomes:
            words = [kind.__name__ if kind else "absent" for kind in (was, becomes)]
            raise ExportError(f"{where}: {name or 'it'} is {words[0]} and would be {words[1]}")


def _require_same_tensors(old: nn.Module, new: nn.Module, where: str) -> None:
    was, becomes = _shapes(old), _shapes(new)
    for name in [*was, *(name for name in becomes if name not in was)]:
        if was.get(name) != becomes.get(name):
            raise ExportError(f"{where}.{name} has shape {was.get(name)} and would have {becomes.get(name)}")


def _require_same_attributes(
    old: nn.Module, new: nn.Module, where: str, kept: tuple[int, ...], moved: tuple[int, int], num_blocks: int
) -> None:
    """An attribute may be the block's index, the number of blocks or about all blocks; else it must stay."""
    was, becomes = _attributes(old), _attributes(new)
    for name in becomes:
        if name not in was or _same(was[name], becomes[name]):
            continue
        if type(was[name]) is int and (was[name], becomes[name]) in (moved, (num_blocks, len(kept))):
            continue
        followed = _followed(was[name], kept, num_blocks) if re.search("layer|block", name) else []
        if not any(_same(becomes[name], value) for value in followed):
            raise ExportError(f"{where}.{name} is {was[name]!r} and would be {becomes[name]!r}")


def _followed(value: Any, kept: tuple[int, ...], num_blocks: int) -> list[Any]:
    """What an attribute about all blocks becomes: an entry per block, block indices, or a table by index."""
    position = {block: index for index, block in enumerate(kept)}
    if isinstance(value, dict):
        return [{position[key]: entry for key, entry in value.items() if key in position}]
    if not isinstance(value, list | tuple):
        return []
    indices = [position[entry] for entry in value if isinstance(entry, int) and entry in position]
    return [indices, [value[block] for block in kept]] if len(value) == num_blocks else [indices]


def _same(one: Any, other: Any) -> bool:
    """Equal, where nan is itself, a rounding is nothing and a tuple is the list that a file makes of it."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or math.isclose(one, other, rel_tol=1e-12) or (math.isnan(one) and math.isnan(other))
    one, other = (list(value) if isinstance(value, tuple) else value for value in (one, other))
    return bool(repr(one) == repr(other))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own parameters and buffers."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The module's own public attributes that are plain data: what it was built with."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _PASSING and "cached" not in name and _is_plain(value)
    }


def _configs(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if hasattr(value, "get_text_config")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, dict):
        return all(_is_plain(entry) for pair in value.items() for entry in pair)
    return value is None or isinstance(value, bool | int | float | str)
