"""The Export page: the list in every format, the job that writes the smaller model, and its proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import data
from sleb.errors import StorageError
from sleb.export import finished_exports
from sleb.formats.list_formats import FORMATS, in_words, render
from sleb.records import Job, JobState, Permissions, Progress, RunSpec
from sleb.report.summaries import exported_model
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import job_processes
from tests.support.dashboard import charts, open_page, press, words
from tests.support.exports import export_job, proof
from tests.support.runs.stores import write_run

WRITE = "Write the smaller model"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_shown_as_it_is_written(name: str, runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    app = open_page("export", run="one")
    app.segmented_control(key="format").set_value(name).run()
    app.slider(key="steps").set_value(3).run()
    assert not app.exception
    assert app.code[0].value == render(run, name, 3).strip()


def test_a_tool_that_cannot_read_the_model_gets_no_list(runs: Path) -> None:
    write_run(runs / "file", 12, 4, model="/models/some.gguf")
    app = open_page("export", run="file", format="mergekit")
    assert not app.exception
    assert ["which mergekit cannot read" in each.value for each in app.info] == [True]
    assert not app.code
    assert "such as the layer" in words(
        open_page("export", run=write_run(runs / "one", 12, 4).run_id, format="mergekit")
    )


def test_the_list_after_any_step_with_its_cost(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    assert run.trace is not None
    app = open_page("export", run="one", steps="2")
    step = run.trace.steps[1]
    facts = {each.label: each.value for each in app.metric}
    assert facts["Blocks kept"] == "10 of 12"
    assert facts["Parameters"] == f"−{2000 / 17000:.1%}"
    assert facts["Held-out perplexity"].endswith(f"→ {step.held_out.perplexity:.2f}")
    assert facts["Calibration perplexity"].endswith(f"→ {step.perplexity:.2f}")
    assert in_words(12, step.removal_list).split(";")[0] in words(app).replace("\\", "")
    removed = charts(app)[0]["data"][1]
    assert [round(base + 0.5) for base in removed["base"]] == sorted(step.removal_list)


@pytest.mark.parametrize("steps", ["99", "0", "x", ""])
def test_a_number_of_steps_out_of_range_is_no_crash(steps: str, runs: Path) -> None:
    write_run(runs / "one", 12, 4)
    app = open_page("export", run="one", steps=steps)
    assert not app.exception
    assert app.slider(key="steps").value in (1, 4)


def test_a_run_with_fewer_steps_follows_one_with_more(runs: Path) -> None:
    write_run(runs / "four", 12, 4)
    write_run(runs / "two", 12, 2)
    write_run(runs / "one", 12, 1)
    app = open_page("export", run="four", steps="4")
    for run_id in ("two", "one", "four"):
        app.query_params["run"] = run_id
        app.run()
        assert not app.exception
        assert f"{12 - {'two': 2, 'one': 1, 'four': 2}[run_id]} of 12" in words(app)


def test_without_a_list_it_says_what_to_do(runs: Path) -> None:
    write_run(runs / "none", 12, 3, done=0, state=JobState.FAILED, message="It broke.")
    run_folder.create(RunSpec(model="just/created"), runs / "new")
    run_folder.create(RunSpec(model="an/analysis", kind="analyze"), runs / "analysis")
    for run_id, sentence in [("none", "sleb resume"), ("new", "sleb resume"), ("analysis", "chose no block")]:
        app = open_page("export", run=run_id)
        assert not app.exception
        assert sentence in words(app).replace("\\", "")
        assert WRITE not in [button.label for button in app.button]


def test_the_button_starts_what_was_chosen(runs: Path, started: list[Job], tmp_path: Path) -> None:
    write_run(runs / "one", 12, 4)
    app = open_page("export", run="one", steps="3")
    assert app.text_input[0].value == "~/sleb-exports/one-3-removed"
    app.text_input[0].set_value(f" {tmp_path}/out ").run()
    app.toggle(key="replace").set_value(True).run()
    press(app, WRITE)
    (job,) = started
    spec = job.spec
    assert (spec.kind, spec.steps, spec.out, spec.replace) == ("export", 3, f"{tmp_path}/out", True)
    assert (spec.device, spec.allow_pickle, spec.trust_remote_code) == ("cpu", False, False)


def test_a_sample_is_exported_from_a_copy(runs: Path, started: list[Job], tmp_path: Path) -> None:
    before = sorted(path for path in data.SAMPLES.rglob("*") if path.name != ".lock")
    app = open_page("export", run=data.SAMPLE)
    app.text_input[0].set_value(str(tmp_path / "out")).run()
    press(app, WRITE)
    assert not app.exception
    assert started[0].directory.is_relative_to(runs / data.SAMPLE)
    assert sorted(path for path in data.SAMPLES.rglob("*") if path.name != ".lock") == before
    assert data.load(data.SAMPLE).run_dir == runs / data.SAMPLE
    assert [each.run_id for each in data.outlines() if not isinstance(each, Exception)].count(data.SAMPLE) == 1
    press(app, WRITE)
    assert len(started) == 2  # of the copy that is there now


@pytest.mark.parametrize(
    ("name", "replace", "sentence"),
    [
        ("", False, "Name a folder"),
        ("{}/full", False, "not empty"),
        ("{}/full", True, "other than an earlier export"),
        ("{}/file", True, "is a file"),
        ("{}/link", True, "is a link"),
        ("{}/file/below", False, "Nothing can be written in"),
        ("{}/a\0b", False, "characters"),
        ("~nobody-here/x", False, "home folder"),
        ("{}/" + "x" * 300, False, "cannot be used"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    name: str, replace: bool, sentence: str, runs: Path, started: list[Job], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    write_run(runs / "one", 12, 2)
    app = open_page("export", run="one")
    app.text_input[0].set_value(name.format(tmp_path)).run()
    app.toggle(key="replace").set_value(replace).run()
    press(app, WRITE)
    assert not app.exception
    assert [sentence in each.value.replace("\\", "") for each in app.error] == [True]
    assert started == []


def test_a_process_that_cannot_be_started_leaves_no_job(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(job: Job, permissions: Permissions) -> None:
        raise StorageError("The disk is *full*.")

    monkeypatch.setattr(job_processes, "start", refuse)
    write_run(runs / "one", 12, 2)
    app = open_page("export", run="one")
    app.text_input[0].set_value(str(tmp_path / "out")).run()
    press(app, WRITE)
    assert [each.value for each in app.error] == ["The disk is \\*full\\*."]
    assert [job.spec.kind for job in run_folder.load("one").jobs] == ["search"]


def test_an_earlier_export_may_be_replaced(runs: Path, started: list[Job], tmp_path: Path) -> None:
    (tmp_path / "proof.json").write_text("{}")
    write_run(runs / "one", 12, 2)
    app = open_page("export", run="one")
    app.text_input[0].set_value(str(tmp_path)).run()
    app.toggle(key="replace").set_value(True).run()
    press(app, WRITE)
    assert len(started) == 1


def test_a_running_export_is_watched_and_stopped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(runs / "one", 12, 4)
    job = export_job(run, JobState.RUNNING, out="/somewhere/*here*")
    status = job_folder.load_job(job.directory).status
    phase = Progress(phase="Writing 10 of 12 blocks")
    job_folder.write_status(job.directory, status.model_copy(update={"host": "elsewhere", "progress": phase}))
    stopped: list[str] = []
    monkeypatch.setattr(job_processes, "stop", lambda run: stopped.append(run.run_id))
    app = open_page("export", run="one")
    assert not app.exception
    shown = words(app)
    assert "Writing 10 of 12 blocks" in shown
    assert "/somewhere/\\*here\\*" in shown
    assert next(button for button in app.button if button.label == WRITE).disabled
    press(app, "Stop")
    assert stopped == ["one"]


def test_what_an_export_left_behind_is_shown(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    job = export_job(run, JobState.FINISHED)
    left = [{"name": "run.sh", "why": "it is a program"}]
    made = proof(checked=["the *defaults* are equal"], left_behind=left, notes=["Block 8 is now block 7."])
    job_folder.write_result(job.directory, {"out": "/home/me/small", "proof": made.model_dump(mode="json")})
    app = open_page("export", run="one")
    assert not app.exception
    assert "The \\*defaults\\* are equal" in words(app)
    assert [each.value for each in app.info] == ["Block 8 is now block 7."]
    assert [frame.value.to_dict("list") for frame in app.dataframe] == [
        {"File": ["run.sh"], "Reason": ["it is a program"]}
    ]


def test_a_failed_export_shows_its_sentence_and_its_log(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    job = export_job(run, JobState.FAILED, "The disk is *full*.")
    (job.directory / "log.txt").write_text("INFO it began\nERROR it ended")
    app = open_page("export", run="one")
    assert [each.value for each in app.error] == ["The disk is \\*full\\*."]
    assert any("ERROR it ended" in each.value for each in app.code)
    assert not next(button for button in app.button if button.label == WRITE).disabled


def test_the_proof_of_the_newest_finished_export(runs: Path, tmp_path: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    (tmp_path / "there").mkdir()
    for out, made in [("missing", proof(blocks_after=11)), ("there", proof())]:
        job = export_job(run, JobState.FINISHED, out=str(tmp_path / out))
        job_folder.write_result(job.directory, {"out": str(tmp_path / out), "proof": made.model_dump(mode="json")})
    export_job(run, JobState.STOPPED, "Stopped on request.")
    app = open_page("export", run="one")
    assert not app.exception
    facts = {each.label: (each.value, each.delta) for each in app.metric}
    assert facts["Blocks"][0] == "12 → 10"
    assert facts["Parameters"] == ("200.0 → 150.0 M", "−25.0%")
    assert facts["Weights on disk"][0] == "300 MB"
    shown = words(app)
    assert "exactly those" in shown
    assert "equal with the KV cache, without it" in shown
    assert "it was moved or deleted" not in shown
    assert "Stopped on request" in shown  # the newest of all
    assert str(tmp_path / "there") in [each.value for each in app.code]
    assert exported_model.snippet(tmp_path / "there").strip() in [each.value for each in app.code]
    (tmp_path / "there").rmdir()
    assert "it was moved or deleted" in words(app.run())


def test_a_result_that_cannot_be_read_is_no_crash(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    job = export_job(run, JobState.FINISHED)
    (job.directory / "result.json").write_text(json.dumps({"out": 3}))
    app = open_page("export", run="one")
    assert not app.exception
    assert finished_exports.read_exports(run_folder.load("one")) == []


def test_swaps_are_steps_that_remove_no_more_blocks(runs: Path, started: list[Job]) -> None:
    run = write_run(runs / "refined", 12, 4, swap=True)
    assert run.trace is not None
    app = open_page("export", run="refined")
    assert not app.exception
    assert (app.slider(key="steps").value, app.slider(key="steps").label) == (6, "After how many steps")
    assert {each.label: each.value for each in app.metric}["Blocks kept"] == "8 of 12"
    assert app.text_input[0].value == "~/sleb-exports/refined-4-removed-2-swapped"
    assert json.loads(app.code[0].value)["removal_list"] == list(run.removal_list)
    app.slider(key="steps").set_value(4).run()
    assert app.text_input[0].value == "~/sleb-exports/refined-4-removed"
    assert json.loads(app.code[0].value)["removal_list"] == list(run.trace.steps[3].removal_list)
    export_job(run, JobState.FAILED, steps=3)
    export_job(run, JobState.STOPPED, steps=6)
    app = open_page("export", run="refined")
    assert not app.exception
    (table,) = [each.value for each in app.dataframe if "Folder" in each.value]
    assert list(table["Removed"]) == [4, 3]
