"""Fixtures that the tests of this folder share."""

from tests.support.dashboard import runs, started, tab

__all__ = ["runs", "started", "tab"]
