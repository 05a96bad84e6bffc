"""Messages below the edges name settings as a notebook spells them, in back quotes, and only those that exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache

import pytest
import typer

import sleb
from sleb.cli.main import app
from sleb.records import JobSettings, Permissions, RunSpec, requests
from sleb.records.base import Record
from sleb.records.options import settings_of
from tests.support.paths import ROOT

EDGES = ("sleb/cli",)
"""Where options are spelled with dashes."""
OF_THE_SERVER = {"allow-path", "read-only", "allow-pickle", "trust-remote-code"}
"""Options of `sleb dashboard`, which its pages name as they are typed."""
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")
_COMMAND = re.compile(r"`sleb [^`]*`")
"""A command that a message quotes, whole, to be typed as it is."""
_SETTING = re.compile(r"`([a-z][a-z_]*)(?:=[^`\n]*)?`")
_RAISERS = re.compile(r"Error|NotPermitted|NotAllowed|NotNumbers|Stopped|warning|UnconfirmedNames")


def packages() -> list[str]:
    """Packages and modules below the edges, each tested by itself."""
    inside = sorted((ROOT / "sleb").iterdir())
    below = [path for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = [str(path.relative_to(ROOT)) for path in (*below, ROOT / "app", ROOT / "pages")]
    return [name for name in names if name not in EDGES]


def trees(package: str) -> Iterator[tuple[str, ast.Module]]:
    """The syntax trees of a package's files, by name."""
    path = ROOT / package
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String constants that are not docstrings, pieces of f-strings among them, with their lines."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(statement.value) for statement in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def is_command(text: str) -> bool:
    """Whether it is a word of a command that a program gives to another one (`--json`, `--device=`), no message."""
    return bool(re.fullmatch(r"--(?:[a-z][a-z.-]*=?)?|--no-", text, re.IGNORECASE))


@cache
def options() -> frozenset[str]:
    """All options of the command line; those of other programs and of style sheets are not meant."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    spelled = (name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts))
    return frozenset(name.removeprefix("--") for name in spelled if name.startswith("--"))


@pytest.mark.parametrize("package", packages())
def test_no_text_below_the_edges_names_an_option(package: str) -> None:
    wrong = [
        f"{name}:{line}: --{option}"
        for name, tree in trees(package)
        for line, text in texts(tree)
        for option in _OPTION.findall(_COMMAND.sub("", text))
        if option in options()
        and not is_command(text)
        and not (package in ("app", "pages") and option in OF_THE_SERVER)
    ]
    assert not wrong


@cache
def settings() -> frozenset[str]:
    """All that a message can name: parameters of public functions, fields of what is asked, and permissions."""
    names = {each.name for record in (RunSpec, JobSettings) for each in settings_of(record)}
    names |= set(Permissions.model_fields)
    for name in sleb.__all__:
        function = getattr(sleb, name)
        names |= set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()
    for record in vars(requests).values():
        if isinstance(record, type) and issubclass(record, Record):
            names |= set(record.model_fields)
    return frozenset(names)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that are given to an error or a warning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _RAISERS.search(ast.unparse(node.func)):
            for given in (*node.args, *(each.value for each in node.keywords)):
                yield from texts(given)


@pytest.mark.parametrize("package", packages())
def test_every_setting_that_a_message_names_is_there(package: str) -> None:
    wrong = [
        f"{name}:{line}: `{setting}`"
        for name, tree in trees(package)
        for line, text in messages(tree)
        for setting in _SETTING.findall(text)
        if setting not in settings()
    ]
    assert not wrong


def test_the_test_sees_what_it_forbids() -> None:
    tree = ast.parse('def f():\n    """Like --this."""\n    raise OptionError(f"Lower --that of {x}, or `such`.")\n')
    assert [option for _, text in texts(tree) for option in _OPTION.findall(text)] == ["that"]
    assert [setting for _, text in messages(tree) for setting in _SETTING.findall(text)] == ["such"]
    assert "such" not in settings()
    assert {"sequence_length", "memory_budget", "trust_paths", "window", "protect", "gguf"} <= settings()
