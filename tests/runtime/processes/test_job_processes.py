"""Who executes a run is believed only as far as the lock and the clock bear it out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import sleb
from sleb import execution
from sleb.errors import ModelError, RunBusy
from sleb.records import JobState, JobStatus, Run, RunSpec, SearchJob
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import device_queue, job_processes
from tests.support.command import run as command


@pytest.fixture
def run() -> Run:
    return run_folder.create(RunSpec(model="some/model", ratio=0.1))


def with_status(run: Run, **status: object) -> Run:
    job = job_folder.create_job(run.run_dir, SearchJob())
    job_folder.write_status(job.directory, JobStatus.model_validate(status))
    return run_folder.load(run.run_id)


@pytest.mark.parametrize("away", [-10_000.0, 10_000.0, 1e18])
@pytest.mark.parametrize("status", [{"state": "queued"}, {"state": "running", "host": "another-host", "pid": 1}])
def test_a_heartbeat_far_from_now_does_not_block_a_run(run: Run, away: float, status: dict[str, object]) -> None:
    now = with_status(run, heartbeat=time.time() + away, **status)
    job_processes.require_idle(now)
    now = with_status(run, heartbeat=time.time() + 5, **status)  # a clock that is a little ahead
    with pytest.raises(RunBusy):
        job_processes.require_idle(now)


def test_stopping_ends_no_process_that_does_not_hold_the_run(run: Run) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(stranger.pid).create_time()
        named = {"pid": stranger.pid, "host": socket.gethostname(), "process_started": started}
        now = with_status(run, state="running", heartbeat=time.time(), **named)
        assert job_processes.active(now) is not None
        assert job_processes.stop(now).status.state is JobState.STOPPED
        assert stranger.poll() is None
        job_processes.require_idle(run_folder.load(run.run_id))
    finally:
        stranger.communicate(b"\n")


@pytest.mark.parametrize("name", ["{}/nothing", "{}/nothing.gguf", "somebody/no-such-model"])
def test_a_model_that_is_not_there_is_refused_without_waiting(name: str, home: Path, tmp_path: Path) -> None:
    model = name.format(tmp_path)
    with device_queue.holding(home, "cpu", lambda _: None):  # for as long as this test: who waits never comes to an end
        with pytest.raises(ModelError, match="There is no"):
            sleb.search(model, device="cpu", run_dir=tmp_path / "run")
        job = run_folder.load(tmp_path / "run").jobs[-1]
        assert job.status.state is JobState.FAILED
        assert "There is no" in job.status.message
        _, message = command("search", model, "--device", "cpu", "--run-dir", tmp_path / "other", code=2)
    assert "There is no" in message
    assert not (tmp_path / "other").exists()


def test_a_call_from_a_notebook_says_that_it_waits(home: Path, tiny_model: Path) -> None:
    code = f"import sleb; sleb.search({str(tiny_model)!r}, device='cpu')"
    with device_queue.holding(home, "cpu", lambda _: None):
        waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert waiting.stderr is not None
            assert waiting.stderr.readline() == "Waiting for cpu: 1 job before this one\n"
        finally:
            waiting.kill()
            waiting.communicate()
    assert execution.is_finished(sleb.runs()[0]) is False
