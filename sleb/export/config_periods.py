"""Periods in configs that say of which kind each block is. Knows configs and block indices; never sees a model."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from sleb.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PERIOD = re.compile("interval|every_n|pattern$|_period$|_step$|_freq$|group_size$")


def broken_periods(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, str]:
    """Periods that no longer say of which kind each block is, by name, and the list that says so in their place."""
    before, after = (each.get_text_config().to_dict() for each in (old, new))
    count = old.get_text_config().num_hidden_layers
    lists = {name: value for name, value in before.items() if isinstance(value, list) and len(value) == count}
    broken: dict[str, str] = {}
    for name, period in after.items():
        if not _PERIOD.search(name) or type(period) is not int or not 1 < period <= count:
            continue
        for other, kinds in lists.items():
            repeats = all(kind == kinds[block % period] for block, kind in enumerate(kinds))
            stays = all(kind == kinds[block % period] for block, kind in enumerate(after.get(other) or ()))
            if repeats and not stays and any(kind != kinds[0] for kind in kinds):
                broken[name] = other
    return broken


def _derived_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Lists with an entry per block that the config computes rather than holds."""
    names = [name for name, member in inspect.getmembers_static(type(config)) if isinstance(member, property)]
    values = {name: getattr(config, name, None) for name in names if re.search("layer", name)}
    return {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
    }


def fit_periods(old: PreTrainedConfig, new: PreTrainedConfig, removed: set[int]) -> None:
    """Set periods and offsets from which kinds follow (Jamba) to those that give the kept blocks' kinds.

    Raises `ExportError` where none do.
    """
    pairs = [
        (name, name.removesuffix("period") + "offset")
        for name, value in vars(new).items()
        if name.endswith("_period") and isinstance(value, int)
    ]
    pairs = [(period, offset) for period, offset in pairs if isinstance(getattr(new, offset, None), int)]
    if not pairs:
        return
    wanted = {
        name: [entry for block, entry in enumerate(value) if block not in removed]
        for name, value in _derived_lists(old).items()
    }

    def mismatches() -> int:
        derived = _derived_lists(new)
        return sum(a != b for name in wanted for a, b in zip(wanted[name], derived[name], strict=True))

    periods_before = ", ".join(f"{name}={getattr(new, name)}" for pair in pairs for name in pair)
    for pair in pairs:  # they do not depend on each other: fitting one after the other fits all
        before = getattr(new, pair[0])
        periods = [before, *(period for period in range(1, new.num_hidden_layers + 2) if period != before)]
        fits: list[tuple[int, int, int]] = []
        for period, offset in ((value, offset) for value in periods for offset in range(value)):
            _set(new, pair, period, offset)
            fits.append((mismatches(), period, offset))
        _set(new, pair, *min(fits, key=lambda fit: fit[0])[1:])
    if mismatches():
        name = next(name for name in wanted if wanted[name] != _derived_lists(new)[name])
        raise ExportError(
            f"its config can only say where blocks of a kind are by a period ({periods_before}), and no period gives "
            f"the kinds of the blocks that stay ({name}: {', '.join(map(str, wanted[name]))})"
        )


def _set(config: PreTrainedConfig, names: tuple[str, str], period: int, offset: int) -> None:
    setattr(config, names[0], period)
    setattr(config, names[1], offset)
