"""A run folder from someone else is data: it runs no code, writes nowhere, and names nothing that is read unasked."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import sleb
from sleb.errors import NotPermitted, RunError, SlebError, UnconfirmedNames
from sleb.records import EvaluateJob, EvaluateSpec, ExportJob, Permissions, QuantizeJob, QuantizeSpec, Run, SearchJob
from sleb.runtime import job_folder, origin, run_folder
from sleb.runtime.processes import job_processes
from tests.support import tiny
from tests.support.builders import make_stack
from tests.support.command import run as command
from tests.support.runs.strangers import from_elsewhere, with_own_code


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(3000))
    return path


def question(text: Path, **settings: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"lists": [[1]], "texts": [str(text)], "window": 16, "limit": 2} | settings)


def test_what_it_names_is_shown_and_not_read_before_it_is_confirmed(model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text)
    for words in (["resume"], ["work"], ["generate", "--prompt=a", "--removal-list=[1]"], ["heal", "--removal-list=1"]):
        err = command(words[0], run.run_dir, *words[1:], code=2)[1]
        assert str(model) in err, words
        assert "--trust-paths" in err
    assert "--trust-paths" in command("export", run.run_dir, "--format=hf", f"--out={tmp_path / 'out'}", code=2)[1]
    assert not run_folder.load(run.run_dir).jobs
    command("resume", run.run_dir, "--trust-paths")
    assert sleb.load(run.run_dir).trace is not None
    assert origin.unconfirmed(run.run_dir) == ()


def test_what_this_machine_wrote_is_not_asked_about_wherever_it_lies(model: Path, text: Path, tmp_path: Path) -> None:
    run = sleb.search(str(model), calibration=str(text), remove=1, sequences=2, sequence_length=16, analysis=False)
    moved = Path(shutil.move(run.run_dir, tmp_path / "moved"))
    assert sleb.evaluate(moved, perplexity=[str(text)], window=16, limit=2)
    (moved / "spec.json").write_text((moved / "spec.json").read_text().replace(str(text), "/etc/passwd"))
    with pytest.raises(UnconfirmedNames, match="/etc/passwd"):
        sleb.evaluate(moved, perplexity=[str(text)], window=16, limit=1)


def test_its_code_does_not_run_because_its_job_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with_own_code(model, marker)
    job = EvaluateJob(ask=question(text), trust_remote_code=True)
    run = from_elsewhere(tmp_path / "theirs", model, text, job, finished=True)
    assert "--trust-paths" in command("work", run.run_dir, code=2)[1]
    assert "--trust-remote-code" in command("work", run.run_dir, "--trust-paths", code=2)[1]
    brought = command("import", run.run_dir)[0].strip()
    assert not marker.exists()
    command("work", run_folder.locate(brought), "--trust-paths", "--trust-remote-code")
    assert marker.exists()


def test_a_broken_off_question_is_not_asked_again_with_its_permissions(model: Path, text: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    request = question(text, tasks=["theirs"], task_folder=str(tasks))
    job = EvaluateJob(ask=request, trust_remote_code=True, allow_pickle=True)
    run = from_elsewhere(tmp_path / "theirs", model, text, job, finished=True)
    _break_off(run)
    err = command("resume", run.run_dir, "--trust-paths", code=2)[1]
    assert f"--allow-pickle --trust-remote-code --task-folder {tasks}" in err
    with pytest.raises(NotPermitted, match="task_folder="):
        sleb.resume(run.run_dir, trust_paths=True, trust_remote_code=True, allow_pickle=True)
    assert len(run_folder.load(run.run_dir).jobs) == 1


def test_it_writes_nowhere_because_its_job_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "proof.json").write_text("{}")
    ask = QuantizeSpec(lists=((1,),), texts=(), out=str(precious), replace=True)
    run = from_elsewhere(tmp_path / "theirs", model, text, QuantizeJob(ask=ask), finished=True)
    err = command("work", run.run_dir, "--trust-paths", code=2)[1]
    assert f"--out {precious} --replace" in err
    assert "--replace" in command("work", run.run_dir, "--trust-paths", "--out", precious, code=2)[1]
    assert "--out" in command("work", run.run_dir, "--trust-paths", "--out", tmp_path, "--replace", code=2)[1]
    assert (precious / "proof.json").read_text() == "{}"
    export = ExportJob(out=str(precious), replace=True)
    with pytest.raises(NotPermitted):
        Permissions(out=str(tmp_path)).granted(export)
    granted = Permissions(out=str(precious), replace=True).granted(export)
    assert (granted.out, granted.replace) == (str(precious), True)


def test_a_process_is_not_started_for_it_either(model: Path, text: Path, tmp_path: Path) -> None:
    """What the dashboard's buttons call."""
    job = EvaluateJob(ask=question(text), allow_pickle=True)
    run = from_elsewhere(tmp_path / "theirs", model, text, job, finished=True)
    with pytest.raises(NotPermitted):
        job_processes.start(run.jobs[0])
    with pytest.raises(UnconfirmedNames):
        job_processes.start(run.jobs[0], Permissions(allow_pickle=True))


