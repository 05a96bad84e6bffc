"""Which stored tensor is of which block, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleb.errors import StorageError
from sleb.export.contents import tensor_files
from sleb.export.contents.tensor_files import without_blocks
from sleb.model.inspection.stored_tensors import read_headers

BLOCKS = [{"up.weight": (3, 2), "norm.weight": (3,)}] * 3


def stored(folder: Path, *prefixes: str, **others: torch.Tensor) -> Path:
    result = dict(others)
    for prefix in prefixes:
        for number in range(3):
            result[f"{prefix}.{number}.up.weight"] = torch.randn(3, 2)
            result[f"{prefix}.{number}.norm.weight"] = torch.randn(3)
    save_file(result, folder / "source.safetensors")
    return folder / "source.safetensors"


@pytest.mark.parametrize(
    ("prefixes", "path", "result"),
    [
        (("model.layers",), "model.layers", "model.layers"),
        (("h",), "transformer.h", "h"),  # without the name of the whole
        (("language_model.layers",), "model.language_model.layers", "language_model.layers"),
        (("model.layers", "draft.layers"), "model.layers", "model.layers"),
        (("one.layers", "two.layers"), "model.layers", None),  # either could be
    ],
)
def test_the_blocks_are_found_by_name_and_shape(
    tmp_path: Path, prefixes: tuple[str, ...], path: str, result: str | None
) -> None:
    headers = read_headers([stored(tmp_path, *prefixes)])
    copy = without_blocks(headers, path, BLOCKS, {}, (0, 2))
    assert (copy.prefix if copy else None) == result


def test_another_stack_of_as_many_blocks_is_left_alone(tmp_path: Path) -> None:
    others = {f"vision.layers.{number}.up.weight": torch.randn(5, 5) for number in range(3)}
    source = stored(tmp_path, "text.layers", **others)
    copy = without_blocks(read_headers([source]), "model.text.layers", BLOCKS, {}, (2,))
    assert copy is not None
    tensor_files.write(copy, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {
        *others,
        "text.layers.0.up.weight",
        "text.layers.0.norm.weight",
    }


def test_slices_outside_the_stack_are_taken_along_any_dimension(tmp_path: Path) -> None:
    source = stored(tmp_path, "model.layers", table=torch.arange(24.0).reshape(2, 6, 2), **{"a.b": torch.ones(6)})
    copy = without_blocks(read_headers([source]), "model.layers", BLOCKS, {"table": ((2, 6, 2), 1)}, (0, 2))
    assert copy is not None
    tensor_files.write(copy, tmp_path)
    result = load_file(tmp_path / "model.safetensors")
    assert torch.equal(result["table"], torch.arange(24.0).reshape(2, 6, 2)[:, [0, 1, 4, 5]])
    assert torch.equal(result["a.b"], torch.ones(6))
    assert copy.size == sum(each.numel() * 4 for each in result.values())
    missing = without_blocks(read_headers([source]), "model.layers", BLOCKS, {"no.table": ((2, 6, 2), 1)}, (0, 2))
    assert missing is None


def test_types_that_torch_reads_only_when_aligned_are_aligned(tmp_path: Path) -> None:
    odd = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3).half(), "c": torch.ones(1, dtype=torch.int64)}
    copy = without_blocks(read_headers([stored(tmp_path, "h", **odd)]), "h", BLOCKS, {}, (1,))
    assert copy is not None
    tensor_files.write(copy, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in odd} == {
            name: each.tolist() for name, each in odd.items()
        }
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("most", "files"), [(None, 1), (72, 2), (1, 7)])
def test_files_are_as_large_as_they_may_be(tmp_path: Path, most: int | None, files: int) -> None:
    """Three blocks of 24 and 12 bytes, and eight bytes beside them."""
    source = stored(tmp_path, "h", head=torch.ones(2))
    copy = without_blocks(read_headers([source]), "h", BLOCKS, {}, (0, 1, 2))
    assert copy is not None
    tensor_files.write(copy, tmp_path, most)
    written = sorted(tmp_path.glob("model*.safetensors"))
    assert len(written) == files
    result = [load_file(path) for path in written]
    for name, tensor in load_file(source).items():
        assert [torch.equal(each[name], tensor) for each in result if name in each] == [True]
    sizes = [sum(each.numel() * 4 for each in shard.values()) for shard in result]
    assert sum(sizes) == copy.size == 116
    assert most is None or max(sizes) <= max(most, 24)
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)


def test_a_byte_that_did_not_arrive_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = without_blocks(read_headers([stored(tmp_path, "h")]), "h", BLOCKS, {}, (1,))
    assert copy is not None
    right = tensor_files._write_file

    def torn(path: Path, tensors: list[tensor_files.Tensor]) -> int:
        data = right(path, tensors)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        return data

    monkeypatch.setattr(tensor_files, "_write_file", torn)
    with pytest.raises(StorageError, match="has not arrived as it was"):
        tensor_files.write(copy, tmp_path)
