"""Fixtures for tests of pages and panels: a store, the jobs that would start, a browser's tab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sleb.records import Job
from sleb.runtime.processes import job_processes
from tests.support import browser


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
