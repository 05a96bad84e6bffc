"""A quantisation is applied by the loader, or refused by name; what loads has the weights that were meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sleb.errors import ModelError
from sleb.model.loading import load_model
from tests.support import tiny
from tests.support.quantised import FP8, Tensors, eight_bits

Make = Callable[..., str]

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
MLX = {"group_size": 64, "bits": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("plain") / "model", num_blocks=3)


@pytest.fixture
def make(plain: Path, tmp_path: Path) -> Make:
    """A copy of the model with other settings, tensors, and JSON files beside them."""

    def made(settings: dict[str, Any] | None = None, tensors: Tensors | None = None, **files: Any) -> str:
        folder = Path(shutil.copytree(plain, tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text()) | (settings or {})
        (folder / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return str(folder)

    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bit_weights_that_load_are_those_that_were_meant(make: Make, plain: Path, dtype: str) -> None:
    stored, meant = eight_bits(plain)
    loaded = load_model(make({"quantization_config": FP8, "dtype": "bfloat16"}, stored), dtype=dtype)
    assert loaded.quantisation == "fp8, dequantised while loading"
    result = loaded.model.state_dict()
    assert {str(result[name].dtype) for name in meant} == {f"torch.{dtype}"}
    for name, weight in meant.items():
        torch.testing.assert_close(result[name].float(), weight, rtol=2**-8 if dtype == "bfloat16" else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "beside", "sentence"),
    [
        ({"quantization_config": MODELOPT}, {}, r"modelopt \(FP8\), as its config under quantization_config says"),
        (
            {},
            {"hf_quant_config": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}},
            r"modelopt \(NVFP4\), as the file hf_quant_config.json beside",
        ),
        ({}, {"quantize_config": {"bits": 4, "group_size": 128}}, r"without a name.*quantize_config.json beside"),
        (
            {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            {},
            r"compressed-tensors \(pack-quantized\), as its config under compression_config",
        ),
        ({"text_config": {"quantization_config": MODELOPT}}, {}, "under text_config.quantization_config"),
        ({"vision_config": {"quantization_config": FP8}}, {}, "under vision_config.quantization_config"),
        ({"quantization": MLX, "quantization_config": MLX}, {}, r"without a name \(quant_method\) \(4 bits\)"),
        ({"quantization_config": {"quant_method": "a\u2028b"}}, {}, "quantised with a b, as"),
        ({"quantization_config": {}}, {}, "without a name"),
    ],
)
def test_a_scheme_that_the_loader_skips_is_refused_by_name(
    make: Make, settings: dict[str, Any], beside: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_model(make(settings, **beside))


@pytest.mark.parametrize(
    "method",
    ["aqlm", "auto-round", "awq", "bitnet", "eetq", "fp_quant", "gptq", "higgs", "hqq", "nvfp4", "quanto", "spqr"],
)
def test_a_scheme_whose_library_or_device_is_missing_is_refused_by_name(make: Make, method: str) -> None:
    settings = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    with pytest.raises(ModelError, match=rf"is quantised with {method} \(4 bits\), which cannot be loaded here"):
        load_model(make(settings))


@pytest.mark.parametrize(
    ("settings", "scale_name", "sentence"),
    [
        ({}, "weight_scale_inv", "stores weights as F8_E4M3 .*names no quantisation"),
        ({"quantization_config": FP8}, "weight_scale", "with fp8, and transformers leaves 21 of the tensors out"),
    ],
)
def test_scales_that_the_model_does_not_take_are_refused(
    make: Make, plain: Path, settings: dict[str, Any], scale_name: str, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_model(make(settings, eight_bits(plain, scale_name)[0]))


def test_a_weight_that_has_lost_its_scale_is_refused(make: Make, plain: Path) -> None:
    stored, _ = eight_bits(plain)
    del stored["model.layers.1.mlp.up_proj.weight_scale_inv"]
    with pytest.raises(ModelError, match=r"still packed after loading \(model.layers.1.mlp.up_proj.weight in float8"):
        load_model(make({"quantization_config": FP8}, stored))


@pytest.mark.parametrize("more", ["model.layers.0.mlp.up_proj.input_scale", "model.layers.0.mlp.up_proj.qzeros"])
def test_scales_beside_plain_weights_are_refused(make: Make, plain: Path, more: str) -> None:
    tensors = load_file(plain / "model.safetensors") | {more: torch.ones(1)}
    with pytest.raises(ModelError, match=r"though its config does not say how.*leaves 1 of the tensors out"):
        load_model(make({}, tensors))


def test_scales_of_a_part_that_is_not_loaded_are_not_missed(make: Make, plain: Path) -> None:
    vision = {"visual.blocks.0.qkv.weight": torch.ones(2, 2), "visual.blocks.0.qkv.weight_scale_inv": torch.ones(1)}
    assert load_model(make({}, load_file(plain / "model.safetensors") | vision), dtype="float32").quantisation is None


def test_packed_weights_that_no_config_speaks_of_are_refused(make: Make, plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    packed = {f"{name}.{part}": torch.ones(4, 4, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")}
    with pytest.raises(ModelError, match=r"though its config does not say how.*up_proj\.qweight, for one"):
        load_model(make({}, tensors | packed))


def test_integers_for_weights_are_refused(make: Make, plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"stores weights as I8 .{name}"):
        load_model(make({}, tensors | {name: (tensors[name] * 10).to(torch.int8)}))


def test_scales_of_a_cache_change_no_weight(make: Make, plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors") | {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    loaded = load_model(make({}, tensors), dtype="float32")
    assert loaded.quantisation is None
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(loaded.model.state_dict()[name], tensors[name])


def test_plain_weights_under_a_scheme_are_not_called_quantised(make: Make) -> None:
    assert load_model(make({"quantization_config": {"quant_method": "mxfp4"}}), dtype="float32").quantisation is None


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_the_files_say_which_type_the_checkpoint_has(make: Make, plain: Path, kind: str, dtype: str | None) -> None:
    tensors = {name: each.to(getattr(torch, kind)) for name, each in load_file(plain / "model.safetensors").items()}
    loaded = load_model(make({"dtype": dtype}, tensors), dtype="checkpoint")
    assert (loaded.checkpoint_dtype, loaded.dtype, loaded.model.dtype) == (kind, kind, getattr(torch, kind))


def test_four_bit_experts_that_load_are_those_that_were_meant(tmp_path: Path) -> None:
    """MXFP4 as gpt-oss has it: two numbers a byte, the lower half first, and an exponent for each 32."""
    folder = tiny.save(tmp_path / "model", "gpt-oss", num_blocks=3)
    tensors = load_file(folder / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    meant: Tensors = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(-8, -3, blocks.shape[:3])
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, (exponents + 127).to(torch.uint8)
        numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
        meant[name] = (numbers * 2.0 ** exponents[..., None]).flatten(-2).transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder), dtype="float32")
    assert loaded.quantisation == "mxfp4, dequantised while loading"
    result = loaded.model.state_dict()
    assert len(meant) == 6
    assert all(torch.equal(result[name], weight) for name, weight in meant.items())
