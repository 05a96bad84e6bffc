"""Headers that announce what a file does not hold are refused; others are read as the library reads them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sleb.errors import ModelError
from sleb.model.inspection import gguf_header
from sleb.model.inspection.block_count import num_blocks
from tests.support import gguf_files

HUGE = 1 << 40
UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def text(value: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(value)) + value.encode()


def header(*settings: bytes, kv: int | None = None, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, count, len(settings) if kv is None else kv)
    return b"GGUF" + counts + b"".join(settings) + tensors


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(of: int, count: int, entries: bytes = b"") -> bytes:
    return struct.pack("<IQ", of, count) + entries


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(UINT8, 0)


HOSTILE = [
    (header(kv=HUGE), "1,099,511,627,776 settings"),
    (header(count=HUGE), "1,099,511,627,776 tensors"),
    (header(setting("a", ARRAY, array(UINT8, HUGE))), "3,000,000 entries"),
    (header(setting("a", ARRAY, array(UINT8, 1_000_000))), "announces 1,000,000 entries of 1 bytes, and 0 bytes"),
    (header(setting("a", ARRAY, array(STRING, 2_000_000))), "2,000,000 entries of a list"),
    (header(setting("a", STRING, struct.pack("<Q", HUGE))), "a text announces"),
    (header(struct.pack("<Q", HUGE) + b"a" * 20), "a setting's name has"),
    (header(setting("a", ARRAY, nested(100_000))), "nested too deeply"),
    (header(setting("a", 77, b"")), "type 77"),
    (header(setting("a", UINT8, b"1"), setting("a", UINT8, b"1")), "'a' twice"),
    (header(setting("a\x1b[31m" * 500, 77, b"")), "type 77"),
    (header(version=1), "version 1"),
    (header(count=1, tensors=tensor("t", (1 << 20, 1 << 20))), "ends 4,398,046,511,135 bytes behind"),
    (header(count=1, tensors=tensor("t", (4,) * 9)), "9 dimensions"),
    (header(count=1, tensors=tensor("t", (1 << 63, 1 << 63))), "behind the file's end"),
    (header(count=1, tensors=tensor("t", (1,), 99)), "damaged or truncated"),
    (header(setting("general.alignment", UINT32, struct.pack("<I", 3))), "alignment is 3"),
    (header(setting("a", UINT32, b"")), "damaged or truncated"),
    (b"GGUF", "damaged or truncated"),
    (b"GGML" + bytes(40), "not a GGUF file"),
]


@pytest.mark.parametrize(("content", "words"), HOSTILE, ids=[words for _, words in HOSTILE])
def test_a_header_that_announces_too_much_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as refused:
        gguf_header.check(path)
    assert str(refused.value).isprintable()
    assert num_blocks(str(path)) is None


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_versions_say_how_many_blocks(tmp_path: Path, order: str, version: int) -> None:
    def own(key: str, kind: int, value: bytes) -> bytes:
        return text(key, order) + struct.pack(f"{order}I", kind) + value

    settings = own("general.architecture", STRING, text("llama", order))
    settings += own("list", ARRAY, struct.pack(f"{order}IQ", STRING, 2) + text("a", order) + text("b", order))
    settings += own("llama.block_count", UINT32, struct.pack(f"{order}I", 12))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack(f"{order}IQQ", version, 0, 3) + settings)
    assert num_blocks(str(path)) == 12
    assert gguf_header.check(path).architecture == "llama"


@pytest.mark.parametrize("architecture", ["llama", "lfm2", "gemma2"])
def test_what_is_read_is_what_the_library_reads(tmp_path: Path, architecture: str) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", architecture, alignment=64)
    result, reader = gguf_header.check(path), gguf.GGUFReader(path)
    scalars: dict[str, Any] = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert result.settings == scalars
    assert result.elements == sum(int(np.prod(each.shape)) for each in reader.tensors)
    assert [(each.name, each.shape, each.kind) for each in result.tensors] == [
        (each.name, tuple(each.shape.tolist()), int(each.tensor_type)) for each in reader.tensors
    ]
    assert num_blocks(str(path)) == 6
