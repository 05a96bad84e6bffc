"""Cache entries: whole, verified, bounded, shared. A damaged one is never believed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sleb.analysis import block_output_cache, cache_folder
from sleb.analysis.block_output_cache import BlockOutputs
from sleb.errors import OptionError, StorageError
from tests.support.paths import ROOT

TOKENS, BLOCKS, HIDDEN = 10, 3, 8


def make(seed: int = 0, tokens: int = TOKENS, model: str = "tiny") -> BlockOutputs:
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(0, 100, shape).astype(np.int32)

    return BlockOutputs(
        model=model,
        sequences=2,
        sequence_length=tokens // 2,
        outputs=floats(BLOCKS + 1, tokens, HIDDEN),
        cosine=floats(tokens, BLOCKS + 1, BLOCKS + 1),
        predictions=ints(BLOCKS, tokens),
        token_ids=ints(tokens),
        sequence=ints(tokens),
        position=ints(tokens),
        random_token_id=5,
        random_cosine=floats(BLOCKS + 1, BLOCKS + 1),
        generated_predictions=np.empty((BLOCKS, 0), np.int32),
        generated_ids=np.empty(0, np.int32),
        generated_sequence=np.empty(0, np.int32),
        generated_reason="It cannot.",
        passage_top=ints(4, BLOCKS, 5),
        passage_probability=floats(4, BLOCKS, 5),
        versions={"torch": "2.13.0"},
    )


def key(number: int) -> str:
    return block_output_cache.key_of(number=number)


def folder(home: Path) -> Path:
    return home / "cache" / "block-outputs"


def entries(home: Path) -> set[str]:
    return {child.name for child in folder(home).iterdir() if child.is_dir()}


def assert_same(entry: BlockOutputs | None, expected: BlockOutputs) -> None:
    assert entry is not None
    for field in dataclasses.fields(BlockOutputs):
        a, b = getattr(entry, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    expected = make()
    assert block_output_cache.read(tmp_path, key(1)) is None
    assert block_output_cache.write(tmp_path, key(1), expected, {"dtype": "float32"})
    entry = block_output_cache.read(tmp_path, key(1))
    assert_same(entry, expected)
    assert entry is not None
    assert isinstance(entry.outputs, np.memmap)
    assert not entry.outputs.flags.writeable
    assert entries(tmp_path) == {key(1)}


def test_a_key_depends_on_every_part_and_on_content() -> None:
    ids = np.arange(6, dtype=np.int32)
    base = block_output_cache.key_of(ids=ids, revision=None, versions={"a": "1", "b": "2"})
    assert base == block_output_cache.key_of(versions={"b": "2", "a": "1"}, ids=ids.copy(), revision=None)
    others = [
        block_output_cache.key_of(ids=ids[::-1], revision=None, versions={"a": "1", "b": "2"}),
        block_output_cache.key_of(ids=ids.reshape(2, 3), revision=None, versions={"a": "1", "b": "2"}),
        block_output_cache.key_of(ids=ids.astype(np.int64), revision=None, versions={"a": "1", "b": "2"}),
        block_output_cache.key_of(ids=ids, revision="None", versions={"a": "1", "b": "2"}),
        block_output_cache.key_of(ids=ids, revision=None, versions={"a": "1", "b": "3"}),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize("name", ["../../secret", "", "A" * 32, "0" * 31, "0" * 33, "."])
def test_a_key_from_elsewhere_cannot_leave_the_cache(tmp_path: Path, name: str) -> None:
    assert block_output_cache.read(tmp_path, name) is None


@pytest.mark.parametrize("file", ["outputs.safetensors", "cosine.safetensors", "predictions.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_entry_is_removed_not_believed(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {})
    path = folder(tmp_path) / key(1) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-20] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert block_output_cache.read(tmp_path, key(1)) is None
    assert "computed again" in caplog.text
    assert entries(tmp_path) == set()
    assert block_output_cache.write(tmp_path, key(1), make(), {})
    assert_same(block_output_cache.read(tmp_path, key(1)), make())


def test_every_byte_of_the_description_counts(tmp_path: Path) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {"dtype": "float32"})
    path = folder(tmp_path) / key(1) / "meta.json"
    path.write_text(path.read_text().replace('"random_token_id": 5', '"random_token_id": 6'))
    assert block_output_cache.read(tmp_path, key(1)) is None


def test_an_entry_under_another_key_is_not_believed(tmp_path: Path) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {})
    os.rename(folder(tmp_path) / key(1), folder(tmp_path) / key(2))
    assert block_output_cache.read(tmp_path, key(2)) is None


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block_output_cache.write(tmp_path, key(0), make(), {})
    size = cache_folder.usage(tmp_path)[0].bytes
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, str(4.5 * size / 1e9))
    for number in (1, 2, 3):
        block_output_cache.write(tmp_path, key(number), make(number), {})
    for number, age in enumerate([400, 300, 200, 100]):
        then = time.time() - age
        os.utime(folder(tmp_path) / key(number) / "meta.json", (then, then))
        for file in (folder(tmp_path) / key(number)).glob("*.safetensors"):
            os.utime(file, (then, then))
    assert block_output_cache.read(tmp_path, key(0)) is not None  # the oldest becomes the most recently used
    block_output_cache.write(tmp_path, key(4), make(4), {})
    assert entries(tmp_path) == {key(0), key(2), key(3), key(4)}
    block_output_cache.write(tmp_path, key(4), make(5), {})  # the same key again replaces, and evicts nobody
    assert entries(tmp_path) == {key(0), key(2), key(3), key(4)}
    assert_same(block_output_cache.read(tmp_path, key(4)), make(5))
    assert sum(entry.bytes for entry in cache_folder.usage(tmp_path)) <= 4.5 * size


def test_what_is_mapped_survives_its_eviction(tmp_path: Path) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {})
    entry = block_output_cache.read(tmp_path, key(1))
    cache_folder.clear(tmp_path, key(1))
    assert_same(entry, make())


def test_an_entry_takes_at_most_a_quarter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, "0.00001")
    assert not block_output_cache.write(tmp_path, key(1), make(), {})
    assert "quarter" in caplog.text
    caplog.clear()
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, "0")
    assert not block_output_cache.write(tmp_path, key(1), make(), {})
    assert caplog.text == ""
    assert not folder(tmp_path).exists()


def test_tokens_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_output_cache.tokens_that_fit(30, 576) == 4096
    assert block_output_cache.tokens_that_fit(80, 8192) == 1_863  # of the default 20 GB
    assert block_output_cache.tokens_that_fit(80, 8192, limit=10**8) == 256
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, "0")
    assert block_output_cache.tokens_that_fit(80, 8192) == 4096  # nothing is kept, so nothing needs to fit
    per_token = 4 * 81 * (8192 + 81)  # bytes: outputs and cosine
    assert 1_863 * per_token < 5e9 < 1_866 * per_token


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, text)
    with pytest.raises(OptionError, match=f"SLEB_CACHE_LIMIT is '{text}'"):
        block_output_cache.limit_bytes()


WRITER = """
import sys; sys.path.insert(0, {root!r})
import os, pathlib
from tests.analysis import test_block_output_cache as made
from sleb.analysis import block_output_cache as cache
{before}
kept = cache.write(pathlib.Path({home!r}), made.key(1), made.make(1, tokens={tokens}), {{}})
print(kept)
"""


def writer(home: Path, before: str = "", tokens: int = TOKENS) -> list[str]:
    code = WRITER.format(root=str(ROOT), home=str(home), before=before, tokens=tokens)
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("call", ["cache.save_file", "cache._hash_json", "os.replace"])
def test_a_writer_killed_in_between_leaves_no_entry(tmp_path: Path, call: str) -> None:
    block_output_cache.write(tmp_path, key(2), make(2), {})
    killed = f"{call} = lambda *args, **kwargs: os.kill(os.getpid(), 9)"
    assert subprocess.run(writer(tmp_path, killed)).returncode == -9
    assert block_output_cache.read(tmp_path, key(1)) is None
    assert len(entries(tmp_path)) == 2  # what it left behind is not taken for an entry
    assert block_output_cache.write(tmp_path, key(1), make(1), {})
    assert entries(tmp_path) == {key(1), key(2)}  # and is cleared away by the next writer
    assert_same(block_output_cache.read(tmp_path, key(1)), make(1))


def test_a_full_disk_costs_the_entry_not_the_analysis(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = subprocess.run(writer(tmp_path, limit, tokens=1000), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "could not be cached" in done.stderr
    assert entries(tmp_path) == set()


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert not block_output_cache.write(tmp_path, key(1), make(), {})
    assert "could not be cached" in caplog.text
    assert block_output_cache.read(tmp_path, key(1)) is None


def test_two_processes_write_and_read_the_same_entry(tmp_path: Path) -> None:
    loop = (
        f"home = pathlib.Path({str(tmp_path)!r})\n"
        "assert all([cache.write(home, made.key(1), made.make(1), {}) for _ in range(30)])"
    )
    processes = [subprocess.Popen(writer(tmp_path, loop)) for _ in range(2)]
    read = 0
    while any(process.poll() is None for process in processes):
        entry = block_output_cache.read(tmp_path, key(1))
        if entry is not None:
            assert_same(entry, make(1))
            read += 1
    assert [process.returncode for process in processes] == [0, 0]
    assert read > 0
    assert entries(tmp_path) == {key(1)}
    assert_same(block_output_cache.read(tmp_path, key(1)), make(1))


def test_read_without_torch_and_without_reading_everything(tmp_path: Path) -> None:
    tokens = 400_000  # 51 MB of outputs
    block_output_cache.write(tmp_path, key(1), make(tokens=tokens), {})
    code = f"""