def test_its_number_of_processes_is_not_taken_over(model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text, SearchJob(processes=4096))
    _break_off(run)
    command("resume", run.run_dir, "--trust-paths")
    assert run_folder.load(run.run_dir).jobs[-1].spec.processes == 1


@pytest.mark.parametrize(
    "name", ["log.txt", "status.json", "spec.json", "trace.jsonl", "stack.json", "scores", "jobs", ".lock", "analysis"]
)
def test_no_link_in_it_is_followed(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text, SearchJob())
    job = run.jobs[0].directory
    path = (job if name in ("log.txt", "status.json") else run.run_dir) / name
    target = tmp_path / "target"
    if path.is_dir():
        path.rename(target)
    elif path.exists():
        target.write_bytes(path.read_bytes())
        path.unlink()
    elif "." in name:
        target.write_text("precious")
    else:
        target.mkdir()
    path.symlink_to(target)
    before = _content(target)
    assert "link" in command("work", job, "--trust-paths", code=2)[1]
    assert "link" in command("import", run.run_dir, code=2)[1]
    command("delete", run.run_dir, "--yes")
    assert _content(target) == before


def test_the_log_of_a_run_is_not_another_file(model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text, SearchJob())
    secret = tmp_path / "secret"
    secret.write_text("precious")
    (run.jobs[0].directory / "log.txt").symlink_to(secret)
    assert job_folder.log_end(run.jobs[0].directory) == ""


def test_what_is_brought_in_was_not_written_here(model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text)
    brought = sleb.load(command("import", run.run_dir)[0].strip())
    with pytest.raises(UnconfirmedNames):
        sleb.resume(brought)
    assert sleb.resume(brought, trust_paths=True).trace is not None


def test_a_pipe_in_it_does_not_hang(model: Path, text: Path, tmp_path: Path) -> None:

    run = from_elsewhere(tmp_path / "theirs", model, text)
    os.mkfifo(run.run_dir / "trace.jsonl")
    with pytest.raises(RunError, match="not a regular file"):
        sleb.load(run.run_dir)
    with pytest.raises(SlebError):
        job_processes.bring_in(run.run_dir)


def _break_off(run: Run) -> None:
    """The newest job's process was killed."""
    path = run.jobs[-1].directory / "status.json"
    path.write_text('{"state": "stopped", "message": "Stopped on request."}')


def _content(path: Path) -> list[tuple[str, bytes]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(each), each.read_bytes()) for each in files if each.is_file()]


