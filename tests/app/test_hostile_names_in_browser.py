"""A run folder whose every text is markup, in a real browser: nothing of it becomes HTML, a link, or a request.

Every page, every tab, labels and hover texts of the charts, the question before names are read, and the HTML report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleb.records import JobState
from sleb.report import build
from sleb.runtime import findings_folder, job_folder, origin, run_folder
from tests.support import browser
from tests.support.exports import export_job, proof
from tests.support.runs import judged
from tests.support.runs.stores import write_run

pytestmark = browser.NEEDED

EVIL = (
    '<img src=x onerror="window.hacked=1">[x](javascript:window.hacked=1)<a href="https://evil.example/a">a</a>'
    "[b](https://evil.example/b)![c](https://evil.example/c.png)<b>bold</b>**bold** https://evil.example/d :red[e]"
)
SHORT = "<b>bold</b>"
"""Where a chart would cut a longer one."""
CHOSEN = {
    "kind", "state", "sampling", "bos", "objective", "search", "refine", "speedups", "shape", "scheme", "how", "method",
    "format", "scoring", "out", "question", "dtype",
}  # fmt: skip
"""Fields that take one of a few words, or that the test needs."""
FOREIGN_PARTS = """() => {
  const found = [], roots = [document];
  while (roots.length) for (const node of roots.pop().querySelectorAll("*")) {
    if (node.shadowRoot) roots.push(node.shadowRoot);
    for (const name of ["src", "href", "xlink:href", "srcdoc", "data"]) {
      const value = node.getAttribute(name) || "";
      if (value === "x" || /evil[.]example|javascript:/i.test(value)) found.push(node.outerHTML.slice(0, 300));
    }
    const weight = node.style && node.style.fontWeight;
    if (/^(B|STRONG)$/.test(node.tagName) || weight === "bold")
      if (node.textContent.trim() === "bold") found.push(node.outerHTML.slice(0, 300));
  }
  return window.hacked ? ["hacked", ...found] : found;
}"""


def poisoned(value: Any, key: str = "") -> Any:
    """The same with every text replaced."""
    if isinstance(value, dict):
        return {name: poisoned(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, key) for each in value]
    if not isinstance(value, str) or key in CHOSEN:
        return value
    return SHORT if key in ("name", "task") else f"{EVIL} {key}"


def poison(run_dir: Path) -> None:
    for path in [*run_dir.rglob("*.json"), *run_dir.rglob("*.jsonl")]:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        changed = [json.dumps(_as_valid(poisoned(json.loads(line)), json.loads(line))) for line in lines]
        path.write_text("\n".join(changed) + "\n")
    for path in run_dir.rglob("*.txt"):
        path.write_text(EVIL)


def _as_valid(value: Any, before: Any) -> Any:
    """A spec has one of few dtypes."""
    if "calibration" in before:
        value["dtype"] = before["dtype"]
    return value


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that pages show, another of the same weights, a failed and a stopped one."""
    home = tmp_path_factory.mktemp("hostile")
    for name, seed in (("one", 0), ("two", 1)):
        run = write_run(home / "runs" / name, 12, 4, seed=seed)
        judged.keep(run, judged.everything(run))
        for reasons in ((), ("some reason",)):
            job = export_job(run, JobState.FINISHED, message="some message")
            made = proof(passed=not reasons, reasons=reasons).model_dump(mode="json")
            job_folder.write_result(job.directory, {"out": EVIL, "proof": made})
        export_job(run, JobState.FAILED, message="some message")
        poison(run.run_dir)
    path = home / "runs" / "two" / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": SHORT}))
    write_run(home / "runs" / "failed", 12, 4, done=2, state=JobState.FAILED, message="a message")
    write_run(home / "runs" / "stopped", 12, 4, done=2, state=JobState.STOPPED, message="a message")
    for name in ("failed", "stopped"):
        poison(home / "runs" / name)
    damaged = write_run(home / "runs" / "damaged", 12, 2)
    (damaged.run_dir / "spec.json").write_text(json.dumps({"model": EVIL, EVIL: 1}))
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with browser.server(home) as address:
        yield address


