"""A real browser for the dashboard's tests: finds one, starts a server, watches the console.

`python -m tests.support.browser` says which browser the tests will use, and installs playwright's
own where there is none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (  # noqa: SIM905 (one line each would hide them)
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"][data-test-connection-state="CONNECTED"]'
COUNT_RUNS = """() => {
  window.runs = 0;
  const app = document.querySelector("[data-testid=stApp]");
  new MutationObserver(() => { window.runs += app.getAttribute("data-test-script-state") === "running"; })
    .observe(app, { attributeFilter: ["data-test-script-state"] });
}"""
PATIENCE = 120.0
"""Seconds for what a page shows. Nothing waits as long unless it fails: a machine may do other things as well."""
FOR_JOBS = 400.0
"""Seconds for what a process that is started from a page does."""
AGAIN = 10.0
"""Seconds after which something is clicked once more."""
KNOWN = ("the server responded with a status of 404",)
"""Of the console: each page asks once for its own /<page>/_stcore/*, and then for the right one."""


def find() -> str | None:
    """Path of a browser: `SLEB_TEST_BROWSER`, one on the PATH, or playwright's own."""
    chosen = os.environ.get("SLEB_TEST_BROWSER")
    if chosen:
        return chosen
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


NEEDED = pytest.mark.skipif(find() is None, reason="no browser found: python -m tests.support.browser gets one")
"""Marks tests that open one."""


@contextlib.contextmanager
def server(
    home: Path,
    *arguments: str,
    command: Sequence[str] = (sys.executable, "-m", "app"),
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A dashboard over a home of its own, by default this checkout's; yields its address.

    `command` is what starts it in `folder`: it takes Streamlit's options.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = home / "dashboard.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, f"--server.port={port}", *arguments],
            cwd=folder,
            env={**os.environ, "SLEB_HOME": str(home), **(environment or {})},
            stdout=output,
            stderr=output,
        )
    address = f"http://localhost:{port}"
    try:
        _wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=10):
            return
        time.sleep(0.1)
    raise RuntimeError(f"The dashboard did not start:\n{log.read_text()}")


class Tab:
    """A page in a browser, with what its console said."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.said: list[str] = []
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def _hear(self, kind: str, text: str) -> None:
        if kind == "error" and not any(known in text for known in KNOWN):
            self.said.append(text)

    def open(self, path: str = "/") -> None:
        """Go to a page and wait until it is there."""
        self.page.goto(self.address + path)
        self.idle()

    def idle(self) -> None:
        """Until the script has run and the server is connected."""
        self.page.wait_for_timeout(100)  # what was just clicked has to reach the server before it can be done
        self.page.wait_for_selector(IDLE, state="attached")

    def shows(self, text: str, seconds: float = PATIENCE) -> None:
        """Until the text is on the page."""
        self.page.get_by_text(text).first.wait_for(timeout=1000 * seconds)

    def until(self, click: Any, shown: Any, state: str = "visible", seconds: float = PATIENCE) -> None:
        """Click something until something else shows. Only for what may be clicked twice.

        A click in the moment in which a button is drawn again can be lost, as for a quick user.
        """
        from playwright.sync_api import TimeoutError as NotYet

        limit = time.monotonic() + seconds
        while True:
            try:
                click.click(timeout=1000 * AGAIN)
            except NotYet:  # it may be missing, because the last click was only slow
                if time.monotonic() > limit:
                    raise
            try:
                return shown.wait_for(state=state, timeout=1000 * AGAIN)
            except NotYet:
                if time.monotonic() > limit:
                    raise

    def count_runs(self) -> None:
        """From here on `runs` counts how often the server runs the script, or a part of it."""
        self.page.evaluate(COUNT_RUNS)

    @property
    def runs(self) -> int:
        """Since `count_runs`."""
        return int(self.page.evaluate("window.runs"))

    def drawn_anew(self, times: int) -> None:
        """Until the script has run so often since `count_runs`."""
        self.page.wait_for_function("times => window.runs >= times", arg=times)

    def download(self, name: str) -> str:
        """What a download button gives, as text."""
        with self.page.expect_download() as waiting:
            self.page.get_by_role("button", name=name, exact=True).click()
        return Path(waiting.value.path()).read_text()


@contextlib.contextmanager
def tab(address: str, **options: Any) -> Iterator[Tab]:
    """A browser of its own with one page."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE)
    settings: dict[str, Any] = dict(viewport={"width": 1400, "height": 1000})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=FLAGS)
        page = browser.new_page(**(settings | options))
        page.set_default_timeout(1000 * PATIENCE)
        try:
            yield Tab(page, address)
        finally:
            browser.close()


if __name__ == "__main__":
    path = find()
    if path is None:
        print("No browser found; installing playwright's own (SLEB_TEST_BROWSER=/path names another).", flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-m", "playwright", "install", "chromium"],
                timeout=300,
                check=False,
                capture_output=True,
            )
        path = find()
    print(f"Browser for the tests of the dashboard: {path or 'none, so those tests are SKIPPED'}", flush=True)
