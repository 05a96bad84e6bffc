"""The command line as its user meets it: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sleb
from sleb import specs
from sleb.cli import terminal
from sleb.cli.main import app
from sleb.runtime import dashboard_files
from tests.support import tiny
from tests.support.command import run
from tests.support.runs.stores import write_many, write_run


@pytest.fixture
def arguments(tiny_model: Path, text_file: Path) -> list[object]:
    options = ["--sequences", 4, "--sequence-length", 24, "--dtype", "float32", "--no-analysis"]
    return ["search", tiny_model, "--calibration", text_file, *options]


def test_json_is_one_object_and_alone_on_stdout(arguments: list[object]) -> None:
    out, err = run(*arguments, "--remove", 2, "--json")
    result = json.loads(out)
    assert out.count("\n") == 1
    assert "Step 1 of 2" in err
    assert "perplexity" in err
    assert {"run_id", "run_dir", "model", "num_blocks", "method", "removal_list", "kept_blocks", "baseline"} <= set(
        result
    )
    assert {"steps", "block_evaluations", "head_evaluations"} <= set(result)
    assert set(result["baseline"]) == {"nll_sum", "token_count", "perplexity", "held_out_perplexity"}
    step = result["steps"][0]
    assert {"number", "removed", "removal_list", "perplexity", "held_out_perplexity", "margin"} <= set(step)
    assert {"margin_standard_error", "tied", "candidates", "seconds"} <= set(step)
    assert {"block", "nll_sum", "token_count", "perplexity"} <= set(step["candidates"][0])
    assert sorted(result["removal_list"] + result["kept_blocks"]) == list(range(6))
    assert result["steps"][-1]["removal_list"] == result["removal_list"]
    shown = json.loads(run("show", result["run_id"], "--json")[0])
    resumed = json.loads(run("resume", result["run_dir"], "--json")[0])
    assert shown == resumed == result


def test_the_screen_shows_the_evidence(arguments: list[object]) -> None:
    out, _ = run(*arguments, "--remove", 2)
    table = [line.split() for line in out.splitlines()]
    assert ["step", "remove", "score", "margin", "perplexity", "held-out"] in table
    result = sleb.runs()[0].trace
    assert result is not None
    for step in result.steps:
        row = next(words for words in table if words[:2] == [str(step.number), str(step.removed[0])])
        assert f"{step.margin:.4f}" in row
        assert f"{step.margin_standard_error:.4f}" in row
        assert f"{step.perplexity:,.2f}" in row
        assert f"{step.held_out.perplexity:,.2f}" in row
        assert " ".join(row).endswith(
            "significantly different"
        ) or f"tied with {', '.join(map(str, step.tied[:6]))}" in " ".join(row)
    assert f"Removal list: {list(result.removal_list)}" in out
    run_id = sleb.runs()[0].run_id
    shown, _ = run("show", run_id)
    for line in out.strip().splitlines():
        assert line.strip() in shown
    assert run_id in run("runs")[0]
    listed = json.loads(run("runs", "--json")[0])
    assert [each["run_id"] for each in listed["runs"]] == [run_id]


def test_a_run_folder_of_its_own_and_import(arguments: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    run(*arguments, "--remove", 1, "--run-dir", folder)
    assert sleb.runs() == []
    _, err = run(*arguments, "--remove", 1, "--run-dir", folder, code=2)
    assert "already holds something" in err
    run("show", folder)
    imported = run("import", folder)[0].strip()
    assert sleb.load(imported).trace == sleb.load(folder).trace
    _, err = run("delete", imported, "--yes")
    assert sleb.runs() == []
    assert folder.is_dir()


def test_protection_and_rises_are_parsed(arguments: list[object]) -> None:
    out, _ = run(*arguments, "--remove", 1, "--protect", "1,2, 3", "--json")
    assert {c["block"] for c in json.loads(out)["steps"][0]["candidates"]} == {0, 4, 5}
    out, _ = run(*arguments, "--remove", 1, "--protect", "", "--json")
    assert len(json.loads(out)["steps"][0]["candidates"]) == 6
    out, _ = run(*arguments, "--until-perplexity", "+100000%", "--json")
    assert len(json.loads(out)["removal_list"]) == 4
    assert "block indices" in run(*arguments, "--protect", "a", code=2)[1]
    assert "+10%" in run(*arguments, "--until-perplexity", "much", code=2)[1]


def test_a_finished_run_has_nothing_to_prepare(arguments: list[object]) -> None:
    name = json.loads(run(*arguments, "--remove", 1, "--json")[0])["run_id"]
    out, err = run("resume", name, "--prepare", code=2)
    assert out == ""
    assert "nothing to prepare" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["search", "demo", "--memory-budget", "20"], "a size such as 24GB"),
        (["search", "demo", "--device", "cuda:1", "--processes", "2"], "names one device"),
        (["search", "./nothing"], "no model folder"),
        (["search", "demo", "--method", "metric9"], "metric9"),
        (["search", "demo", "--remove", "0"], "--remove"),
        (["search", "demo", "--ratio", "2"], "--ratio"),
        (["search", "demo", "--remove", "1", "--ratio", "0.5"], "not both"),
        (["search", "demo", "--device", "abacus"], "abacus"),
        (["search", ""], "empty"),
        (["search"], "MODEL"),
        (["show", "nothing"], "no run"),
        (["resume", "nothing"], "no run"),
        (["stop", "nothing"], "no run"),
        (["delete", "nothing"], "no run"),
        (["import", "/nothing"], "no run"),
        (["work", "/nothing"], "/nothing does not exist"),
        (["export", "nothing"], "no run"),
        (["export", "nothing", "--format", "onnx"], "onnx"),
        (["cache", "--clear", "everything"], "everything"),
        (["search", "demo", "--seed", "x"], "--seed"),
        (["search", "demo", "--seed", "-1"], "--seed"),
        (["search", "demo", "--until-perplexity", "10"], "+10%"),
        (["search", "x" * 5000], "no model"),
        (["search", "~no-such-user/model"], "home folder"),
        (["search", "demo", "--run-dir", "~no-such-user/run"], "home folder"),
        (["search", "demo", "--run-dir", "/dev/null"], "not a folder"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(words: list[str], sentence: str) -> None:
    out, err = run(*words, code=2)
    assert out == ""
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert sleb.runs() == []  # a run that never began leaves nothing behind


def test_what_a_method_must_remove_cannot_be_protected(arguments: list[object]) -> None:
    err = run(*arguments, "--method", "early-exit", "--protect", "5", code=2)[1]
    assert "block 5 is protected" in " ".join(err.split())
    assert sleb.runs() == []


def test_exports_of_the_list(arguments: list[object], tmp_path: Path) -> None:
    result = json.loads(run(*arguments, "--remove", 2, "--json")[0])
    name, removal_list = result["run_id"], result["removal_list"]
    assert json.loads(run("export", name, "--format", "list")[0]) == removal_list
    assert json.loads(run("export", name, "--format", "list", "--steps", 1)[0]) == removal_list[:1]
    assert json.loads(run("export", name)[0])["removal_list"] == removal_list
    rows = list(csv.DictReader(io.StringIO(run("export", name, "--format", "csv")[0])))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    merge = tmp_path / "merge.yaml"
    run("export", name, "--format", "mergekit", "--out", merge)
    assert "slices" in merge.read_text()
    merge.write_text("mine")
    assert "--replace" in run("export", name, "--format", "mergekit", "--out", merge, code=2)[1]
    assert merge.read_text() == "mine"
    (tmp_path / "link").symlink_to(merge)
    run("export", name, "--format", "list", "--out", tmp_path / "link", "--replace")
    assert (tmp_path / "link").is_symlink()
    assert json.loads(merge.read_text()) == removal_list
    out, _ = run("export", name, "--format", "list", "--out", "/dev/null", "--json")
    assert json.loads(out)["removal_list"] == removal_list
    assert not Path("/dev/null").is_file()
    assert "2" in run("export", name, "--steps", 3, code=2)[1]
    assert "--out" in run("export", name, "--format", "hf", code=2)[1]


def test_the_smaller_model_is_written_and_proved(arguments: list[object], tmp_path: Path) -> None:
    """The whole way: search, export, reload in a process of its own."""
    result = json.loads(run(*arguments, "--remove", 2, "--json")[0])
    out, _ = run("export", result["run_id"], "--format", "hf", "--out", tmp_path / "smaller", "--json")
    proof = json.loads(out)
    assert proof["passed"]
    assert proof["kept_blocks"] == result["kept_blocks"]
    from transformers import AutoModelForCausalLM

    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert len(smaller.model.layers) == 4
    assert json.loads((tmp_path / "smaller" / "proof.json").read_text())["passed"]
    assert "removal" in (tmp_path / "smaller" / "README.md").read_text().lower()
    _, err = run("export", result["run_id"], "--format", "hf", "--out", tmp_path / "smaller", code=2)
    assert "--replace" in err
    run("export", result["run_id"], "--format", "hf", "--out", tmp_path / "smaller", "--steps", 1, "--replace")
    assert json.loads((tmp_path / "smaller" / "proof.json").read_text())["blocks_after"] == 5


def test_work_executes_what_is_waiting(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """What the dashboard does: write the spec and the job, start a process, look at files."""
    from sleb.runtime import run_folder
    from sleb.runtime.processes import job_processes

    spec = specs.run_spec(
        str(tiny_model), calibration=str(text_file), sequences=3, sequence_length=16, remove=1, analysis=False
    )
    made = run_folder.create(spec)
    job = job_processes.next_job(made, specs.job_spec("search"))
    process = job_processes.start(job)
    assert process.wait(timeout=400) == 0, (job.directory / "log.txt").read_text()
    done = sleb.load(made.run_id)
    assert done.jobs[0].status.state == "finished"
    assert len(done.removal_list) == 1
    again = run_folder.create(spec, tmp_path / "by hand")
    run("work", again.run_dir)
    assert sleb.load(tmp_path / "by hand").removal_list == done.removal_list
    assert "no job waiting" in run("work", again.run_dir, code=2)[1]


def test_a_failed_job_keeps_its_sentence_and_its_log(tiny_model: Path, tmp_path: Path) -> None:
    from sleb.runtime import run_folder
    from sleb.runtime.processes import job_processes

    spec = specs.run_spec(str(tiny_model), calibration=str(tmp_path / "absent.txt"), sequence_length=16, remove=1)
    made = run_folder.create(spec)
    job = job_processes.next_job(made, specs.job_spec("search"))
    assert job_processes.start(job).wait(timeout=400) == 2
    failed = sleb.load(made.run_id).jobs[0]
    assert failed.status.state == "failed"
    assert "absent.txt" in failed.status.message
    assert "absent.txt" in (job.directory / "log.txt").read_text()


def test_analyze_prints_and_caches(tiny_model: Path, text_file: Path) -> None:
    words: list[Any] = ["analyze", tiny_model, "--calibration", text_file, "--sequences", 3, "--sequence-length", 24]
    out, _ = run(*words)
    assert "Metric1" in out
    assert "early exit" in out
    shown, _ = run("cache")
    assert "block-outputs" in shown
    assert json.loads(run("cache", "--json")[0])["entries"][0]["folder"] == "block-outputs"
    out, err = run("cache", "--clear", "block-outputs", "--json")
    assert "Cleared 1" in err
    assert json.loads(out)["bytes"] > 0


def test_a_reader_who_leaves_does_not_end_the_search(arguments: list[object], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sleb", *map(str, arguments), "--remove", "3", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.wait(timeout=400)
    assert "Traceback" not in errors
    assert len(sleb.load(tmp_path / "run").removal_list) == 3


def test_a_screen_without_unicode(arguments: list[object]) -> None:
    words = [sys.executable, "-m", "sleb", *map(str, arguments), "--remove", "1"]
    environment = dict(os.environ) | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Removal list" in done.stdout


def test_names_are_shown_as_text(text_file: Path, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "\x1b[31m[bold]red")
    options = ["--calibration", text_file, "--sequences", 3, "--sequence-length", 16, "--remove", 1, "--no-analysis"]
    run("search", folder, *options)
    shown = run("runs")[0] + run("show", sleb.runs()[0].run_id)[0]
    assert "\x1b[31m" not in shown
    assert "[bold]red" in shown


def test_a_damaged_run_can_be_deleted_and_an_old_job_does_not_matter(arguments: list[object]) -> None:
    result = json.loads(run(*arguments, "--remove", 1, "--json")[0])
    folder = Path(result["run_dir"])
    (folder / "jobs" / "1-search" / "status.json").write_text("{")
    assert "damaged" in run("show", result["run_id"])[0]
    (folder / "spec.json").write_text("{")
    assert "damaged" in run("show", result["run_id"], code=2)[1]
    run("delete", result["run_id"], "--yes")
    assert not folder.exists()


def test_help_teaches() -> None:
    runner = CliRunner()
    for words in ([], ["search"], ["export"], ["resume"]):
        shown = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
    assert "wikitext2-rows" in runner.invoke(app, ["search", "--help"], env={"COLUMNS": "200"}).output


def test_python_m_sleb_is_sleb() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sleb", "show", "nothing"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sleb: There is no run 'nothing'")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [("", "is not an address"), ("999.1.1.1", "is not an address"), ("nosuchhost.invalid", "is not an address"),
     ("192.0.2.7", "cannot listen"), ("localhost", "is in use"), ("127.0.0.1", "is in use")],
)  # fmt: skip
def test_a_dashboard_that_cannot_listen_says_so(address: str, sentence: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "sleb", "dashboard", f"--port={port}", f"--address={address}"],
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_dashboard_may_is_handed_to_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its environment, over what the environment err before."""
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    for name in (dashboard_files.ALLOW_PATH, dashboard_files.READ_ONLY):
        monkeypatch.setenv(name, "1")  # put back afterwards
    (tmp_path / "a:b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a:b")
    port = f"--port={free_port()}"
    run("dashboard", port, "--allow-path", tmp_path / "absent", code=2)
    assert started == []
    run("dashboard", port, "--allow-path", tmp_path / "link", "--allow-path", tmp_path, "--read-only")
    assert json.loads(os.environ[dashboard_files.ALLOW_PATH]) == [str(tmp_path / "a:b"), str(tmp_path)]
    assert os.environ[dashboard_files.READ_ONLY] == "1"
    _, err = run("dashboard", port, "--address=0.0.0.0", "--server.maxUploadSize=1")
    assert "--allow-path DIR" in err
    assert (os.environ[dashboard_files.ALLOW_PATH], os.environ[dashboard_files.READ_ONLY]) == ("[]", "0")
    assert started[1][-3:] == [port.replace("--", "--server."), "--server.address=0.0.0.0", "--server.maxUploadSize=1"]
    assert started[1][1:3] == ["-P", str(dashboard_files.SERVER)]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_report_is_written_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12, 3)
    out = tmp_path / "report.html"
    wanted = [sys.executable, "-m", "sleb", "report", str(run.run_dir), "--out", str(out)]
    assert subprocess.run(wanted, capture_output=True, cwd=tmp_path).returncode == 0
    assert str(list(run.removal_list)) in out.read_text()
    again = subprocess.run(wanted, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_a_screen_shows_the_newest_runs_and_a_file_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(home / "runs", 5, 6, 2)
    monkeypatch.setattr(terminal, "MOST_SHOWN", 3)
    names = [f"run-{number:04d}" for number in range(5)]
    assert [line.split()[0] for line in run("runs")[0].splitlines()[1:]] == names
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich takes it for a terminal then
    screen, errors = run("runs")
    assert [name for name in names if name in screen] == names[:3]
    assert "The newest 3 of 5 runs" in errors
    assert [name for name in names if name in run("runs", "--all")[0]] == names
