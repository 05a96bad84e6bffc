"""Run folders of earlier versions load, go on, export and say what they said when they were recorded.

`tests/data/compatibility/0.1.0/` was written by `scripts/record_compatibility.py` at commit 69051c0 and never changes.
Its paths begin with `/compatibility`; every test works on a copy in which they begin with the copy's own folder.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import sleb
from sleb.analysis import block_output_cache
from sleb.cli.output import with_flags
from sleb.export import proof_process, proven_folder
from sleb.records import Proof
from sleb.runtime import origin, run_folder
from tests.support.command import run as command
from tests.support.paths import DATA, ROOT
from tests.support.recorded.steps import steps_of

RECORDED = DATA / "compatibility" / "0.1.0"
TOKEN = b"/compatibility"
HOST = "recorded"
EXPECTED: dict[str, Any] = {each.stem: json.loads(each.read_bytes()) for each in (RECORDED / "expected").iterdir()}
NAMES = sorted(EXPECTED)
UNFINISHED = [name for name in NAMES if EXPECTED[name]["state"] not in ("finished", "failed")]
SEARCHES = [name for name in UNFINISHED if not name.startswith(("evaluation", "tasks"))]
ON_TEXT: dict[str, Any] = dict(window=50, limit=8, device="cpu")


def copied(to: Path) -> Path:
    """The fixture with paths of its own. The cache's entries are sealed, and stay as they are."""
    shutil.copytree(RECORDED, to)
    for folder in (to / "home" / "runs", to / "expected", to / "tasks"):
        for file in folder.rglob("*"):
            if file.suffix in (".json", ".jsonl", ".txt", ".yaml"):
                content = file.read_bytes()
                if TOKEN in content:
                    file.write_bytes(content.replace(TOKEN, str(to).encode()))
    return to


@pytest.fixture(scope="module", autouse=True)
def _command_line_built_once() -> Iterator[None]:
    """Typer builds all commands again for each call, which takes longer than most of what is called here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; nobody writes to it."""
    return copied(tmp_path_factory.mktemp("recorded") / "it")


