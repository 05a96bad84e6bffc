"""Exports of whole folders: what the source holds is copied, carried over, or said; and a proof that sees what is not.

One fresh process proves them all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor

from sleb.errors import ExportError
from sleb.export.checkpoint import export_checkpoint, write_checkpoint
from sleb.export.contents.model_folder import plan_folder, renumbered_names, require_as_stored, write_saved
from sleb.export.proven_folder import expect, write_expectation
from sleb.export.removal import plan_removal, streamlined
from sleb.model.inspection.source_folder import source_folder
from sleb.model.loading import load_model
from sleb.records import Proof
from tests.support import source_folders
from tests.support.families import build
from tests.support.paths import ROOT
from tests.support.source_folders import tensors

KEPT = (0, 2, 4, 5)  # of six blocks
SOURCES: dict[str, Callable[[Path], Path]] = {
    "further": source_folders.with_further_blocks,
    "kimi": source_folders.kimi_linear,
    "code": source_folders.with_own_code,
    "fp8": source_folders.in_fp8,
    "seeing": source_folders.seeing,
    "part": source_folders.text_part,
    "sharded": lambda folder: source_folders.save(folder, build("mixtral"), max_shard_size="60KB"),
    "packed": lambda folder: source_folders.save(folder, build("gemma4")),
}


def write(folder: Path, source: Path) -> Path:
    """All of an export without blocks 1 and 3 but its proof."""
    folder.mkdir()
    trusted = "auto_map" in json.loads((source / "config.json").read_text())
    loaded = load_model(str(source), dtype="checkpoint", device="cpu", trust_remote_code=trusted)
    removal = plan_removal(loaded.model, (1, 3))
    plan = plan_folder(loaded.model, removal, source_folder(str(source), None))
    expectation = expect(loaded.model, loaded.tokenizer, removal)
    written = write_checkpoint(loaded.model, loaded.tokenizer, plan, folder, "# A card", trust_remote_code=trusted)
    write_expectation(folder, removal, expectation, written)
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def _lose_a_tensor(folder: Path) -> None:
    source_folders.rewrite(
        folder, lambda result: {name: each for name, each in result.items() if "eh_proj" not in name}
    )


def _change_a_type(folder: Path) -> None:
    source_folders.rewrite(folder, lambda result: result | {"model.norm.weight": result["model.norm.weight"].half()})


WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a tensor that is not loaded is lost": ("further", _lose_a_tensor, "1 tensors are not those of the source"),
    "a tensor has another type": ("further", _change_a_type, "such as model.norm.weight"),
    "a file is lost": ("seeing", lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "a file is changed": (
        "seeing",
        lambda folder: (folder / "processor_config.json").write_text("{}"),
        "processor_config.json is not as it was written",
    ),
    "a nested list is stale": (
        "kimi",
        lambda folder: edit(folder / "config.json", lambda c: c["linear_attn_config"].update(full_attn_layers=[3, 8])),
        "full_attn_layers in its config names a block that does not exist",
    ),
    "a setting is not the planned one": (
        "code",
        lambda folder: edit(folder / "config.json", lambda c: c["attention_plan"].update(global_layers=[0, 2, 3])),
        "its config says attention_plan = ",
    ),
    "a list still has an entry for each block": (
        "further",
        lambda folder: edit(folder / "config.json", lambda c: c.update(kinds_of_layers=["full"] * 6)),
        "kinds_of_layers in its config still has an entry for each of 6 blocks",
    ),
    "generating has other defaults": (
        "sharded",
        lambda folder: edit(folder / "generation_config.json", lambda c: c.update(repetition_penalty=1.5)),
        "its defaults for generating differ (repetition_penalty)",
    ),
    "the chat template is another": (
        "sharded",
        lambda folder: edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}")),
        "its tokenizer has other chat templates",
    ),
    "the index names what is not there": (
        "sharded",
        lambda folder: edit(
            folder / "model.safetensors.index.json", lambda c: c["weight_map"].update(no=min(c["weight_map"].values()))
        ),
        "its index names other tensors than its files hold",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("folders")
    sources = {name: make(root / f"source {name}") for name, make in SOURCES.items()}
    folders = {name: write(root / name, source) for name, source in sources.items()}
    for name, (of, change, _) in WRONG.items():
        folders[name] = Path(shutil.copytree(folders[of], root / name))
        change(folders[name])
    command = [sys.executable, "-m", "sleb.export.proof_process", "--trust-remote-code", *map(str, folders.values())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # some are meant to fail
    proofs = {name: Proof.model_validate_json((each / "proof.json").read_text()) for name, each in folders.items()}
    return SimpleNamespace(sources=sources, folders=folders, proofs=proofs)


def config_of(written: SimpleNamespace, name: str) -> dict[str, Any]:
    return dict(json.loads((written.folders[name] / "config.json").read_text()))


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_is_that_of_the_source_under_its_new_number(written: SimpleNamespace, name: str) -> None:
    assert written.proofs[name].passed, written.proofs[name].reasons
    assert written.proofs[name].max_logit_difference == 0.0
    kept = tuple(block for block in range(8 if name == "kimi" else 6) if block not in (1, 3))
    moved = {block: index for index, block in enumerate(kept)} | ({6: 4, 7: 5} if name == "further" else {})
    prefixes = {"seeing": "language_model.model.layers.", "part": "model.language_model.layers."}
    prefix = prefixes.get(name, "model.layers.")
    source, result = tensors(written.sources[name]), tensors(written.folders[name])
    expected = {}
    for key, tensor in source.items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix):
            expected[key] = tensor
        elif int(number) in moved:
            expected[f"{prefix}{moved[int(number)]}.{rest}"] = tensor
    assert result.keys() == expected.keys()
    packed = 0
    for key, tensor in expected.items():
        if tensor.shape != result[key].shape:  # a slice for each block
            dim = next(at for at, size in enumerate(tensor.shape) if size != result[key].shape[at])
            slices = tensor.unflatten(dim, (6, -1)).index_select(dim, torch.tensor(KEPT))
            tensor, packed = slices.flatten(dim, dim + 1), packed + 1
        assert tensor.dtype == result[key].dtype
        assert torch.equal(tensor.view(torch.uint8), result[key].contiguous().view(torch.uint8))
    assert packed == (2 if name == "packed" else 0)


def test_further_blocks_are_carried_over_and_said(written: SimpleNamespace) -> None:
    proof, config = written.proofs["further"], config_of(written, "further")
    assert config["num_nextn_predict_layers"] == 2
    assert config["num_hidden_layers"] == 4
    assert config["dtype"] == "float16"  # named now, since not all weights have it
    assert proof.dtype == "float16"
    assert [note.partition(",")[0] for note in proof.notes] == ["model.layers.6", "model.layers.7"]
    assert proof.notes[0].endswith("is carried over as model.layers.4.")
    result = tensors(written.folders["further"])
    assert result["model.layers.4.eh_proj.weight"].dtype == torch.float16
    assert result["model.layers.4.input_layernorm.weight"].dtype == torch.float32


def test_nested_lists_that_count_from_one_follow(written: SimpleNamespace) -> None:
    lists = config_of(written, "kimi")["linear_attn_config"]
    assert lists["kda_layers"] == [1, 2, 3, 4, 5] or pytest.fail(str(lists))
    assert lists["full_attn_layers"] == [6]


def test_settings_that_only_their_own_code_knows_follow(written: SimpleNamespace) -> None:
    config = config_of(written, "code")
    assert config["attention_plan"] == {"global_layers": [0, 3]}
    assert config["moe_layers_enum"] == "0,1,3"
    assert config["auto_map"]["AutoModelForCausalLM"] == "own.OwnModel"
    assert "own.py" in written.proofs["code"].files


def test_a_quantised_checkpoint_stays_quantised(written: SimpleNamespace) -> None:
    quantisation = config_of(written, "fp8")["quantization_config"]
    assert quantisation["modules_to_not_convert"] == ["lm_head", "model.layers.2.no_such"]
    assert quantisation["quant_method"] == "fp8"


def test_what_sees_images_is_carried_over(written: SimpleNamespace) -> None:
    folder = written.folders["seeing"]
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__.startswith("Gemma3ImageProcessor")
    names = {"chat_template.json", "preprocessor_config.json", "processor_config.json", "tokenizer.model"}
    assert names < set(written.proofs["seeing"].files)
    for name in names:
        assert (folder / name).read_bytes() == (written.sources["seeing"] / name).read_bytes()
    config = config_of(written, "seeing")
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["num_hidden_layers"] == 6
    assert "source seeing" not in json.dumps(config)


def test_what_transformers_does_not_load_is_carried_over(written: SimpleNamespace) -> None:
    config, source = config_of(written, "part"), json.loads((written.sources["part"] / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["text_config"]["layer_types"] == [source["text_config"]["layer_types"][block] for block in KEPT]
    assert config["vision_config"] == source["vision_config"]
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert "mtp.layers.0.fc.weight, are carried over" in written.proofs["part"].notes[0]


def test_the_proof_says_what_was_compared(written: SimpleNamespace) -> None:
    checked = "; ".join(written.proofs["sharded"].checked)
    number = len(tensors(written.folders["sharded"]))
    for clause in (
        f"{number} tensors",
        "3 files",
        "defaults for generating",
        "counts and lists in config.json",
        "the tokenizer gives the same tokens",
    ):
        assert clause in checked
    assert len(list(written.folders["sharded"].glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_sees_what_no_logit_shows(written: SimpleNamespace, name: str) -> None:
    assert not written.proofs[name].passed
    assert WRONG[name][2] in "; ".join(written.proofs[name].reasons)
    assert written.proofs[name].max_logit_difference == 0.0


def test_a_quantised_checkpoint_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    source = source_folders.in_fp8(tmp_path / "model")
    loaded = load_model(str(source), dtype="checkpoint", device="cpu")
    source_folders.rewrite(source, lambda result: {name.replace("layers", "x"): each for name, each in result.items()})
    removal = plan_removal(loaded.model, (1,))
    plan = plan_folder(loaded.model, removal, source_folder(str(source), None))
    assert plan.copy is not None  # whatever the stack is called
    source_folders.rewrite(source, lambda result: {name.replace(".", "_"): each for name, each in result.items()})
    plan = plan_folder(loaded.model, removal, source_folder(str(source), None))
    assert plan.copy is None
    with pytest.raises(ExportError, match="stored quantised, and which tensor is of which block cannot be told"):
        require_as_stored(plan)


def test_weights_that_are_others_leave_further_blocks_behind(tmp_path: Path) -> None:
    """As those of a healed or a quantised model are."""
    source = source_folders.with_further_blocks(tmp_path / "model")
    (source / "LICENSE").write_text("as is")
    (source / "own.py").write_text("")
    source_folders.settings(source, auto_map={"AutoModelForCausalLM": "own.Model"})  # a class of transformers will do
    loaded = load_model(str(source), dtype="checkpoint", device="cpu")
    plan = plan_folder(loaded.model, plan_removal(loaded.model, (1, 3)), source_folder(str(source), None))
    smaller = streamlined(loaded.model, (1, 3))
    out = tmp_path / "out"
    result = write_saved(smaller, loaded.tokenizer, plan, out, with_code=False)
    further = [name for name in tensors(source) if ".layers.6." in name or ".layers.7." in name]
    assert [each.name for each in result.left_behind] == [
        f"{len(further)} tensors, such as model.layers.6.eh_proj.weight",
        "own.py",
    ]
    assert result.notes == ("num_nextn_predict_layers is set to 0 in the config: no further block was carried over.",)
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert "auto_map" not in config
    assert (out / "LICENSE").read_text() == "as is"
    assert not any(".layers.4." in name for name in tensors(out))


def test_what_is_left_behind_is_said_in_the_log_and_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a pickle, too, whose config names no type: transformers writes its weights, in the type they have."""
    source = source_folders.save(tmp_path / "model", build("llama").half())
    torch.save(source_folders.tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    source_folders.settings(source, "dtype")
    (source / "run.sh").write_text("true")
    (source / "LICENSE").write_text("as is")
    loaded = load_model(str(source), dtype="checkpoint", device="cpu", allow_pickle=True)
    assert loaded.dtype == "float16"
    folder = source_folder(str(source), None)
    proof = export_checkpoint(loaded.model, loaded.tokenizer, (1, 3), tmp_path / "out", "# A card", source=folder)
    assert {each.name: each.why for each in proof.left_behind} == {
        "pytorch_model.bin": "it holds weights of the baseline",
        "tensors that transformers does not load, if any": "only transformers reads a pickle",
        "run.sh": "it is a program",
    }
    assert "Left behind: run.sh (it is a program)." in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `run.sh`: it is a program" in card
    assert "- the defaults for generating are equal" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "as is"
    assert {each.dtype for each in tensors(tmp_path / "out").values()} == {torch.float16}


def test_names_of_modules_follow_and_patterns_are_refused() -> None:
    removal: Any = SimpleNamespace(kept=KEPT)
    result = renumbered_names(
        {"ignore": ["lm_head", "model.layers.3.mlp", r"re:.*layers\.4\..*", "visual.layers.3"], "model.layers.5": 1},
        "model.layers",
        removal,
        ((6, 4),),
    )
    assert result == {"ignore": ["lm_head", r"re:.*layers\.2\..*", "visual.layers.3"], "model.layers.3": 1}
    with pytest.raises(ExportError, match="names blocks in its settings for quantisation by a pattern"):
        renumbered_names([r"re:model\.layers\.(0|1)\..*"], "model.layers", removal, ())
