"""The YAML of a stranger's task file, read within bounds and without code. Knows files; never sees lm-eval."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleb.errors import OptionError, excerpt

LARGEST = 4 << 20
"""Most bytes of a task file; lm-eval's own largest has 63,000."""
_DEEPEST, _WIDEST = 100, 1_000_000  # of what its YAML becomes, with all that its aliases repeat
FLAG = "which a task file may only with `trust_remote_code`"
"""How a sentence ends that says what a task file must not do."""


class _Function(str):
    """The name that `!function` gives, where nothing is imported."""


def parsed(path: Path, refuse: bool) -> dict[str, Any]:
    """A task file's YAML, in which `!function` is refused, or becomes the name that it would import.

    Raises `OptionError` for a file that is not read, `ValueError` for one that holds no settings.
    """
    import yaml

    safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = _text(path)
    _require_small(path, yaml, yaml.parse(text, Loader=safe))

    class Loader(safe):
        pass

    def function(loader: Any, node: Any) -> str:
        name = loader.construct_scalar(node)
        if refuse:
            raise OptionError(f"The task file {path} runs code (!function {excerpt(name, 80)}), {FLAG}.")
        return _Function(path.parent / str(name))

    yaml.add_constructor("!function", function, Loader=Loader)
    config = yaml.load(text, Loader=Loader)
    if not isinstance(config, dict):
        raise ValueError(f"Expected YAML dict from {path}, got {type(config).__name__}")
    return config


def _text(path: Path) -> bytes:
    """The bytes of a regular file: a pipe would never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OptionError(f"The task file {path} is not a regular file.")
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise OptionError(
            f"The task file {path} has more than {LARGEST / 1e6:.0f} MB; examples go into files of their own."
        )
    return text


def _require_small(path: Path, yaml: Any, events: Iterator[Any]) -> None:
    """Refuse YAML that becomes too much; an alias is as large as what it repeats. Nothing is made of the events yet."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        before, anchor = total, None
        if isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
            total += 1 + len(event.value) // 64
            if len(event.value) > 1_000 and event.implicit[0] and re.fullmatch(r"[-+0-9_:.,]+", event.value):
                raise OptionError(f"The task file {path} has a number of {len(event.value):,} digits.")
        elif isinstance(event, yaml.AliasEvent):
            if any(each == event.anchor for each, _ in opened):
                raise OptionError(f"The task file {path} has an alias of itself, {excerpt(event.anchor, 40)}.")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            total += 1
            opened.append((event.anchor, before))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
        if anchor is not None:
            sizes[anchor] = total - before
        if total > _WIDEST or len(opened) > _DEEPEST:
            raise OptionError(
                f"The task file {path} becomes too much: at most {_WIDEST:,} values, {_DEEPEST} deep, with all that "
                "aliases repeat."
            )


def holds_function(value: Any) -> bool:
    """Whether a setting, or anything in it, is a function by its name."""
    if isinstance(value, dict | list):
        return any(holds_function(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, _Function)
