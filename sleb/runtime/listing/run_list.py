"""All runs of a folder, newest first: read once, and again where a file changed. Knows run folders and their index."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from pydantic import ValidationError

from sleb.errors import RunError
from sleb.records import JobState, Run
from sleb.records.base import Record
from sleb.runtime import run_folder, run_index
from sleb.runtime.listing.index_file import IndexFile
from sleb.runtime.run_index import Contents, Outline, Reading, Stamps

_AT_ONCE = 1000
"""Number of runs that are written to the index together: what was read before an interruption is kept."""
_SUMMARIES_AT_ONCE = 100
_ROUND_SECONDS = 30.0
"""Seconds without a look at every run after which all are read again, however many they are."""


class _Kept(Record):
    """A `Reading` as the index has it."""

    stamps: Stamps
    contents: Contents


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch garbage collection off while thousands of records are made that stay: it takes longer than making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class RunList:
    """The runs of a folder, for all threads of a process. `follows` says of a link in it whether it may be read."""

    def __init__(
        self, folder: Path, index: IndexFile | None = None, follows: Callable[[Path], bool] = lambda link: True
    ) -> None:
        self._folder = folder
        self._index = index
        self._follows = follows
        self._lock = threading.Lock()
        self._known: dict[str, Reading] | None = None
        self._shown: dict[str, Outline | RunError] = {}
        self._order: tuple[str, ...] = ()
        self._live: set[str] = set()
        """Names of runs with which something is happening, or was a moment ago."""
        self._cursor = 0
        """Number of names that were looked at in this round."""
        self._round_ended = -_ROUND_SECONDS

    def outlines(self, first: str | None = None, at_most: int | None = None) -> list[Outline | RunError]:
        """All runs, newest first; an unreadable one is its error.

        `at_most` is how many of the runs with which nothing seems to happen are read again this time; all are within a
        few calls, and at once after a pause. New, deleted and running runs and `first` are always seen.
        """
        with self._lock:
            names = self._names()
            self._refresh(names, self._due(names, first, at_most))
            return [self._shown[name] for name in self._order]

    def summaries(self, make: Callable[[Run], str]) -> Iterator[tuple[Outline, str] | RunError]:
        """The text that `make` gives for each run, newest first, one by one; the error of one that cannot be read.

        It is made of the whole run, and kept in the index for as long as no file of the run changes.
        """
        outlines = self.outlines()
        readings = [self._readings()[name] for name in self._order]
        wanted = [(name, _signature(reading)) for name, reading in zip(self._order, readings, strict=True)]
        kept = self._index.summaries(iter(wanted)) if self._index else iter([None] * len(wanted))
        made: list[tuple[str, str, str]] = []
        for outline, reading, (name, signature), text in zip(outlines, readings, wanted, kept, strict=True):
            if text is None or isinstance(outline, RunError):
                try:
                    text = make(run_folder.load(self._folder / name))
                    outline = run_index.outline(self._folder / name) if isinstance(outline, RunError) else outline
                except RunError as error:
                    yield error
                    continue
                if reading.settled:
                    made.append((name, signature, text))
            yield outline, text
            if self._index and len(made) >= _SUMMARIES_AT_ONCE:
                self._index.keep_summaries(made)
                made = []
        if self._index:
            self._index.keep_summaries(made)

    def _names(self) -> list[str]:
        names: list[str] = []
        with suppress(OSError), os.scandir(self._folder) as entries:
            names = [
                each.name
                for each in entries
                if run_folder.is_run_id(each.name) and (not each.is_symlink() or self._follows(Path(each.path)))
            ]
        return names

    def _readings(self) -> dict[str, Reading]:
        """The readings in memory; at first those of the index."""
        if self._known is None:
            self._known = {}
            with _without_collection():
                for name, text in (self._index.outlines() if self._index else {}).items():
                    with suppress(ValidationError):
                        kept = _Kept.model_validate_json(text)
                        self._known[name] = Reading(kept.stamps, kept.contents, settled=True)
        return self._known

    def _due(self, names: list[str], first: str | None, at_most: int | None) -> Iterable[str]:
        """Runs to be looked at now."""
        now, known = time.monotonic(), self._readings()
        if at_most is None or len(names) <= at_most or now - self._round_ended > _ROUND_SECONDS:
            self._round_ended, self._cursor = now, 0
            return names
        here = set(names)
        due = (here - known.keys()) | (here & {*self._live, first}) | set(names[self._cursor : self._cursor + at_most])
        self._cursor += at_most
        if self._cursor >= len(names):
            self._round_ended, self._cursor = now, 0
        return due

    def _refresh(self, names: list[str], due: Iterable[str]) -> None:
        """Look at some runs, and forget those whose names are no longer there."""
        known = self._readings()
        fresh: dict[str, str] = {}
        removed = set(known) - set(names)
        moved = bool(removed) or not self._order
        for name in due:
            before = known.get(name)
            reading = self._looked_at(name, before)
            if reading is None:
                removed |= {name} & set(known)
                continue
            if reading is not before:
                moved |= before is None or before.changed != reading.changed
                known[name] = reading
                if reading.settled and isinstance(reading.contents, Contents):
                    fresh[name] = _Kept(stamps=reading.stamps, contents=reading.contents).model_dump_json()
            (self._live.add if _may_change(reading) else self._live.discard)(name)
            if reading is not before or name not in self._shown or name in self._live:
                self._shown[name] = reading.outline(self._folder / name)
            if len(fresh) >= _AT_ONCE:
                self._keep(fresh, ())
                fresh = {}
        for name in removed:
            del known[name]
            self._shown.pop(name, None)
            self._live.discard(name)
        self._keep(fresh, removed)
        if moved or removed:
            self._order = tuple(sorted(known, key=lambda name: (known[name].changed, name), reverse=True))

    def _looked_at(self, name: str, before: Reading | None) -> Reading | None:
        """A run as it is now; None without a run of that name."""
        directory = f"{self._folder}/{name}"
        if before is not None and before.is_current(directory):
            return before
        if not os.path.lexists(f"{directory}/spec.json"):
            return None
        return run_index.read(self._folder / name, time.time_ns())

    def _keep(self, fresh: dict[str, str], removed: Iterable[str]) -> None:
        if self._index is not None:
            self._index.keep(fresh, removed)


def list_outlines(folder: Path | None = None) -> list[Outline | RunError]:
    """All runs of a folder (by default the runs folder, by its index), newest first; an unreadable one is its error."""
    return (RunList(folder) if folder else of_home(run_folder.home())).outlines()


def of_home(home: Path, follows: Callable[[Path], bool] = lambda link: True) -> RunList:
    """The runs in a home folder, with the index that is kept there."""
    return RunList(home / "runs", IndexFile(home / "cache" / "run-index.sqlite"), follows)


def _may_change(reading: Reading) -> bool:
    """Whether something is happening with a run, or was a moment ago."""
    if not reading.settled or isinstance(reading.contents, RunError) or reading.contents.status is None:
        return not reading.settled
    return reading.contents.status.state in (JobState.QUEUED, JobState.RUNNING)


def _signature(reading: Reading) -> str:
    """Equal while none of the run's files changes from which a summary is made: those of an outline."""
    return blake2b(repr(sorted(reading.stamps.items())).encode(), digest_size=16).hexdigest()
