"""Runs survive: the worker is killed at random moments, and resuming gives what an undisturbed run gives."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sleb
from sleb import execution, specs
from sleb.records import JobSpec, JobState
from sleb.runtime import job_folder, job_processes, run_folder
from tests.support import tiny

KILLS = 20


def execute(job_dir: Path, home: str) -> None:
    """In the forked child: what `sleb work` does."""
    import torch

    os.environ["SLEB_HOME"] = home
    torch.set_num_threads(1)
    from sleb import execution

    execution.work(job_dir)


@pytest.fixture(scope="module")
def forking() -> multiprocessing.context.ForkServerContext:
    """Processes forked after the imports: importing torch takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sleb.worker", "transformers.models.llama.modeling_llama"])
    return context


def test_a_worker_killed_at_random_moments_loses_no_finished_step(
    forking: multiprocessing.context.ForkServerContext, tmp_path: Path, home: Path
) -> None:
    model = tiny.save(tmp_path / "model", num_blocks=14)
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(20_000))
    spec = specs.run_spec(
        str(model),
        calibration=str(text),
        sequences=12,
        sequence_length=48,
        remove=6,
        dtype="float32",
        analysis=False,
    )
    undisturbed = execution.start(spec, JobSpec(kind="search"), tmp_path / "undisturbed")
    began = time.perf_counter()
    first = run_folder.create(spec, tmp_path / "timed")
    _start(forking, first, home).join()
    duration = time.perf_counter() - began
    draw = random.Random(20)
    kills = runs = 0
    interrupted_steps: set[int] = set()
    while kills < KILLS:
        runs += 1
        run = run_folder.create(spec, tmp_path / f"run-{runs}")
        while True:
            process = _start(forking, run, home)
            process.join(draw.uniform(0.0, 0.8 * duration))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
            before = (run.run_dir / "trace.jsonl").read_bytes() if (run.run_dir / "trace.jsonl").exists() else b""
            now = sleb.load(run.run_dir)
            whole = before[: before.rfind(b"\n") + 1]
            interrupted_steps.add(len(now.trace.steps) if now.trace else -1)
            if api_finished(now):
                break
            assert job_processes.state_of(now) in (JobState.INTERRUPTED, JobState.QUEUED)
            if kills >= KILLS or draw.random() < 0.4:
                sleb.resume(run.run_dir)
                break
        done = sleb.load(run.run_dir)
        assert (run.run_dir / "trace.jsonl").read_bytes().startswith(whole)
        assert done.removal_list == undisturbed.removal_list
        assert _evidence(done) == _evidence(undisturbed)
    assert len(interrupted_steps) >= 3, "the kills should land in different places"


def _start(forking, run: sleb.Run, home: Path):
    job = job_folder.create_job(run.run_dir, JobSpec(kind="search"))
    process = forking.Process(target=execute, args=(job.directory, str(home)))
    process.start()
    return process


def api_finished(run: sleb.Run) -> bool:
    return execution.is_finished(run)


def _evidence(run: sleb.Run) -> list[dict]:
    """Everything that was found, to the last bit, without the seconds."""
    assert run.trace is not None
    found = [run.trace.baseline.model_dump(exclude={"seconds"})]
    return found + [step.model_dump(exclude={"seconds"}) for step in run.trace.steps]


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
