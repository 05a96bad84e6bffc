"""What the tests of pages share: AppTest over the real entry, and the charts of a page as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit import config
from streamlit.testing.v1 import AppTest

from sleb.records import Job
from sleb.runtime import dashboard_files
from sleb.runtime.processes import job_processes
from tests.support import browser
from tests.support.paths import ROOT

config.set_option("server.address", "localhost")  # as `streamlit_config.toml` has it; no server runs here


@pytest.fixture
def runs(home: Path) -> Path:
    """The folder of runs that the pages show."""
    return home / "runs"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that would have been started: their process is tested elsewhere."""
    jobs: list[Job] = []
    monkeypatch.setattr(job_processes, "start", lambda job, permissions: jobs.append(job))
    return jobs


@pytest.fixture
def tab(address: str) -> Iterator[browser.Tab]:
    """A tab on the module's server; its console has to stay silent."""
    with browser.tab(address) as tab:
        yield tab
        assert tab.said == []


def open_page(name: str, **query: str) -> AppTest:
    """A page as the navigation opens it, run once."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=120)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if name != "runs":
        app.switch_page(f"../pages/{name}.py")
        for key, value in query.items():
            app.query_params[key] = value
        app.run()
    return app


Allow = Callable[..., None]
"""What `started_with` gives: folders, `address` and `read_only`."""


@contextmanager
def started_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allow]:
    """Pages of a server that was started with other folders, at another address, or only to show."""

    def start(*folders: Path, address: str | None = "0.0.0.0", read_only: bool = False) -> None:
        config.set_option("server.address", address)
        monkeypatch.setenv(dashboard_files.ALLOW_PATH, json.dumps([str(each) for each in folders]))
        monkeypatch.setenv(dashboard_files.READ_ONLY, "1" if read_only else "0")

    before = config.get_option("server.address")
    start(address="localhost")
    try:
        yield start
    finally:
        config.set_option("server.address", before)


def array(value: Any) -> np.ndarray:
    """Numbers of a chart, as Plotly writes them."""
    if not isinstance(value, dict):
        return np.array(value, dtype=float)
    numbers = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
    return numbers.reshape([int(each) for each in value["shape"].split(",")]) if "shape" in value else numbers


def charts(app: AppTest) -> list[dict[str, Any]]:
    """Every Plotly chart of the page, as the browser gets it."""
    return [json.loads(each.proto.spec) for each in app.get("plotly_chart")]


def words(app: AppTest) -> str:
    """All text of the page outside of charts."""
    kinds = ("title", "caption", "markdown", "error", "warning", "info", "success", "metric")
    return "\n".join(
        f"{each.label} {each.value}" if kind == "metric" else str(each.value)
        for kind in kinds
        for each in app.get(kind)
    )


def press(app: AppTest, label: str) -> AppTest:
    """Press a button by its label, and run the page."""
    return next(button for button in app.button if button.label == label).click().run()
