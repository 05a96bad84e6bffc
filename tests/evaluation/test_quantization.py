"""`sleb quantize`: the numbers are those of the quantised model, the folder is it, and nothing else changes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleb import api
from sleb.errors import ExportError, OptionError
from sleb.evaluation import quantization
from sleb.evaluation.perplexity import windows as cut
from sleb.model.block_stack import BlockStack
from sleb.model.identity import weights_hash
from sleb.model.loading import load_model
from sleb.records import Quantization, TextPerplexity
from sleb.runtime import findings_folder, run_folder
from tests.support import tiny
from tests.support.command import run
from tests.support.families import build, token_ids

torchao = pytest.importorskip("torchao", reason="needs the extra: pip install 'sleb[quantize]'")
pytest.importorskip("compressed_tensors", reason="needs the extra: pip install 'sleb[quantize]'")

LIST = (1, 3)
WINDOW = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text(tiny.text(1500, seed=5))
    return path


def quantised(model: Path, text: Path, *schemes: str, **more: Any) -> list[Quantization]:
    settings = dict(removal_list=LIST, schemes=schemes, perplexity=[str(text)], window=WINDOW, dtype="float32")
    findings = api.quantize(str(model), **(settings | more))
    return findings_folder.of_kind(findings, Quantization)


def by_torchao(model: Any, scheme: str) -> Any:
    """The model quantised in place by the library alone."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(
        model.model.layers,
        int8 if scheme == "int8" else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    )
    return model


@torch.inference_mode()
def plain_nats(model: Any, skipped: tuple[int, ...], ids: torch.Tensor) -> float:
    with BlockStack(model).skipping(skipped):
        logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return float(loss.double().sum())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_perplexity_is_that_of_a_plain_forward_of_the_quantised_model(
    tiny_model: Path, text: Path, scheme: str
) -> None:
    findings = quantised(tiny_model, text, scheme, group_size=32)
    assert [each.removal_list for each in findings] == [(), LIST]
    loaded = load_model(str(tiny_model), dtype="float32")
    ids = torch.from_numpy(cut(str(text), loaded.tokenizer, 128, window=WINDOW).ids)
    before = {each.removal_list: plain_nats(loaded.model, each.removal_list, ids) for each in findings}
    model = by_torchao(loaded.model, scheme)
    for each in findings:
        after = plain_nats(model, each.removal_list, ids)
        assert each.before.nll_sum == pytest.approx(before[each.removal_list], rel=1e-6)
        assert each.measured.nll_sum == pytest.approx(after, rel=1e-6)
        assert after != before[each.removal_list]
        assert each.change == pytest.approx((after - before[each.removal_list]) / each.measured.token_count, rel=1e-2)
        assert each.library == f"torchao {torchao.__version__}"
        assert each.group_sizes == (() if scheme == "int8" else (32,))
    known = findings_folder.of_kind(api.findings_of(run_folder.list_runs()[0]), TextPerplexity)
    assert {each.removal_list: each.measured for each in known} == {each.removal_list: each.before for each in findings}


def test_int8_is_close_and_int4_is_farther() -> None:
    model = build("llama")
    ids = token_ids(model)
    with torch.inference_mode():
        logits = model(ids).logits
        apart = {
            scheme: float(
                (quantization.quantised(model, scheme).stack.forward(ids) - logits).abs().max() / logits.std()
            )
            for scheme in ("int8", "int4")
        }
    assert 0 < apart["int8"] < 0.1
    assert 3 * apart["int8"] < apart["int4"] < 2