@pytest.fixture(scope="module")
def tab(address: str) -> Iterator[browser.Tab]:
    """One browser for all of them."""
    with browser.tab(address) as tab:
        tab.page.on("request", lambda request: tab.said.append(request.url) if is_evil(request.url) else None)
        tab.page.on("dialog", lambda dialog: tab.said.append(dialog.message))
        yield tab


def is_evil(url: str) -> bool:
    return "evil.example" in url.partition("?")[0]


def clean(tab: browser.Tab) -> None:
    """Nothing on the page, and nothing asked for, in the console, or in a dialog of the browser."""
    assert tab.page.evaluate(FOREIGN_PARTS) == []
    assert tab.said == []


def hover_over_charts(tab: browser.Tab) -> int:
    """Bring up hover texts, and check each; how many there were."""
    seen = 0
    for chart in tab.page.locator(".js-plotly-plot").all():
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        assert box is not None
        for across in (0.2, 0.7):
            tab.page.mouse.move(box["x"] + across * box["width"], box["y"] + 0.4 * box["height"], steps=2)
            tab.page.wait_for_timeout(100)
            seen += tab.page.locator(".hoverlayer text").count() > 0
            clean(tab)
    return seen


def test_the_run_loads_and_what_is_looked_for_would_be_found(home: Path, tab: browser.Tab) -> None:
    """Else the other tests would look at an empty page, or not see what is there."""
    run = run_folder.load(home / "runs" / "one")
    assert EVIL in run.spec.model
    assert run.stack is not None
    assert EVIL in run.stack.text
    assert len(findings_folder.findings(run.run_dir)) > 20
    assert EVIL in run.jobs[-1].status.message
    tab.page.set_content('<a href="https://evil.example/a">a</a><img src=x><b>bold</b>')
    assert len(tab.page.evaluate(FOREIGN_PARTS)) == 3
    tab.page.goto("about:blank")
    tab.said.clear()


@pytest.mark.parametrize("page", ["runs", "similarity", "alignment", "steps", "compare", "export"])
def test_no_page_makes_anything_of_it(page: str, tab: browser.Tab) -> None:
    for run in ("one", "failed") if page == "runs" else ("one",):
        tab.open(f"/{page.removeprefix('runs')}?run={run}&runs=one,two,[x](https://evil.example/y)")
        tab.page.get_by_text("evil" if page != "compare" else "<b>bold").first.wait_for(state="attached")
        tab.page.wait_for_timeout(200)
        clean(tab)
    if page in ("similarity", "alignment", "compare"):
        tab.page.locator(".js-plotly-plot .main-svg").first.wait_for()
        assert hover_over_charts(tab) or page != "compare"


def test_no_tab_of_evaluate_makes_anything_of_it(tab: browser.Tab) -> None:
    tab.open("/evaluate?run=one")
    tab.page.locator(".scatterlayer .trace").first.wait_for(state="attached")
    clean(tab)
    assert hover_over_charts(tab)
    for name in ("Side by side", "Another calibration set", "Quantise", "Heal"):
        tab.page.get_by_role("tab", name=name).click()
        tab.idle()
        tab.page.wait_for_timeout(300)
        clean(tab)


def test_the_question_before_names_are_read_shows_text(tab: browser.Tab, home: Path) -> None:
    tab.open("/?run=stopped")
    dialog = tab.page.get_by_role("dialog")
    tab.until(tab.page.get_by_role("button", name="Resume"), dialog)
    dialog.get_by_text("<img src=x").first.wait_for()
    clean(tab)
    dialog.get_by_role("button", name="Leave it").click()
    dialog.wait_for(state="hidden")
    assert origin.unconfirmed(home / "runs" / "stopped")


def test_the_report_makes_nothing_of_it(tab: browser.Tab, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(build.of(run_folder.load(home / "runs" / "one")))
    tab.page.goto(path.as_uri())
    tab.page.locator(".js-plotly-plot .main-svg").first.wait_for()
    tab.page.get_by_text("evil.example").first.wait_for()
    clean(tab)
    hover_over_charts(tab)
