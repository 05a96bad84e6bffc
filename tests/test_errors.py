"""Messages are one line fit for the screen, whatever they echo."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from app.wording import in_fields
from sleb.cli.output import with_flags
from sleb.errors import MOST_CHARACTERS, NotPermitted, SlebError, excerpt, printable, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ± text\nof two lines", "plain ± text\nof two lines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("bytes \udcff", "bytes \\udcff"),
        ("a\tb\rc", "a\\tb\\rc"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(SlebError(text)) == shown.replace("\n", " ")


def test_what_somebody_gave_is_quoted_and_cut() -> None:
    assert quoted("demo") == "'demo'"
    assert quoted("\x1b[31m") == "'\\x1b[31m'"
    assert len(quoted("x" * 5000)) <= 110
    assert len(quoted([["x" * 5000] * 50] * 50)) < 5000
    assert "too long" in quoted(10**5000)


def test_a_long_message_keeps_its_end_which_says_what_to_do() -> None:
    output = str(SlebError(f"Nothing is called {'x' * 5000}. Give another one."))
    assert len(output) <= MOST_CHARACTERS
    assert output.startswith("Nothing is called xxx")
    assert output.endswith("xxx. Give another one.")


@pytest.mark.parametrize("edge", [with_flags, in_fields])
@pytest.mark.parametrize(
    "text",
    [
        "/tmp/a`remove=3`b cannot be read.",
        "/tmp/`remove`/model cannot be read.",
        f"Nothing is called {quoted('`remove`')} or {quoted('a `trust_remote_code=True` b')}.",
        f"The template refuses it ({excerpt('use `trust_remote_code=True`, please')}).",
    ],
)
def test_back_quotes_of_others_are_no_settings(edge: Callable[[str], str], text: str) -> None:
    assert edge(text) == text


def test_the_command_line_spells_only_options_that_it_has() -> None:
    assert with_flags("Give a `token=x` or `revision=main`.") == "Give a `token=x` or --revision main."


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/a folder", "'/a folder'"), ("/a`b'c", r"$'/a\x60b\'c'"), ("/a\nb", r"$'/a\nb'"), ("/a\x1b", r"$'/a\x1b'")],
)
def test_a_path_to_allow_can_be_typed_as_the_message_shows_it(path: str, shown: str) -> None:
    message = with_flags(str(NotPermitted("heal", {"out": path})))
    assert message.endswith(f"repeat the command with --out {shown}.")
    echoed = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True, text=True)
    assert echoed.stdout == path
