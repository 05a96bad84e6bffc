"""A click on the map of the Similarity page, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import browser

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no browser found: python -m tests.support.browser gets one"
)

MAP, CHUNKS = ".st-key-similarity-map", ".st-key-chunks"


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[browser.Tab]:
    with browser.server(tmp_path) as address, browser.tab(address) as tab:
        yield tab
        assert tab.said == []


def click(tab: browser.Tab, chart: str, x: float, y: float) -> None:
    """Click where a chart's axes have x and y."""
    tab.page.locator(f"{chart} .heatmaplayer image").wait_for()
    place = tab.page.evaluate(
        """([chart, x, y]) => {
            const plot = document.querySelector(chart + " .js-plotly-plot"), layout = plot._fullLayout;
            plot.scrollIntoView({block: "center"});
            const box = plot.getBoundingClientRect();
            return [box.left + layout.xaxis._offset + layout.xaxis.d2p(x),
                    box.top + layout.yaxis._offset + layout.yaxis.d2p(y)];
        }""",
        [chart, x, y],
    )
    tab.page.mouse.move(*place)
    tab.page.locator(f"{chart} .hoverlayer .hovertext").wait_for()
    tab.page.mouse.click(*place)


def test_a_click_on_a_cell_or_a_chunk_shows_what_lies_between(tab: browser.Tab) -> None:
    tab.open("/similarity")
    tab.shows("Click a cell")
    click(tab, MAP, 17, 3)
    tab.shows("14 blocks, 4 to 17")
    assert "cell=3-17" in tab.page.url
    click(tab, MAP, -1, 5)  # redrawn with the picked cell, and still there to be clicked
    tab.shows("6 blocks, 0 to 5")
    assert "cell=5-in" in tab.page.url
    click(tab, CHUNKS, 10, 4)
    tab.shows("4 blocks, 10 to 13")
    assert "cell=9-13" in tab.page.url
    tab.page.reload()
    tab.shows("4 blocks, 10 to 13")
