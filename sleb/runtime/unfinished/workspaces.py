"""Folders in which something is written before it has its name, and what is done about those of killed writers.

Each is registered in `<home>/partial/` before it exists, so that it is found wherever it is. What the register says is
believed only as far as the name goes: a path is removed if its own name is that of an unfinished one whose process is
dead (`names`), and never a link.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sleb.runtime.files import read_json, writing
from sleb.runtime.unfinished import names
from sleb.runtime.unfinished.in_place import OLD

log = logging.getLogger(__name__)

_TARGET = "target.json"  # in a workspace: the name that its content is to have, beside it
_REMOVED = "removed"
NEW = "new"
"""The name, in a workspace, of what becomes the target."""


@contextmanager
def workspace(home: Path, target: Path) -> Iterator[Path]:
    """A folder beside `target`, on its file system, which is removed afterwards with all that it still holds.

    What killed writers left is removed first. Raises `StorageError`.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(home, target.parent)
        folder = names.temporary(target)
        entry = _register(home, folder)
        try:
            folder.mkdir(mode=0o700)
            (folder / _TARGET).write_text(json.dumps({"name": target.name}), encoding="utf-8")
        except BaseException:
            _forget(folder, entry)
            raise
    try:
        yield folder
    finally:
        _forget(folder, entry)


def remove(home: Path, target: Path) -> None:
    """Take a folder away in one move, so that no reader sees half of it, then delete it. Raises `OSError`."""
    with workspace(home, target) as folder:
        os.rename(target, folder / _REMOVED)


def abandoned(home: Path) -> list[Path]:
    """What killed writers left: what is registered, and what lies in the folders of `home`."""
    paths = dict.fromkeys(path for _, path in _registered(home))
    for folder in (home, home / "runs", home / "uploads", home / "cache", *_folders(home / "cache")):
        paths |= dict.fromkeys(_within(folder))
    return [path for path in paths if names.is_abandoned(path) and os.path.lexists(path) and not path.is_symlink()]


def sweep(home: Path, *folders: Path) -> list[Path]:
    """Remove what killed writers left, anywhere that is known and in these folders; what was moved away is put back."""
    paths = dict.fromkeys(abandoned(home))
    for folder in folders:
        paths |= dict.fromkeys(path for path in _within(folder) if names.is_abandoned(path))
    removed = [path for path in paths if discard(path)]
    for entry, path in _registered(home):
        if names.is_abandoned(path) and not os.path.lexists(path):
            _unlink(entry)
    return removed


def sweep_below(folder: Path) -> None:
    """Remove what killed writers left in a folder and everything below it, such as a run's."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if names.is_unfinished(name) and names.is_abandoned(Path(where, name)):
                discard(Path(where, name))


def discard(path: Path) -> bool:
    """Remove an abandoned file or workspace; whether that worked. What was being replaced is put back first."""
    if path.is_symlink() or not _put_back(path):
        return False
    log.info("Removing %s, which a killed process left.", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)


def _put_back(workspace: Path) -> bool:
    """A process killed between two moves left the old one here: it gets its name again, unless the new one has it.

    False where it could not: then the workspace must stay.
    """
    old = workspace / OLD
    if not os.path.lexists(old):
        return True
    try:
        name = read_json(workspace / _TARGET)["name"]
        target = workspace.parent / name
        if Path(name).name != name or name in ("", ".", ".."):
            return False
        if not os.path.lexists(target):
            os.rename(old, target)
            log.warning("%s is back: what was replacing it did not come to its end.", target)
    except FileNotFoundError:  # another process was faster
        return not os.path.lexists(old)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s was not put back, and stays: %s", old, error)
        return False
    return True


def _register(home: Path, folder: Path) -> Path | None:
    entry = home / "partial" / f"{folder.name}.json"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(json.dumps({"path": str(folder)}), encoding="utf-8")
    except (OSError, ValueError) as error:
        log.debug("%s is not registered: %s", folder, error)
        return None
    return entry


def _registered(home: Path) -> list[tuple[Path, Path]]:
    """Entries of the register and the paths they name; one that names what has another name counts for itself."""
    entries = []
    for entry in _within(home / "partial"):
        own = entry.name.removesuffix(".json")
        if not names.is_unfinished(own):
            continue
        path = entry.with_name(own)
        with suppress(OSError, ValueError, KeyError, TypeError):
            named = Path(read_json(entry)["path"])
            path = named if named.name == own and named.is_absolute() else path
        entries.append((entry, path))
    return entries


def _forget(folder: Path, entry: Path | None) -> None:
    if _put_back(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        _unlink(entry)


def _unlink(entry: Path | None) -> None:
    if entry is not None:
        with suppress(OSError):
            entry.unlink()


def _folders(folder: Path) -> list[Path]:
    return [each for each in _within(folder) if each.is_dir() and not each.is_symlink()]


def _within(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
