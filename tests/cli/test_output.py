"""What leaves the command line: one printable sentence for whatever was given, and for whenever it is stopped."""

from __future__ import annotations

import ast
import io
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sleb
from sleb.errors import MOST_CHARACTERS
from tests.support.command import run
from tests.support.paths import ROOT
from tests.support.runs.stores import write_run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["search", "x", "--protect", "٣"], "block indices"),
        (["search", "x", "--protect", "1_0"], "block indices"),
        (["search", "x", "--until-perplexity", "+٣%"], "+10%"),
        (["search", "x", "--until-perplexity", "nan"], "+10%"),
        (["search", "x", "--memory-budget", "٣GB"], "24GB"),
        (["search", "x", "--memory-budget", "9" * 5000 + "GB"], "24GB"),
        (["search", "x", "--sequences", "３"], "--sequences"),
        (["search", "x", "--confidence", "1e-320"], "--confidence"),
        (["search", "x", "--confidence", "0.9999999999999999"], "--confidence"),
        (["evaluate", "x", "--removal-list", "٣"], "block indices"),
        (["evaluate", "x", "--removal-list", "[]", "--shots", "-1"], "--shots"),
        (["benchmark", "x", "--removal-list", "[]", "--prompt", "٣x٣"], "1x2048"),
        (["benchmark", "x", "--removal-list", "[]", "--prompt", "1_0x1_0"], "1x2048"),
        (["heal", "x", "--removal-list", "[1]", "--rank", "999999999999"], "--rank"),
        (["heal", "x", "--removal-list", "[1]", "--learning-rate", "1e99"], "--learning-rate"),
        (["heal", "x", "--removal-list", "[1]", "--learning-rate", "1e-320"], "--learning-rate"),
        (["search", "x", "--revision", "\udcff"], "--revision is not UTF-8 text"),
        (["heal", "x", "--removal-list", "[1]", "--source", "\udcff"], "--source is not UTF-8 text"),
        (["evaluate", "x", "--removal-list", "[1]", "--tasks", "\udcff"], "--tasks is not UTF-8 text"),
        (["benchmark", "x", "--removal-list", "[1]", "--device", "\udcff"], "UTF-8 text"),
        (["show", "\x1b[31m" * 1000], "no run"),
        (["search", "x", "--protect", "\u202e" * 5000], "block indices"),
        (["search", "x", f"--{'y' * 5000}"], "No such option"),
        (["z" * 5000], "No such command"),
        (["cache", "--clear", "\x1b]0;title\x07" * 500], "The cache has nothing called"),
    ],
)
def test_a_value_that_nobody_means_is_refused_in_one_printable_sentence(words: list[str], sentence: str) -> None:
    out, err = run(*words, code=2)
    last = err.splitlines()[-1]
    assert out == ""
    assert last.startswith("sleb: ")
    assert sentence in last
    assert len(last) <= MOST_CHARACTERS + len("sleb: ")
    assert last.isprintable()
    assert sleb.runs() == []


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", [["show", "run"], ["runs"], ["export", "run", "--format", "csv"]])
def test_a_run_from_elsewhere_steers_no_terminal(
    command: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sleb.cli.main import main

    hostile = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"
    made = write_run(home / "runs" / "run", 4, 1, model=f"model {hostile}", message=hostile, words=(hostile,))
    trace = made.run_dir / "trace.jsonl"
    trace.write_text(trace.read_text().replace("as asked", "as asked\\u001b[2J\\u202e"))
    screen = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "argv", ["sleb", *command])
    with pytest.raises(SystemExit):
        main()
    assert "example" in screen.getvalue() or "model" in screen.getvalue() or "number" in screen.getvalue()
    assert {each for each in screen.getvalue() if not each.isprintable()} <= {"\n"}


def test_what_libraries_log_and_warn_of_steers_no_terminal() -> None:
    code = (
        "import logging, sys, warnings\n"
        "from sleb.cli.main import main\n"
        "sys.argv = ['sleb', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "logging.getLogger('another').warning('\\x1b[1ma model\\x1b[0m called %s', '\\x1b]0;title')\n"
        "warnings.warn('\\x1b[31m' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "WARNING: a model called \\x1b]0;title\n" in done.stderr
    assert "\x1b" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= MOST_CHARACTERS


def test_text_leaves_the_command_line_in_one_place() -> None:
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in (ROOT / "sleb" / "cli").glob("*.py")
        if path.name != "output.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stderr.write")
    ]
    assert not wrong


@pytest.mark.parametrize(("answer", "code"), [("", 130), ("n\n", 1), ("\x1b\n", 130)])
def test_deleting_without_a_yes_deletes_nothing(
    answer: str, code: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(home / "runs" / "run", 4, 1).run_dir
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    _, err = run("delete", "run", code=code)
    assert folder.is_dir()
    assert "Abort" not in err
    assert "Nothing was deleted" in err


def test_a_command_that_is_stopped_while_it_imports_says_so() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "sleb", "search", "nothing"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "pydantic" in line:  # by then Python has begun with the program, and is far from through
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "sleb: Stopped on request."


def test_the_log_of_a_job_steers_no_screen() -> None:
    from sleb.worker import _Printable

    record = logging.LogRecord("name", logging.WARNING, "path", 1, "%s\nnext", ("\x1b[31mred",), None)
    assert _Printable("%(message)s").format(record) == "\\x1b[31mred\nnext"
    assert record.args == ("\x1b[31mred",)  # which other handlers look at