def test_the_revision_that_is_loaded_is_the_one_that_is_shown(model: Path, text: Path, tmp_path: Path) -> None:
    """A resumed run loads the commit that its `stack.json` names."""
    run = from_elsewhere(tmp_path / "theirs", model, text)
    stack = make_stack().model_copy(update={"revision": "refs/pr/66"})
    (run.run_dir / "stack.json").write_text(stack.model_dump_json())
    assert f"{model} at revision refs/pr/66" in origin.unconfirmed(run.run_dir)
    own = run_folder.create(run.spec, tmp_path / "own")
    origin.write_stack(own.run_dir, make_stack())
    assert origin.unconfirmed(own.run_dir) == ()
    (own.run_dir / "stack.json").write_text(stack.model_dump_json())
    assert f"{model} at revision refs/pr/66" in origin.unconfirmed(own.run_dir)


def test_a_search_in_a_run_that_searches_nothing_reads_no_text(text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", "demo", text, SearchJob(), finished=True)
    err = command("work", run.run_dir, "--trust-paths", code=2)[1]
    assert "of another kind than its run" in err
    assert not (run.run_dir / "stack.json").exists()


def test_its_tasks_and_processes_are_asked_about_whatever_else_it_names(tmp_path: Path) -> None:
    ask = EvaluateSpec(lists=((1,),), texts=(), tasks=("piqa",))
    job = EvaluateJob(ask=ask, processes=6)
    run = from_elsewhere(tmp_path / "theirs", "demo", "demo", job, finished=True)
    assert origin.unconfirmed(run.run_dir, "1-evaluate") == ("task piqa", "6 processes")
    assert "task piqa, 6 processes" in command("work", run.run_dir, code=2)[1]
    _break_off(run)
    assert "task piqa, 6 processes" in command("resume", run.run_dir, code=2)[1]


def test_a_job_of_the_largest_number_is_not_passed_by(model: Path, text: Path, tmp_path: Path) -> None:
    """The next one would have a number that no list shows, and its result would be the stranger's."""
    run = from_elsewhere(tmp_path / "theirs", model, text, SearchJob())
    run.jobs[0].directory.rename(run.run_dir / "jobs" / "999999999-search")
    with pytest.raises(RunError, match="999999999, which no program wrote"):
        job_folder.create_job(run.run_dir, SearchJob())


def test_a_small_file_takes_no_large_memory(model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text)
    (run.run_dir / "trace.jsonl").write_bytes(b"\n" * (4 << 20))
    with pytest.raises(RunError, match="Line 1 of"):
        sleb.load(run.run_dir)
    (run.run_dir / "trace.jsonl").unlink()
    (run.run_dir / "spec.json").write_bytes(b"[" + b"{}," * (2 << 20) + b"{}]")
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match="damaged"):
            sleb.load(run.run_dir)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float16\ntokenizer_source: base", "nope"])
def test_a_type_of_weights_is_one_that_there_is(dtype: str, model: Path, text: Path, tmp_path: Path) -> None:
    run = from_elsewhere(tmp_path / "theirs", model, text)
    stack = json.loads(make_stack().model_dump_json()) | {"dtype": dtype}
    (run.run_dir / "stack.json").write_text(json.dumps(stack))
    with pytest.raises(RunError, match="damaged: dtype"):
        sleb.load(run.run_dir)


def test_whoever_is_asked_sees_the_whole_name_and_stdout_stays_clean(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("data/" * 60)
    long.mkdir(parents=True)
    secret = long / "secret.txt"
    secret.write_text(text.read_text())
    run = from_elsewhere(tmp_path / "theirs", model, secret)
    monkeypatch.setattr(sys, "stdin", _Terminal("n\n"))
    out, err = command("resume", run.run_dir, "--prepare", code=1)
    assert str(secret) in err
    assert (out, err.splitlines()[-1]) == ("", "Go on? [y/N]: sleb: Nothing was read.")
    monkeypatch.setattr(sys, "stdin", _Terminal("y\n"))
    out, _ = command("resume", run.run_dir, "--prepare")
    assert Path(out.removesuffix("\n")).is_dir()


class _Terminal(io.StringIO):
    """Somebody at a keyboard."""

    def isatty(self) -> bool:
        return True
