"""`candidates`: one option from its field to every edge, and what it does to a search."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path

import pytest

import sleb
from app.wording import in_fields
from sleb import specs
from sleb.errors import OptionError
from sleb.formats import command_line
from sleb.methods.cost_forecast import cost_of_spec
from sleb.methods.problem import protected_blocks
from tests.support.command import run
from tests.support.dashboard import open_page
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("candidates", "protect", "kept"),
    [
        (None, None, (0, 9)),
        ((2, 3), None, (0, 1, 4, 5, 6, 7, 8, 9)),
        ((0, 1, 2), None, (0, 3, 4, 5, 6, 7, 8, 9)),
        ((0, 1, 2), (), (3, 4, 5, 6, 7, 8, 9)),
        (range(10), (4,), (4,)),
    ],
)
def test_what_is_not_named_or_is_protected_is_kept(
    candidates: tuple[int, ...] | None, protect: tuple[int, ...] | None, kept: tuple[int, ...]
) -> None:
    assert protected_blocks(specs.run_spec("x", candidates=candidates, protect=protect), 10) == kept


@pytest.mark.parametrize(
    ("candidates", "sentence"),
    [
        ((2, 10), r"`candidates` names block 10; the model has blocks 0 to 9\."),
        ((-1,), r"`candidates` names block -1; the model has blocks 0 to 9\."),
        ((0, 9), r"`candidates` names no block that can be removed"),
        ((), r"`candidates` names no block that can be removed"),
    ],
)
def test_what_cannot_be_is_one_sentence(candidates: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        cost_of_spec(specs.run_spec("x", candidates=candidates, remove=1), 10)


def test_a_search_from_the_command_line(tiny_model: Path, text_file: Path) -> None:
    size = ["--sequences", 4, "--sequence-length", 24, "--dtype", "float32", "--no-analysis", "--remove", 1, "--json"]
    words = ["search", tiny_model, "--calibration", text_file, *size]
    result = json.loads(run(*words, "--candidates", "0,2-4", "--protect", "3")[0])
    assert [each["block"] for each in result["steps"][0]["candidates"]] == [0, 2, 4]
    assert result["protected"] == [1, 3, 5]
    assert sleb.load(result["run_id"]).spec.candidates == (0, 2, 3, 4)
    assert "--candidates names block 6;" in run(*words, "--candidates", "2-6", code=2)[1]
    assert "--candidates takes block indices such as 8-20,22" in run(*words, "--candidates", "4-2", code=2)[1]


def test_the_command_shown_for_a_run_asks_for_it() -> None:
    line = command_line.command_line(specs.run_spec("x/y", candidates=(8, 9, 10, 22)))
    assert "--candidates=8,9,10,22" in shlex.split(line)
    assert "--candidates" not in command_line.command_line(specs.run_spec("x/y"))


def test_a_notebook_shows_it() -> None:
    assert inspect.signature(sleb.search).parameters["candidates"].default is None
    assert "candidates: Blocks that may be removed; all others are kept." in (sleb.search.__doc__ or "")


def test_the_form_has_a_control_for_it(home: Path) -> None:
    app = open_page("runs")
    app.toggle(key="form").set_value(True).run()
    control = app.text_input(key="new-candidates")
    assert (control.label, control.placeholder) == ("Candidate blocks", "all")
    control.set_value("8-12, 20").run()
    assert not app.exception
    assert "--candidates=8,9,10,11,12,20" in "".join(each.value for each in app.code)
    assert in_fields("Shorten `candidates`.") == "Shorten “Candidate blocks”."


def test_the_reference_has_a_row_for_it() -> None:
    row = "| `--candidates` | `8-20,22` | all | Blocks that may be removed; all others are kept."
    assert row in (ROOT / "docs" / "command-line.md").read_text()
