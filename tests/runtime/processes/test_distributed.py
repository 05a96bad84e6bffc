"""Several processes give what one gives, and losing one of them loses nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import sleb
from sleb import execution, specs
from sleb.errors import OptionError, RankLost
from sleb.records import Job, JobState, RunSpec
from sleb.runtime import run_folder
from sleb.runtime.processes import distributed, job_processes
from sleb.runtime.processes.distributed import Group, Rank
from tests.support import tiny
from tests.support.command import SLEB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", num_blocks=10)


def spec_of(model: Path, text: Path, **options: object) -> RunSpec:
    settings = {"sequences": 9, "sequence_length": 32, "held_out": 3, "remove": 3, "dtype": "float32"}
    return specs.run_spec(str(model), calibration=str(text), analysis=False, **(settings | options))


def prepared(spec: RunSpec, processes: int) -> Job:
    return job_processes.next_job(run_folder.create(spec), specs.job_spec("search", processes=processes))


def sums(run: sleb.Run) -> list[float | None]:
    return [candidate.nll_sum for step in run.trace.steps for candidate in step.candidates]


def test_every_sequence_belongs_to_one_rank() -> None:
    for size, count in ((1, 5), (2, 5), (3, 9), (4, 2)):
        parts = [list(range(count))[Group(Rank(rank, size)).part(count)] for rank in range(size)]
        assert sorted(index for part in parts for index in part) == list(range(count))


def test_one_process_alone_talks_to_nobody() -> None:
    group, result = Group(), np.arange(3.0)
    assert group.sum(result) is result
    assert group.share(lambda: "text") == "text"
    assert group.first


def test_two_processes_find_what_one_finds(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with a `sleb.py` of its own, which is not the program."""
    (tmp_path / "sleb.py").write_text("raise SystemExit('another program')")
    monkeypatch.chdir(tmp_path)
    spec = spec_of(model, text_file)
    alone = execution.start(spec, specs.job_spec("search"))
    together = execution.start(spec, specs.job_spec("search", processes=2))
    assert together.trace.removal_list == alone.trace.removal_list
    np.testing.assert_allclose(sums(together), sums(alone), rtol=1e-6)
    assert together.trace.block_evaluations == alone.trace.block_evaluations
    assert together.jobs[-1].attempt.processes == 2
    assert together.jobs[-1].status.state is JobState.FINISHED


def test_torchrun_starts_the_same_job(model: Path, text_file: Path) -> None:
    """With Metric1, whose sums are not split by `score`."""
    spec = spec_of(model, text_file, method="metric1")
    alone = execution.start(spec, specs.job_spec("search"))
    job = prepared(spec, processes=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "--no-python", SLEB, "work", str(job.directory)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    run = sleb.load(job.directory.parent.parent)
    assert run.trace.removal_list == alone.trace.removal_list
    np.testing.assert_allclose(
        [candidate.score for step in run.trace.steps for candidate in step.candidates],
        [candidate.score for step in alone.trace.steps for candidate in step.candidates],
        rtol=1e-6,
    )
    assert run.jobs[-1].attempt.processes == 2


def started(job: Job, steps: int) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A job of two processes that has finished so many steps, and its second process."""
    first = subprocess.Popen([sys.executable, "-m", "sleb", "work", str(job.directory)], stderr=subprocess.PIPE)
    trace = job.directory.parent.parent / "trace.jsonl"
    limit = time.monotonic() + 400
    while not (trace.exists() and trace.read_bytes().count(b"\n") > steps):
        assert first.poll() is None, first.stderr and first.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)
    (second,) = psutil.Process(first.pid).children()
    return first, second


def test_a_process_that_dies_ends_the_job_with_a_sentence_and_the_run_resumes(model: Path, text_file: Path) -> None:
    spec = spec_of(model, text_file, sequences=120, remove=7, search="full")
    job = prepared(spec, processes=2)
    first, second = started(job, steps=1)
    second.kill()
    _, output = first.communicate(timeout=400)
    assert first.returncode == 1
    assert b"Process 2 of 2 was lost" in output
    assert b"Traceback" not in output
    run = sleb.load(job.directory.parent.parent)
    assert run.jobs[-1].status.state is JobState.FAILED
    assert "Process 2 of 2 was lost" in run.jobs[-1].status.message
    assert 1 <= len(run.trace.steps) < 7
    resumed = sleb.resume(run)
    assert resumed.trace.removal_list == execution.start(spec, specs.job_spec("search")).trace.removal_list


def test_stopping_the_first_process_stops_all(model: Path, text_file: Path) -> None:
    job = prepared(spec_of(model, text_file, sequences=120, remove=7, search="full"), processes=2)
    first, second = started(job, steps=1)
    job_processes.stop(sleb.load(job.directory.parent.parent))
    first.communicate(timeout=400)
    assert first.returncode == 130
    assert sleb.load(job.directory.parent.parent).jobs[-1].status.state is JobState.STOPPED
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE


def test_the_others_end_when_the_first_is_killed(model: Path, text_file: Path) -> None:
    job = prepared(spec_of(model, text_file, sequences=120, remove=7, search="full"), processes=2)
    first, second = started(job, steps=1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs([second], timeout=400)
    assert not alive


def test_a_process_that_cannot_start_is_not_waited_for(
    model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(spec_of(model, text_file), processes=2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankLost, match="Process 2 of 2 ended as it started"):
        execution.work(job.directory)


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_nonsense_in_the_environment_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError):
        distributed.rank_here()


def test_one_device_cannot_be_shared_by_name(model: Path, text_file: Path) -> None:
    with pytest.raises(OptionError, match="names one device"):
        specs.job_spec("search", device="cuda:1", processes=2)
