"""Lines on stdout and stderr: where text leaves the command line, harmless to a terminal. Tables are `terminal`'s."""

from __future__ import annotations

import sys
from functools import cache

import typer

from sleb.errors import SlebError, Stopped, printable, respelled, sentence
from sleb.records import JobSettings, Permissions, RunSpec, requests
from sleb.records.base import Record
from sleb.records.options import settings_of

_OF_COMMANDS = {"all_steps", "format", "gguf", "perplexity", "removal_list", "run_dir", "steps"}
"""Settings that commands have beside the fields of records."""


def with_flags(text: str) -> str:
    """A message in which settings are written as options: `batch_size=1` -> --batch-size 1."""
    return respelled(text, _flag)


@cache
def _names() -> frozenset[str]:
    """Settings that have an option; other words in back quotes are not ours."""
    described = {each.name for record in (RunSpec, JobSettings) for each in settings_of(record)}
    records: list[type[Record]] = [Permissions]
    records += [each for each in vars(requests).values() if isinstance(each, type) and issubclass(each, Record)]
    return frozenset(described.union(_OF_COMMANDS, *(each.model_fields for each in records)))


def _flag(name: str, value: str | None) -> str | None:
    if name not in _names():
        return None
    option = name.replace("_", "-")
    if value == "False":
        return f"--no-{option}"
    return f"--{option}" if value in (None, "True") else f"--{option} {value}"


def say(text: str) -> None:
    """Print a remark on stderr."""
    typer.echo(printable(with_flags(text)), err=True)


def fail(message: str) -> None:
    """Print on stderr why a command could not do what it was asked."""
    typer.echo(f"sleb: {sentence(with_flags(message))}", err=True)


def require_yes(question: str, otherwise: str, option: str) -> None:
    """Ask on stderr; typer itself would write a blank on stdout. Raises `SlebError` for no, `Stopped` for no answer.

    `otherwise` is what does not happen then, and `option` what answers yes.
    """
    while True:
        sys.stderr.write(printable(f"{question} [y/N]: "))
        sys.stderr.flush()
        answer = sys.stdin.readline()
        if not answer:
            say("")  # under the question
            raise Stopped(f"{otherwise}, without an answer. Answer y, or add {option}.")
        if answer.strip().lower() in ("y", "yes"):
            return
        if answer.strip().lower() in ("", "n", "no"):
            raise SlebError(f"{otherwise}.")


def put(text: str, *, newline: bool = True) -> None:
    """Print a result on stdout: a terminal gets it without what would steer it, a file or a program as it is."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=newline)
