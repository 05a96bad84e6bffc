"""Where a model can be written, and a disk that is full meanwhile: one sentence, whichever library meets it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sleb
from sleb.errors import OptionError, StorageError
from sleb.export.destination import PROOF, Destination, save_text, saving
from tests.support import tiny
from tests.support.families import build

PLACES = {  # name -> whether replacing is asked for, and why it is refused
    "missing": (False, None),
    "missing/deep": (False, None),
    "empty": (False, None),
    "export": (False, "is not empty; name another folder, or replace an earlier export with `replace`"),
    "mine": (True, "is something other than an earlier export; name another folder"),
    "file": (True, "is a file; name a folder that does not exist yet"),
    "link": (True, "is a link; name the folder itself"),
    "file/below": (False, "Nothing can be written in .*file; name another folder"),
    "x" * 300: (False, "cannot be used .File name too long"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_is_written_where_nothing_is_lost(name: str, tmp_path: Path) -> None:
    for folder in ("empty", "export", "mine"):
        (tmp_path / folder).mkdir()
    (tmp_path / "export" / PROOF).touch()
    (tmp_path / "mine" / "notes").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    replace, reason = PLACES[name]
    destination = Destination(tmp_path / name, replace)
    if reason is None:
        destination.require_free()
    else:
        with pytest.raises(OptionError, match=reason):
            destination.require_free()
    Destination(tmp_path / "export", replace=True).require_free()


def test_a_file_needs_its_suffix_and_never_replaces_its_source(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_text("weights")
    gguf = {"file": "inner", "suffix": ".gguf", "source": source, "replace": True}
    with pytest.raises(OptionError, match=r"does not end in \.gguf"):
        Destination(tmp_path / "smaller.bin", **gguf).require_free()
    with pytest.raises(OptionError, match="is the model itself"):
        Destination(source, **gguf).require_free()
    with pytest.raises(OptionError, match=r"name a file that ends in \.gguf"):
        Destination(tmp_path, **gguf).require_free()
    (tmp_path / "other.gguf").write_text("something")
    other = Destination(tmp_path / "other.gguf", is_export=lambda path: False, **gguf)
    other.require_free(look_inside=False)
    with pytest.raises(OptionError, match="something other than an earlier export"):
        other.require_free()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As good as a full disk: the write that makes a file longer fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wordy() -> Any:
    """A tokenizer whose file is longer than a tiny model's weights."""
    made = tiny.tokenizer()
    made.add_tokens([f"word-{number}" for number in range(3000)])
    return made


@pytest.mark.parametrize("library", ["python", "safetensors", "tokenizers"])
def test_what_each_library_says_of_a_full_disk_is_one_sentence(library: str, tmp_path: Path) -> None:
    made = wordy()
    write = {
        "python": lambda: (tmp_path / "README.md").write_text("x" * 100_000),
        "safetensors": lambda: save_file({"x": torch.zeros(100_000)}, tmp_path / "model.safetensors"),
        "tokenizers": lambda: made.save_pretrained(tmp_path),
    }[library]
    with files_of_at_most(10_000), pytest.raises(StorageError, match="free some disk space"), saving():
        write()


def test_a_bug_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), saving():
        1 / 0  # noqa: B018


@pytest.mark.parametrize("kind", ["quantize", "heal", "adapter", "export"])
def test_a_disk_that_fills_while_the_tokenizer_is_written_leaves_nothing(
    kind: str, text_file: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "made" / "out"
    build("llama", 4, 0).save_pretrained(str(model))
    wordy().save_pretrained(str(model))
    ask = dict(removal_list=[1], perplexity=[str(text_file)], limit=1, window=16, dtype="float32", out=out)
    healing = dict(source=str(text_file), sequences=1, sequence_length=8)
    run = _searched(model, text_file) if kind == "export" else None
    work = {
        "quantize": lambda: sleb.quantize(str(model), **ask),
        "heal": lambda: sleb.heal(str(model), **ask, **healing),
        "adapter": lambda: sleb.heal(str(model), **ask, **healing, adapter=True),
        "export": lambda: sleb.export_model(run, out),
    }[kind]
    with files_of_at_most(300_000), pytest.raises(StorageError, match="free some disk space"):
        work()
    assert list(out.parent.iterdir()) == []


def _searched(model: Path, text: Path) -> sleb.Run:
    return sleb.search(
        str(model), remove=1, calibration=str(text), sequences=2, sequence_length=16, dtype="float32", analysis=False
    )


@pytest.mark.parametrize("name", ["loop", "loop/list.json", "x" * 300])
def test_a_file_that_no_path_leads_to_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OptionError, match="cannot be used"):
        save_text(tmp_path / name, "text", replace=True)


@pytest.mark.parametrize(("out", "message"), [(5, "found 5"), (None, "found None"), ("a\0b", "null character")])
def test_what_is_no_path_is_refused_in_a_notebook(monkeypatch: pytest.MonkeyPatch, out: Any, message: str) -> None:
    monkeypatch.setattr("sleb.api._loaded", lambda run: run)
    with pytest.raises(OptionError, match=f"`out` .*{message}"):
        sleb.export_model("run", out)
    if out is not None:
        with pytest.raises(OptionError, match=f"`run_dir` .*{message}"):
            sleb.search("demo", run_dir=out)
