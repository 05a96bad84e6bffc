"""The token view of the Prediction alignment page in a real browser: mouse, keyboard, address, and foreign text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import browser
from tests.support.runs.stores import write_run

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no browser found: python -m tests.support.browser gets one"
)

SPACES = (
    "a",
    " b",
    "\n",
    " ",
    "\u202eright to left",
    "\t",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("dashboard")
    write_run(place / "runs" / "hostile", 12, 4, words=SPACES)
    write_run(place / "runs" / "parts", 11, 4, words=("<0xE2>", "a", "<0xE2>", "b", "c", "d", "e"))
    with browser.server(place) as address:
        yield address


def about(tab: browser.Tab, text: str) -> None:
    tab.page.locator(".about", has_text=text).wait_for()


def test_a_token_is_picked_by_mouse_and_keys_and_kept_in_the_address(tab: browser.Tab) -> None:
    tab.open("/alignment?run=sample-smollm2-135m-metric3")
    tab.page.locator(".token").nth(20).click()
    about(tab, "position 20")
    tab.page.wait_for_url("**token=20*")
    assert tab.page.locator(".predictions .row").count() == 30
    assert tab.page.locator(".predictions .row").nth(29).locator(".cell").first.get_attribute("class") == "cell final"
    tab.page.keyboard.press("ArrowRight")
    about(tab, "position 21")
    tab.page.wait_for_url("**token=21*")
    tab.page.keyboard.press("Home")
    about(tab, "position 0:")
    tab.page.keyboard.press("ArrowDown")
    assert tab.page.evaluate("document.activeElement.shadowRoot.activeElement.ariaSelected") == "true"
    tab.page.keyboard.press("End")
    tab.page.wait_for_url("**token=47*")
    assert tab.page.locator('.token[tabindex="0"]').count() == 1
    tab.page.reload()
    about(tab, "position 47")


def test_predictions_that_look_the_same_are_told_apart_by_their_ids(tab: browser.Tab) -> None:
    tab.open("/alignment?run=parts&token=6")  # the text goes on with token 0, the model with token 2
    about(tab, "the text with <0xE2>")
    assert "as the text does" not in tab.page.locator(".about").inner_text()
    rows = tab.page.locator(".predictions .row").all()
    assert len(rows) == 11
    alike = [row.locator(".word").all_text_contents().count("<0xE2>") for row in rows]
    final = [row.locator(".cell.final").count() for row in rows]
    assert max(alike) == 2
    assert max(final) == 1
    assert final[-1] == 1


def test_the_colour_follows_the_exit_that_is_chosen(tab: browser.Tab) -> None:
    tab.open("/alignment?run=sample-smollm2-135m-metric3&token=3")
    tab.shows("Settles on the final prediction after block")
    first = tab.page.locator(".token").first
    before = first.evaluate("each => each.style.backgroundColor")
    tab.page.get_by_role("radio", name="First agreement").click()
    tab.shows("First agrees with the final prediction after block")
    assert first.evaluate("each => each.style.backgroundColor") != before
    about(tab, "position 3:")


def test_tokens_are_text_and_what_cannot_be_seen_is_shown(tab: browser.Tab) -> None:
    dialogs: list[str] = []
    tab.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    tab.open("/alignment?run=hostile&token=7")
    about(tab, "<script>alert(1)</script>")
    texts = [each.replace("\u00a0", " ") for each in tab.page.locator(".token").all_text_contents()[:8]]
    assert texts == ["a", " b", "⏎", "␣", "U+202Eright to left", "⇥", SPACES[6], SPACES[7]]
    assert tab.page.locator(".view").locator("img, script").count() == 0
    assert "<script>alert(1)</script>" in tab.page.locator(".predictions").inner_text()
    assert dialogs == []
