"""`sleb evaluate`: which lists, what is kept, that nothing is computed twice, and bad input."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sleb
from sleb import execution
from sleb.errors import OptionError, RunError
from sleb.evaluation import perplexity, request
from sleb.records import EvaluateSpec, JobState, TextPerplexity
from sleb.report.summaries import list_curves
from sleb.runtime import findings_folder, job_folder
from sleb.runtime.processes import job_processes
from sleb.text import calibration
from tests.support import tiny
from tests.support.command import run as command
from tests.support.runs import judged
from tests.support.runs.stores import write_run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held.txt"
    path.write_text(tiny.text(2500, seed=5))
    return path


@pytest.fixture
def run(tiny_model: Path, text_file: Path) -> sleb.Run:
    return sleb.search(
        str(tiny_model),
        calibration=str(text_file),
        sequences=3,
        sequence_length=32,
        remove=3,
        dtype="float32",
        analysis=False,
    )


def evaluated(*words: object) -> dict[str, Any]:
    return json.loads(command("evaluate", *words, "--window", 50, "--json")[0])


def test_the_whole_curve_is_one_command_and_kept_in_the_run(run: sleb.Run, text: Path, scored: list[int]) -> None:
    findings = evaluated(run.run_id, "--all-steps", "--perplexity", text)["findings"]
    assert [len(each["removal_list"]) for each in findings] == [0, 1, 2, 3]
    assert [tuple(each["removal_list"]) for each in findings[1:]] == [
        tuple(sorted(step.removal_list)) for step in run.trace.steps
    ]
    assert findings[0]["rise"] is None
    first = findings[0]["measured"]
    assert first["perplexity"] == pytest.approx(math.exp(first["nll_sum"] / first["token_count"]))
    for each in findings[1:]:
        nats = each["measured"]["nll_sum"] - findings[0]["measured"]["nll_sum"]
        assert each["rise"] == pytest.approx(nats / each["measured"]["token_count"])
        assert each["rise_standard_error"] > 0
    windows = findings[0]["text"]["windows"]
    assert sum(scored) == 4 * windows
    scored.clear()
    last = evaluated(run.run_id, "--perplexity", text)["findings"]  # the last list, known from the curve
    assert last == [findings[0], findings[3]]
    assert scored == []
    evaluated(run.run_id, "--perplexity", text, "--removal-list", "[1]")
    assert sum(scored) in (0, windows)  # the new list only; none where a step has removed just block 1
    known = findings_folder.of_kind(sleb.findings_of(run), TextPerplexity)
    assert {each.removal_list for each in known} >= {tuple(each["removal_list"]) for each in findings}


def test_json_has_the_perplexity_beside_each_sum_and_the_files_have_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12, 5, analysis=False)
    judged.keep(run, judged.everything(run))
    findings = json.loads(command("show", run.run_dir, "--json")[0])["findings"]
    sums = [each for finding in findings for each in finding.values() if isinstance(each, dict) and "nll_sum" in each]
    assert {each["kind"] for each in findings} >= {"perplexity", "quantization", "healing"}
    assert len(sums) > 20
    for each in sums:
        assert each["perplexity"] == pytest.approx(math.exp(each["nll_sum"] / each["token_count"]))
    kept = findings_folder.findings(run.run_dir)
    assert [set(each) for each in findings] == [set(each.model_dump()) for each in kept]  # and nothing else was added
    for each in kept:
        file = json.loads((run.run_dir / findings_folder.FOLDER / f"{each.question}.json").read_text())
        assert file == each.model_dump(mode="json")


def test_a_model_and_a_list_from_anywhere_have_a_run_that_is_found_again(
    tiny_model: Path, text: Path, scored: list[int]
) -> None:
    first = evaluated(tiny_model, "--removal-list", "[4, 2]", "--perplexity", text, "--dtype", "float32")
    assert [each["removal_list"] for each in first["findings"]] == [[], [2, 4]]
    scored.clear()
    again = evaluated(tiny_model, "--removal-list", "4,2", "--perplexity", text, "--dtype", "float32")
    assert again == first
    assert scored == []
    assert [each.run_id for each in sleb.runs()] == [first["run_id"]]
    kept = sleb.load(first["run_id"])
    assert kept.removal_list == (2, 4)
    assert kept.kept_blocks == (0, 1, 3, 5)
    by_run = evaluated(first["run_id"], "--perplexity", text)
    assert by_run["findings"] == first["findings"]
    other = evaluated(tiny_model, "--removal-list", "[]", "--perplexity", text, "--dtype", "float32")
    assert [each["removal_list"] for each in other["findings"]] == [[]]
    assert other["run_id"] != first["run_id"]
    assert "evaluation" in command("runs")[0]
    assert "evaluation of" in command("show", first["run_id"])[0]


def test_the_table_names_text_estimate_and_error(run: sleb.Run, text: Path) -> None:
    out, _ = command("evaluate", run.run_id, "--steps", 2, "--perplexity", text, "--window", 50, "--limit", 4)
    lines = out.splitlines()
    head = next(line for line in lines if "held.txt" in line)
    assert "4 of" in head
    assert head.endswith("(an estimate)")
    removed = ", ".join(map(str, sorted(run.trace.steps[1].removal_list)))
    row = next(line for line in lines if line.startswith(f"2: {removed}"))
    assert "±" in row
    assert any(line.startswith("none") for line in lines)


def test_a_killed_evaluation_goes_on(run: sleb.Run, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(tiny.text(200_000, seed=9))
    words = [sys.executable, "-m", "sleb", "evaluate", run.run_id, "--all-steps", f"--perplexity={long}", "--window=50"]
    process = subprocess.Popen([*words, "--batch-size=2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = run.run_dir / findings_folder.FOLDER
    limit = time.monotonic() + 400
    while not list(folder.glob("windows-*.npz")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with np.load(next(iter(folder.glob("windows-*.npz")))) as table:
        before = table["nats"]
    assert 0 < np.isfinite(before).sum() < before.size
    assert sleb.load(run.run_dir).jobs[-1].status.state is JobState.INTERRUPTED
    answered = json.loads(command("resume", run.run_id, "--json")[0])["findings"]
    assert [len(each["removal_list"]) for each in answered] == [0, 1, 2, 3]
    assert "removal list" in json.dumps(json.loads(command("resume", run.run_id, "--json")[0])).replace("_", " ")
    with np.load(next(iter(folder.glob("windows-*.npz")))) as table:
        after = table["nats"]
    assert np.isfinite(after).all()
    there = np.isfinite(before)
    assert np.array_equal(after[there], before[there])


def test_a_job_from_elsewhere_is_worked_off(run: sleb.Run, text: Path) -> None:
    """What the dashboard does: the question is in the job's folder, a process answers it."""
    lists = request.lists_of(run, all_steps=True)
    ask = request.ask_of(EvaluateSpec, lists=lists, texts=(str(text),), window=50)
    job = job_folder.create_job(run.run_dir, request.job_of(ask))
    done = execution.work(job.directory)
    assert len(request.answers(done)) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--removal-list", "[1, 1]"], "names block 1 twice"),
        (["--removal-list", "[99]"], "blocks 0 to 5"),
        (["--removal-list", "[0,1,2,3,4,5]"], "at least one must stay"),
        (["--removal-list", "[-1]"], "from 0 on"),
        (["--removal-list", "[a]"], "block indices such as"),
        (["--removal-list", "[1]", "--steps", "1"], "Give one of"),
        (["--steps", "4"], "give 1 to 3"),
        (["--perplexity", "none"], "Nothing to evaluate"),
        (["--perplexity", "/nowhere.txt"], "file /nowhere.txt"),
        (["--perplexity", "wikitext3"], "No text"),
        (["--bos", "maybe"], "--bos"),
        (["--perplexity", "demo,none"], "stands alone"),
        (["--perplexity", "x" * 300], "No text"),
        (["--perplexity", "bad\udcffname"], "no UTF-8"),
        (["--limit", "99999999999999999999999"], "--limit"),
        (["--removal-list", "[99999999999999999999999]"], "block indices such as"),
        (["--removal-list", "[1"], "block indices such as"),
        (["--removal-list", "1_0"], "block indices such as"),
        (["--device", "cuda"], "0 CUDA devices"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], sentence: str, run: sleb.Run, text: Path) -> None:
    rest = [] if "--perplexity" in words else ["--perplexity", str(text)]
    out, err = command("evaluate", run.run_id, *words, *rest, "--window", 50, code=2)
    assert out == ""
    assert sentence in " ".join(err.split())
    assert sleb.load(run.run_dir).removal_list == run.removal_list


