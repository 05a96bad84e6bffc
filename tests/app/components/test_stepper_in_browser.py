"""The stepper under the hand: keys, tooltips, clicks, and steps that no server is asked for.

How long a step takes is measured by benchmarks/dashboard.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support import browser
from tests.support.runs.stores import write_run

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no browser found: python -m tests.support.browser gets one"
)

STEP = """(stepper, key) => {
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, composed: true }));
  return [stepper.querySelector(".where").textContent, stepper.querySelectorAll(".column.out").length];
}"""
"""Presses a key and looks, before the browser does anything else: no answer of a server can have come."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("stepper")
    write_run(home / "runs" / "big", 80, 40, analysis=False)
    with browser.server(home) as address:
        yield address


@pytest.fixture
def tab(address: str) -> Iterator[browser.Tab]:
    with browser.tab(address, viewport={"width": 1400, "height": 1100}) as tab:
        tab.open("/steps?run=big&step=20")
        tab.page.locator(".stepper .bars .bar").first.wait_for(state="attached")
        yield tab
        assert tab.said == []


def where(tab: browser.Tab) -> str:
    return tab.page.locator(".stepper .where").inner_text()


def test_keys_belong_to_the_stepper_unless_something_else_has_the_focus(tab: browser.Tab) -> None:
    tab.page.get_by_text("Watch blocks being removed").click()
    tab.page.keyboard.press("ArrowRight")
    assert where(tab) == "Step 21 of 40"
    tab.page.get_by_role("combobox", name="Run").focus()
    tab.page.keyboard.press("ArrowLeft")
    assert where(tab) == "Step 21 of 40"
    slider = tab.page.get_by_role("slider", name="Step")
    slider.focus()
    tab.page.keyboard.press("ArrowLeft")
    assert where(tab) == "Step 20 of 40"
    assert slider.input_value() == "20"


def test_every_block_can_be_read_by_pointer_and_by_keyboard(tab: browser.Tab) -> None:
    tip = tab.page.locator(".stepper .tip")
    tab.page.locator(".stepper .column .hit").nth(5).hover()
    by_pointer = tip.inner_text()
    tab.page.mouse.move(5, 5)
    assert tip.is_hidden()
    tab.page.locator(".stepper").focus()
    for _ in range(6):
        tab.page.keyboard.press("ArrowDown")
    assert tip.inner_text() == by_pointer
    assert by_pointer.startswith("Block 5")
    assert "±" in by_pointer
    assert where(tab) == "Step 20 of 40"
    tab.page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_removed_block_leads_to_its_step(tab: browser.Tab) -> None:
    removed = tab.page.locator(".stepper .column.out").first
    step = removed.locator(".when").text_content()
    removed.locator(".hit").click()
    assert where(tab) == f"Step {step} of 40"


def test_playing_leaves_the_server_in_peace_and_the_address_follows_afterwards(tab: browser.Tab) -> None:
    tab.idle()
    tab.count_runs()
    tab.page.get_by_role("button", name="Play").click()
    tab.page.locator(".stepper .where", has_text=re.compile(r"Step (2[2-9]|[34]\d)")).wait_for()
    assert tab.runs == 0
    tab.page.get_by_role("button", name="Pause").click()
    stopped = where(tab).split()[1]
    tab.page.wait_for_url(f"**step={stopped}*")
    tab.shows(f"All candidates of step {stopped}")


def test_a_step_is_drawn_in_the_moment_of_the_key_without_the_server(tab: browser.Tab) -> None:
    stepper = tab.page.locator(".stepper")
    shown = {"ArrowRight": 21, "ArrowLeft": 20, "End": 40, "Home": 0}
    for key, step in shown.items():
        before = "Before step 1 of 40" if step == 0 else f"Step {step} of 40"
        assert stepper.evaluate(STEP, key) == [before, step]
    assert stepper.evaluate(STEP, "ArrowRight") == ["Step 1 of 40", 1]
