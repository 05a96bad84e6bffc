"""The Runs page as a script: what it shows and what its buttons do to the store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import data, page
from app.panels import run_form
from app.wording import plain
from sleb import specs
from sleb.errors import CalibrationError, RunError
from sleb.records import Job, JobState, Method
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import job_processes
from tests.support.dashboard import ROOT, open_page, press, words
from tests.support.runs.stores import write_many, write_run


def labels(app) -> list[str]:  # type: ignore[no-untyped-def]
    return [button.label for button in app.button]


def test_an_empty_store_shows_the_recorded_sample(runs: Path) -> None:
    app = open_page("runs")
    assert not app.exception
    table = app.dataframe[0].value
    assert set(table["State"]) == {"Sample"}
    assert set(table["Method"]) == {"Metric3 (SLEB)", "Metric2", "Metric1", "Early exit", "Best chunk"}
    shown = words(app)
    assert "12 of 30" in shown
    assert "\\[17, 18, 16" in shown or "[17, 18, 16" in shown
    assert "Run the demo" in labels(app)
    assert not {"Delete", "Resume", "Stop"} & set(labels(app))  # a sample is to be looked at


def test_runs_are_listed_newest_first_with_what_they_found(runs: Path) -> None:
    write_run(runs / "old", 12, 3, model="org/one", method=Method.METRIC2)
    write_run(runs / "new", 32, 5, model="/models/<b>two")
    os.utime(runs / "old" / "spec.json", (1, 1))
    app = open_page("runs")
    table = app.dataframe[0].value
    own = table[table["State"] != "Sample"]
    assert list(own["Run"]) == ["new", "old"]
    assert list(own["Removed"]) == [5, 3]
    assert list(own["Method"]) == ["Metric3 (SLEB)", "Metric2"]
    run = run_folder.load("new")
    assert run.trace is not None
    assert own["After"].iloc[0] == pytest.approx(run.trace.steps[-1].perplexity)
    assert own["Removal list"].iloc[0] == ", ".join(map(str, run.removal_list))
    assert "±" in own["Held-out"].iloc[0]
    assert "\\<b\\>two" in words(app)  # as text


def test_a_failed_run_shows_its_sentence_and_its_log(runs: Path) -> None:
    sentence = "The disk is full: x could not be written."
    write_run(runs / "failed", 12, 4, done=2, state=JobState.FAILED, message=sentence)
    app = open_page("runs", run="failed")
    assert [each.value for each in app.error] == [sentence.replace(":", "\\:")]
    assert any(sentence in each.value for each in app.code)
    assert "Resume" in labels(app)


def test_resume_goes_on_as_the_last_try_did(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(runs / "stopped", 12, 4, done=2, state=JobState.STOPPED)
    spec = specs.job_spec("search", "cpu", 3, processes=2, memory_budget=10**9, speedups="off")
    last = job_folder.create_job(run.run_dir, spec)
    job_folder.write_status(last.directory, run_folder.load(run.run_dir).jobs[0].status)
    started: list[Job] = []
    monkeypatch.setattr(job_processes, "start", lambda job, permissions: started.append(job))
    app = open_page("runs", run="stopped")
    press(app, "Resume")
    assert not app.exception
    assert [job.spec for job in started] == [spec]


def test_an_unreadable_run_is_named_and_hides_no_other(runs: Path) -> None:
    write_run(runs / "good", 12, 2)
    write_run(runs / "bad", 12, 2)
    (runs / "bad" / "spec.json").write_text("{")
    app = open_page("runs")
    assert any("damaged" in each.value for each in app.warning)
    assert "good" in list(app.dataframe[0].value["Run"])


@pytest.mark.parametrize("run_id", ["../../etc", "/etc", "nowhere", ".hidden", "a/../b", "x" * 300])
def test_a_run_id_from_the_url_cannot_leave_the_store(run_id: str, home: Path) -> None:
    (home / "etc").mkdir()
    (home / "etc" / "spec.json").write_text("{}")
    with pytest.raises(RunError, match="is not in"):
        data.folder_of(run_id)
    app = open_page("runs", run=run_id)
    assert not app.exception
    assert any("is not in" in each.value for each in app.warning)
    assert "12 of 30" in words(app)


def test_the_demo_is_started_by_one_click(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(
        job_processes, "start", lambda job, permissions: started.append(job.directory)
    )  # its process is tested elsewhere
    app = open_page("runs")
    press(app, "Run the demo")
    (directory,) = started
    run = run_folder.load(directory.parent.parent)
    assert (run.spec.model, run.spec.ratio, run.jobs[0].spec.kind) == ("demo", 0.1, "search")
    assert app.query_params["run"] in (run.run_id, [run.run_id])


def test_the_form_asks_for_what_it_says(runs: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    monkeypatch.setattr(job_processes, "start", lambda job, permissions: None)
    app = open_page("runs")
    app.toggle(key="form").set_value(True).run()
    assert "20,392 block evaluations" in words(app)  # the demo's, counted before anything runs
    app.text_input(key="new-model").set_value("org/other").run()
    app.selectbox(key="new-amount").set_value("remove").run()
    app.number_input(key="new-remove").set_value(5).run()
    app.selectbox(key="new-source").set_value("other").run()
    assert any("Name the file or data set" in each.value for each in app.error)
    assert "Start" not in labels(app)
    app.text_input(key="new-other").set_value(str(text_file)).run()
    app.text_input(key="new-protect").set_value("0, 3").run()
    app.number_input(key="new-sequences").set_value(9).run()
    press(app, "Start")
    (run,) = [each for each in run_folder.list_runs() if not isinstance(each, RunError)]
    assert run.spec.model == "org/other"
    assert (run.spec.num_remove, run.spec.protected) == (5, (0, 3))
    assert run.spec.calibration.source == str(text_file)
    assert (run.spec.calibration.sequences, run.spec.calibration.sequence_length) == (9, 2048)


def test_the_form_asks_for_swaps_after_metric3_only(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_processes, "start", lambda job, permissions: None)
    app = open_page("runs")
    app.toggle(key="form").set_value(True).run()
    without = next(line for line in words(app).splitlines() if "block evaluations" in line)
    app.checkbox(key="new-refine").set_value(True).run()
    assert without not in words(app)
    assert "one round of swaps is counted" in words(app)
    assert "--refine=swap" in "".join(each.value for each in app.code)
    app.selectbox(key="new-method").set_value("metric2").run()
    assert app.checkbox(key="new-refine").disabled
    assert not app.error
    assert "--refine" not in "".join(each.value for each in app.code)
    app.selectbox(key="new-method").set_value("metric3").run()
    press(app, "Start")
    (run,) = [each for each in run_folder.list_runs() if not isinstance(each, RunError)]
    assert run.spec.refine == "swap"
    app = open_page("runs", run=run.run_id)
    press(app, "Duplicate")
    assert next(each for each in app.checkbox if each.label == "Refine by swaps").value


def test_bad_choices_get_a_sentence_and_no_start_button(runs: Path) -> None:
    app = open_page("runs")
    app.toggle(key="form").set_value(True).run()
    app.text_input(key="new-protect").set_value("first").run()
    assert any("“Protected blocks” takes block indices" in each.value for each in app.error)
    assert "Start" not in labels(app)
    app.text_input(key="new-protect").set_value("").run()
    app.selectbox(key="new-amount").set_value("remove").run()
    app.number_input(key="new-remove").set_value(29).run()
    assert any("Asked to remove 29 of 30" in each.value for each in app.error)


def test_a_run_is_duplicated_with_its_choices(runs: Path) -> None:
    run = write_run(runs / "first", 12, 3, method=Method.BEST_CHUNK, model="org/one", seed=5)
    app = open_page("runs", run="first")
    press(app, "Duplicate")
    shown = {each.label: each.value for each in (*app.text_input, *app.selectbox, *app.number_input)}
    assert shown["Model"] == "org/one"
    assert shown["Method"] == "best-chunk"
    assert shown["Blocks"] == run.spec.num_remove == 3
    assert shown["Seed"] == 5


def test_delete_asks_before_it_does(runs: Path) -> None:
    write_run(runs / "kept", 12, 3)
    app = open_page("runs", run="kept")
    press(app, "Delete")
    assert {"Delete for good", "Keep it"} <= set(labels(app))  # what they do: test_story_in_browser.py
    assert (runs / "kept").exists()
    app.run()  # other drawings of the page keep the question
    press(app, "Keep it")
    assert not {"Delete for good", "Keep it"} & set(labels(app))
    app.run()
    assert "Keep it" not in labels(app)
    press(app, "Delete")
    press(app, "Delete for good")
    assert not (runs / "kept").exists()
    assert "Keep it" not in labels(app)


def test_nothing_in_a_browser_turns_on_pickle_or_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.permissions() == {"allow_pickle": False, "trust_remote_code": False}
    assert not data.job_spec("search").trust_remote_code
    monkeypatch.setenv("SLEB_DASHBOARD_TRUST_REMOTE_CODE", "1")
    assert data.job_spec("search").trust_remote_code
    assert not data.job_spec("search").allow_pickle


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"  \n", "no text"),
        ("a.txt", b"a\0b", "no text"),
        ("a.txt", b"x" * (run_form.UPLOAD_BYTES + 1), "at most 8 MB"),
        ("a.jsonl", b'{"text": "a"}\nnonsense', "Line 2"),
        ("a.jsonl", b"[1]", "not a JSON object"),
    ],
)
def test_an_upload_is_checked(name: str, content: bytes, sentence: str, home: Path) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        run_form.keep_upload(name, content)
    assert not (home / "uploads").exists()


def test_an_upload_keeps_no_name_from_outside(home: Path) -> None:
    path = run_form.keep_upload("../../etc/passwd.txt", b"some text")
    assert path.parent == home / "uploads"
    assert path.read_text() == "some text"
    assert run_form.keep_upload("b.jsonl", b'{"text": "some text"}\n').suffix == ".jsonl"


def test_of_more_runs_than_are_drawn_the_newest_are_and_any_is_found(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_many(runs, 8, 6, 2)
    monkeypatch.setattr(page, "MOST_SHOWN", 3)
    app = open_page("runs")
    assert not app.exception
    samples = 5
    assert list(app.dataframe[0].value["Run"])[:4][:3] == ["run-0000", "run-0001", "run-0002"]
    assert len(app.dataframe[0].value) == 3 + samples
    assert "8 of 13 runs, the newest first." in words(app)
    app.text_input(key="find-run").input("0006 Metric3").run()
    assert list(app.dataframe[0].value["Run"]) == ["run-0006"]
    assert "1 of 1 matching runs" in words(app)
    steps = open_page("steps", run="run-0006")
    assert not steps.exception
    offered = steps.selectbox[0].options
    assert len(offered) == 3 + 1 + samples
    assert steps.selectbox[0].value == "run-0006"


def test_hundreds_of_runs_are_listed(runs: Path) -> None:
    write_many(runs, 120)
    assert len(data.outlines()) == 125  # and five samples


@pytest.mark.parametrize("page", ["runs", "similarity", "alignment", "steps", "compare", "evaluate", "export"])
def test_opening_a_page_never_imports_torch(page: str, home: Path) -> None:
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.support.dashboard import open_page\n"
        f"app = open_page({page!r})\nassert not app.exception, app.exception\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_the_configuration_is_in_force_from_any_directory(folder: Path) -> None:
    """A link that is broken, or was checked out as a file, would be ignored without a word."""
    code = (
        f"import sys; sys.argv = ['streamlit', 'run', {str(ROOT / 'app' / 'main.py')!r}]\n"
        "from streamlit import config\nfrom streamlit.web import bootstrap\n"
        f"config._main_script_path = {str(ROOT / 'app' / 'main.py')!r}\nbootstrap.load_config_options({{}})\n"
        "print(config.get_option('server.address'), config.get_option('theme.light.primaryColor'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.split() == ["localhost", "#0b6aa8"], done.stderr


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("see https://evil.example/x", "://e"),
        ("www.evil.example", "www.e"),
        ("write to a@b.example", "a@b"),
        (":material/home: and :red[x]", ":m"),
        ("a -> b >= c", "->"),
    ],
)
def test_foreign_text_is_shown_as_text(text: str, never: str) -> None:
    shown = plain(text)
    assert never not in shown.replace("\\", "")
    assert shown.replace("\\", "").replace("\N{WORD JOINER}", "") == text


def test_foreign_markup_is_escaped() -> None:
    assert plain("<b>*x*</b> $y$ [a](b)") == r"\<b\>\*x\*\</b\> \$y\$ \[a\]\(b\)"


def test_two_processes_for_one_run_leave_one_job(runs: Path) -> None:
    """Resume pressed in two tabs at once: who comes second takes its job back."""
    run = write_run(runs / "stopped", 12, 4, done=2, state=JobState.STOPPED)
    second = job_folder.create_job(run.run_dir, data.job_spec("search"))
    with job_processes.lock_of(run.run_dir):
        done = subprocess.run(
            [sys.executable, "-m", "sleb", "work", str(second.directory)], capture_output=True, text=True, cwd=ROOT
        )
    assert done.returncode == 2
    assert "is being executed" in done.stderr
    assert [job.name for job in run_folder.load("stopped").jobs] == ["1-search"]
    assert job_processes.state_of(run_folder.load("stopped")) is JobState.STOPPED
