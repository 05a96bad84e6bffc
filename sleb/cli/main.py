"""The command line: its commands, and what becomes of an error. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sleb.cli.evaluate import benchmark, evaluate, generate, heal, quantize
from sleb.cli.export import export, report
from sleb.cli.output import fail, put, say
from sleb.cli.processes import dashboard, stop, work
from sleb.cli.runs import bring_in, cache, delete, runs, show
from sleb.cli.search import analyze, resume, search
from sleb.errors import SlebError, sentence

app = typer.Typer(
    name="sleb",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Which transformer blocks can a language model lose, what does it cost, and how sure is that?\n\n"
        "Try **sleb search demo** first: a real model and real text come with the installation.\n\n"
        "Then **sleb search MODEL --ratio 0.2**, **sleb show RUN** and "
        "**sleb export RUN --format hf --out FOLDER**."
    ),
)


_COMMANDS: dict[str, Callable[..., None]] = {
    "search": search,
    "analyze": analyze,
    "resume": resume,
    "show": show,
    "runs": runs,
    "stop": stop,
    "delete": delete,
    "import": bring_in,
    "export": export,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "quantize": quantize,
    "heal": heal,
    "generate": generate,
    "report": report,
    "cache": cache,
    "work": work,
    "dashboard": dashboard,
}
"""Commands in the order in which `--help` lists them."""
_PASSING_OPTIONS_ON = {"dashboard": {"allow_extra_args": True, "ignore_unknown_options": True}}

for _name, _command in _COMMANDS.items():
    app.command(_name, context_settings=_PASSING_OPTIONS_ON.get(_name))(_command)


def _say_version(wanted: bool) -> None:
    if wanted:
        from sleb import __version__

        put(f"sleb {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options before any command."""


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RefusedUsage: type[Exception] = typer.BadParameter.__bases__[0]
"""Exceptions of typer for options and commands that it cannot take."""


def main() -> None:
    """Run one command; an error is one sentence and an exit code, and only a bug is a traceback."""
    os.environ["PYTHONSAFEPATH"] = "1"  # no process below this one imports a file of the folder it starts in
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it logs every retry; the end is reported here
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours says how far the whole is
    handler = _ToScreen()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)  # of other libraries, which write to stderr themselves
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± must not end a search
    try:
        code = app(prog_name="sleb", standalone_mode=False)  # else typer would print what it refuses as it came
        if code == 130:
            fail("Stopped on request.")
        sys.exit(code)
    except SlebError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except _RefusedUsage as error:
        _explain_usage(error)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        fail("Stopped on request.")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # no reader is left, and Python flushes once more
        sys.exit(1)
    except (OSError, UnicodeError) as error:
        fail(str(error))
        sys.exit(1)


def _explain_usage(error: Any) -> None:
    """How the command is used, and what was wrong with this use of it; a command alone has shown its help instead."""
    message = error.format_message()
    if not message:
        return
    if error.ctx is not None:
        say(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.")
    fail(message)


class _ToScreen(logging.Handler):
    """Writes warnings to stderr as it is at that moment: a live progress bar takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        say(sentence(_COLOUR.sub("", self.format(record))))