import pathlib, resource, sys
import numpy
from sleb.analysis import block_output_cache as cache
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = cache.read(pathlib.Path({str(tmp_path)!r}), {key(1)!r}, verify=False)
part = numpy.array(found.outputs[:, 1000:1010])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert part.shape == (4, 10, 8), part.shape
assert grown < 20_000, grown  # kB
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_usage_and_clear(tmp_path: Path) -> None:
    assert cache_folder.usage(tmp_path) == []
    assert cache_folder.clear(tmp_path, "all") == []
    for number in (1, 2):
        block_output_cache.write(tmp_path, key(number), make(model=f"model {number}"), {})
    (tmp_path / "cache" / "demo" / "inner").mkdir(parents=True)
    (tmp_path / "cache" / "demo" / "inner" / "text.txt").write_text("12345")
    listed = {entry.name: entry for entry in cache_folder.usage(tmp_path)}
    assert set(listed) == {key(1), key(2), "demo"}
    assert listed[key(1)].model == "model 1"
    assert listed[key(1)].folder == "block-outputs"
    assert listed[key(1)].bytes > make().outputs.nbytes
    assert listed[key(1)].age < 60
    assert (listed["demo"].bytes, listed["demo"].model) == (5, None)
    with pytest.raises(OptionError, match=r"nothing called '\.\./runs'.*block-outputs, demo"):
        cache_folder.clear(tmp_path, "../runs")
    assert [entry.name for entry in cache_folder.clear(tmp_path, key(1))] == [key(1)]
    assert {entry.name for entry in cache_folder.usage(tmp_path)} == {key(2), "demo"}
    cache_folder.clear(tmp_path, "demo")
    assert {entry.name for entry in cache_folder.usage(tmp_path)} == {key(2)}
    cache_folder.clear(tmp_path, "all")
    assert cache_folder.usage(tmp_path) == []


def test_clearing_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "demo").symlink_to(tmp_path / "precious")
    cache_folder.clear(tmp_path, "all")
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert not (tmp_path / "cache" / "demo").exists()


def test_a_cache_that_cannot_be_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {})

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=r"cannot be cleared: .*Permission denied"):
        cache_folder.clear(tmp_path, "all")


def test_a_damaged_entry_that_cannot_be_removed_is_still_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    block_output_cache.write(tmp_path, key(1), make(), {})
    (folder(tmp_path) / key(1) / "meta.json").write_text(json.dumps({"content": {}, "xxh3": ""}))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING):
        assert block_output_cache.read(tmp_path, key(1)) is None
    assert "could not be removed" in caplog.text
