"""Recorded samples on the command line and in a notebook: read by name like any run, and never written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sleb
from app import data
from sleb import specs
from sleb.cli.main import app
from sleb.errors import RunError, SlebError
from sleb.runtime import job_folder, run_folder
from sleb.runtime.dashboard_files import SAMPLES
from sleb.runtime.processes import job_processes

NAME = data.SAMPLE


def command(*words: object, code: int = 0) -> tuple[str, str]:
    """What it says on stdout, and on stderr or as its sentence."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, SlebError):
        assert result.exception.exit_code == code, result.exception
        return result.stdout, str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


@pytest.fixture(autouse=True)
def unchanged() -> object:
    """Whatever a test does, the samples are what they were; a lock may be left by another."""

    def state() -> list[tuple[str, int, int]]:
        paths = (path for path in sorted(SAMPLES.rglob("*")) if path.is_file() and path.name != ".lock")
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    before = state()
    yield
    assert state() == before


def test_a_sample_is_read_by_its_name() -> None:
    shown = json.loads(command("show", NAME, "--json")[0])
    assert shown["run_dir"] == str(SAMPLES / NAME)
    assert shown["findings"]
    out, _ = command("show", NAME)
    assert f"Removal list: {shown['removal_list']}" in out
    assert f"sleb export {NAME} " in out  # the hints name it as it can be named
    assert json.loads(command("export", NAME, "--format", "list", "--steps", 2)[0]) == shown["removal_list"][:2]
    assert sleb.load(NAME).removal_list == tuple(shown["removal_list"])
    assert sleb.findings_of(NAME)


def test_a_report_of_a_sample_is_written(tmp_path: Path) -> None:
    command("report", NAME, "--out", tmp_path / "report.html")
    assert "SmolLM2-135M" in (tmp_path / "report.html").read_text()


def test_every_sample_of_the_dashboard_is_found_and_none_is_listed() -> None:
    listed = [each.run_id for each in data.outlines() if not isinstance(each, RunError)]
    assert len(listed) == 5
    for name in listed:
        assert run_folder.load(name).run_dir == data.folder_of(name) == SAMPLES / name
        assert run_folder.is_sample(SAMPLES / name)
        assert data.is_sample(run_folder.load(name))
    assert json.loads(command("runs", "--json")[0]) == {"runs": []}
    assert "There are none yet" in command("show", "nothing", code=2)[1]


@pytest.mark.parametrize(
    "words",
    [
        ["resume", "RUN"],
        ["resume", "RUN", "--prepare"],
        ["delete", "RUN"],
        ["delete", "RUN", "--yes"],
        ["export", "RUN", "--format", "hf", "--out", "OUT"],
        ["export", "RUN", "--format", "gguf", "--out", "OUT.gguf"],
        ["evaluate", "RUN"],
        ["benchmark", "RUN"],
        ["quantize", "RUN"],
        ["heal", "RUN"],
        ["generate", "RUN", "--prompt", "The"],
    ],
    ids=" ".join,
)
def test_what_would_write_into_a_sample_is_refused_in_one_sentence(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(SAMPLES / NAME)
    for run in (NAME, SAMPLES / NAME, tmp_path / "link"):
        given = [each.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for each in words]
        out, sentence = command(*given, code=2)
        assert out == ""
        assert sentence == (
            f"{NAME} is a recorded sample, which is only read. Copy it among your runs, and give the same command "
            f"again: sleb import {NAME}"
        )
        assert not (tmp_path / "out").exists()


def test_what_only_looks_for_work_in_a_sample_finds_none() -> None:
    assert "nothing to stop" in command("stop", NAME, code=2)[1]
    assert "no job waiting" in command("work", SAMPLES / NAME, code=2)[1]


def test_a_notebook_is_refused_as_well(tmp_path: Path) -> None:
    run = sleb.load(NAME)
    for given in (NAME, run):
        for refused in (sleb.resume, sleb.evaluate, lambda each: sleb.export_model(each, tmp_path / "out")):
            with pytest.raises(RunError, match="is a recorded sample"):
                refused(given)
    with pytest.raises(RunError, match="is a recorded sample"):
        job_processes.delete(run.run_dir)


def test_a_sample_is_worked_with_once_it_is_imported(home: Path) -> None:
    assert command("import", NAME)[0].strip() == NAME
    own = home / "runs" / NAME
    assert run_folder.load(NAME).run_dir == own  # the copy goes before the sample, as in the dashboard
    assert json.loads(command("runs", "--json")[0])["runs"][0]["run_id"] == NAME
    assert "already exists. Go on with that copy, or delete it first" in command("import", NAME, code=2)[1]
    job = job_processes.next_job(run_folder.load(NAME), specs.job_spec("search"))
    assert job.directory.is_relative_to(own)
    job_folder.withdraw_job(job)
    command("delete", NAME, "--yes")
    assert not own.exists()
    assert run_folder.load(NAME).run_dir == SAMPLES / NAME


def test_a_name_means_the_same_to_every_command(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # no run
    assert json.loads(command("show", f"{NAME}/", "--json")[0])["run_id"] == NAME
    assert command("import", f"{NAME}/")[0].strip() == NAME
    assert "found an empty one" in command("import", "", code=2)[1]


def test_a_link_to_a_sample_among_the_runs_is_deleted_and_the_sample_stays(home: Path) -> None:
    (home / "runs").mkdir()
    (home / "runs" / "link").symlink_to(SAMPLES / NAME)
    command("delete", "link", "--yes")
    assert not (home / "runs" / "link").is_symlink()
    assert json.loads(command("runs", "--json")[0]) == {"runs": []}
