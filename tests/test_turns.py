"""Jobs wait for their device in the order of their tickets; whoever dies gives the turn back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sleb import api, jobs, store, turns
from sleb.records import JobState, RunSpec


def test_turns_come_in_the_order_of_arrival(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "POLL_SECONDS", 0.01)
    order: list[int] = []
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
    inside = threading.Event()
    leave = threading.Event()

    def work(number: int) -> None:
        with turns.turn(home, "cpu", heard[number].append):
            order.append(number)
            inside.set()
            if number == 0:
                leave.wait(10)

    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        limit = time.monotonic() + 10
        while len(turns.queue(home, "cpu")) <= number and time.monotonic() < limit:
            time.sleep(0.005)
    assert inside.wait(10)
    assert order == [0]
    assert turns.queue(home, "cpu") == [os.getpid()] * 3
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2]
    assert heard[0] == []
    assert heard[1] == [1]
    assert heard[2][0] == 2  # and perhaps 1 later, if it looked in between
    assert turns.queue(home, "cpu") == []


def test_devices_do_not_wait_for_each_other(home: Path) -> None:
    with turns.turn(home, "cuda:0", pytest.fail), turns.turn(home, "cuda:1", pytest.fail):
        assert turns.queue(home, "cuda:0") == turns.queue(home, "cuda") == [os.getpid()]


def test_a_dead_process_gives_its_turn_back(home: Path) -> None:
    code = f"from pathlib import Path\nfrom sleb import turns\nturns._draw(turns._folder(Path({str(home)!r}), 'cpu'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(next((home / "queue").iterdir()).glob("0*"))) == 1  # its ticket is still there
    with turns.turn(home, "cpu", pytest.fail):
        assert turns.queue(home, "cpu") == [os.getpid()]


def test_a_reused_process_id_is_somebody_else() -> None:
    me = psutil.Process()
    assert turns.alive(me.pid, me.create_time())
    assert not turns.alive(me.pid, me.create_time() - 100)


def test_where_tickets_cannot_be_written_nobody_waits(home: Path) -> None:
    (home / "queue").write_text("a file where the folder should be")
    with turns.turn(home, "cpu", pytest.fail):
        pass


@pytest.mark.parametrize(("visible", "expected"), [("", "cpu"), ("-1", "cpu")])
def test_auto_without_a_gpu_is_the_cpu(visible: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(turns.platform, "system", lambda: "Linux")
    assert turns.device_name("auto") == expected
    assert turns.device_name("cuda") == "cuda:0"


def test_a_job_waits_without_torch_and_can_be_stopped_while_it_does(tiny_model: Path, text_file: Path) -> None:
    spec = api.run_spec(str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=32, remove=1)
    run = store.create(spec)
    with turns.turn(store.home(), "cpu", pytest.fail):
        process = jobs.start(store.create_job(run.run_dir, api.job_spec("search", "cpu")))
        assert jobs.active(store.load(run.run_id)) is not None  # from the moment it was started
        limit = time.monotonic() + 30
        while not (now := store.load(run.run_id)).jobs[0].status.progress and time.monotonic() < limit:
            time.sleep(0.05)
        job = now.jobs[0]
        assert job.status.state is JobState.QUEUED
        assert job.status.progress is not None
        assert (job.status.progress.phase, job.status.progress.message) == ("Waiting for cpu", "1 job before this one")
        maps = Path(f"/proc/{process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        assert jobs.stop(now).status.state is JobState.STOPPED
        process.wait(10)
        assert turns.queue(store.home(), "cpu") == [os.getpid()]
    assert jobs.active(store.load(run.run_id)) is None


def test_a_queued_job_goes_on_when_the_device_is_free(tiny_model: Path, text_file: Path) -> None:
    spec = api.run_spec(str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=32, remove=1)
    runs = [store.create(spec) for _ in range(2)]
    with turns.turn(store.home(), "cpu", pytest.fail):
        processes = []
        for number, run in enumerate(runs):
            processes.append(jobs.start(store.create_job(run.run_dir, api.job_spec("search", "cpu"))))
            limit = time.monotonic() + 30
            while len(turns.queue(store.home(), "cpu")) < number + 2 and time.monotonic() < limit:
                time.sleep(0.05)
    for process in processes:
        assert process.wait(90) == 0
    first, second = (store.load(run.run_id).jobs[0].status for run in runs)
    assert first.state is second.state is JobState.FINISHED
    assert first.heartbeat is not None
    assert second.started is not None
    assert first.heartbeat <= second.started  # one at a time


def test_a_started_job_whose_process_never_came_is_not_active_for_ever(home: Path) -> None:
    run = store.create(RunSpec(model="demo"))
    job = store.create_job(run.run_dir, api.job_spec("search"))
    assert jobs.active(store.load(run.run_id)) is None  # created, not started: somebody else will
    store.write_status(job.directory, job.status.model_copy(update={"heartbeat": time.time()}))
    assert jobs.active(store.load(run.run_id)) is not None
    store.write_status(job.directory, job.status.model_copy(update={"heartbeat": time.time() - 100}))
    assert jobs.active(store.load(run.run_id)) is None
