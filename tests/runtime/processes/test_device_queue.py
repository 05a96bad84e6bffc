"""Jobs wait in the device queue in the order of arrival; a process that dies leaves it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sleb import specs
from sleb.records import JobState, RunSpec
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import device_queue, job_processes


def test_turns_come_in_the_order_of_arrival(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_queue, "POLL_SECONDS", 0.01)
    order: list[int] = []
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
    inside = threading.Event()
    leave = threading.Event()

    def work(number: int) -> None:
        with device_queue.holding(home, "cpu", heard[number].append):
            order.append(number)
            inside.set()
            if number == 0:
                leave.wait(120)

    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        limit = time.monotonic() + 120
        while len(device_queue.queue(home, "cpu")) <= number and time.monotonic() < limit:
            time.sleep(0.005)
    assert inside.wait(120)
    assert order == [0]
    assert device_queue.queue(home, "cpu") == [os.getpid()] * 3
    leave.set()
    for thread in threads:
        thread.join(120)
    assert order == [0, 1, 2]
    assert heard[0] == []
    assert heard[1] == [1]
    assert heard[2][0] == 2  # and perhaps 1 later, if it looked in between
    assert device_queue.queue(home, "cpu") == []


def test_devices_do_not_wait_for_each_other(home: Path) -> None:
    with device_queue.holding(home, "cuda:0", pytest.fail), device_queue.holding(home, "cuda:1", pytest.fail):
        assert device_queue.queue(home, "cuda:0") == device_queue.queue(home, "cuda") == [os.getpid()]


def test_a_dead_process_gives_its_turn_back(home: Path) -> None:
    code = (
        "from pathlib import Path\nfrom sleb.runtime.processes import device_queue\n"
        f"device_queue._enter(device_queue._folder(Path({str(home)!r}), 'cpu'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(next((home / "queue").iterdir()).glob("0*"))) == 1  # its entry is still there
    with device_queue.holding(home, "cpu", pytest.fail):
        assert device_queue.queue(home, "cpu") == [os.getpid()]


def test_a_reused_process_id_is_somebody_else() -> None:
    me = psutil.Process()
    assert device_queue.alive(me.pid, me.create_time())
    assert not device_queue.alive(me.pid, me.create_time() - 100)


def test_where_tickets_cannot_be_written_nobody_waits(home: Path) -> None:
    (home / "queue").write_text("a file where the folder should be")
    with device_queue.holding(home, "cpu", pytest.fail):
        pass


@pytest.mark.parametrize(("visible", "expected"), [("", "cpu"), ("-1", "cpu")])
def test_auto_without_a_gpu_is_the_cpu(visible: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(device_queue.platform, "system", lambda: "Linux")
    assert device_queue.device_name("auto") == expected
    assert device_queue.device_name("cuda") == "cuda:0"


def test_a_job_waits_without_torch_and_can_be_stopped_while_it_does(tiny_model: Path, text_file: Path) -> None:
    spec = specs.run_spec(str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=32, remove=1)
    run = run_folder.create(spec)
    with device_queue.holding(run_folder.home(), "cpu", pytest.fail):
        process = job_processes.start(job_folder.create_job(run.run_dir, specs.job_spec("search", "cpu")))
        assert job_processes.active(run_folder.load(run.run_id)) is not None  # from the moment it was started
        limit = time.monotonic() + 120
        while not (now := run_folder.load(run.run_id)).jobs[0].status.progress and time.monotonic() < limit:
            time.sleep(0.05)
        job = now.jobs[0]
        assert job.status.state is JobState.QUEUED
        assert job.status.progress is not None
        assert (job.status.progress.phase, job.status.progress.message) == ("Waiting for cpu", "1 job before this one")
        maps = Path(f"/proc/{process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        assert job_processes.stop(now).status.state is JobState.STOPPED
        process.wait(120)
        assert device_queue.queue(run_folder.home(), "cpu") == [os.getpid()]
    assert job_processes.active(run_folder.load(run.run_id)) is None


def test_a_queued_job_goes_on_when_the_device_is_free(tiny_model: Path, text_file: Path) -> None:
    spec = specs.run_spec(str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=32, remove=1)
    runs = [run_folder.create(spec) for _ in range(2)]
    with device_queue.holding(run_folder.home(), "cpu", pytest.fail):
        processes = []
        for number, run in enumerate(runs):
            processes.append(job_processes.start(job_folder.create_job(run.run_dir, specs.job_spec("search", "cpu"))))
            limit = time.monotonic() + 120
            while len(device_queue.queue(run_folder.home(), "cpu")) < number + 2 and time.monotonic() < limit:
                time.sleep(0.05)
    for process in processes:
        assert process.wait(400) == 0
    first, second = (run_folder.load(run.run_id).jobs[0].status for run in runs)
    assert first.state is second.state is JobState.FINISHED
    assert first.heartbeat is not None
    assert second.started is not None
    assert first.heartbeat <= second.started  # one at a time


def test_a_started_job_whose_process_never_came_is_not_active_for_ever(home: Path) -> None:
    run = run_folder.create(RunSpec(model="demo"))
    job = job_folder.create_job(run.run_dir, specs.job_spec("search"))
    assert job_processes.active(run_folder.load(run.run_id)) is None  # created, not started: somebody else will
    job_folder.write_status(job.directory, job.status.model_copy(update={"heartbeat": time.time()}))
    assert job_processes.active(run_folder.load(run.run_id)) is not None
    job_folder.write_status(job.directory, job.status.model_copy(update={"heartbeat": time.time() - 100}))
    assert job_processes.active(run_folder.load(run.run_id)) is None
