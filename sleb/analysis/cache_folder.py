"""The contents of `<home>/cache/`, listed and cleared. Knows folders; of an entry only the model that it is of."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from sleb.errors import OptionError, StorageError, quoted
from sleb.runtime.unfinished import workspaces
from sleb.runtime.unfinished.names import is_unfinished, temporary

FOLDER = "block-outputs"
META = "meta.json"
"""The file of an entry that says what it is; its modification time is the entry's last use."""
SCRATCH = "offload"
"""The folder of weights that streaming had to convert: their process's own, as long as it lives."""
PARTIAL = "partial"
"""The name by which `sleb cache` knows what killed processes left, wherever it is."""
_LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class CacheEntry:
    """One thing that `sleb cache` shows and clears."""

    name: str
    folder: str
    """The folder under `<home>/cache/` that it is in."""
    path: Path
    bytes: int
    last_used: float
    """Seconds since the epoch."""
    model: str | None = None

    @property
    def age(self) -> float:
        """Seconds since the last use."""
        return max(0.0, time.time() - self.last_used)


def usage(home: Path) -> list[CacheEntry]:
    """Everything under `<home>/cache/`: each entry of block outputs, and every other folder as a whole.

    It includes what killed processes left, there or where they were writing.
    """
    listed: list[CacheEntry] = []
    cache = home / "cache"
    for child in sorted(cache.iterdir()) if cache.is_dir() else []:
        if child.name in (FOLDER, SCRATCH):
            entries = [entry for entry in sorted(child.iterdir()) if entry.is_dir()]
            listed += [describe(entry, child.name) for entry in entries if not is_unfinished(entry.name)]
        elif not is_unfinished(child.name):
            listed.append(describe(child, child.name))
    return listed + [replace(describe(path, PARTIAL), name=str(path)) for path in workspaces.abandoned(home)]


def clear(home: Path, target: str) -> list[CacheEntry]:
    """Remove an entry, a folder under `<home>/cache/` by its name, or `all`; returns what was removed."""
    entries = usage(home)
    chosen = [entry for entry in entries if target in ("all", entry.name, entry.folder)]
    if not chosen and target not in ("all", FOLDER, PARTIAL):
        names = ", ".join([*sorted({"all", FOLDER, PARTIAL} | {entry.folder for entry in entries}), "or a key"])
        raise OptionError(f"The cache has nothing called {quoted(target)}; it can clear {names}.")
    if not chosen:
        return []
    try:
        root_of(home).mkdir(parents=True, exist_ok=True)
        with lock_of(home):
            workspaces.sweep(home)  # partial ones, and what a killed clearing left
            for entry in chosen:
                if entry.folder == PARTIAL:
                    continue
                if entry.path.is_dir() and not entry.path.is_symlink():
                    remove(entry.path)
                else:
                    entry.path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"The cache in {home / 'cache'} cannot be cleared: {error}.") from error
    return chosen


def root_of(home: Path) -> Path:
    """The folder that holds the cache."""
    return home / "cache" / FOLDER


def lock_of(home: Path) -> FileLock:
    """The lock that a process holds while it changes the cache."""
    return FileLock(root_of(home) / ".lock", timeout=_LOCK_SECONDS)


def remove(path: Path) -> None:
    """Take a folder away in one move, so that no reader sees half of it, then delete it."""
    if not path.is_dir():
        return
    trash = temporary(path)
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def describe(path: Path, folder: str) -> CacheEntry:
    """The size and the last use of what lies at a path, as `sleb cache` lists it."""
    files = list(_files_under(path))
    meta = path / META
    model = None
    if folder == FOLDER:
        try:
            model = str(json.loads(meta.read_text(encoding="utf-8"))["content"]["model"])
        except (OSError, ValueError, KeyError, TypeError):
            model = None  # unfinished or damaged; its size still counts
    last_used = max((modified for _, modified in files), default=0.0)
    return CacheEntry(path.name, folder, path, sum(size for size, _ in files), last_used, model)


def _files_under(path: Path) -> Iterator[tuple[int, float]]:
    """Bytes and modification time of every file that is still there."""
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            status = file.stat()
        except OSError:
            continue
        if file.is_file():
            yield status.st_size, status.st_mtime
