"""The config of a model with fewer blocks. Knows configs and block indices; never sees a model.

A config says what each block is in many ways: lists with an entry per block, lists of block indices, counts
from either end, periods. An attribute whose meaning is not certain gets several readings, the likeliest
first; which of them is right is for `removal.py` to find out, by building the model that each would give.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from sleb.errors import ExportError, OptionError
from sleb.export.config_periods import fit_periods

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_READINGS = 32
"""Configs offered at most: the likeliest, then those that differ from it in one attribute, then in two."""

_PER_BLOCK = re.compile("layer|block|idx|indices|pattern|types")  # names of settings about blocks
_OTHER = re.compile("token|label|^mtp|^architectures$|^_")  # names of other settings
_NUM_BLOCKS = re.compile(r"^(n|num)_?(hidden_|decoder_)?(layers?|blocks?)$")
_COUNT = re.compile("layer|block|dense")
_FROM_START = re.compile(r"first|start_index$|^num_dense_layers$|^max_window_layers$")
_FROM_END = re.compile(r"_last_|shared_layers$")
_END_INDEX = re.compile(r"end_index$")
_NUMBERED = re.compile("layer|block|idx|indices|indexes")  # a list of numbers so named holds block numbers
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_mtp_layers")
"""Names of the number of further blocks that predict several tokens at once."""
_OTHER_PART = re.compile("vision|visual|image|video|audio|speech|encoder|talker|project|quant|rope|draft|mtp")
"""Nested settings of something else than the stack."""

Path = tuple[str | int, ...]
"""Where a setting stands in a config: keys, and places in lists."""


def check_removal_list(removal_list: Sequence[int], num_blocks: int) -> None:
    """Require a list of blocks of this model, each once, that leaves one. Raises `OptionError`."""
    if not removal_list:
        raise OptionError("The removal list is empty; name at least one block to remove.")
    outside = [block for block in removal_list if not 0 <= block < num_blocks]
    if outside:
        raise OptionError(
            f"The removal list names block {outside[0]}, and the model has blocks 0 to {num_blocks - 1}; "
            "correct the list."
        )
    twice = [block for index, block in enumerate(removal_list) if block in removal_list[:index]]
    if twice:
        raise OptionError(f"The removal list names block {twice[0]} twice; name each block once.")
    if len(removal_list) == num_blocks:
        raise OptionError(f"The removal list names all {num_blocks} blocks; at least one must be kept.")


def streamlined_config(config: PreTrainedConfig, removal_list: Sequence[int]) -> PreTrainedConfig:
    """A copy of the config for the model without these blocks, by the likeliest reading of its attributes.

    Whether it describes the blocks that stay is for the model to say: see `removal.plan_removal`.
    """
    return rebuilt(config, next(readings(config, removal_list)), removal_list)


def readings(config: PreTrainedConfig, removal_list: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The config as plain data, rewritten for fewer blocks, the likeliest reading first."""
    text = config.get_text_config()
    check_removal_list(removal_list, text.num_hidden_layers)
    stack = _stack_of(text, removal_list)
    choices = _choices(text, stack)
    likeliest = {path: options[0] for path, options in choices.items()}
    others = {path: options[1:] for path, options in choices.items() if len(options) > 1}
    for chosen in itertools.islice(_deviations(likeliest, others), MAX_READINGS):
        reading = copy.deepcopy(stack.settings)
        for path, value in chosen.items():
            _put(reading, path, value)
        yield reading if text is config else _as_data(config) | {_text_name(config): reading}


