"""A model's folder is data: what it asks for beyond what it holds is refused in a sentence before it is built."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleb.errors import ModelError
from sleb.model.inspection import model_files, stored_tensors
from sleb.model.inspection.block_count import num_blocks
from sleb.model.loading import load_model
from tests.support.families import FAMILIES

DEEP = "[" * 100_000


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refused(model: Path, words: str, **options: bool) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(str(model), **options)  # type: ignore[arg-type]
    sentence = str(caught.value).replace(str(model), "")
    assert sentence.isprintable()
    assert len(sentence) < 500


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 .* at most 1,024"),
        ({"num_hidden_layers": 1e300}, "num_hidden_layers = "),
        ({"text_config": {"n_layer": 10**7}}, "n_layer = 10000000"),
        ({"num_local_experts": 10**5}, "num_local_experts = 100000"),
        ({"num_local_experts": 4000, "num_hidden_layers": 1000}, "1,000 blocks and 4,000 experts"),
        ({"num_labels": 10**9}, "num_labels = "),
        ({"hidden_size": 10**6}, r"asks in its config for [\d,]+ weights"),
        ({"vocab_size": 10**9}, r"asks in its config for [\d,]+ weights"),
        ({"vocab_size": 10**30}, "cannot be loaded"),
        ({"head_dim": 10**9}, r"asks in its config for [\d,]+ weights"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"num_key_value_heads": 0}, "cannot be loaded"),
        ({"head_dim": 0}, "cannot be loaded"),
        ({"hidden_act": "no\x1b[31m" * 2000}, "cannot be loaded"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation = 'owner/kernel'.*`trust_remote_code=True`"),
        ({"_attn_implementation": "paged|a/b@main:run"}, "_attn_implementation = .*`trust_remote_code=True`"),
        ({"text_config": {"attn_implementation": {"": "kernels-community/x"}}}, "kernels-community.*`trust_remote"),
        ({"num_hidden_layers": "9"}, "cannot be loaded .*num_hidden_layers.*expected int"),
    ],
)
def test_a_config_that_asks_for_what_it_may_not_is_refused(model: Path, settings: dict[str, Any], words: str) -> None:
    change(model / "config.json", **settings)
    refused(model, words)


def test_an_adapter_beside_a_model_is_not_obeyed(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": "(.*.*)*X"}))
    refused(model, "an adapter, or a model with one beside it .*merge it into its base model")


def test_a_model_of_the_hub_with_an_adapter_beside_it_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0" * 40, tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_model("owner/model", dtype="float32").name == "owner/model"
    (repository / "snapshots" / commit / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="owner/model is an adapter, or a model with one beside it"):
        load_model("owner/model")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", DEEP, "nested too deeply"),
        ("config.json", "[1]", "not a JSON object"),
        ("config.json", "NaN", "not a JSON object"),
        ("config.json", '{"a": 1, "a": 2}', "model_type"),
        ("generation_config.json", DEEP, "RecursionError"),
        ("tokenizer.json", DEEP, "nested too deeply"),
        ("tokenizer.json", '{"added_tokens": [{"id": -1, "content": "x"}]}', "cannot be loaded"),
        ("tokenizer_config.json", "5", "cannot be loaded"),
        ("model.safetensors.index.json", DEEP, "nested too deeply"),
        ("model.safetensors.index.json", "{}", "weight_map"),
        ("tokenizer_config.json", '{"added": [{"\\u001b[31mred": 1}]}', "setting named"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}', "'../../x' outside"),
        ("model.safetensors", struct.pack("<Q", 1 << 60), "cannot be loaded"),
        ("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode(), "cannot be loaded"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    model: Path, name: str, content: str | bytes, words: str
) -> None:
    (model / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(model, words)


def test_a_file_without_an_end_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    refused(model, "not a regular file")
    (model / "tokenizer.json").unlink()
    with open(model / "vocab.txt", "wb") as file:
        file.truncate(1 << 40)
    refused(model, "1,099,512 MB")
    with open(model / "config.json", "ab") as file:
        file.truncate(1 << 40)
    refused(model, "more than 8 MB")
    assert num_blocks(str(model)) is None


@pytest.mark.parametrize(
    "damage", [lambda: b"", lambda: b"\x80\x04junk", lambda: pickle.dumps(eval), lambda: b"PK\x03\x04" * 20]
)
def test_a_pickle_that_cannot_be_read_is_refused(model: Path, damage: Callable[[], bytes]) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(damage())
    refused(model, "`allow_pickle=True`")
    refused(model, "cannot be loaded", allow_pickle=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bamba"])
def test_a_real_family_is_never_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Without the room that small models have."""
    monkeypatch.setattr(model_files, "_TIMES", 1.01)
    monkeypatch.setattr(model_files, "_SPARE", 0)
    config = FAMILIES[family].config(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model_files.read_config(tmp_path)
    model_files.require_plain_files(tmp_path)
    stored = stored_tensors.read_headers(tmp_path.glob("*.safetensors"))
    model_files.require_stored(family, config, {}, stored, 0)
    with pytest.raises(ModelError, match="its files hold"):
        model_files.require_stored(family, FAMILIES[family].config(8), {}, stored, 0)


def test_names_of_settings_that_only_sound_like_counts_may_be_large() -> None:
    config = {
        "hidden_size_per_layer_input": 10**6,
        "n_positions": 1 << 20,
        "num_experts_per_tok": 8,
        "num_parameters": 7e9,
    }
    model_files.require_modest("here", config | {"time_step_limit": [0.0, float("inf")]})


def test_what_transformers_says_of_a_file_has_no_control_characters(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["evil\x1b]0;title\x07"] = weights["model.norm.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.getLogger("transformers").addHandler(handler)
    try:
        load_model(str(model))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert "evil" in output.getvalue()
    assert output.getvalue().replace("\n", "").replace("\t", "").isprintable()
