"""The dashboard's main story in a real browser: sample, live run, stepping, clicking, downloads, stop and resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from sleb.formats.list_formats import FORMATS, render
from sleb.records import JobState
from sleb.runtime import run_folder
from sleb.runtime.processes import job_processes
from tests.support import browser, tiny
from tests.support.runs.stores import write_run

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no browser found: python -m tests.support.browser gets one"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that the server and all tests of this file share."""
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with browser.server(place) as address:
        yield address


@pytest.fixture
def tab(address: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[browser.Tab]:
    monkeypatch.setenv("SLEB_HOME", str(place))
    with browser.tab(address, accept_downloads=True) as tab:
        yield tab
        assert tab.said == []


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(tiny.text(800_000))
    return path


def fill(tab: browser.Tab, **fields: str) -> None:
    for label, value in fields.items():
        box = tab.page.get_by_label(label.replace("_", " "), exact=True)
        box.fill(value)
        box.press("Enter")
        tab.idle()


def choose(tab: browser.Tab, label: str, option: str) -> None:
    tab.page.get_by_role("combobox", name=label).click()
    tab.page.get_by_role("option", name=option).click()
    tab.idle()


def start(tab: browser.Tab, model: Path, text: Path, **more: str) -> str:
    """Fill the form and start; the id of the run."""
    tab.open("/")
    tab.page.get_by_text("New run").click()
    tab.idle()
    fill(tab, Model=str(model))
    choose(tab, "Remove", "A number of blocks")
    fill(tab, Blocks="2")
    choose(tab, "Calibration text", "A file on the server")
    fill(tab, File_or_data_set=str(text))
    tab.page.get_by_text("More choices").click()
    fill(tab, **({"Sequences": "8", "Tokens_each": "32"} | more))
    before = tab.page.url
    tab.page.get_by_role("button", name="Start", exact=True).click()
    tab.page.wait_for_url(lambda url: url != before)
    return tab.page.url.split("run=")[1].split("&")[0]


def state(run_id: str) -> JobState:
    return job_processes.state_of(run_folder.load(run_id))


def test_the_first_paint_shows_the_recorded_sample(tab: browser.Tab) -> None:
    tab.open("/")
    tab.shows("Recorded sample")
    tab.shows("12 of 30")
    assert "run=sample-smollm2-135m-metric3" in tab.page.url


def test_a_live_run_is_started_and_watched_to_its_end(tab: browser.Tab, tiny_model: Path, text_file: Path) -> None:
    run_id = start(tab, tiny_model, text_file)
    tab.shows("Finished", browser.FOR_JOBS)
    tab.shows("2 of 6")
    run = run_folder.load(run_id)
    assert state(run_id) is JobState.FINISHED
    tab.shows(str(list(run.removal_list)))


def test_a_run_survives_a_reload_and_is_stopped_and_resumed(
    tab: browser.Tab, tiny_model: Path, long_text: Path
) -> None:
    run_id = start(tab, tiny_model, long_text, Sequences="4000", Tokens_each="64")
    tab.shows("Step 1 of 2", browser.FOR_JOBS)
    tab.page.reload()
    tab.idle()
    tab.shows("of 2")
    tab.page.get_by_role("button", name="Stop", exact=True).click()
    resume = tab.page.get_by_role("button", name="Resume", exact=True)
    resume.wait_for(timeout=1000 * browser.FOR_JOBS)
    assert state(run_id) is JobState.STOPPED
    tab.until(resume, resume, "detached")
    tab.shows("Finished", browser.FOR_JOBS)
    assert [job.spec.kind for job in run_folder.load(run_id).jobs] == ["search", "search"]
    assert len(run_folder.load(run_id).removal_list) == 2


def test_the_form_remembers_what_it_does_not_show(tab: browser.Tab) -> None:
    def holds(label: str, value: str) -> None:  # what has just been drawn is empty for a moment
        expect(tab.page.get_by_label(label, exact=True)).to_have_value(value)

    tab.open("/")
    tab.page.get_by_text("New run").click()
    tab.idle()
    tab.page.get_by_text("More choices").click()
    holds("Confidence, per cent", "95")
    fill(tab, Sequences="9")
    choose(tab, "Calibration text", "Upload a text")
    tab.shows("Choose a text to upload.")
    choose(tab, "Calibration text", "The default text")
    tab.page.get_by_role("button", name="Start", exact=True).wait_for()
    holds("Confidence, per cent", "95")
    tab.page.get_by_text("New run").click()
    tab.idle()
    tab.page.get_by_text("New run").click()
    tab.idle()
    tab.page.get_by_text("More choices").click()
    holds("Confidence, per cent", "95")
    holds("Sequences", "9")


def test_a_run_is_duplicated_into_the_form(tab: browser.Tab, place: Path) -> None:
    write_run(place / "runs" / "pattern", 12, 3, model="org/pattern")
    tab.open("/?run=pattern")
    tab.page.get_by_role("button", name="Duplicate", exact=True).click()
    box = tab.page.get_by_label("Model", exact=True)
    box.wait_for()
    assert box.input_value() == "org/pattern"


def test_runs_from_elsewhere_appear_by_themselves(tab: browser.Tab, place: Path) -> None:
    write_run(place / "runs" / "watched", 12, 4, done=2, state=JobState.STOPPED)
    tab.open("/?run=watched")
    tab.shows("2 of 12")
    with (place / "runs" / "watched" / "trace.jsonl").open() as trace:
        lines = trace.readlines()
    assert len(lines) == 3
    (place / "runs" / "watched" / "trace.jsonl").write_text("".join(lines[:2]))
    tab.shows("1 of 12")


def test_steps_are_walked_with_the_keyboard(tab: browser.Tab) -> None:
    tab.open("/steps?run=sample-smollm2-135m-metric3&step=3")
    where, stepper = tab.page.locator(".stepper .where"), tab.page.locator(".stepper")
    expect(where).to_have_text("Step 3 of 12")
    stepper.evaluate("node => { node.marked = true; }")
    tab.page.keyboard.press("ArrowRight")
    assert where.inner_text() == "Step 4 of 12"  # at once, without the server
    tab.page.wait_for_url("**step=4*")
    tab.shows("All candidates of step 4")
    tab.page.keyboard.press("End")
    assert where.inner_text() == "Step 12 of 12"
    tab.page.wait_for_url("**step=12*")
    tab.page.keyboard.press("Home")
    assert where.inner_text() == "Before step 1 of 12"
    tab.page.wait_for_url("**step=0*")
    tab.page.keyboard.press(" ")
    tab.page.get_by_role("button", name="Pause").wait_for()
    tab.shows("Step 2 of 12")
    tab.page.keyboard.press(" ")
    tab.page.get_by_role("button", name="Play").wait_for()
    tab.page.wait_for_url(lambda url: "step=0" not in url)  # the address follows once it rests
    assert stepper.evaluate("node => node.marked")  # the same node all along
    tab.page.reload()
    tab.idle()
    expect(where).to_have_text(f"Step {tab.page.url.split('step=')[1].split('&')[0]} of 12")


def test_a_live_run_grows_under_the_eyes_of_whoever_watches(
    tab: browser.Tab, tiny_model: Path, long_text: Path
) -> None:
    run_id = start(tab, tiny_model, long_text, Sequences="1200", Tokens_each="64")
    tab.open(f"/steps?run={run_id}")
    where = tab.page.locator(".stepper .where").filter(has_text="Step 2 of 2")
    where.wait_for(
        timeout=1000 * browser.FOR_JOBS
    )  # the state of the job says so already while the step is searched for
    assert len(run_folder.load(run_id).removal_list) == 2


def test_every_export_is_downloaded_as_it_is_rendered(tab: browser.Tab, place: Path) -> None:
    run = write_run(place / "runs" / "exported", 12, 4, model="org/exported")
    tab.open("/export?run=exported&steps=3")
    labels = {"json": "JSON", "csv": "CSV", "list": "Plain list", "sleb": "SLEB", "mergekit": "mergekit"}
    for name in FORMATS:
        label = labels.get(name, "llama.cpp")
        tab.page.get_by_test_id("stButtonGroup").get_by_text(label, exact=True).click()
        tab.idle()
        expected, limit = render(run, name, 3), time.monotonic() + browser.PATIENCE
        while (shown := tab.download("Download")) != expected and time.monotonic() < limit:
            tab.page.wait_for_timeout(100)  # the button is there before its file is
        assert shown == expected, name
    report = tab.download("Download the report")
    assert str(list(run.removal_list[:3])) in report
    assert "org/exported" in report


def test_a_run_is_deleted_when_asked_twice(tab: browser.Tab, place: Path) -> None:
    write_run(place / "runs" / "unwanted", 12, 3)
    tab.open("/?run=unwanted")
    tab.count_runs()
    for answer in ("Keep it", "Delete for good"):
        assert (place / "runs" / "unwanted").exists()
        button = tab.page.get_by_role("button", name=answer)
        tab.page.get_by_role("button", name="Delete", exact=True).click()
        button.wait_for()
        tab.drawn_anew(tab.runs + 2)  # as it always is, and the question is still there
        button.click()
        button.wait_for(state="detached")
    tab.page.wait_for_url(lambda url: "run=unwanted" not in url)
    assert not (place / "runs" / "unwanted").exists()
    tab.page.reload()
    tab.idle()
    assert button.count() == 0


def test_a_question_that_is_closed_is_not_asked_again(tab: browser.Tab, place: Path) -> None:
    write_run(place / "runs" / "wanted", 12, 3)
    tab.open("/?run=wanted")
    answer = tab.page.get_by_role("button", name="Keep it")
    tab.page.get_by_role("button", name="Delete", exact=True).click()
    answer.wait_for()
    tab.page.keyboard.press("Escape")
    answer.wait_for(state="detached")
    tab.page.get_by_text("New run").click()  # draws the whole page again
    tab.page.get_by_label("Model", exact=True).wait_for()
    tab.idle()
    assert answer.count() == 0
    assert (place / "runs" / "wanted").exists()