def test_bad_subjects_are_a_sentence_and_leave_nothing(tiny_model: Path, text: Path, home: Path) -> None:
    assert "No run is called 'nothing'" in command("evaluate", "nothing", code=2)[1]
    assert "no model folder" in command("evaluate", "./nothing", "--removal-list", "[1]", code=2)[1]
    outside = ["evaluate", tiny_model, "--removal-list", "[99]", "--perplexity", text, "--window", 50]
    assert "blocks 0 to 5" in command(*outside, code=2)[1]
    assert sleb.runs() == []
    write_run(home / "runs" / "begun", 12, 3, done=0, state=JobState.STOPPED)
    assert "no finished step" in command("evaluate", "begun", "--perplexity", text, code=2)[1]
    with pytest.raises(RunError, match="searched nothing"):
        request.lists_of(request.subject_run(str(tiny_model), [2]), steps=1)
    with pytest.raises(OptionError, match="None"):
        request.subject_run(str(tiny_model), [None])  # type: ignore[list-item]


def test_what_a_model_only_takes_is_refused_for_a_run(run: sleb.Run, text: Path, tmp_path: Path) -> None:
    for option in (["--dtype", "bfloat16"], ["--run-dir", tmp_path / "new"], ["--revision", "main"]):
        assert (
            f"{option[0]} is for a model" in command("evaluate", run.run_id, "--perplexity", text, *option, code=2)[1]
        )


