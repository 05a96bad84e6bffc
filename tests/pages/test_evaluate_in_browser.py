"""Evaluate in a real browser: a button measures a tiny model, the panels are linked, one list is taken, tokens tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sleb import api
from sleb.records import TextPerplexity
from sleb.runtime import findings_folder, run_folder
from tests.support import browser
from tests.support.runs import judged
from tests.support.runs.stores import write_run

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no browser found: python -m tests.support.browser gets one"
)


PLACES = """chart => {
  const from = chart.getBoundingClientRect().top, layout = chart._fullLayout;
  const panels = ["yaxis", "yaxis2", "yaxis3", "yaxis4"].map((name) => layout[name])
    .map((axis) => [axis._offset, axis._offset + axis._length]);
  const legends = [...chart.querySelectorAll(".infolayer > [class^=legend]")]
    .map((node) => node.getBoundingClientRect()).map((box) => [box.top - from, box.bottom - from]);
  return [panels, legends];
}"""
"""Tops and bottoms in pixels."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all kinds of findings, one without any on a tiny model."""
    home = tmp_path_factory.mktemp("evaluate")
    run = write_run(home / "runs" / "full", 12, 5, analysis=False)
    judged.keep(run, judged.everything(run))
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with browser.server(home) as address:
        yield address


def drawn(tab: browser.Tab) -> None:
    """Until the panels are there, with all their lines."""
    tab.page.locator(".scatterlayer .trace").nth(15).wait_for(state="attached")


def pick(tab: browser.Tab, name: str, option: str) -> None:
    """Choose from a list. It is scrolled to first: an open list closes when the page scrolls."""
    box = tab.page.get_by_role("combobox", name=name)
    box.scroll_into_view_if_needed()
    wanted = tab.page.get_by_role("option").filter(has_text=option)
    tab.until(box, wanted)
    wanted.click()


def test_a_button_measures_every_list_in_a_process_and_the_panels_follow(
    tab: browser.Tab, home: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEB_HOME", str(home))
    run = api.search(
        str(tiny_model), remove=2, calibration=str(text_file), sequences=4, sequence_length=64, analysis=False,
        device="cpu", run_dir=home / "runs" / "tiny",
    )  # fmt: skip
    tab.open("/evaluate?run=tiny")
    tab.shows("No text measured yet")
    texts = tab.page.get_by_role("combobox", name="Texts")
    texts.click()
    texts.fill(str(text_file))
    texts.press("Enter")
    tab.idle()
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("button", name="More", exact=True).click()
    window = tab.page.get_by_role("spinbutton", name="Tokens per window")
    window.fill("64")
    window.press("Enter")
    tab.idle()
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("button", name="Remove wikitext2").first.click()
    tab.idle()
    tab.page.get_by_role("button", name="Evaluate", exact=True).click()
    tab.shows("Measuring what lists cost")
    assert tab.page.get_by_role("button", name="Time it").is_disabled()
    tab.page.reload()  # the process belongs to no browser
    tab.page.locator(".legendtext", has_text="text.txt ≈").wait_for(timeout=1000 * browser.FOR_JOBS)
    tab.page.get_by_text("Measuring what lists cost").wait_for(state="hidden", timeout=1000 * browser.FOR_JOBS)
    findings = findings_folder.of_kind(findings_folder.findings(run.run_dir), TextPerplexity)
    assert {each.removal_list for each in findings} == {(), *judged.lists_of(run_folder.load(run.run_dir))}
    assert {each.text.windows for each in findings} == {4}


def test_panels_are_read_together_and_the_proposed_list_is_taken(tab: browser.Tab) -> None:
    tab.open("/evaluate?run=full")
    drawn(tab)
    box = tab.page.locator(".js-plotly-plot").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 1000  # cost, accuracy, speed and size on one screen
    tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 120)
    hover = tab.page.locator(".hoverlayer")
    hover.get_by_text("3 blocks removed").wait_for()
    words = hover.text_content() or ""
    for name in ("wikitext2", "too good", "piqa", "generation", "predicted", "parameters"):
        assert name in words
    worse = tab.page.get_by_role("spinbutton", name="At most … % worse: the limit")
    worse.fill("20")
    worse.press("Enter")
    tab.shows("Remove 3 of 12 blocks")
    assert "worse=20" in tab.page.url
    tab.page.get_by_role("button", name="Take this list").click()
    tab.page.wait_for_url("**/export?**")
    tab.shows("9 of 12")
    assert "steps=3" in tab.page.url


def test_flipped_tokens_are_read_by_pointer_and_by_keyboard(tab: browser.Tab) -> None:
    tab.open("/evaluate?run=full&show=Side+by+side")
    drawn(tab)
    flips = tab.page.locator(".flip")
    flips.first.wait_for()
    assert flips.count() == 3
    tip = tab.page.locator(".tip")
    flips.nth(1).hover()
    assert tip.inner_text().split() == ["Baseline", "<b>", "20.0", "%", "Smaller", "<i>", "70.0", "%"]
    flips.first.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    assert tip.inner_text().split() == ["Baseline", "⏎", "62.0", "%", "Smaller", "␣", "<", "0.1", "%"]
    tab.page.keyboard.press("Escape")
    assert tip.is_hidden()
    texts = tab.page.locator(".card .text")
    assert texts.count() == 2
    assert "of light and of <b>bridges</b>." in texts.first.inner_text()
    pick(tab, "Earlier prompts", "<i>five</i>")
    tab.idle()
    assert flips.count() == 3


def test_narrow_screens_show_the_panels_without_overlap(address: str) -> None:
    with browser.tab(address, viewport={"width": 1000, "height": 900}, color_scheme="dark") as tab:
        for width in (1000, 420):
            tab.page.set_viewport_size({"width": width, "height": 900})
            tab.open("/evaluate?run=full")
            drawn(tab)
            main = tab.page.locator("[data-testid=stMain]")
            assert main.evaluate("node => node.scrollWidth <= node.clientWidth")
            panels, legends = tab.page.locator(".js-plotly-plot").evaluate(PLACES)
            assert len(panels) == len(legends) == 4
            for (_, above), (top, bottom), (below, _) in zip([(0, 0), *panels], legends, panels, strict=False):
                assert above - 6 <= top < bottom <= below + 1  # each legend stands between its panel and the one above
        assert tab.said == []