def undecided(config: PreTrainedConfig, removal_list: Sequence[int], data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Lists of block numbers whose reading in `data` is one of two: their name, and `data` with the other one."""
    text = config.get_text_config()
    stack = _stack_of(text, removal_list)
    reading = data if text is config else data[_text_name(config)]
    for path, options in _choices(text, stack).items():
        value = _at(stack.settings, path)
        if not _is_undecided(path, value, stack):
            continue
        for option in options:
            if option != value and option != _at(reading, path):
                other = copy.deepcopy(reading)
                _put(other, path, option)
                yield named(path), other if text is config else data | {_text_name(config): other}


def changes(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, Any]:
    """Settings of the config's text part that the smaller model changes, by name."""
    before, after = (each.get_text_config().to_dict() for each in (old, new))
    loading = ("dtype", "quantization_config", "_name_or_path", "transformers_version")
    return {name: value for name, value in after.items() if before.get(name) != value and name not in loading}


def named(path: Path) -> str:
    """The name of a setting in a message."""
    return ".".join(map(str, path))


def further_blocks(settings: Mapping[str, Any]) -> dict[str, int]:
    """How many blocks a config counts behind the last one, to predict several tokens at once, by the count's name."""
    counts = {name: settings.get(name) for name in FURTHER}
    return {name: count for name, count in counts.items() if type(count) is int and count > 0}


@dataclass(frozen=True)
class _Stack:
    """The settings of a model's stack, and which of its blocks stay."""

    settings: dict[str, Any]
    num_blocks: int
    kept: tuple[int, ...]
    further: int
    """Blocks behind the last one; lists may hold entries for them."""
    kinds: tuple[frozenset[int], ...]
    """The blocks of each kind, for each list with an entry per block."""

    @property
    def position(self) -> dict[int, int]:
        """The new number of every block that has one."""
        moved = {block: index for index, block in enumerate(self.kept)}
        behind = range(self.num_blocks, self.num_blocks + self.further)
        return moved | {block: block - self.num_blocks + len(self.kept) for block in behind}


def _stack_of(text: PreTrainedConfig, removal_list: Sequence[int]) -> _Stack:
    count = text.num_hidden_layers
    kept = tuple(block for block in range(count) if block not in set(removal_list))
    data = _with_explicit_dense_blocks(_as_data(text), count)
    lists = [value for value in data.values() if isinstance(value, list) and len(value) == count]
    kinds = [
        frozenset(block for block, entry in enumerate(value) if entry == kind)
        for value in lists
        if all(isinstance(entry, str) for entry in value)
        for kind in sorted(set(value))
    ]
    further = max(further_blocks(data).values(), default=0)
    return _Stack(data, count, kept, further, tuple(kinds))


def _choices(text: PreTrainedConfig, stack: _Stack) -> dict[Path, list[Any]]:
    blocks_name = type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    choices = {path: _read(path, value, stack) for path, value in _settings(stack.settings, stack.num_blocks)}
    if (blocks_name,) in choices:
        choices[blocks_name,] = [len(stack.kept)]
    return choices


def _settings(data: Any, num_blocks: int, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every setting of a config that may be about blocks, nested ones too."""
    for name, value in data.items():
        path = (*above, name)
        other = _OTHER_PART.search(str(name)) or (isinstance(value, dict) and "model_type" in value)
        if isinstance(value, dict) and not other and not all(str(key).isdecimal() for key in value):
            yield from _settings(value, num_blocks, path)
        elif isinstance(value, list) and 0 < len(value) < num_blocks and all(isinstance(each, dict) for each in value):
            for index, entry in enumerate(value):
                yield from _settings(entry, num_blocks, (*path, index))
        else:
            yield path, value


def _at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def _put(data: Any, path: Path, value: Any) -> None:
    *above, last = path
    _at(data, tuple(above))[last] = copy.deepcopy(value)


def rebuilt(config: PreTrainedConfig, data: dict[str, Any], removal_list: Sequence[int]) -> PreTrainedConfig:
    """A config of the same class from plain data, as a reload makes it, periods fitted to what is kept."""
    try:
        new = type(config).from_dict(copy.deepcopy(data))
        _require_accepted(config, new, data)
        fit_periods(config.get_text_config(), new.get_text_config(), set(removal_list))
    except (StrictDataclassError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{type(config).__name__} does not accept what is left ({reason[:300]})") from error
    for name in ("_attn_implementation", "_experts_implementation"):  # chosen while loading, never saved
        if getattr(config, name, None) is not None:
            setattr(new, name, getattr(config, name))
    return new


def _require_accepted(old: PreTrainedConfig, new: PreTrainedConfig, data: dict[str, Any]) -> None:
    """Require that a config takes what it is given: Gemma 4's makes the last block one of full attention.

    Raises `ExportError`.
    """
    if old.get_text_config() is not old:
        data = data[_text_name(old)]
    becomes = new.get_text_config().to_dict()
    for path, given in _settings(data, 0):
        try:
            taken = _at(becomes, path)
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(given, list) and isinstance(taken, list) and taken != given:
            raise ExportError(f"its config turns {named(path)} of the blocks that stay, {given}, into {taken}")


def _as_data(config: PreTrainedConfig) -> dict[str, Any]:
    """Everything the config would write to disk, defaults included; what is saved is not quantised."""
    data = copy.deepcopy(config.to_dict())
    data.pop("quantization_config", None)
    return data


def _text_name(config: PreTrainedConfig) -> str:
    """The name of the part of a multimodal config that has the blocks. Raises `ExportError`."""
    names = [name for name, value in vars(config).items() if value is config.get_text_config()]
    if not names:
        raise ExportError(f"the text part of {type(config).__name__} has no name of its own")
    return names[0]


def _deviations(likeliest: dict[Path, Any], others: dict[Path, list[Any]]) -> Iterator[dict[Path, Any]]:
    """The likeliest reading, then those that deviate from it in one attribute, then in two."""
    for number in range(3):
        for names in itertools.combinations(others, number):
            for values in itertools.product(*(others[name] for name in names)):
                yield likeliest | dict(zip(names, values, strict=True))


def _read(path: Path, value: Any, stack: _Stack) -> list[Any]:
    """Values that the attribute may have for the kept blocks alone, the likeliest first."""
    name, num_blocks, kept = str(path[-1]), stack.num_blocks, stack.kept
    options: list[Any] = []
    if _OTHER.search(name) or isinstance(value, bool):
        pass
    elif name == "scale_depth" and isinstance(value, int | float):
        # MiniCPM divides it by the root of num_hidden_layers.
        options = [value * math.sqrt(len(kept) / num_blocks)]
    elif isinstance(value, int):
        options = _read_number(path, value, num_blocks, kept)
    elif isinstance(value, str):
        options = _read_text(name, value, stack)
    elif isinstance(value, list | tuple):
        options = [type(value)(option) for option in _read_list(path, list(value), stack)]
    elif isinstance(value, dict) and "layer" in name and all(str(key).isdecimal() for key in value):
        by_block = {int(key): entry for key, entry in value.items()}
        position = stack.position
        options = [{str(position[old]): by_block[old] for old in sorted(by_block) if old in position}]
    certain = isinstance(value, list | tuple | dict | str) and bool(_PER_BLOCK.search(name))
    if not (options and certain):  # what is certainly about blocks cannot stay as it is
        options.append(value)
    return [option for index, option in enumerate(options) if option not in options[:index]]


def _read_text(name: str, value: str, stack: _Stack) -> list[str]:
    """A letter for each block, or block numbers between commas (Step's moe_layers_enum)."""
    if len(value) == stack.num_blocks and "pattern" in name:
        return ["".join(value[block] for block in stack.kept)]
    numbers = _numbers_in(name, value)
    return [",".join(map(str, option)) for option in _read_indices((name,), numbers, stack)] if numbers else []


def _numbers_in(name: str, value: Any) -> list[int]:
    """The block numbers that a setting lists; none where it lists something else."""
    if isinstance(value, str) and _NUMBERED.search(name) and re.fullmatch(r"\s*\d{1,4}(\s*,\s*\d{1,4})*\s*", value):
        value = [int(entry) for entry in value.split(",")]
    if not isinstance(value, list | tuple) or not value or len(set(map(repr, value))) != len(value):
        return []
    return list(value) if all(type(entry) is int for entry in value) else []


def _bases(path: Path, numbers: list[int], stack: _Stack) -> list[int]:
    """What the block numbers of a list may count from: 0, 1, both where it is unknown, or neither."""
    last = stack.num_blocks + stack.further
    bases = [base for base in (0, 1) if all(base <= number < last + base for number in numbers)]
    if len(bases) == 1:
        return bases
    if 0 in numbers or not bases:
        return bases[:1]
    siblings = _at(stack.settings, path[:-1]) if len(path) > 1 else stack.settings
    beside = [_numbers_in(str(name), value) for name, value in siblings.items() if _NUMBERED.search(str(name))]
    everything = sorted(number for each in beside for number in each)
    for base in bases:  # lists that name every block once, between them
        if everything == list(range(base, stack.num_blocks + base)) and len([each for each in beside if each]) > 1:
            return [base]
    fitting = [base for base in bases if frozenset(number - base for number in numbers) in stack.kinds]
    return fitting if len(fitting) == 1 else bases


def _is_undecided(path: Path, value: Any, stack: _Stack) -> bool:
    """Whether a list holds block numbers, and nothing in the config shows from where they count."""
    numbers = _numbers_in(str(path[-1]), value)
    if not numbers or len(numbers) == stack.num_blocks or _OTHER.search(str(path[-1])):
        return False
    return bool(_NUMBERED.search(str(path[-1]))) and len(_bases(path, numbers, stack)) > 1


def _read_indices(path: Path, numbers: list[int], stack: _Stack) -> list[list[int]]:
    """Block numbers as they are without the removed blocks."""
    position = stack.position
    return [
        [position[number - base] + base for number in numbers if number - base in position]
        for base in _bases(path, numbers, stack)
    ]


def _read_number(path: Path, value: int, num_blocks: int, kept: tuple[int, ...]) -> list[Any]:
    name = str(path[-1])
    from_start = sum(block < value for block in kept)
    from_end = sum(block >= num_blocks - value for block in kept)
    if _NUM_BLOCKS.search(name) and value == num_blocks:
        return [len(kept)]
    if value <= 0 or len(path) > 1 or name in FURTHER:
        return []
    if _END_INDEX.search(name):  # the last block, included
        return [sum(block <= value for block in kept) - 1]
    if _FROM_START.search(name):
        return [from_start]
    if _FROM_END.search(name):
        return [from_end]
    if _COUNT.search(name) and value <= num_blocks:
        return [value, from_start, from_end]
    return []


def _read_list(path: Path, value: list[Any], stack: _Stack) -> list[Any]:
    name, num_blocks, kept = str(path[-1]), stack.num_blocks, stack.kept
    repeated = _expanded(value)
    if repeated is not None and len(repeated) == num_blocks:  # GPT-Neo's attention_types
        return [[[[repeated[block] for block in kept], 1]]]
    options: list[Any] = []
    numbers = _numbers_in(name, value)
    if numbers and _NUMBERED.search(name):
        options += _read_indices(path, numbers, stack)
    elif len(numbers) > 1 and any(frozenset(number - base for number in numbers) in stack.kinds for base in (0, 1)):
        options += _read_indices(path, numbers, stack)  # the blocks of a kind, whatever the list is called
    if len(value) == num_blocks and name.endswith("_source_layers"):
        # Per block the one whose keys and values it uses.
        position = {block: index for index, block in enumerate(kept)}
        lost = [value[block] for block in kept if value[block] not in position]
        if lost:
            raise ExportError(f"blocks that stay use keys and values of block {lost[0]} ({name})")
        return [[position[value[block]] for block in kept]]
    behind = len(value) == num_blocks + stack.further and (stack.further > 0) and bool(_PER_BLOCK.search(name))
    too_long = len(value) > num_blocks and "layer" in name  # SmolLM3 allows it
    if len(value) == num_blocks or behind or (too_long and not numbers):
        per_block = [value[block] for block in kept] + (value[num_blocks:] if behind else [])
        certain = (len(value) == num_blocks or behind) and value != list(range(num_blocks))
        options.insert(0 if certain else len(options), per_block)
    elif value and re.search("types|pattern", name):  # repeated up the stack (RecurrentGemma's block_types)
        options += [value, [value[block % len(value)] for block in kept]]
    return options


def _expanded(value: list[Any]) -> list[Any] | None:
    """Entries of a list of [pattern, repetitions] pairs, or None where it is something else."""
    pairs = bool(value) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and isinstance(pair[1], int)
        for pair in value
    )
    return [entry for pattern, times in value for entry in pattern * times] if pairs else None


def _with_explicit_dense_blocks(data: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """Name dense blocks (Qwen's mixtures) by their list alone, without a period: a list can place them anywhere."""
    step = data.get("decoder_sparse_step")
    if "mlp_only_layers" not in data or not isinstance(step, int) or step <= 1:
        return data
    listed = data["mlp_only_layers"] or []
    dense = [block for block in range(num_blocks) if block in listed or (block + 1) % step]
    return data | {"decoder_sparse_step": 1, "mlp_only_layers": dense}
