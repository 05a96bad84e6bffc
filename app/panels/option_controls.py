"""A control for an option, by its kind: number, choice, text or check; its label, help and range are the field's.

What a control holds is not always the value: shares are in per cent, blocks a text, and an empty text no value at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamlit.delta_generator import DeltaGenerator

from sleb.formats import spelling
from sleb.records.options import Setting

_LARGEST = 10**15
"""The largest number in a control; a browser holds larger ones, but not exactly."""


def shown(setting: Setting, value: Any) -> Any:
    """What a control holds for a value; None and an empty text stand for a default that depends on others."""
    if setting.on_off is not None:
        return value == setting.on_off[0]
    if value is None:
        return None if setting.kind == "number" or setting.option.percent else ""
    if setting.option.percent is not None:
        low, high = setting.option.percent
        return min(max(low, round(100 * value)), high)
    if setting.kind == "blocks":
        return spelling.listed(value)
    return str(getattr(value, "value", value)) if setting.kind == "choice" else value


def value(setting: Setting, held: Any) -> Any:
    """The value that a control holds, or None for the default. Raises `OptionError`."""
    if setting.on_off is not None:
        return setting.on_off[0] if held else setting.on_off[1]
    if setting.option.percent is not None:
        return None if held is None else held / 100
    if not isinstance(held, str):
        return held
    text = held.strip()
    return spelling.read(setting, text) if text else None if setting.depends else setting.default


def draw(
    setting: Setting,
    column: DeltaGenerator,
    *,
    first: Any,
    key: str,
    label: str | None = None,
    names: Mapping[str, str] | None = None,
    demo: bool = False,
    disabled: bool = False,
) -> Any:
    """Draw the control of an option; returns what it holds.

    `first` is what it begins with, `names` what its choices are called, `demo` whether the model is the demo's.
    """
    option = setting.option
    common: dict[str, Any] = {"key": key, "help": f"{option.help} {option.details}".strip(), "disabled": disabled}
    title = label or option.label + (", per cent" if option.percent is not None else "")
    if setting.on_off is not None:
        return column.checkbox(title, value=first, **common)
    if setting.kind == "choice":
        choices = list(setting.choices)
        called: Callable[[str], str] = (lambda choice: names[choice]) if names is not None else str
        return column.selectbox(title, choices, format_func=called, index=choices.index(first), **common)
    if setting.kind == "number" or option.percent is not None:
        ends = option.percent or (setting.low, min(setting.high or _LARGEST, _LARGEST))
        low, high = (None if each is None else int(each) for each in ends)
        bounds: dict[str, Any] = {"min_value": low, "max_value": high}
        placeholder = option.otherwise or str(setting.usual(demo) or "")
        return column.number_input(title, value=first, placeholder=placeholder, **bounds, **common)
    return column.text_input(title, value=first, placeholder=option.otherwise, **common)