@pytest.fixture
def recorded(read_only: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy for tests that only read."""
    monkeypatch.setenv("SLEB_HOME", str(read_only / "home"))
    return read_only


@pytest.fixture(scope="module")
def going_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once."""
    return copied(tmp_path_factory.mktemp("going-on") / "it")


@pytest.fixture
def resumed(going_on: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy for tests that go on with one run and leave the others alone."""
    monkeypatch.setenv("SLEB_HOME", str(going_on / "home"))
    confirm_all(going_on)
    return going_on


@pytest.fixture
def fresh(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the test's own."""
    folder = copied(tmp_path / "it")
    monkeypatch.setenv("SLEB_HOME", str(folder / "home"))
    confirm_all(folder)
    return folder


def confirm_all(folder: Path) -> None:
    """Runs of versions that signed nothing are asked about once: somebody said yes to all."""
    for run in run_folder.run_dirs(folder / "home" / "runs"):
        origin.confirm(run, *(each.name for each in (run / "jobs").iterdir() if (each / "spec.json").exists()))


def expected_of(folder: Path, name: str) -> dict[str, Any]:
    """What was recorded about a run."""
    return json.loads((folder / "expected" / f"{name}.json").read_bytes())


def assert_says(result: Any, expected: Any, where: str = "", rel: float = 1e-9) -> None:
    """Everything that was said then is said now; more may be said, and the last digit of a number may be another."""
    if isinstance(expected, dict):
        assert isinstance(result, dict), where
        for key, value in expected.items():
            assert key in result, f"{where}.{key} is missing"
            assert_says(result[key], value, f"{where}.{key}", rel)
    elif isinstance(expected, list | tuple):
        assert isinstance(result, list | tuple), where
        assert len(result) == len(expected), where
        for index, (each, value) in enumerate(zip(result, expected, strict=True)):
            assert_says(each, value, f"{where}[{index}]", rel)
    elif isinstance(expected, float):
        assert result == pytest.approx(expected, rel=rel, abs=rel), where
    else:
        assert result == expected, where


def as_value(cell: str) -> Any:
    """What a cell of a table holds: a number, a list, or words."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def as_json(value: Any) -> Any:
    """Tuples are lists, as on disk."""
    return json.loads(json.dumps(value))


# --- reading


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_reads_as_it_did(name: str, recorded: Path) -> None:
    expected = expected_of(recorded, name)
    run = sleb.load(name)
    assert run == sleb.load(recorded / "home" / "runs" / name)
    assert {job.name: job.status.state.value for job in run.jobs} == expected["jobs"]
    assert list(run.removal_list) == expected["removal_list"]
    assert (run.trace.finished if run.trace else None) == expected["finished"]
    assert (run.analysis is not None) is expected["analysed"]
    assert_says(as_json(steps_of(run)), expected["steps"])
    assert Counter(each.kind for each in sleb.findings_of(name)) == expected["findings"]
    assert_says(json.loads(command("show", name, "--json")[0]), expected["shown"])
    screen, _ = command("show", name)
    assert screen.split()[:3] == ["run", name, f"({expected['state']})"]
    assert (f"Removal list: {expected['removal_list']}" in screen) is bool(expected["steps"])


def test_all_recorded_runs_are_listed(recorded: Path) -> None:
    rows = {each["run_id"]: each for each in json.loads(command("runs", "--json")[0])["runs"]}
    assert sorted(rows) == NAMES == sorted(run.run_id for run in sleb.runs())
    for name in NAMES:
        assert_says(rows[name], expected_of(recorded, name)["listed"], name)
    screen, errors = command("runs")
    listed = {line.split()[0]: line.split()[1] for line in screen.splitlines()[1:] if line.strip()}
    assert {name: listed.get(name) for name in NAMES} == {name: rows[name]["state"] for name in NAMES}
    assert errors == ""


@pytest.mark.parametrize("name", ["metric3", "best-chunk", "swap", "gguf"])
def test_its_list_is_exported_as_it_was(name: str, recorded: Path) -> None:
    for format, text in expected_of(recorded, name)["exported"].items():
        if name == "gguf" and format in ("mergekit", "sleb"):  # which cannot read it
            assert "is a GGUF file" in command("export", name, "--format", format, code=2)[1]
            continue
        result, _ = command("export", name, "--format", format)
        if format == "json":  # travels: without the folders that it named then
            before = json.loads(text)
            before["model"] = Path(before["model"]).name
            before["calibration"]["source"] = Path(before["calibration"]["source"]).name
            assert_says(json.loads(result), before)
        elif format == "csv":
            now, before = (list(csv.DictReader(io.StringIO(each))) for each in (result, text))
            rows = [[{key: as_value(cell) for key, cell in row.items()} for row in each] for each in (now, before)]
            assert_says(*rows)
        elif format == "mergekit":  # named the type of the search, which need not be the checkpoint's
            assert_says(yaml.safe_load(result), {k: v for k, v in yaml.safe_load(text).items() if k != "dtype"})
            assert "dtype" not in yaml.safe_load(result)
        else:
            assert result == text


@pytest.mark.parametrize("name", [name for name in NAMES if "-stopped" not in name or name.startswith("race")])
def test_it_is_reported(name: str, recorded: Path, tmp_path: Path) -> None:
    searched = bool(EXPECTED[name]["steps"])
    _, errors = command("report", name, "--out", tmp_path / "report.html", code=0 if searched else 2)
    if searched:
        page = (tmp_path / "report.html").read_text()
        assert name in page
        assert "plotly" in page.lower()
    else:
        assert "chose no block" in errors or "has no finished step" in errors


def test_the_dashboard_reads_them_without_torch(recorded: Path) -> None:
    code = (
        "import json, sys\n"
        "from app import data\n"
        "found = {}\n"
        "for each in data.outlines():\n"
        "    if data.is_sample(each):\n"
        "        continue\n"
        "    run = data.load(each.run_id)\n"
        "    steps = run.trace.steps if run.trace else ()\n"
        "    tokens = data.tokens_of(run)\n"
        "    found[each.run_id] = dict(\n"
        "        state=each.state.value, removal_list=each.removal_list, findings=len(data.findings_of(run)),\n"
        "        tokens=None if tokens is None else len(tokens),\n"
        "        similar=None if tokens is None else data.similarity_over(run, data.TokenChoice()).mean.shape,\n"
        "        exits=None if tokens is None else data.exits_over(run, data.TokenChoice()).token_count,\n"
        "        evidence=[data.evidence(run, step) is not None for step in steps],\n"
        "        blocks=data.num_blocks_of(run.spec.model), rivals=len(data.rivals_of(run)),\n"
        "    )\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert sorted(result) == NAMES
    for name, seen in result.items():
        expected = expected_of(recorded, name)
        assert seen["state"] == expected["state"]
        assert seen["removal_list"] == expected["removal_list"]
        assert seen["findings"] == sum(expected["findings"].values())
        assert seen["evidence"] == [True] * len(expected["steps"])
        assert seen["blocks"] == 6
        whole = dict(tokens=96, similar=[7, 7], exits=96)
        if not expected["analysed"]:
            whole = dict.fromkeys(whole)
        assert {key: seen[key] for key in whole} == whole
    assert result["metric3"]["rivals"] > 0


# --- going on


def assert_ends_like(run: sleb.Run, reference: sleb.Run) -> None:
    """The same result as an undisturbed run that was recorded; another CPU rounds in another way."""
    assert run.trace is not None
    assert reference.trace is not None
    assert run.removal_list == reference.removal_list
    assert run.trace.finished == reference.trace.finished
    assert run.trace.baseline.perplexity == pytest.approx(reference.trace.baseline.perplexity, rel=1e-4)
    assert_says(
        as_json(steps_of(run)),
        as_json(steps_of(reference)),
        rel=1e-4,
    )
    assert (run.analysis is None) is (reference.analysis is None)
    if run.analysis is not None and reference.analysis is not None:
        now, then = run.analysis, reference.analysis
        assert_says(now.similarity.model_dump(mode="json"), then.similarity.model_dump(mode="json"), rel=1e-4)
        # Near-ties between tokens may fall otherwise.
        assert now.alignment.calibration.agreement == pytest.approx(then.alignment.calibration.agreement, abs=0.05)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_goes_on_to_what_an_undisturbed_one_found(name: str, resumed: Path) -> None:
    reference = sleb.load(name.split("-stopped")[0].removesuffix("-interrupted").removesuffix("-queued"))
    trace = resumed / "home" / "runs" / name / "trace.jsonl"
    whole = trace.read_bytes().rpartition(b"\n")[0] if trace.exists() else b""
    if name.endswith("-queued"):
        command("work", resumed / "home" / "runs" / name)
    else:
        command("resume", name, "--device", "cpu")
    done = sleb.load(name)
    assert trace.read_bytes().startswith(whole)  # nothing that was known is found again
    assert done.jobs[-1].status.state.value == "finished"
    assert_ends_like(done, reference)


def test_a_run_of_a_version_that_signed_nothing_is_asked_about_once(fresh: Path) -> None:
    name, folder = "metric3-stopped", fresh / "home" / "runs"
    (folder / name / origin.SIGNATURE).unlink()
    assert "--trust-paths" in command("resume", name, code=2)[1]
    command("resume", name, "--trust-paths")
    assert origin.unconfirmed(folder / name) == ()


def test_a_finished_run_is_returned_as_it_is(resumed: Path) -> None:
    run = sleb.load("metric3")
    assert sleb.resume("metric3") == run


def test_a_failed_run_fails_with_the_same_sentence(resumed: Path) -> None:
    message = sleb.load("failed").jobs[-1].status.message
    with pytest.raises(sleb.SlebError) as caught:
        sleb.resume("failed", device="cpu")
    assert with_flags(str(caught.value)) == message  # which named options when it was recorded


def findings_by_question(name: str) -> dict[Any, dict[str, Any]]:
    """What a run knows, by what was asked."""
    result = [each.model_dump(mode="json") for each in sleb.findings_of(name)]
    return {
        (each["kind"], tuple(each["removal_list"]), each["text"]["name"] if "text" in each else each["task"]): each
        for each in result
    }


def files_of(folder: Path) -> dict[str, Any]:
    """Findings as they lie on disk, without the key that the version which wrote them did not have."""
    read = {path.name: json.loads(path.read_bytes()) for path in folder.glob("*.json")}
    return {name: {key: value for key, value in each.items() if key != "depends_on"} for name, each in read.items()}


@pytest.mark.parametrize("name", ["evaluation-stopped", "tasks-stopped"])
def test_a_stopped_evaluation_asks_only_what_is_not_known(
    name: str, resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "tasks-stopped":
        pytest.importorskip("lm_eval", reason="needs the extra: pip install 'sleb[tasks]'")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "data-sets"))
    folder = resumed / "home" / "runs" / name / "evaluation"
    before, known = files_of(folder), findings_by_question(name)
    assert before
    allowed = ["--task-folder", resumed / "tasks"] if name == "tasks-stopped" else []
    command("resume", name, "--json", *allowed)
    assert sleb.load(name).jobs[-1].status.state.value == "finished"
    assert {key: value for key, value in files_of(folder).items() if key in before} == before
    now, reference = findings_by_question(name), findings_by_question("evaluation")
    assert now.keys() - known.keys()
    assert now.keys() == {key for key in reference if name == "tasks-stopped" or key[0] == "perplexity"}
    for key, each in now.items():
        wanted = ("measured", "rise", "rise_standard_error", "text", "metrics", "changes", "examples_hash")
        assert_says(each, {part: reference[key][part] for part in wanted if part in reference[key]}, rel=1e-4)


# --- what is known


@pytest.mark.parametrize("kind", ["evaluate", "accuracy", "benchmark", "generate", "quantize", "linear", "lora"])
def test_what_was_found_then_is_not_computed_again(
    kind: str, resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_text = dict(steps=2, perplexity=[str(resumed / "held.txt")], **ON_TEXT)
    healing = dict(source=str(resumed / "text.txt"), sequences=16, sequence_length=32, **on_text)
    before = files_of(resumed / "home" / "runs" / "metric3" / "evaluation")
    if kind == "evaluate":
        result = sleb.evaluate("metric3", all_steps=True, perplexity=[str(resumed / "held.txt")], **ON_TEXT)
    elif kind == "accuracy":
        pytest.importorskip("lm_eval", reason="needs the extra: pip install 'sleb[tasks]'")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "data-sets"))
        tasks: dict[str, Any] = dict(tasks=["questions"], task_folder=resumed / "tasks")
        result = sleb.evaluate("metric3", steps=2, perplexity=[], **tasks, **ON_TEXT)
    elif kind == "benchmark":
        monkeypatch.setattr(socket, "gethostname", lambda: HOST)  # times of another machine do not answer
        shapes: dict[str, Any] = dict(prompt=(1, 16), generation=(2, 4), generation_prompt=8)
        repetitions: dict[str, Any] = dict(prompt_repetitions=3, generation_repetitions=2)
        result = sleb.benchmark("metric3", steps=2, device="cpu", **shapes, **repetitions)
    elif kind == "generate":
        result = sleb.generate("metric3", "the block of a model", steps=2, tokens=12, device="cpu")
    elif kind == "quantize":
        pytest.importorskip("torchao", reason="needs the extra: pip install 'sleb[quantize]'")
        pytest.importorskip("compressed_tensors", reason="needs the extra: pip install 'sleb[quantize]'")
        result = sleb.quantize("metric3", schemes=("int8", "int4"), group_size=32, **on_text)
    elif kind == "linear":
        result = sleb.heal("metric3", how="linear", **healing)
    else:
        pytest.importorskip("peft", reason="needs the extra: pip install 'sleb[heal]'")
        result = sleb.heal("metric3", how="lora", rank=2, batch_sequences=4, learning_rate=1e-2, **healing)
    assert files_of(resumed / "home" / "runs" / "metric3" / "evaluation") == before  # times of finding included
    known = sleb.findings_of("metric3")
    assert result
    assert all(each in known for each in result)


def test_block_outputs_cached_then_are_read_and_made_anew_the_same(fresh: Path) -> None:
    """They were kept by weights alone, so that none is taken for an answer now; a page still shows them."""
    then = sleb.load("metric3").analysis
    assert then is not None
    key = then.description.cache_key
    read = block_output_cache.read(fresh / "home", key)
    assert read is not None
    assert read.outputs.shape == (7, 96, 32)
    rows = json.loads(command("cache", "--json")[0])["entries"]
    assert {each["name"] for each in rows} >= {key}
    shutil.rmtree(sleb.load("metric3").run_dir / "analysis")
    result = sleb.resume("metric3", device="cpu").analysis
    assert result is not None
    assert not result.description.cached
    now, before = (each.model_dump(mode="json", exclude={"description"}, exclude_unset=True) for each in (result, then))
    assert_says(now, before, rel=1e-5)
    assert {each.id for each in then.passage.tokens} == {None}  # which token it was, nobody wrote down then
    assert None not in {each.id for each in result.passage.tokens}


# --- the smaller model


def test_the_smaller_folder_is_written_and_proved_as_it_was(fresh: Path) -> None:
    assert_proved_as_it_was("metric3", sleb.export_model("metric3", fresh / "smaller", steps=2))


def test_the_smaller_gguf_file_is_written_and_proved_as_it_was(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its proof is made in this process: a fresh one takes seconds, and the other export starts it."""

    def prove_here(folder: Path, *_: Any) -> Proof:
        return Proof.model_validate(proof_process.prove(folder))

    monkeypatch.setattr(proven_folder, "run_proof", prove_here)
    assert_proved_as_it_was("gguf", sleb.export_model("gguf", fresh / "smaller.gguf", format="gguf"))


def assert_proved_as_it_was(name: str, proof: Proof) -> None:
    """What a proof says of the model and not of the machine."""
    job = next(job for job in sleb.load(name).jobs if job.spec.kind == "export")
    then = json.loads((job.directory / "result.json").read_bytes())["proof"]
    now = proof.model_dump(mode="json")
    same = ("passed", "blocks_before", "blocks_after", "kept_blocks", "parameters_before", "parameters_after", "tokens")
    assert now["passed"], now["reasons"]
    assert {key: now[key] for key in same} == {key: then[key] for key in same}
    assert now["generated_by_skipping"] == then["generated_by_skipping"]
