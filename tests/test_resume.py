"""Runs that are stopped keep what they finished, and say how to go on; for kills see `runtime/test_kills.py`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sleb
from sleb.records import JobState
from tests.support import tiny


@pytest.fixture
def slow_run(tmp_path: Path) -> tuple[Path, list[str]]:
    """A search that takes long enough to be stopped, and its command line."""
    model = tiny.save(tmp_path / "model", num_blocks=16)
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(200_000))
    command = [
        sys.executable,
        "-m",
        "sleb",
        "search",
        str(model),
        "--calibration",
        str(text),
        "--sequences",
        "64",
        "--search",
        "full",
    ]
    command += [
        "--sequence-length",
        "128",
        "--remove",
        "12",
        "--no-analysis",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    return tmp_path / "run", command


def _wait_for_a_step(run_dir: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        if (run_dir / "trace.jsonl").exists() and b'"step"' in (run_dir / "trace.jsonl").read_bytes():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step within minutes")


def test_ctrl_c_stops_cleanly_and_says_how_to_resume(slow_run: tuple[Path, list[str]]) -> None:
    run_dir, command = slow_run
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_a_step(run_dir, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 130
    assert f"sleb resume {run_dir}" in errors
    assert "Traceback" not in errors
    run = sleb.load(run_dir)
    assert run.jobs[-1].status.state is JobState.STOPPED
    assert 1 <= len(run.trace.steps) < 12  # type: ignore[union-attr]


def test_stop_from_another_process(slow_run: tuple[Path, list[str]]) -> None:
    run_dir, command = slow_run
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_a_step(run_dir, process)
    busy = subprocess.run(
        [sys.executable, "-m", "sleb", "resume", str(run_dir)], capture_output=True, text=True, timeout=400
    )
    assert busy.returncode == 2
    assert f"process {process.pid}" in busy.stderr
    stopped = subprocess.run(
        [sys.executable, "-m", "sleb", "stop", str(run_dir)], capture_output=True, text=True, timeout=400
    )
    assert stopped.returncode == 0, stopped.stderr
    process.communicate(timeout=400)
    assert process.returncode == 130
    assert sleb.load(run_dir).jobs[-1].status.state is JobState.STOPPED
    again = subprocess.run(
        [sys.executable, "-m", "sleb", "stop", str(run_dir)], capture_output=True, text=True, timeout=400
    )
    assert again.returncode == 2
    assert "nothing to stop" in again.stderr
