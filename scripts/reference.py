"""Write `docs/command-line.md`, the reference of all commands: `make reference`. With `--check` only compare, exit 1.

Everything in it comes from the commands and from the fields that describe their options; nothing is written by hand but
what stands here.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from sleb.cli.main import app
from sleb.records import JobSettings, RunSpec
from sleb.records.options import Setting, settings_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "command-line.md"
HEAD = """# The command line

<!-- Written by scripts/reference.py from the commands themselves: change it there, then run `make reference`. -->

`sleb COMMAND --help` says the same on a terminal, and [the README](../README.md) shows a tour. Results go to stdout,
everything else to stderr; `--json` prints one object. Bad input gets one sentence and exit code 2, Ctrl-C 130,
everything else that fails 1.

`MODEL` is a Hugging Face name, a local folder, a `.gguf` file or `demo`. `RUN` is a run id, a run folder or a sample's
name. Blocks are original, 0-based indices: `0,29`, a range such as `8-20`, both, or `none`. A rise is `+10%` or `0.1`;
a size is `24GB`, `500MB` or `16GiB`. The options of a search have the same names in a notebook, with underscores:
`sleb.search("demo", sequence_length=512)`; there blocks are lists, rises are shares, and sizes are bytes.

"""
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if "--check" in arguments:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE} is not up to date: run make reference.", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE}.", file=sys.stderr)
    return 0


def page() -> str:
    """The whole page."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    links = " · ".join(f"[{name}](#sleb-{name})" for name in commands)
    return HEAD + links + "\n" + "".join(_section(name, command) for name, command in commands.items())


def _section(name: str, command: Any) -> str:
    intro = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    parameters = [each for each in command.params if each.name != "help"]
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    usage = " ".join(["sleb", name, *(["[OPTIONS]"] * (len(parameters) > len(arguments))), *map(_name, arguments)])
    head = f"\n## sleb {name}\n\n{intro}\n\n```text\n{usage}\n```\n"
    return (
        head + "\n| option | values | default | what it is |\n|---|---|---|---|\n" + "\n".join(_rows(parameters)) + "\n"
    )


def _rows(parameters: list[Any]) -> Iterator[str]:
    """Arguments, options of no panel, then panel by panel, and `--json` last."""
    panels: dict[str, list[Any]] = {"": []}
    for each in parameters:
        panel = "Output" if each.name == "as_json" else getattr(each, "rich_help_panel", None) or ""
        panels.setdefault(panel, []).append(each)
    for panel in sorted(panels, key=lambda each: each == "Output"):
        if panel:
            yield f"| **{panel}** | | | |"
        yield from map(_row, sorted(panels[panel], key=lambda each: each.param_type_name == "option"))


def _row(parameter: Any) -> str:
    help_text = parameter.help or ""
    setting = _setting_of(parameter)
    default = match[1] if (match := _DEFAULT.search(help_text)) else _default(parameter)
    sentence = _DEFAULT.sub("", help_text)
    if setting is not None and setting.option.details:
        sentence = f"{sentence} {setting.option.details}"
    if parameter.param_type_name == "argument":
        cells = (f"`{_name(parameter)}`", "", "", sentence)
    else:
        names = "<br>".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
        cells = (names, _values(parameter, setting), default, sentence)
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _setting_of(parameter: Any) -> Setting | None:
    """The description from which the option was made."""
    settings = (*settings_of(RunSpec), *settings_of(JobSettings))
    own = next((each for each in settings if each.name == parameter.name), None)
    is_its = own is not None and own.option.group == getattr(parameter, "rich_help_panel", None)
    return own if is_its and own is not None and (parameter.help or "").startswith(own.option.help) else None


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or default is False:
        return ""
    if default is True:
        return f"`{parameter.opts[0]}`"
    values = default if isinstance(default, list | tuple) else (default,)
    return ", ".join(f"`{getattr(each, 'value', each)}`" for each in values)


def _values(parameter: Any, setting: Setting | None) -> str:
    """What can be given: names, a range, or a word for it."""
    if parameter.is_flag:
        return ""
    if choices := _choices(parameter.type_descriptor.annotation):
        return ", ".join(f"`{each}`" for each in choices)
    if parameter.metavar is not None:
        return f"`{parameter.metavar}`"
    if setting is not None and setting.kind == "number":
        return _range(setting.low, setting.high, setting.strict, setting.option.unit)
    if parameter.min is not None or parameter.max is not None:
        return _range(parameter.min, parameter.max, False, "")
    types = _leaves(parameter.type_descriptor.annotation)
    return "path" if Path in types else "number" if float in types or int in types else "text"


def _range(low: float | None, high: float | None, strict: bool, unit: str) -> str:
    if low is None and high is None:
        return "number"
    if high is None:
        words = f"at least {_plain(low)}"
    elif strict:
        words = f"between {_plain(low)} and {_plain(high)}"
    else:
        words = f"{_plain(low)} to {_plain(high)}"
    return f"{words} {unit}".strip()


def _plain(number: float | None) -> str:
    return f"{number:.6f}".rstrip("0").rstrip(".")


def _leaves(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (None, Literal):
        return [annotation]
    return [leaf for each in get_args(annotation) for leaf in _leaves(each)]


def _choices(annotation: Any) -> tuple[str, ...]:
    for each in _leaves(annotation):
        if get_origin(each) is Literal:
            return get_args(each)
        if isinstance(each, type) and issubclass(each, Enum):
            return tuple(member.value for member in each)
    return ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
