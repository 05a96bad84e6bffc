"""Run folders: what was written is read back, what was torn is ignored, what is foreign is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sleb.errors import RunBusy, RunError, StorageError
from sleb.records import Baseline, JobState, JobStatus, Run, RunSpec, SearchJob
from sleb.runtime import files, job_folder, origin, run_folder, trace_file
from sleb.runtime.processes import job_processes
from tests.support.builders import make_stack, make_step, measured
from tests.support.command import run as command
from tests.support.paths import ROOT

FIRST = Baseline(
    calibration=measured(3.0),
    held_out=measured(3.1, 250),
    block_evaluations=60,
    head_evaluations=2,
    seconds=1.0,
)


@pytest.fixture
def run() -> Run:
    made = run_folder.create(RunSpec(model="some/Model.Name", ratio=0.1))
    origin.write_stack(made.run_dir, make_stack())
    return run_folder.load(made.run_id)


def test_a_run_is_read_back_as_it_was_written(run: Run) -> None:
    assert run_folder.load(run.run_id) == run_folder.load(run.run_dir) == run
    assert run.spec.model == "some/Model.Name"
    assert "model-name" in run.run_id
    trace_file.append_baseline(run.run_dir, FIRST)
    steps = [make_step(1, (3,)), make_step(2, (3, 5), margin=None, margin_standard_error=None)]
    for step in steps:
        trace_file.append_step(run.run_dir, step)
    trace_file.append_finished(run.run_dir, "done")
    trace = run_folder.load(run.run_id).trace
    assert trace is not None
    assert trace.baseline == FIRST
    assert list(trace.steps) == steps
    assert trace.finished == "done"


def test_a_torn_last_line_is_ignored_and_cut_before_the_next(run: Run) -> None:
    trace_file.append_baseline(run.run_dir, FIRST)
    trace_file.append_step(run.run_dir, make_step(1, (3,)))
    path = run.run_dir / "trace.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-200:-40])
    assert len(run_folder.load(run.run_id).trace.steps) == 1  # type: ignore[union-attr]
    trace_file.append_step(run.run_dir, make_step(2, (3, 5)))
    assert path.read_bytes().startswith(whole)
    assert run_folder.load(run.run_id).trace.removal_list == (3, 5)  # type: ignore[union-attr]


def test_a_line_damaged_in_the_middle_is_named(run: Run) -> None:
    trace_file.append_baseline(run.run_dir, FIRST)
    trace_file.append_step(run.run_dir, make_step(1, (3,)))
    path = run.run_dir / "trace.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], lines[1]]) + "\n")
    with pytest.raises(RunError, match=r"Line 2 .* damaged"):
        run_folder.load(run.run_id)


@pytest.mark.parametrize("lines", [(0, 1, 1), (0, 2, 1), (0, 0, 1), (1, 2), (0, 2)])
def test_lines_out_of_order_are_not_believed(run: Run, lines: tuple[int, ...]) -> None:
    trace_file.append_baseline(run.run_dir, FIRST)
    for count in (1, 2):
        trace_file.append_step(run.run_dir, make_step(count, (3, 5)[:count]))
    path = run.run_dir / "trace.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("".join(whole[line] + "\n" for line in lines))
    with pytest.raises(RunError, match="damaged"):
        run_folder.load(run.run_id)


def test_a_run_that_was_moved_away_is_not_begun_anew(run: Run) -> None:
    trace_file.append_baseline(run.run_dir, FIRST)
    run.run_dir.rename(run.run_dir.with_name("moved"))
    with pytest.raises(RunError, match="moved or deleted"):
        trace_file.append_step(run.run_dir, make_step(1, (3,)))
    assert not run.run_dir.exists()


def test_a_folder_of_another_version_is_refused_and_untouched(run: Run) -> None:
    path = run.run_dir / "spec.json"
    content = json.loads(path.read_text()) | {"format_version": 99, "from_the_future": True}
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="version 99"):
        run_folder.load(run.run_id)
    assert json.loads(path.read_text()) == content
    errors = [each for each in run_folder.list_runs() if isinstance(each, RunError)]
    assert len(errors) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "{}", '{"format_version": 1, "model": 3}'])
def test_a_damaged_spec_is_a_sentence(run: Run, content: str) -> None:
    (run.run_dir / "spec.json").write_text(content)
    with pytest.raises(RunError):
        run_folder.load(run.run_id)


@pytest.mark.parametrize("name", ["../outside", "nothing", "", ".", "a/b", "x" * 300, "\x00"])
def test_names_that_are_no_run_are_refused(name: str) -> None:
    with pytest.raises(RunError):
        run_folder.load(name)


def test_a_folder_in_use_is_not_taken(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="sleb resume"):
        run_folder.create(RunSpec(model="m", ratio=0.1), run.run_dir)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError):
        run_folder.create(RunSpec(model="m", ratio=0.1), tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(RunError):
        run_folder.create(RunSpec(model="m", ratio=0.1), tmp_path / "file")


def test_import_and_delete(tmp_path: Path) -> None:
    outside = run_folder.create(RunSpec(model="m", ratio=0.1), tmp_path / "from elsewhere")
    origin.write_stack(outside.run_dir, make_stack())
    trace_file.append_baseline(outside.run_dir, FIRST)
    inside = run_folder.bring_in(outside.run_dir)
    assert inside.run_dir.parent == run_folder.runs_folder()
    assert inside.trace == run_folder.load(outside.run_dir).trace
    assert [run.run_id for run in run_folder.list_runs() if isinstance(run, Run)] == [inside.run_id]
    run_folder.delete(inside.run_dir)
    assert run_folder.list_runs() == []
    with pytest.raises(RunError):
        run_folder.bring_in(tmp_path)


def test_a_full_disk_is_a_sentence_and_loses_nothing(run: Run) -> None:
    """A real refusal: the kernel caps the size of files this process may write."""
    trace_file.append_baseline(run.run_dir, FIRST)
    trace_file.append_step(run.run_dir, make_step(1, (3,)))
    before = (run.run_dir / "trace.jsonl").read_bytes()
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support.builders import make_step
from sleb.runtime import trace_file
from sleb.errors import StorageError
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, {len(before) + 100}))
try:
    trace_file.append_step(Path({str(run.run_dir)!r}), make_step(2, (3, 5)))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "disk is full" in done.stdout, done.stderr
    assert (run.run_dir / "trace.jsonl").read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    trace_file.append_step(run.run_dir, make_step(2, (3, 5)))
    assert len(run_folder.load(run.run_id).trace.steps) == 2  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written_is_a_sentence() -> None:
    with pytest.raises(StorageError, match="/proc/sleb"):
        run_folder.create(RunSpec(model="m", ratio=0.1), Path("/proc/sleb/run"))


def test_replaced_files_are_whole_and_leave_no_litter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.run_dir / "file"
    files.replace_file(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError):
        files.replace_file(path, "new")
    assert path.read_text() == "old"
    assert sorted(each.name for each in run.run_dir.iterdir()) == [
        "file", "spec.json", "spec.signature", "stack.json", "stack.signature",
    ]  # fmt: skip


def test_scores_are_kept_beside_the_trace(run: Run) -> None:
    nats = np.random.default_rng(0).random((4, 3))
    trace_file.write_scores(run.run_dir, "step-0001", nats=nats, blocks=np.arange(4))
    result = trace_file.read_scores(run.run_dir, "step-0001")
    np.testing.assert_array_equal(result["nats"], nats)
    np.testing.assert_array_equal(result["blocks"], np.arange(4))


def test_jobs_are_numbered_and_an_interrupted_one_is_derived(run: Run) -> None:
    jobs_made = [job_folder.create_job(run.run_dir, SearchJob()) for _ in range(11)]
    assert [job.name for job in jobs_made][-1] == "11-search"
    assert [job.name for job in run_folder.load(run.run_id).jobs] == [f"{n}-search" for n in range(1, 12)]
    removed = subprocess.Popen([sys.executable, "-c", "pass"])
    removed.wait()
    import socket

    status = JobStatus(state=JobState.RUNNING, pid=removed.pid, host=socket.gethostname(), process_started=1.0)
    job_folder.write_status(jobs_made[-1].directory, status)
    assert job_processes.state_of(run_folder.load(run.run_id)) is JobState.INTERRUPTED
    elsewhere = status.model_copy(update={"host": "another-host", "heartbeat": 0.0})
    job_folder.write_status(jobs_made[-1].directory, elsewhere)
    assert job_processes.state_of(run_folder.load(run.run_id)) is JobState.INTERRUPTED


def test_two_workers_never_execute_the_same_run(run: Run) -> None:
    first, second = (job_folder.create_job(run.run_dir, SearchJob()) for _ in range(2))
    with job_processes.executing(first.directory):
        assert job_processes.state_of(run_folder.load(run.run_id)) is JobState.QUEUED  # the newest job is the second
        with pytest.raises(RunBusy, match="being executed by process"):
            job_processes.require_idle(run_folder.load(run.run_id))
        code = f"""
