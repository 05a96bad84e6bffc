"""The other files of a model's folder: carried over into the smaller model's, or named as left behind. No torch.

The folder may be a stranger's. No link is followed out of it, no program is carried over, no more is read than such
files hold, and what describes the blocks of the baseline is left behind.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.errors import excerpt
from sleb.export.destination import PROOF, saving
from sleb.model.inspection.source_folder import INDEX, LARGEST, WEIGHTS, SourceFolder
from sleb.records import LeftBehind
from sleb.runtime.files import MOST_BYTES

CARD = "README.md"
SOURCE_CARD = "README-source.md"
"""The name under which the source's own card is carried over."""
TEMPLATES = "additional_chat_templates"
"""A folder in which transformers keeps further chat templates of a tokenizer."""

_MOST_FILES, _MOST_BYTES = 500, 1 << 30
_CHUNK = 1 << 20
_OURS = (PROOF, "proof-expected.safetensors", "proof-error.txt")
_PROGRAMS = (
    *(".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".com", ".pyc", ".pyd", ".jar"),
    *(".whl", ".js", ".deb", ".rpm"),
)
_VOCABULARIES = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map|chat_template)\w*\.json")
_COUNT = re.compile(r"(n|num)_?(hidden_|decoder_)?(layers?|blocks?)")
_NAMED_BLOCK = re.compile(r"\b(layers?|blocks?|h)\\?\.\(?\d+|layer_range")
_WHOLE = "it describes the blocks of the baseline"


@dataclass(frozen=True)
class Carried:
    """The files of a folder besides weights and config: carried over, or left behind."""

    files: dict[str, str]
    """Names of the files that were carried over, and the SHA-256 of what was written."""
    left_behind: tuple[LeftBehind, ...]


def carry_over(source: SourceFolder, folder: Path, num_blocks: int, *, with_code: bool) -> Carried:
    """Copy what can be carried over into `folder`; `with_code`: the model's own Python files, too."""
    files: dict[str, str] = {}
    left = [LeftBehind(name=excerpt(name), why="it was not fetched from the hub") for name in source.elsewhere]
    if not source.complete:
        left.append(LeftBehind(name="further files of its repository, if any", why="the hub did not answer"))
    total = 0
    for name, path in _entries(source):
        why = _reason(source, name, path, num_blocks, with_code)
        size = path.stat().st_size if why is None else 0
        if why is None and (len(files) >= _MOST_FILES or total + size > _MOST_BYTES):
            why = "it is one file too many to carry over"
        if why:
            left.append(LeftBehind(name=excerpt(name), why=why))
        if why is not None:
            continue
        total += size
        target = SOURCE_CARD if name == CARD else name
        with saving(name):
            (folder / target).parent.mkdir(exist_ok=True)
            files[target] = _copied(path, folder / target, with_code)
    return Carried(files, tuple(left[:_MOST_FILES]))


def _entries(source: SourceFolder) -> Iterator[tuple[str, Path]]:
    """Every entry of the folder and of its folder of chat templates, by name."""
    for path in sorted(source.folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from ((f"{TEMPLATES}/{each.name}", each) for each in sorted(path.iterdir()))
        else:
            yield path.name, path


def _reason(source: SourceFolder, name: str, path: Path, num_blocks: int, with_code: bool) -> str | None:
    """Why a file is left behind, "" for one that is accounted for otherwise, None for one to be carried over."""
    suffix = path.suffix.lower()
    if name in ("config.json", INDEX) or path in source.weights:
        return ""
    if not name.isprintable():
        return "its name cannot be shown"
    if not _stays_inside(source.folder, path):
        return "it is a link out of the folder, or to nothing"
    if path.is_dir():
        return "it is a folder"
    if not stat.S_ISREG(path.stat().st_mode):
        return "it is not a regular file"
    if name.startswith("."):
        return "it is hidden"
    if suffix in WEIGHTS or name.endswith(".index.json"):
        return "it holds weights of the baseline"
    if name in _OURS or name == SOURCE_CARD:
        return "an earlier export wrote it"
    if name.startswith(TEMPLATES) and suffix != ".jinja":
        return "it is not a chat template"
    if suffix in _PROGRAMS:
        return "it is a program"
    if suffix == ".py" and not with_code:
        return "it is code, which only `trust_remote_code` carries over"
    if path.stat().st_size > LARGEST:
        return f"it has more than {LARGEST >> 20} MiB"
    return _WHOLE if "imatrix" in name.lower() or _speaks_of_blocks(path, num_blocks) else None


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a path leads nowhere else: a link must stay in the folder, or lead to its files in the hub's cache."""
    if not path.is_symlink():
        return True
    root = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or to itself
        return False
    if root.parent.name == "snapshots" and root.parent.parent / "blobs" == target.parent:
        return True
    return target.parent == root


def _speaks_of_blocks(path: Path, num_blocks: int) -> bool:
    """Whether settings of another tool number the blocks or count them, such as params.json or a recipe."""
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        return _NAMED_BLOCK.search(path.read_text("utf-8", "replace")) is not None
    if kind != ".json" or _VOCABULARIES.fullmatch(path.name):
        return False
    try:
        left: list[Any] = [json.loads(path.read_bytes())]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            counts = [entry for key, entry in value.items() if _COUNT.fullmatch(key)]
            if any(type(entry) is int and entry == num_blocks for entry in counts):
                return True
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and _NAMED_BLOCK.search(value):
            return True
    return False


def _copied(path: Path, target: Path, with_code: bool) -> str:
    """Copy a file; settings lose what names code that is left behind. Returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    changed = None if with_code else _without_code(path)
    with open(path, "rb") as file, open(target, "wb") as copy:
        for chunk in (changed,) if changed is not None else iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def _without_code(path: Path) -> bytes | None:
    """A file of settings without the names of classes in code of its own; None for one that names none."""
    if path.suffix != ".json" or path.stat().st_size > MOST_BYTES:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict) or "auto_map" not in settings:
        return None
    settings.pop("auto_map")
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
