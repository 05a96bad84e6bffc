"""A run folder from elsewhere in the dashboard: what it names is shown as text, and read once a user has agreed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app import actions, data
from sleb.errors import UnconfirmedNames
from sleb.evaluation import request
from sleb.records import EvaluateSpec, JobSpec, JobState, JobStatus, Run
from sleb.runtime import job_folder, origin, run_folder
from tests.support.dashboard import open_page, press, words
from tests.support.runs import judged
from tests.support.runs.stores import write_run

MODEL = "<img src=x onerror=alert(1)>[x](javascript:alert(1))"
SHOWN = f"{MODEL} at revision 0123abc"
"""With the revision that was found, which is the one that is loaded again."""
READ, LEAVE = "Read them", "Leave it"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the processes that would have been started, once everything was checked."""
    read: list[list[str]] = []

    def note(command: list[str], **options: Any) -> None:
        read.append(command[command.index("work") :])

    monkeypatch.setattr(subprocess, "Popen", note)
    return read


def foreign(run: Run) -> Run:
    """As if it had been written on another machine: nothing in it is signed here."""
    for signature in run.run_dir.rglob(origin.SIGNATURE):
        signature.unlink()
    return run


def stopped(home: Path, **settings: Any) -> Run:
    return foreign(write_run(home / "runs" / "one", 12, 4, model=MODEL, done=2, state=JobState.STOPPED, **settings))


def labels(app: AppTest) -> list[str]:
    return [each.label for each in app.button]


def code(app: AppTest) -> list[str]:
    return [each.value for each in app.code]


def test_resume_shows_what_is_read_and_starts_once_that_is_confirmed(home: Path, executed: list[list[str]]) -> None:
    run = stopped(home)
    app = open_page("runs", run="one")
    press(app, "Resume")
    assert not app.exception
    assert executed == []
    assert SHOWN in code(app)
    assert MODEL not in words(app)  # text only
    app.run()  # other drawings of the page keep the question
    press(app, LEAVE)
    assert not {READ, LEAVE} & set(labels(app))
    assert executed == []
    assert origin.unconfirmed(run.run_dir) == (SHOWN,)
    press(app, "Resume")
    press(app, READ)
    assert [command[-1] for command in executed] == [str(run.run_dir / "jobs" / "2-search")]
    assert READ not in labels(app)
    assert origin.unconfirmed(run.run_dir) == ()


def test_an_evaluation_and_an_export_ask_as_well(home: Path, executed: list[list[str]], tmp_path: Path) -> None:
    foreign(write_run(home / "runs" / "one", 12, 3, model=MODEL))
    app = open_page("evaluate", run="one")
    press(app, "Evaluate")
    assert SHOWN in code(app)
    assert executed == []
    press(app, READ)
    assert len(executed) == 1
    foreign(write_run(home / "runs" / "two", 12, 3, model=MODEL))
    app = open_page("export", run="two")
    app.text_input[0].set_value(f"{tmp_path}/new").run()
    press(app, "Write the smaller model")
    assert SHOWN in code(app)
    press(app, READ)
    assert len(executed) == 2
    assert executed[1][1:3] == ["--out", f"{tmp_path}/new"]


def test_a_run_of_this_machine_and_a_sample_ask_nothing(home: Path, executed: list[list[str]]) -> None:
    write_run(home / "runs" / "one", 12, 3, model=MODEL)
    press(open_page("evaluate", run="one"), "Evaluate")
    assert len(executed) == 1
    press(open_page("evaluate", run=data.SAMPLE), "Evaluate")
    assert len(executed) == 2


def test_a_text_that_only_the_folder_knows_is_shown_with_its_whole_path(home: Path, executed: list[list[str]]) -> None:
    run = write_run(home / "runs" / "one", 12, 3, model="demo")
    spec = EvaluateSpec(lists=judged.lists_of(run)[:1], texts=("/home/me/secret/c4", "/home/me/.ssh/id_rsa"))
    job_folder.create_job(run.run_dir, request.job_of(spec))
    foreign(run)
    origin.confirm(run.run_dir)
    app = open_page("evaluate", run="one")
    texts = app.multiselect(key="evaluate-texts-one")
    assert "/home/me/secret/c4" not in texts.options
    texts.set_value(["c4"]).run()
    press(app, "Evaluate")
    assert len(executed) == 1  # c4 is c4, whatever a folder calls so
    assert run_folder.load("one").jobs[-1].spec.ask.texts == ("c4",)  # type: ignore[union-attr]
    job_folder.write_status(run_folder.load("one").jobs[-1].directory, JobStatus(state=JobState.FINISHED))
    app = open_page("evaluate", run="one")
    app.multiselect(key="evaluate-texts-one").set_value(["id_rsa"]).run()
    press(app, "Evaluate")
    assert len(executed) == 1
    assert any("/home/me/.ssh/id_rsa" in each for each in code(app))


def test_the_folder_s_own_job_writes_nowhere_and_brings_no_task_files(
    home: Path, executed: list[list[str]], tmp_path: Path
) -> None:
    run = write_run(home / "runs" / "one", 12, 3, model="demo")
    spec = EvaluateSpec(lists=judged.lists_of(run)[:1], texts=(), tasks=("evil",), task_folder=str(tmp_path))
    job = job_folder.create_job(run.run_dir, request.job_of(spec, trust_remote_code=True))
    job_folder.write_status(job.directory, JobStatus(state=JobState.STOPPED))
    app = open_page("runs", run="one")
    press(app, "Resume")
    assert executed == []
    assert "sleb resume one --task-folder" in words(app).replace("\\", "").replace("\N{WORD JOINER}", "")
    assert [each.name for each in run_folder.load("one").jobs] == ["1-search", "2-evaluate"]


def test_names_that_change_after_they_were_shown_are_asked_again(home: Path, executed: list[list[str]]) -> None:
    run = stopped(home)
    with pytest.raises(UnconfirmedNames):
        actions.go_on(data.load("one"), JobSpec(kind="search"), again=True, seen=("another/model",))
    assert origin.unconfirmed(run.run_dir) == (SHOWN,)
    assert executed == []


def test_a_stranger_s_thousand_processes_are_not_started(home: Path, executed: list[list[str]]) -> None:
    run = write_run(home / "runs" / "one", 12, 4, model="demo", done=2, state=JobState.STOPPED)
    job = job_folder.create_job(run.run_dir, JobSpec(kind="search", processes=4096))
    job_folder.write_status(job.directory, JobStatus(state=JobState.STOPPED))
    foreign(run)
    press(open_page("runs", run="one"), "Resume")
    assert len(executed) == 1
    assert run_folder.load("one").jobs[-1].spec.processes == 1