def test_the_model_itself_is_left_alone() -> None:
    model = build("llama").eval()
    ids = token_ids(model)
    before, kinds = weights_hash(model), {type(each) for each in model.parameters()}
    precision = torch.get_float32_matmul_precision()
    with torch.inference_mode():
        logits = model(ids).logits
        copied = quantization.quantised(model, "int4", 16)
        assert torch.equal(model(ids).logits, logits)
    assert weights_hash(model) == before
    assert {type(each) for each in model.parameters()} == kinds
    assert copied.stack.model.lm_head.weight is model.lm_head.weight  # shared, not copied
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_folder_holds_what_was_promised_and_is_proven(
    tiny_model: Path, text: Path, tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "out"
    findings = quantised(tiny_model, text, scheme, out=out)
    assert [each.out for each in findings] == [None, str(out)]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    proof = json.loads((out / "proof.json").read_text())
    assert proof["passed"]
    assert proof["kept_blocks"] == [0, 2, 4, 5]
    assert proof["parameters_after"] < proof["parameters_before"]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(proof["files"])
    assert proof["left_behind"] == []
    file = (out / "model.safetensors").read_bytes()
    assert findings[1].weight_bytes == len(file) - 8 - int.from_bytes(file[:8], "little")
    assert findings[1].weight_bytes < (0.42 if scheme == "int8" else 0.35) * findings[1].weight_bytes_before
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    with pytest.raises(OptionError, match="`replace`"):
        quantised(tiny_model, text, scheme, out=out)
    if scheme == "int4":
        assert reloaded(out, tmp_path) == pytest.approx(skipping(tiny_model, scheme), abs=1e-5)


def skipping(folder: Path, scheme: str) -> np.ndarray:
    """Logits of the quantised model with the blocks skipped."""
    model = quantization.quantised(load_model(str(folder), dtype="float32").model, scheme)
    with torch.inference_mode(), model.stack.skipping(LIST):
        return model.stack.forward(token_ids(model.stack.model)).numpy()


def reloaded(out: Path, scratch: Path) -> np.ndarray:
    """Logits of what plain transformers makes of the folder, in a process that has never heard of us."""
    code = (
        "import sys, numpy, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.inference_mode():\n"
        "    numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).logits.numpy())\n"
        "print(len(model.model.layers), 'sleb' in sys.modules)"
    )
    np.save(scratch / "ids.npy", token_ids(build("llama")).numpy())
    command = [sys.executable, "-P", "-c", code, str(out), str(scratch / "ids.npy"), str(scratch / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scratch)
    assert done.stdout.split() == ["4", "False"]
    return np.load(scratch / "logits.npy")


def test_a_proof_that_fails_leaves_nothing(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale on its way to the file is found out, by the real proof."""
    from sleb.evaluation import quantized_folder

    right = quantized_folder._packed

    def wrong(model: Any, bits: int) -> dict[str, torch.Tensor]:
        state = right(model, bits)
        name = next(name for name in state if name.endswith("_scale"))
        return state | {name: state[name] * 1.5}

    monkeypatch.setattr(quantized_folder, "_packed", wrong)
    with pytest.raises(ExportError, match="not the one that was scored"):
        quantised(tiny_model, text, "int8", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    kept = findings_folder.of_kind(api.findings_of(run_folder.list_runs()[0]), Quantization)
    assert [each.out for each in kept] == [None, None]  # what was measured stays


def test_what_is_known_is_not_computed_again(tiny_model: Path, text: Path, scored: list[int]) -> None:
    first = quantised(tiny_model, text, "int8")
    windows = first[0].text.windows
    assert sum(scored) == 4 * windows  # two lists, as loaded and quantised
    assert quantised(tiny_model, text, "int8") == first
    assert sum(scored) == 4 * windows
    both = quantised(tiny_model, text, "int8", "int4")
    assert sum(scored) == 6 * windows
    assert [each for each in both if each.scheme == "int8"] == first
    quantised(tiny_model, text, "int4", group_size=16)
    assert sum(scored) == 8 * windows


def test_a_sweep_that_was_cut_short_goes_on(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantised(tiny_model, text, "int4", run_dir=tmp_path / "whole")
    write, kept = findings_folder.Table.write, []

    def stop(self: findings_folder.Table, rows: Any) -> None:
        write(self, rows)
        if "int4" in self._name:
            kept.append(len(rows))
            if len(kept) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(findings_folder.Table, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        quantised(tiny_model, text, "int4", batch_size=1)
    again = quantised(tiny_model, text, "int4", batch_size=1)
    windows = whole[0].text.windows
    assert len(kept) == -(-windows // 4)  # four windows between two writings, and none of them twice
    for one, other in zip(whole, again, strict=True):
        assert one.measured.nll_sum == pytest.approx(other.measured.nll_sum, rel=1e-6)


@pytest.mark.parametrize(
    ("row", "wanted", "size"), [(576, 128, 64), (1536, 128, 128), (32, 128, 32), (96, 96, 96), (80, 128, 16)]
)
def test_a_group_divides_its_row(row: int, wanted: int, size: int) -> None:
    assert quantization._group_sizes({"q_proj": torch.nn.Linear(row, 1)}, wanted) == {"q_proj": size}


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ((88,), "rows of 88 (0); give `group_size=88`."),
        ((8,), "rows of 8 (0); use int8."),
        ((96, 88), "rows of 88 (1); use int8."),  # each alone could be divided, by 96 and by 88
        ((72, 144), "rows of 72 (0); give `group_size=96`."),  # 144 by 48, and 72 by 24
        ((88, 128, 72), "rows of 72 (2), 88 (0); use int8."),
    ],
)
def test_advice_about_groups_holds_for_all_rows(rows: tuple[int, ...], advice: str) -> None:
    modules = {str(index): torch.nn.Linear(row, 1) for index, row in enumerate(rows)}
    with pytest.raises(OptionError) as refused:
        quantization._group_sizes(modules, 128)
    assert advice in str(refused.value)
    match = re.search(r"group_size=(\d+)", advice)
    if match:
        sizes = quantization._group_sizes(modules, int(match[1])).values()
        assert all(row % size == 0 for row, size in zip(rows, sizes, strict=True))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "hold 0% of the weights in the blocks of GPT2LMHeadModel"),
        ("mixtral", "experts"),
        ("falcon", "FalconForCausalLM cannot run on torchao's int8 weights"),
    ],
)
def test_models_that_torchao_cannot_quantise_are_refused(family: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        quantization.quantised(build(family), "int8")


def test_a_quantised_model_is_not_quantised_again() -> None:
    copied = quantization.quantised(build("llama"), "int8").stack.model
    with pytest.raises(OptionError, match="LlamaForCausalLM is quantised already"):
        quantization.quantised(copied, "int4")


def test_a_missing_library_is_said_before_a_run_is_made(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    for missing, more in (("torchao", {}), ("compressed_tensors", {"out": tmp_path / "out"})):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, missing=missing: None if name == missing else find(name, *rest),
        )
        with pytest.raises(OptionError, match=r"pip install 'sleb\[quantize\]'"):
            quantised(tiny_model, text, "int8", **more)


def test_a_streamed_model_is_refused(tiny_model: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="needs all of it in memory"):
        quantised(tiny_model, text, "int8", memory_budget=200_000)


def test_bad_input_is_one_sentence(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`out` names a folder for a model without blocks"):
        quantised(tiny_model, text, "int8", removal_list=(), out=tmp_path / "out")
    with pytest.raises(OptionError, match="give `perplexity` a text"):
        quantised(tiny_model, text, "int8", perplexity=[])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="is a file"):
        quantised(tiny_model, text, "int8", out=tmp_path / "file", replace=True)


def test_the_command_prints_a_table(tiny_model: Path, text: Path) -> None:
    words = ["quantize", tiny_model, "--removal-list", "[1, 3]", "--scheme", "int8", "--scheme", "int4"]
    words += ["--perplexity", text, "--window", WINDOW, "--dtype", "float32", "--limit", 3]
    table = run(*words)[0].partition("Weight-only quantisation")[2]
    assert table.count("2: 1, 3") == 2
    assert "int4, groups of 32 or 64" in table
