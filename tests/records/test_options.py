"""Every option of a search is described once, on its field, and every edge offers it."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import typer
from pydantic import BaseModel

import sleb
from app.wording import in_fields
from sleb import specs
from sleb.cli.main import app
from sleb.errors import OptionError
from sleb.formats import command_line, spelling
from sleb.records import JobSettings, Method, RunSpec
from sleb.records.options import Setting, settings_of
from tests.support.dashboard import open_page

RUN, JOB = settings_of(RunSpec), settings_of(JobSettings)
SETTINGS = {each.name: each for each in (*RUN, *JOB)}


@pytest.mark.parametrize(("record", "options"), [(RunSpec, specs.RunOptions), (JobSettings, specs.JobOptions)])
def test_the_types_that_editors_read_are_those_of_the_fields(record: type[BaseModel], options: type) -> None:
    hints = get_type_hints(options)
    assert set(hints) == {each.name for each in settings_of(record)}
    for setting in settings_of(record):
        optional = NoneType in get_args(hints[setting.name])
        assert optional == setting.depends or setting.name == "processes", setting.name  # resuming: as before
        if setting.choices and setting.name != "method":
            assert setting.choices == get_args(hints[setting.name])


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_option_is_a_flag_a_parameter_and_a_label(setting: Setting) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (flag,) = (each for each in commands["search"].params if each.name == setting.name)
    assert setting.flag in flag.opts
    assert flag.help.startswith(setting.option.help)
    assert flag.rich_help_panel == setting.option.group
    assert any(each.name == setting.name for each in commands["analyze"].params) != setting.option.search_only
    parameter = inspect.signature(sleb.search).parameters[setting.name]
    assert parameter.default == (None if setting.depends else setting.default)
    assert f"{setting.name}: {setting.option.help}"[:60] in (sleb.search.__doc__ or "")
    assert in_fields(f"Lower `{setting.name}`.") == f"Lower “{setting.option.label}”."


def test_the_form_has_a_control_for_every_option_it_offers(home: Path) -> None:
    page = open_page("runs")
    page.toggle(key="form").set_value(True).run()
    labels = {
        each.label: each for kind in ("text_input", "number_input", "selectbox", "checkbox") for each in page.get(kind)
    }
    for setting in SETTINGS.values():
        if setting.option.in_form and setting.name not in ("remove", "ratio", "until_perplexity", "calibration"):
            label = setting.option.label + (", per cent" if setting.option.percent else "")
            assert labels[label].help.startswith(setting.option.help), label
    assert labels["Sequences"].placeholder == "16"  # of the demo


def test_resuming_takes_processes_and_budget_from_the_last_try() -> None:
    parameters = inspect.signature(sleb.resume).parameters
    assert [parameters[name].default for name in ("processes", "memory_budget", "device")] == [None, None, "auto"]


def test_labels_and_names_are_one_option_each() -> None:
    assert len(SETTINGS) == len(RUN) + len(JOB)
    assert len({each.option.label for each in SETTINGS.values()}) == len(SETTINGS)


OTHERS: dict[str, Any] = dict(
    calibration="c4", sequences=7, sequence_length=33, held_out=2, sampling="first", bos="no", chat=True, seed=3,
    ratio=0.3, method="metric3", until_perplexity=0.125, protect=[0, 2], candidates=[1, 3, 4], objective="kl",
    search="full", refine="swap", confidence=0.9, dtype="float32", revision="main", analysis=False,
)  # fmt: skip
JOB_OTHERS: dict[str, Any] = dict(device="cpu", batch_size=5, processes=2, memory_budget=24_000_000_000, speedups="off")


def test_the_command_shown_for_a_run_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another value for every option, and with none."""
    from typer.testing import CliRunner

    from sleb.cli import search as commands

    assert set(OTHERS) | {"remove"} == {each.name for each in RUN}
    assert set(JOB_OTHERS) == {each.name for each in JOB}
    started: list[Any] = []
    monkeypatch.setattr(commands, "_start", lambda spec, job, *rest: started.append((spec, job)))
    for options, job_options in (
        (OTHERS, JOB_OTHERS),
        ({}, {}),
        ({"remove": 3, "method": "early-exit", "protect": []}, {}),
    ):
        spec, job = specs.run_spec("org/model", **options), specs.job_spec("search", **job_options)
        line = command_line.command_line(spec, job)
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)
        assert started.pop() == (spec, job)
    assert "--memory-budget=24GB" in command_line.arguments(spec, specs.job_spec("search", **JOB_OTHERS))
    assert command_line.arguments(specs.run_spec("demo")) == [
        "search", "--calibration=demo", "--sequences=16", "--sequence-length=256", "--ratio=0.1", "demo"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("protect", "0,29", (0, 29)),
        ("protect", " 0 29 ", (0, 29)),
        ("protect", "0-3,29", (0, 1, 2, 3, 29)),
        ("protect", "none", ()),
        ("protect", "", ()),
        ("protect", "-1", (-1,)),
        ("until_perplexity", "+10%", 0.1),
        ("until_perplexity", "0.5", 0.5),
        ("memory_budget", "24GB", 24 * 10**9),
        ("memory_budget", "1.5GiB", 3 * 2**29),
        ("revision", "main", "main"),
    ],
)
def test_a_value_is_read_as_it_is_typed(name: str, text: str, value: object) -> None:
    assert spelling.read(SETTINGS[name], text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("protect", "a"), ("protect", "3-1"), ("protect", "0-99999999"), ("protect", "1-"), ("until_perplexity", "10"),
     ("memory_budget", "20"), ("memory_budget", "0GB")],
)  # fmt: skip
def test_what_is_typed_otherwise_is_refused_with_an_example(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"`{name}` takes .* such as .*; found '{text}'"):
        spelling.read(SETTINGS[name], text)


@pytest.mark.parametrize("size", [1, 999, 1000, 24_000_000_000, 10**15, 123_456_789])
def test_a_size_is_written_as_it_is_read(size: int) -> None:
    setting = SETTINGS["memory_budget"]
    assert spelling.read(setting, spelling.written(setting, size)) == size


def test_a_notebook_is_told_of_what_it_misspells() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'protected'"):
        specs.run_spec("x", protected=[1])  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="`remove`: found 0"):
        specs.run_spec("x", remove=0)
    with pytest.raises(OptionError, match="`method`: found 'metric9'"):
        specs.run_spec("x", method="metric9")
    assert specs.run_spec("x", method=Method.METRIC2, sequences=None).calibration.sequences == 128


def test_a_page_calls_the_check_that_replaces_an_export_as_its_label_does() -> None:
    assert in_fields("Replace it with `replace`.") == "Replace it with “Replace an earlier export”."