from pathlib import Path
from sleb.runtime.processes import job_processes
from sleb.errors import RunBusy
try:
    with job_processes.executing(Path({str(second.directory)!r})):
        print("executing")
except RunBusy as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"process {os.getpid()}" in done.stdout
        assert job_folder.load_job(second.directory).status.state is JobState.QUEUED
    assert job_folder.load_job(first.directory).status.state is JobState.FINISHED
    job_processes.require_idle(run_folder.load(run.run_id))


KILLED = """
import os, signal, sys
from pathlib import Path
from sleb.records import RunSpec, SearchJob
from sleb.runtime import files, job_folder, run_folder
from sleb.runtime.processes import job_processes
name, folder = sys.argv[1], Path(sys.argv[2])
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if name == "run":
    run_folder.create(RunSpec(model="m", ratio=0.1), folder)
elif name == "job":
    job_folder.create_job(folder, SearchJob())
else:
    run_folder.shutil.rmtree = run_folder.os.unlink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    from sleb.runtime.unfinished import workspaces
    workspaces.shutil.rmtree = run_folder.shutil.rmtree
    job_processes.delete(folder)
"""


def killed(kind: str, folder: Path) -> None:
    """A process that is killed while it makes a run or a job, or deletes a run."""
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(folder)], capture_output=True, text=True)
    assert done.returncode < 0, done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_whose_process_was_killed_before_it_was_a_run_is_begun_again(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    killed("run", folder)
    assert folder.exists() is there
    assert len(list((folder if there else tmp_path).iterdir())) == 1
    assert run_folder.create(RunSpec(model="m", ratio=0.1), folder).run_dir == folder
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
    assert sorted(each.name for each in folder.iterdir()) == ["spec.json", "spec.signature"]


def test_a_job_whose_process_was_killed_before_it_was_written_is_none(run: Run) -> None:
    killed("job", run.run_dir)
    assert run_folder.load(run.run_id).jobs == ()
    assert len(list((run.run_dir / "jobs").iterdir())) == 1
    job = job_folder.create_job(run.run_dir, SearchJob())
    with job_processes.executing(job.directory):
        assert [each.name for each in (run.run_dir / "jobs").iterdir()] == ["1-search"]


def test_a_delete_that_was_cut_off_can_be_repeated(run: Run) -> None:
    killed("delete", run.run_dir)
    assert run_folder.list_runs() == []
    assert len(list(run_folder.runs_folder().iterdir())) == 1
    assert "Deleted what was left" in command("delete", run.run_id, "--yes")[1]
    assert list(run_folder.runs_folder().iterdir()) == []
    assert "There is no run" in command("delete", run.run_id, "--yes", code=2)[1]


def test_a_run_folder_that_cannot_be_moved_is_deleted_with_what_was_asked_last(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    def cut_off(path: Path, *_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (run.run_dir / "scores").mkdir()
    monkeypatch.setattr(run_folder, "remove", cannot)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_folder.delete(run.run_dir)
    assert run_folder.locate(run.run_id) == run.run_dir
    run_folder.delete(run.run_dir)
    assert not run.run_dir.exists()
