"""The report: one file that needs nothing else, says what the run found, and trusts no text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from app import data
from sleb.errors import RunError
from sleb.formats.list_formats import in_words
from sleb.records import JobState, Method, Run, RunSpec
from sleb.report import build
from sleb.report.summaries import exported_model
from sleb.runtime import job_folder, record_files, run_folder
from tests.support import browser
from tests.support.dashboard import ROOT
from tests.support.exports import export_job, proof
from tests.support.runs.stores import write_run

HOSTILE = "<script>alert(1)</script>/x\"'&<b>"


class Parts(HTMLParser):
    """What a browser would make of the file: its scripts, its text, every attribute that names something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str, str]] = []
        self.named: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.policy = ""
        self._kind: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.named += [
            value for name, value in attributes.items() if name in ("src", "href", "action", "data", "srcset")
        ]
        assert not any(name.startswith("on") for name in attributes)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag in ("script", "style"):
            self._kind = attributes.get("type", tag)
            self.scripts.append((self._kind, ""))

    def handle_endtag(self, tag: str) -> None:
        self._kind = None

    def handle_data(self, text: str) -> None:
        if self._kind is None:
            self.words.append(text)
        else:
            kind, so_far = self.scripts[-1]
            self.scripts[-1] = (kind, so_far + text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> list[dict]:  # type: ignore[type-arg]
        return [json.loads(text) for kind, text in self.scripts if kind == "application/json"]


@pytest.fixture
def runs(home: Path) -> Path:
    return home / "runs"


def hostile(runs: Path) -> Run:
    run = write_run(runs / "hostile", 12, 2, model=HOSTILE)
    path = runs / "hostile" / "stack.json"
    record = json.loads(path.read_text()) | {"text": HOSTILE, "model_class": HOSTILE, "weights_hash": HOSTILE}
    path.write_text(json.dumps(record))
    job = export_job(run, JobState.FINISHED)
    made = proof(dtype=HOSTILE, versions={HOSTILE: HOSTILE})
    job_folder.write_result(job.directory, {"out": f"/home/me/{HOSTILE}", "proof": made.model_dump(mode="json")})
    return run_folder.load("hostile")


def test_no_text_of_a_run_becomes_markup_and_nothing_is_fetched(runs: Path) -> None:
    parts = Parts(build.of(hostile(runs)))
    assert parts.text.count("<script>alert(1)</script>/x\"'&<b>") >= 3  # as text
    assert parts.named == []
    assert not {"img", "iframe", "link", "object", "embed", "form", "a", "base", "svg"} & parts.tags
    kinds = [kind for kind, _ in parts.scripts]
    assert kinds.count("script") == 2
    assert set(kinds) == {"script", "style", "application/json"}
    assert "<" not in "".join(text for kind, text in parts.scripts if kind == "application/json")


def test_its_policy_allows_its_own_two_scripts_and_no_request(runs: Path) -> None:
    parts = Parts(build.of(write_run(runs / "one", 12, 2)))
    rules = dict(each.strip().split(" ", 1) for each in parts.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert not re.search(r"https?:|\*|unsafe-eval", parts.policy)
    allowed = re.findall(r"'sha256-([^']+)'", rules["script-src"])
    assert rules["script-src"] == " ".join(f"'sha256-{each}'" for each in allowed)
    own = [text for kind, text in parts.scripts if kind == "script"]
    assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own] == allowed


def test_it_says_what_was_asked_and_what_was_found() -> None:
    run = data.load(data.SAMPLE)
    assert run.trace is not None
    assert run.stack is not None
    text = build.of(run)
    parts = Parts(text)
    for each in [
        "HuggingFaceTB/SmolLM2-135M-Instruct without 12 of its 30 blocks",
        in_words(30, run.removal_list),
        str(list(run.removal_list)),
        run.stack.weights_hash,
        run.stack.text,
        "exactly equal",
        "1.751\u00a0±\u00a0",
        "11 of 12 steps with a block statistically tied with the removed one",
        "transformers 5.23.0",
        "The search ended: removed 12 blocks, as asked.",
    ]:
        assert " ".join(each.split()) in parts.text
    for step in run.trace.steps:
        assert f"{step.held_out.perplexity:,.2f}" in parts.text
    _, animated, perplexity, heatmap, alignment = parts.figures
    assert [frame["name"] for frame in animated["frames"]] == [str(step.number) for step in run.trace.steps]
    assert animated["layout"]["updatemenus"]
    assert len(perplexity["data"]) >= 2
    assert run.analysis is not None
    assert heatmap["data"][0]["z"][3][4] == pytest.approx(run.analysis.similarity.mean[3][4], abs=1e-4)
    assert alignment["data"][0]["y"][-1] == 100
    assert str(ROOT) not in text  # where a folder lies is nobody else's business
    assert len(text) < 6e6


def test_a_list_after_fewer_steps(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    assert run.trace is not None
    parts = Parts(build.of(run, 2))
    assert "without 2 of its 12 blocks" in parts.text
    assert in_words(12, run.trace.steps[1].removal_list) in parts.text
    assert "after 2 of 4 steps" in parts.text
    assert len(parts.figures[1]["frames"]) == 4  # the evidence is all of it


def test_exports_and_their_proof(runs: Path) -> None:
    run = write_run(runs / "one", 12, 4)
    assert "Smaller models written" not in build.of(run)
    job = export_job(run, JobState.FINISHED)
    job_folder.write_result(job.directory, {"out": "/home/me/small", "proof": proof().model_dump(mode="json")})
    text = Parts(build.of(run_folder.load("one"))).text
    assert "200,000,000 → 150,000,000 (−25.0%)" in text
    assert "equal with the KV cache" in text
    assert "small" in text
    assert "/home/me" not in text
    differ = proof(generated_with_cache=(1, 2, 4))
    assert "some differ" in exported_model.generation(differ)


@pytest.mark.parametrize(
    ("num_blocks", "num_remove", "method", "analysis"),
    [(80, 40, Method.METRIC3, True), (12, 1, Method.METRIC1, False), (12, 3, Method.EARLY_EXIT, True),
     (12, 3, Method.BEST_CHUNK, False), (32, 7, Method.METRIC2, False)],
)  # fmt: skip
def test_any_search_has_one(runs: Path, num_blocks: int, num_remove: int, method: Method, analysis: bool) -> None:
    run = write_run(runs / "one", num_blocks, num_remove, method=method, analysis=analysis)
    parts = Parts(build.of(run))
    assert len(parts.figures) == (5 if analysis else 3)
    assert f"without {num_remove} of its {num_blocks} blocks" in parts.text


def test_without_scores_or_analyses_it_says_less(runs: Path) -> None:
    run = write_run(runs / "one", 12, 3, analysis=False, done=2, state=JobState.STOPPED)
    for path in (runs / "one" / "scores").iterdir():
        path.unlink()
    record_files.write_no_analysis(run.run_dir, "Its blocks <b>share</b> states.")
    parts = Parts(build.of(run_folder.load("one")))
    assert "Its blocks <b>share</b> states." in parts.text
    assert "The search is not finished." in parts.text


def test_no_list_no_report(runs: Path) -> None:
    run_folder.create(RunSpec(model="an/analysis", kind="analyze"), runs / "analysis")
    with pytest.raises(RunError, match="chose no block"):
        build.of(run_folder.load("analysis"))


def test_the_command_line_can_make_one_without_streamlit_or_torch(runs: Path) -> None:
    run = write_run(runs / "one", 12, 2)
    code = (
        f"import sys; import sleb; from sleb.report import build; build.of(sleb.load({str(run.run_dir)!r}))\n"
        "print(sorted({'streamlit', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@browser.NEEDED
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_from_a_file_and_its_animation_plays(scheme: str, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(build.of(hostile(runs)))
    with browser.tab(file.as_uri(), color_scheme=scheme) as tab:
        requests: list[str] = []
        tab.page.on("request", lambda request: requests.append(request.url))
        tab.page.goto(tab.address)
        tab.page.wait_for_selector("figure.play .barlayer .point path", state="attached")
        assert tab.page.locator("figure.plot").count() == tab.page.locator("figure.plot .main-svg").count() / 3 == 5
        step = "document.querySelector('figure.play').layout.sliders[0].active"
        assert tab.page.evaluate(step) == 1
        tab.page.locator("figure.play .updatemenu-button").first.click()
        for number in ("1", "2"):
            tab.page.locator("figure.play").get_by_text(f"Step {number}", exact=True).wait_for()
        ink, paper = tab.page.evaluate(
            "[getComputedStyle(document.querySelector('.xtick text')).fill,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == (scheme == "dark")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 380) == (scheme == "dark")
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert requests == [tab.address]
        assert tab.said == []
