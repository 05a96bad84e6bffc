"""Pages of a server that others reach: what they offer, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from sleb.records import Job, JobState
from tests.support.dashboard import Allow, open_page, press, started_with, words
from tests.support.runs import judged
from tests.support.runs.stores import write_run

STARTING = {
    "Run the demo", "New run", "Resume", "Stop", "Duplicate", "Delete", "Start", "Estimate the time", "Evaluate",
    "Time it", "Generate", "Quantise", "Heal", "Measure both", "Write the smaller model", "Replace an earlier export",
}  # fmt: skip


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allow]:
    with started_with(monkeypatch) as start:
        yield start


def labels(app: AppTest) -> set[str]:
    return {each.label for each in (*app.button, *app.toggle)}


def text_of(app: AppTest) -> str:
    return words(app).replace("\\", "").replace("\N{WORD JOINER}", "")


def test_the_form_takes_paths_below_the_folders_only_and_says_which(
    allow: Allow, started: list[Job], tiny_model: Path, text_file: Path
) -> None:
    allow()
    app = open_page("runs")
    app.toggle(key="form").set_value(True).run()
    app.text_input(key="new-model").set_value(str(tiny_model)).run()
    assert "--allow-path DIR" in text_of(app)
    assert "Start" not in labels(app)
    assert "--allow-path DIR" in app.text_input(key="new-model").help
    allow(tiny_model)
    app.run()
    assert "Start" in labels(app)
    assert str(tiny_model) in app.text_input(key="new-model").help.replace("\\", "")
    app.selectbox(key="new-source").set_value("other").run()
    app.text_input(key="new-other").set_value(str(text_file)).run()
    assert "is not below" in text_of(app)
    assert "Start" not in labels(app)
    allow(tiny_model, text_file.parent)
    app.run()
    press(app, "Start")
    assert [job.spec.kind for job in started] == ["search"]


def test_an_export_goes_below_the_folders_only(allow: Allow, home: Path, started: list[Job], tmp_path: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 3, model="org/model")
    write = "Write the smaller model"
    allow()
    app = open_page("export", run="one")
    assert next(each for each in app.button if each.label == write).disabled
    assert "--allow-path DIR" in text_of(app)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("mine")
    allow(tmp_path / "allowed")
    app = open_page("export", run="one")
    assert app.text_input[0].value == f"{tmp_path}/allowed/one-3-removed"
    for name in ("secret", "allowed/../secret", "nowhere"):  # no word on what is there
        app.text_input[0].set_value(f"{tmp_path}/{name}").run()
        press(app, write)
        assert "is not below" in text_of(app)
    assert started == []
    app.text_input[0].set_value(f"{tmp_path}/allowed/new").run()
    press(app, write)
    assert [job.spec.out for job in started] == [f"{tmp_path}/allowed/new"]
    assert run.run_dir == started[0].directory.parent.parent


def test_an_evaluation_reads_below_the_folders_only(
    allow: Allow, home: Path, started: list[Job], text_file: Path
) -> None:
    write_run(home / "runs" / "one", 12, 3, model="org/model")
    allow()
    app = open_page("evaluate", run="one")
    app.multiselect(key="evaluate-texts-one").set_value(["wikitext2", str(text_file)]).run()
    press(app, "Evaluate")
    assert "--allow-path DIR" in text_of(app)
    assert started == []
    allow(text_file.parent)
    press(app, "Evaluate")
    assert len(started) == 1


def test_a_run_of_a_model_elsewhere_is_shown_and_does_not_go_on(
    allow: Allow, home: Path, started: list[Job], tiny_model: Path
) -> None:
    write_run(home / "runs" / "one", 12, 4, model=str(tiny_model), done=2, state=JobState.STOPPED)
    allow()
    app = open_page("runs", run="one")
    assert "2 of 12" in text_of(app)
    press(app, "Resume")
    assert "--allow-path DIR" in text_of(app)
    assert started == []


def test_a_link_in_the_runs_folder_is_named_and_not_followed(allow: Allow, home: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "secret", 12, 3, model="org/secret-model")
    (home / "runs").mkdir()
    (home / "runs" / "linked").symlink_to(tmp_path / "secret")
    allow()
    for page in ("runs", "steps", "export", "compare"):
        app = open_page(page, run="linked", runs="linked")
        assert not app.exception
        assert "secret-model" not in text_of(app)
    assert "leads out of the folders" in text_of(open_page("runs", run="linked"))


@pytest.mark.parametrize("page", ["runs", "evaluate", "export"])
def test_a_dashboard_that_only_shows_offers_nothing_else(page: str, allow: Allow, home: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 4, done=2, state=JobState.STOPPED)
    judged.keep(run, judged.everything(run))
    allow(address="localhost", read_only=True)
    app = open_page(page, run="one")
    assert not app.exception
    assert not STARTING & labels(app)
    for tab in ("Side by side", "Another calibration set", "Quantise", "Heal") if page == "evaluate" else ():
        app.session_state["show"] = tab
        app.run()
        assert not app.exception
        assert not STARTING & labels(app)
    if page in ("evaluate", "export"):
        assert "--read-only" in text_of(app)
    if page == "export":
        assert {"Download", "Download the report"} <= {each.label for each in app.get("download_button")}
