"""Lines on stdout and stderr: where text leaves the command line, harmless to a terminal. Tables are `terminal`'s."""

from __future__ import annotations

import sys

import typer

from sleb.errors import Stopped, printable, sentence


def say(text: str) -> None:
    """A remark, on stderr."""
    typer.echo(printable(text), err=True)


def fail(message: str) -> None:
    """The last line of a command that did not do what it was asked, on stderr."""
    typer.echo(f"sleb: {sentence(message)}", err=True)


def require_yes(question: str, otherwise: str) -> None:
    """Asks on stderr. Ends the command where the answer is no; raises `Stopped` with a sentence where there is none."""
    try:
        if not typer.confirm(printable(question), err=True):
            raise typer.Exit(1)
    except typer.Abort as error:
        say("")  # under the question
        raise Stopped(otherwise) from error


def put(text: str, *, newline: bool = True) -> None:
    """A result, on stdout: on a terminal without what would steer it; a file or another program gets it as it is."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=newline)