def test_the_order_of_a_list_is_nothing(tiny_model: Path, text: Path) -> None:
    answers = [evaluated(tiny_model, "--removal-list", each, "--perplexity", text) for each in ("[5, 2]", "[2, 5]")]
    assert answers[0] == answers[1]


def test_who_comes_second_takes_nothing_away(tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ask the same at once: the one that finds the other's run busy leaves it alone."""
    before = execution.execute

    def busy(made: sleb.Run, *rest: Any) -> sleb.Run:
        with job_processes.lock_of(made.run_dir):
            return before(made, *rest)

    monkeypatch.setattr(execution, "execute", busy)
    command("evaluate", tiny_model, "--removal-list", "[2]", "--perplexity", text, "--window", 50, code=2)
    assert len(sleb.runs()) == 1


def test_a_folder_that_was_there_stays(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    words = ["evaluate", tiny_model, "--removal-list", "[77]", "--perplexity", text, "--run-dir", folder]
    assert "blocks 0 to 5" in command(*words, "--window", 50, code=2)[1]
    assert list(folder.iterdir()) == []


def test_a_damaged_run_is_called_damaged(run: sleb.Run, text: Path) -> None:
    (run.run_dir / "spec.json").write_text("{")
    words = ["evaluate", run.run_id, "--perplexity", text]
    assert "damaged" in command(*words, code=2)[1]
    assert "damaged" in command(*words, "--removal-list", "[3]", code=2)[1]


def test_windows_longer_than_the_positions_are_refused(tmp_path: Path, text: Path) -> None:
    folder = tiny.save(tmp_path / "gpt2", "gpt2")
    err = command("evaluate", folder, "--removal-list", "[2]", "--perplexity", text, "--window", 2048, code=2)[1]
    assert "positions of the model" in err


def test_tables_and_times_that_nobody_wrote_are_left_out(run: sleb.Run, text: Path) -> None:
    first = evaluated(run.run_id, "--perplexity", text)["findings"]
    folder = run.run_dir / findings_folder.FOLDER
    table = next(iter(folder.glob("windows-*.npz")))
    for nats in (np.zeros((2, 3)), np.array([["a"], ["b"]])):
        np.savez(table, lists=np.array("[[], [1]]"), nats=nats)
        again = evaluated(run.run_id, "--perplexity", text)["findings"]
        assert [each["measured"] for each in again] == [each["measured"] for each in first]
    facts = dict(removal_list=(1,), dtype="float32", device="cpu", seconds=1.0, finished=1.0, host="h", threads=1)
    facts |= dict(shape="prompt", sequences=1, tokens=8, baseline_cache_bytes=1, cache_bytes=1, proportional=1.2)
    facts |= dict(baseline_parameters=2, parameters=1, kind="timing")
    for times in ((), (0.0,), (1.0, 2.0)):
        (folder / "timing-x.json").write_text(json.dumps(facts | dict(baseline_times=(1.0,), times=times)))
        assert len(sleb.findings_of(run)) == 2


def test_a_damaged_finding_or_table_is_made_anew(run: sleb.Run, text: Path) -> None:
    first = evaluated(run.run_id, "--perplexity", text)["findings"]
    for path in (run.run_dir / findings_folder.FOLDER).iterdir():
        path.write_bytes(b"{")
    assert sleb.findings_of(run) == []
    again = evaluated(run.run_id, "--perplexity", text)["findings"]
    assert [each["measured"] for each in again] == [each["measured"] for each in first]


def test_windows_that_repeat_what_chose_are_counted_in_a_text_of_another_name(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    run = sleb.search(
        str(tiny_model), calibration=str(text_file), sequences=3, sequence_length=128, remove=1, analysis=False
    )
    tokenizer = tiny.tokenizer()
    chosen = calibration.build(run.spec.calibration, 0, 0, tokenizer, 128).ids
    passages = [tokenizer.decode(row[start : start + 32]) for row in chosen for start in (1, 33, 65)]
    copied, other = tmp_path / "copied.txt", tmp_path / "other.txt"
    copied.write_text(tiny.text(640, seed=77)[:640] + "xyz" + text_file.read_text())  # cut at other places
    other.write_text(tiny.text(640, seed=78))
    windows = perplexity.windows(str(copied), tokenizer, 128, window=128).ids
    counted = sum(any(each in tokenizer.decode(row) for each in passages) for row in windows)
    assert 3 <= counted <= 6
    for path, ending in (
        (copied, f"; {counted} of its windows repeat text that the blocks were chosen on"),
        (other, ""),
    ):
        answer = json.loads(command("evaluate", run.run_id, "--perplexity", path, "--window", 128, "--json")[0])
        assert answer["findings"][0]["text"]["description"].endswith(f"windows of 128 tokens{ending}")


@pytest.mark.parametrize(("source", "is_named"), [("own", True), ("linked", True), ("other", False)])
def test_the_searchs_own_text_is_called_so(run: sleb.Run, text: Path, source: str, is_named: bool) -> None:
    linked = text.with_name("linked.txt")
    linked.symlink_to(run.spec.calibration.source)
    name = {"own": run.spec.calibration.source, "linked": str(linked), "other": str(text)}[source]
    findings = evaluated(run.run_id, "--perplexity", name)["findings"]
    assert ("chosen on a part of it" in findings[0]["text"]["description"]) is is_named
    too_good = list_curves.curves(run, sleb.findings_of(run)).too_good
    assert too_good == ((f"{Path(name).name}: the blocks were chosen on a part of it",) if is_named else ())
