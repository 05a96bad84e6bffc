"""Headers of safetensors files: where each tensor lies, and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sleb.errors import ModelError
from sleb.model.inspection.stored_tensors import main_dtype, read_headers


def test_a_tensor_lies_where_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wanted = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    save_file({"a": torch.ones(5), "b": wanted, "c": torch.ones(2, dtype=torch.float8_e4m3fn)}, path)
    tensors = read_headers([path])
    assert {name: (each.dtype, each.shape, each.item_size) for name, each in tensors.items()} == {
        "a": ("F32", (5,), 4),
        "b": ("BF16", (2, 3), 2),
        "c": ("F8_E4M3", (2,), 1),
    }
    raw = path.read_bytes()[tensors["b"].begin : tensors["b"].begin + tensors["b"].size]
    assert raw == wanted.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a": torch.ones(1, dtype=torch.int64), "b": torch.ones(2).half()}, "float16"),
        ({"a": torch.ones(3), "b": torch.ones(4).bfloat16()}, "bfloat16"),
        ({"a": torch.ones(3), "b": torch.ones(9, dtype=torch.int32)}, None),
        ({"a": torch.ones(1, dtype=torch.int8)}, None),
    ],
)
def test_the_type_of_a_checkpoint_is_that_of_most_weights(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str | None
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    assert main_dtype(read_headers([tmp_path / "model.safetensors"])) == kind
    assert main_dtype({}) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [True, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
        {"dtype": 5, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
        [],
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "model.safetensors"
    raw = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(ModelError, match="has a damaged header"):
        read_headers([path])


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, struct.pack("<Q", 1 << 62), struct.pack("<Q", 9) + b"{}"])
def test_a_truncated_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        read_headers([path])
