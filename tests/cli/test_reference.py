"""The reference of the command line says what the commands say, and says all of it."""

from __future__ import annotations

import runpy

import typer

from sleb.cli.main import app
from tests.support.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "reference.py"))


def test_the_reference_is_up_to_date() -> None:
    assert SCRIPT["PAGE"].read_text() == SCRIPT["page"](), "run make reference"


def test_the_reference_names_every_option_of_every_command() -> None:
    page = SCRIPT["page"]()
    sections = {part.split("\n", 1)[0]: part for part in page.split("\n## sleb ")[1:]}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for each in command.params:
            for option in each.opts if each.param_type_name == "option" and each.name != "help" else ():
                assert f"`{option}`" in sections[name], (name, option)


def test_the_reference_takes_range_default_and_details_from_the_field() -> None:
    page = SCRIPT["page"]()
    assert "| `--processes` | 1 to 4096 | `1` | How many processes share the sequences;" in page
    assert "| `--sequence-length` | at least 2 tokens | 2048; 256 for demo | Tokens of each sequence. |" in page
    assert "| `--sequence-length` | at least 8 | `512` | Tokens of each sequence. |" in page  # of heal, another field
    assert "| `--ratio` | between 0 and 1 | 0.2; 0.1 for demo |" in page
