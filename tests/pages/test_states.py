"""Runs in every state, on every page and in every command that reads them: the word of the job whose state is shown."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.wording import in_fields, plain
from sleb import api
from sleb.records import JOB_SPEC, EvaluateSpec, HealSpec, JobKind, JobState, JobStatus, RunSpec
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import job_processes
from tests.support.command import run as sleb_run
from tests.support.dashboard import open_page, words
from tests.support.runs.stores import write_run

PAGES = ("runs", "similarity", "steps", "evaluate", "export")
DIVERGED = "The training diverged at update 3; lower --learning-rate."
GONE = "Its process has ended; resume it."
NEVER = "No process has taken it up."
ASKS: dict[str, Any] = {"heal": HealSpec(lists=((1, 2),)), "evaluate": EvaluateSpec(lists=((1, 2),), texts=("c4",))}


def given(folder: Path) -> None:
    """A run that judges a list which was given, without a job."""
    run_folder.create(RunSpec(model="org/model", kind="evaluate", given=(1, 2), held_out=0, analysis=False), folder)


def search(done: int, state: JobState = JobState.FINISHED, message: str = "") -> Callable[[Path], None]:
    """A search of four blocks, so many removed."""

    def write(folder: Path) -> None:
        write_run(folder, state=state, message=message, done=done, analysis=state is JobState.FINISHED)

    return write


def unopened(folder: Path) -> None:
    """A search that failed before it had loaded its model."""
    search(1, JobState.FAILED, "There is no model org/model.")(folder)
    for name in ("stack.json", "trace.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "scores")


def without_jobs(folder: Path) -> None:
    search(0, JobState.FAILED)(folder)
    unopened_files = [folder / "stack.json", folder / "trace.jsonl"]
    for each in unopened_files:
        each.unlink(missing_ok=True)
    shutil.rmtree(folder / "jobs")


def job(kind: JobKind, state: JobState, message: str = "", *, alive: bool = False, pid: bool = True) -> Any:
    """One more job: executed by this process if `alive`, else by one that is gone, or by none."""

    def add(folder: Path) -> None:
        own = psutil.Process()
        made = job_folder.create_job(folder, JOB_SPEC.validate_python({"kind": kind, "ask": ASKS.get(kind)}))
        status = JobStatus(
            state=state, message=message, started=time.time(), heartbeat=time.time() - (0 if alive else 3600),
            host=socket.gethostname() if pid else None, pid=(os.getpid() if alive else 2**22 - 3) if pid else None,
            process_started=own.create_time() if alive else 1.0,
        )  # fmt: skip
        job_folder.write_status(made.directory, status)

    return add


STATES: dict[str, tuple[list[Callable[[Path], None]], JobState, str]] = {
    "a failed first job": ([given, job("heal", JobState.FAILED, DIVERGED)], JobState.FAILED, DIVERGED),
    "a killed first job": ([given, job("heal", JobState.RUNNING)], JobState.INTERRUPTED, GONE),
    "a stopped first job": (
        [given, job("heal", JobState.STOPPED, "Stopped on request.")], JobState.STOPPED, "Stopped on request.",
    ),
    "a first job that never began": ([given, job("heal", JobState.QUEUED, pid=False)], JobState.QUEUED, NEVER),
    "no job": ([given], JobState.QUEUED, "This run has not been started."),
    "the second failed": (
        [given, job("evaluate", JobState.FINISHED), job("heal", JobState.FAILED, DIVERGED)], JobState.FAILED, DIVERGED,
    ),
    "the first failed, the second runs": (
        [given, job("heal", JobState.FAILED, DIVERGED), job("evaluate", JobState.RUNNING, alive=True)],
        JobState.RUNNING, "",
    ),
    "finished without findings": ([given, job("evaluate", JobState.FINISHED)], JobState.FINISHED, ""),
    "a search that was not opened": ([unopened], JobState.FAILED, "There is no model org/model."),
    "a search without jobs": ([without_jobs], JobState.QUEUED, "This run has not been started."),
    "a killed search": ([search(2, JobState.RUNNING)], JobState.INTERRUPTED, GONE),
    "a search that failed without a word": ([search(2, JobState.FAILED)], JobState.FAILED, "It ended without a word."),
    "a search that waits": ([search(0, JobState.STOPPED, "x"), job("search", JobState.QUEUED, pid=False)],
                            JobState.QUEUED, NEVER),
    "a killed evaluation beside a search": ([search(4), job("evaluate", JobState.RUNNING)], JobState.FINISHED, ""),
    "a failed export beside a stopped search": (
        [search(2, JobState.STOPPED, "Stopped on request."), job("export", JobState.FAILED, "The disk is full.")],
        JobState.STOPPED, "Stopped on request.",
    ),
}  # fmt: skip


def written(runs: Path, name: str) -> Path:
    folder = runs / name.replace(" ", "-").replace(",", "")
    for each in STATES[name][0]:
        each(folder)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_every_state(home: Path, page: str) -> None:
    folders = {name: written(home / "runs", name) for name in STATES}
    app = open_page(page)
    for name, (_, state, word) in STATES.items():
        folder = folders[name]
        assert job_processes.state_of(run_folder.load(folder)) is state
        app.query_params["run"] = folder.name
        app.session_state["chosen_run"] = folder.name
        app.run()
        assert not app.exception, (name, app.exception[0].message)
        if page == "runs":
            assert {each.name for each in folders.values()} < set(app.dataframe[-1].value["Run"])
            assert plain(in_fields(word)) in words(app), name


@pytest.mark.parametrize("name", STATES)
def test_every_command_shows_every_state(home: Path, tmp_path: Path, name: str) -> None:
    folder, (_, state, word) = written(home / "runs", name), STATES[name]
    out, _ = sleb_run("show", folder)
    told = " ".join(out.split())
    assert f"run {folder.name} ({state.value})" in told
    assert word in told or name in ("no job", "a search without jobs")
    sleb_run("show", folder, "--json")
    out, err = sleb_run("runs")
    assert state.value in out
    assert err == ""
    trace = api.load(folder).trace
    has_steps = trace is not None and len(trace.steps) > 0
    for command in (
        ("report", folder, "--out", tmp_path / "report.html"), ("export", folder, "--format", "list"),
        ("export", folder, "--format", "json"),
    ):  # fmt: skip
        _, err = sleb_run(*command, code=0 if has_steps else 2)
        assert "Traceback" not in err


def test_a_job_beside_the_runs_own_is_told_of_as_well(home: Path) -> None:
    folder = written(home / "runs", "a killed evaluation beside a search")
    out, _ = sleb_run("show", folder)
    assert f"2-evaluate interrupted: {GONE}" in " ".join(out.split())
    assert plain(GONE) in words(open_page("evaluate", run=folder.name))


@pytest.mark.parametrize("name", ["a failed first job", "a first job that never began", "no job"])
def test_what_can_be_gone_on_with_is_offered(home: Path, name: str) -> None:
    folder = written(home / "runs", name)
    offered = "Resume" in [button.label for button in open_page("runs", run=folder.name).button]
    assert offered is (name != "no job")  # whose question nobody knows
    assert (job_processes.unanswered(run_folder.load(folder)) is not None) is offered


def test_advice_is_not_to_go_on_with_what_is_finished(home: Path) -> None:
    folder = written(home / "runs", "finished without findings")
    for where in (folder, folder / "jobs" / "1-evaluate"):
        _, err = sleb_run("work", where, code=2)
        assert "see what it found with: sleb show" in err
        assert "resume" not in err
