"""The index of runs: a file beside the runs that repeats what their files say. Knows SQLite, and no run folder.

It is a cache and never a truth. Whatever is wrong with the file (damaged, locked, of another version, on a disk that
cannot be written), its readers get nothing, its writers keep nothing, and neither reports it.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

FORMAT = 1
"""Version of the index, raised whenever the same files would give another text in it."""
_PATIENCE = 0.3
"""Seconds to wait for another process that writes: far longer than it takes."""
_RESPITE = 10.0
"""Seconds for which the file is not used again after it could not be used: thousands of calls must not all wait."""
_MOST_CHARACTERS = 10**6
"""Length of the longest text that is read back; an outline has about a thousand characters."""
_NOT_NOW = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip
"""Errors that are not the file's fault: it stays. After every other error it is made again."""
_TABLES = """
    DROP TABLE IF EXISTS outlines;
    DROP TABLE IF EXISTS summaries;
    CREATE TABLE outlines (name TEXT PRIMARY KEY, text TEXT, checksum INTEGER);
    CREATE TABLE summaries (name TEXT PRIMARY KEY, signature TEXT, text TEXT, checksum INTEGER);
"""


class IndexFile:
    """Texts about runs by the names of their folders, for any number of processes at once."""

    def __init__(self, path: Path, version: int = FORMAT) -> None:
        self._path = path
        self._version = version
        self._not_before = 0.0

    def outlines(self) -> dict[str, str]:
        """The short text of each run that was kept, by name; nothing where the file cannot be used."""
        with suppress(sqlite3.Error), self._opened("ro") as index:
            query = "SELECT name, text, checksum FROM outlines WHERE length(text) < ?"
            rows = index.execute(query, (_MOST_CHARACTERS,)).fetchall()
            return {name: text for name, text, checksum in rows if checksum == _checksum(name, text)}
        return {}

    def summaries(self, wanted: Iterable[tuple[str, str]]) -> Iterator[str | None]:
        """The long text of each name, if it was kept with that signature; one after the other, for they are large."""
        rest = iter(wanted)
        with suppress(sqlite3.Error), self._opened("ro") as index:
            query = "SELECT text, checksum FROM summaries WHERE name = ? AND signature = ?"
            for name, signature in rest:
                try:
                    yield _intact(index, query, name, signature)
                except sqlite3.Error:
                    yield None
                    raise
        for _ in rest:
            yield None

    def keep(self, outlines: dict[str, str], removed: Iterable[str] = ()) -> None:
        """Keep the short texts of some runs, and forget others."""
        rows = [(name, text, _checksum(name, text)) for name, text in outlines.items()]
        names = [(name,) for name in removed]

        def write(index: sqlite3.Connection) -> None:
            index.executemany("REPLACE INTO outlines VALUES (?, ?, ?)", rows)
            index.executemany("DELETE FROM outlines WHERE name = ?", names)
            index.executemany("DELETE FROM summaries WHERE name = ?", names)

        if rows or names:
            self._write(write)

    def keep_summaries(self, summaries: Iterable[tuple[str, str, str]]) -> None:
        """Keep long texts, each as name, signature and text."""
        rows = [(name, signature, text, _checksum(name + signature, text)) for name, signature, text in summaries]
        if rows:
            self._write(lambda index: index.executemany("REPLACE INTO summaries VALUES (?, ?, ?, ?)", rows))

    def _write(self, write: Callable[[sqlite3.Connection], object]) -> None:
        for _ in range(2):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._opened("rwc") as index:
                    index.execute("PRAGMA synchronous = OFF")  # what a power cut spoils, checksums find
                    index.execute("BEGIN IMMEDIATE")
                    write(index)
                    index.execute("COMMIT")
                return
            except sqlite3.Error as error:
                if _is_of_the_moment(error):
                    return
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            except OSError:  # no folder for it
                return

    @contextmanager
    def _opened(self, mode: str) -> Iterator[sqlite3.Connection]:
        """The file, of our version: another one is an error to a reader, and made again by a writer."""
        if time.monotonic() < self._not_before:
            raise sqlite3.OperationalError("it could not be used a moment ago")
        address = f"file:{quote(str(self._path))}?mode={mode}"
        try:
            with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)) as index:
                index.execute("PRAGMA trusted_schema = OFF")
                if index.execute("PRAGMA user_version").fetchone() != (self._version,):
                    if mode == "ro":
                        raise sqlite3.DatabaseError("it is of another version")
                    index.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {self._version}; COMMIT")
                yield index
        except sqlite3.Error as error:
            if _is_of_the_moment(error) and self._path.exists():
                self._not_before = time.monotonic() + _RESPITE
            raise


def _is_of_the_moment(error: sqlite3.Error) -> bool:
    """Whether an error is temporary and the file sound. An error of our own has no code, and counts as temporary."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.OperationalError) if code is None else (code & 0xFF) in _NOT_NOW


def _intact(index: sqlite3.Connection, query: str, name: str, signature: str) -> str | None:
    rows: list[tuple[str, int]] = index.execute(query, (name, signature)).fetchall()
    return next((text for text, checksum in rows if checksum == _checksum(name + signature, text)), None)


def _checksum(*texts: object) -> int:
    return zlib.crc32("\0".join(map(str, texts)).encode("utf-8", "surrogatepass"))
