"""Values that nobody means: for options, for fields of a record, for the bytes of a file; and places to point at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

V = TypeVar("V")


class Draws:
    """What an example drew, kept so that it can be told."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self.story: list[str] = []

    def draw(self, strategy: st.SearchStrategy[V], label: str = "") -> V:
        """One more value."""
        value = self._data.draw(strategy)
        if label:
            self.story.append(f"{label}: {str(value)[:80]!r}")
        return value


NUMBERS = (
    "0", "-0", "-1", "1", "2", "7", "0.5", "1e-320", "1e-9", "1e99", "1e309", "nan", "-nan", "inf", "-inf", "NaN",
    "1" + "0" * 12, "9" * 20, "9" * 5000, "1_000", "0x10", "+3", " 3 ", "3.0", "٣", "３", "१२", "²", "½", "1,5", "--1",
)  # fmt: skip
TEXTS = (
    "", " ", "\t", "\n", "x" * 5000, "é" * 300, "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "a\rb",
    "\u202egnp.exe", "\u2066x", "\u2028", "\x7f", "\udc80\udcff", "[bold]x[/bold]", "[/]", "%s%n", "{0}", "$(id)",
    "a:b", "a:b:c:d", ":", "::::", "none", "null", "true", "~", "~no-such-user/x",
    "..", "../..", "a/../b", "-", "--", "*",
    "\\",
)  # fmt: skip
SHAPES = (
    "1x8", "1X8", "0x0", "x", "1x", "-1x8", "٣x٣", "1x8x8", "9999999999999x9999999999999", "[1, 2]", "[]", "[",
    "[[1]]", "1,2", "1,,2", "[1e3]", "+10%", "-10%", "+%", "%", "1e400%", "24GB", "0GB", "-1GB", "٣GB", "1e3GB",
    "9" * 400 + "GB",
    "ſ", "K", "1K", "cpu", "cuda:0", "cuda:٣",
    "cuda:-1", "all", "auto", "mps", "meta", "json", "csv", "list", "sleb",
    "mergekit", "llama-quantize", "hf", "gguf", "int8", "int4", "lora", "linear", "both", "metric1", "early-exit", "kl",
)  # fmt: skip

option_values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(SHAPES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=30),
)
"""Words of a command line, which hold no NUL."""

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((-1, 0, 1, 2**31, 2**53, 2**63, 10**18, 10**19 - 1, 10**40, -(10**18))),
    st.floats(),
    st.sampled_from((1e308, -1e308, 5e-324, 0.5, -0.0)),
    st.sampled_from((*TEXTS, *NUMBERS)),
    st.text(max_size=20),
)
json_values = st.one_of(
    _leaves,
    st.lists(_leaves, max_size=4),
    st.dictionaries(st.text(max_size=8), _leaves, max_size=3),
    st.sampled_from(([], {}, [[]], [[[[[[]]]]]], ["x"] * 2000, list(range(2000)), [None], {"": {}})),
)
"""What can stand in JSON, NaN and half characters included."""

_ARRAYS = tuple(
    np.array(each)
    for each in (0, 1.5, [], [0.0], [[1.0]], [[[1]]], [np.nan] * 4, [[np.inf] * 20] * 4, ["x\x1b[31m"], [[True]], [1j],
                 [-1] * 4, [2**62] * 4, b"x", "[[1, 2]]", "[" * 100, np.zeros((0, 5)), np.zeros((4, 0)))
)  # fmt: skip
_raw = st.one_of(
    st.sampled_from(
        (b"", b"\0", b"{}", b"[]", b"null", b"1", b'""', b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\0",
         b"\n" * 5000,
         b"9" * 5000, b"1e999", b"NaN", b'"\\ud800"', b"PK\x03\x04", b"GGUF", b'{"format_version": 2}')
    ),
    st.binary(max_size=200),
)  # fmt: skip


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in JSON: keys and indices, the whole first."""
    result = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    for key, each in items:
        result += paths_in(each, (*at, key))
    return result


def changed(data: Draws, value: Any) -> Any:
    """JSON with something else at one place, or with something left out or added there."""
    path = data.draw(st.sampled_from(paths_in(value)), label="where")
    if not path:
        return data.draw(json_values, label="what")
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    change = data.draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "double")), label="how")
    if change == "remove":
        del inner[path[-1]]
    elif change == "double" and isinstance(inner, list):
        inner += inner * data.draw(st.sampled_from((1, 50)), label="times")
    elif change == "add" and isinstance(inner, dict):
        inner[data.draw(st.text(max_size=10), label="key")] = data.draw(json_values, label="what")
    else:
        inner[path[-1]] = data.draw(json_values, label="what")
    return value


def changed_bytes(data: Draws, content: bytes) -> bytes:
    """A file's content cut, overwritten in places, lengthened, or replaced."""
    change = data.draw(st.sampled_from(("cut", "overwrite", "insert", "replace")), label="how")
    place = data.draw(st.integers(0, max(len(content) - 1, 0)), label="at")
    if change == "cut":
        return content[:place]
    if change == "replace":
        return data.draw(_raw, label="what")
    piece = data.draw(st.one_of(st.binary(min_size=1, max_size=8), _raw), label="what")
    return content[:place] + piece + content[place + (len(piece) if change == "overwrite" else 0) :]


def change_file(data: Draws, path: Path, places: Path) -> None:
    """A file changed in whatever way: as JSON, as bytes, or into something that is not a file."""
    change = data.draw(st.sampled_from(("json",) * 5 + ("bytes",) * 3 + ("other",)), label="file changed as")
    content = path.read_bytes()
    if change == "json" and path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        number = data.draw(st.integers(0, len(lines) - 1), label="line")
        lines[number] = json.dumps(changed(data, json.loads(lines[number]))).encode()
        path.write_bytes(b"\n".join(lines) + b"\n" * (path.suffix == ".jsonl"))
    elif change == "json" and path.suffix == ".npz":
        with np.load(path) as packed:
            arrays = dict(packed)
        name = data.draw(st.sampled_from(sorted(arrays)), label="array")
        arrays[name] = data.draw(st.sampled_from(_ARRAYS), label="becomes")
        np.savez(path, **arrays)
    elif change == "other":
        path.unlink()
        become(data, path, places)
    else:
        path.write_bytes(changed_bytes(data, content))


def become(data: Draws, path: Path, places: Path) -> None:
    """Something at a path that is not a plain file with content, or a huge one."""
    kind = data.draw(st.sampled_from(("nothing", "folder", "pipe", "zero", "loop", "outside", "sparse")), label="kind")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif kind != "nothing":
        path.symlink_to({"zero": Path("/dev/zero"), "loop": path, "outside": places / "file"}[kind])


def make_places(folder: Path) -> list[str]:
    """Paths to point an option at: what is not a file, what never ends, what has a name that no screen takes."""
    (folder / "file").write_text("text of no kind\n")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "missing")
    (folder / "link").symlink_to(folder / "full")
    (folder / "\x1b[31m[bold]\u202ered").mkdir()
    (folder / os.fsdecode(b"latin-\xff\xe9")).write_text("bytes")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with open(folder / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe.gguf", "pipe.txt"):
        os.mkfifo(folder / name)
    devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", "/", "/proc", "/root/x")
    within = (folder / "new" / "deep", folder / "file" / "x")
    return [*map(str, sorted(folder.iterdir())), *map(str, within), *devices]
