"""Fixtures that the tests of this folder share."""

from tests.support.page_fixtures import runs, started, tab

__all__ = ["runs", "started", "tab"]
