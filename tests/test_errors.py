"""Messages are one line fit for the screen, whatever they echo."""

from __future__ import annotations

import pytest

from sleb.errors import MOST_CHARACTERS, SlebError, printable, quoted


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
