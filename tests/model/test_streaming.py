"""Models whose blocks stay on disk are scored, searched and exported like any other, within their budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sleb
from sleb import execution, specs
from sleb.cli.main import app
from sleb.errors import ModelError, OptionError, ScoringError
from sleb.model.block_stack import BlockStack
from sleb.model.loading import LoadedModel, load_model, weights_hash
from sleb.model.streaming import streamed_blocks
from sleb.runtime import job_folder, job_processes, run_folder
from sleb.scoring.self_check import self_check
from sleb.scoring.sweep import Scorer
from tests.support import tiny
from tests.support.families import build, token_ids
from tests.support.paths import ROOT

NAMED_AS_ON_DISK = ["llama", "gemma3", "opt", "qwen3"]
CHANGED_WHILE_LOADING = ["mixtral", "qwen3-moe"]


def saved(folder: Path, family: str, num_blocks: int = 12) -> Path:
    model = build(family, num_blocks)
    model.save_pretrained(str(folder), max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(str(folder))
    return folder


def tight(loaded: LoadedModel) -> int:
    """A budget that three blocks, what surrounds them and some hidden states fit in, and the whole does not."""
    stack = BlockStack(loaded.model)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in stack.blocks]
    whole = sum(each.nbytes for each in (*loaded.model.parameters(), *loaded.model.buffers()))
    return int((whole - sum(blocks) + 3 * max(blocks)) / 0.8 * 1.15)


def opened(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    resident = load_model(str(folder), dtype="float32", device="cpu")
    streamed = load_model(str(folder), dtype="float32", device="cpu", memory_budget=tight(resident))
    assert streamed_blocks(streamed.model) is not None
    assert streamed_blocks(resident.model) is None
    return resident, streamed


@pytest.mark.parametrize("family", NAMED_AS_ON_DISK + CHANGED_WHILE_LOADING)
def test_streamed_blocks_score_as_resident_ones(family: str, tmp_path: Path) -> None:
    resident, streamed = opened(saved(tmp_path / "model", family))
    assert weights_hash(streamed.model) == weights_hash(resident.model)
    stacks = [BlockStack(each.model) for each in (resident, streamed)]
    ids = token_ids(resident.model, batch=5, length=12).numpy()
    check = self_check(stacks[1], range(1, 7), ids)
    assert check.scoring == "sweep", check.reason
    assert check.max_difference is not None
    assert check.max_difference < 1e-5
    skip_sets = [(), (1,), (3,), (1, 4), (6,)]
    found = [Scorer(stack, ids, batch_size=2).score(skip_sets, np.arange(5)) for stack in stacks]
    np.testing.assert_array_equal(*found)
    diverged = [Scorer(stack, ids, batch_size=2).diverge(skip_sets, np.arange(5)) for stack in stacks]
    np.testing.assert_array_equal(*diverged)


def test_a_block_is_read_once_a_round_and_not_where_everybody_skips_it(tmp_path: Path) -> None:
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    stack = BlockStack(streamed.model)
    blocks = stack.streamed
    assert blocks is not None
    blocks.spare_bytes = 10**9  # all in one round
    scorer = Scorer(stack, token_ids(streamed.model, batch=6, length=12).numpy(), batch_size=2)
    scorer.score([(0, 2), (1, 2)], np.arange(6))  # so that block 0 is the one that was read ahead
    before = blocks.bytes_read
    scorer.score([(0, 2), (1, 2)], np.arange(6))
    assert blocks.bytes_read - before == sum(blocks.block_bytes(block) for block in range(12) if block != 2)
    blocks.forget()
    assert all(parameter.is_meta for block in stack.blocks for parameter in block.parameters())


def test_rounds_are_as_long_as_the_budget_allows(tmp_path: Path) -> None:
    resident, streamed = opened(saved(tmp_path / "model", "llama"))
    blocks = streamed_blocks(streamed.model)
    assert blocks is not None
    ids = token_ids(resident.model, batch=7, length=12).numpy()
    one = 12 * resident.model.config.hidden_size * 4
    blocks.spare_bytes = one * (3 + 2) * 3 + 1  # three skip sets are at most three streams, and two more are in work
    scorer = Scorer(BlockStack(streamed.model), ids, batch_size=1)
    assert scorer.round_size([(1,), (2,), (3,)]) == 3
    expected = Scorer(BlockStack(resident.model), ids, batch_size=1).score([(1,), (2,), (3,)], np.arange(7))
    np.testing.assert_array_equal(scorer.score([(1,), (2,), (3,)], np.arange(7)), expected)
    blocks.spare_bytes = one
    with pytest.raises(ScoringError, match="--memory-budget leaves"):
        scorer.score([(1,), (2,)], np.arange(7))


def test_the_twin_for_all_candidates_at_once_is_the_plain_forward_pass() -> None:
    """The self-check of streamed models compares with it; here it is compared itself."""
    from sleb.scoring.self_check import _plain_twin, _streamed_twin

    for family in ("llama", "gemma3", "gpt2", "mixtral", "bloom"):
        model = build(family)
        stack, ids = BlockStack(model), token_ids(model, batch=2, length=12)
        with torch.inference_mode():
            (plain, _), (together, _) = (twin(stack, range(6), ids) for twin in (_plain_twin, _streamed_twin))
        assert plain.keys() == together.keys()
        for skipped in plain:
            torch.testing.assert_close(plain[skipped], together[skipped], rtol=1e-5, atol=1e-4)


def test_a_model_whose_blocks_share_state_is_refused(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "gemma4-shared-kv", num_blocks=12)
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    with pytest.raises(ModelError, match="cannot be streamed block by block"):
        sleb.search(
            str(folder),
            calibration=str(text_file),
            sequences=2,
            sequence_length=16,
            remove=1,
            dtype="float32",
            memory_budget=budget,
        )


def test_what_does_not_fit_or_cannot_be_streamed_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(OptionError, match=r"too small .* in float32: .* --memory-budget [\d.]+kB or more") as refusal:
        load_model(str(folder), dtype="float32", device="cpu", memory_budget=20_000)
    enough = float(str(refusal.value).rpartition("kB or more")[0].rpartition(" ")[2]) * 1e3
    assert streamed_blocks(load_model(str(folder), dtype="float32", memory_budget=int(enough)).model) is not None
    assert streamed_blocks(load_model(str(folder), dtype="float32", memory_budget=10**9).model) is None
    for more in ({"processes": 2}, {"memory_budget": 10**9}):
        with pytest.raises(OptionError, match="--device all keeps one whole model"):
            sleb.search(str(folder), device="all", **more)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises((OptionError, ModelError)):
        load_model(str(tmp_path / "model.gguf"), memory_budget=10**9)


def test_a_shard_that_is_missing_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    sorted(folder.glob("model-*.safetensors"))[2].unlink()
    with pytest.raises(ModelError):
        load_model(str(folder), dtype="float32", device="cpu", memory_budget=budget)


def test_what_accelerate_dispatched_itself_is_scored_the_same(tmp_path: Path) -> None:
    """`device_map="auto"` with more than one device, here the CPU and the disk."""
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "model", "llama")
    resident = load_model(str(folder), dtype="float32", device="cpu")
    surroundings = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = dict.fromkeys(surroundings, "cpu")
    places |= {f"model.layers.{block}": "disk" if block % 3 == 1 else "cpu" for block in range(12)}
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    ids = token_ids(resident.model, batch=3, length=12).numpy()
    skip_sets = [(), (1,), (2, 4)]
    before, dispatched = (
        Scorer(BlockStack(each), ids, batch_size=2).score(skip_sets, np.arange(3))
        for each in (resident.model, model.eval())
    )
    np.testing.assert_array_equal(dispatched, before)


WITHIN = """
import json, resource, sys, threading, time
sys.path.insert(0, {root!r})
import accelerate, datasets, scipy.special, torch, sleb, sleb.worker
from transformers import LlamaForCausalLM

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

sleb.search({warm!r}, calibration={text!r}, sequences=2, sequence_length=16, remove=1, device="cpu", analysis=False)
before, peak, done = anonymous(), 0, False  # what libraries load when they are first used is not the model
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
run = sleb.search(
    {model!r}, calibration={text!r}, sequences=6, sequence_length=48, remove=2, dtype="bfloat16", device="cpu",
    batch_size=2, analysis=False, memory_budget={budget},
)
done = True
thread.join()
proof = sleb.export_model(run, {out!r}, memory_budget={budget}) if {out!r} else None
print(json.dumps({{"grown": peak - before, "list": run.trace.removal_list, "hash": run.stack.weights_hash,
    "sums": [step.calibration.nll_sum for step in run.trace.steps], "proved": bool(proof and proof.passed)}}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_a_model_three_times_the_budget_is_searched_and_exported_within_it(
    tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(str(folder), max_shard_size="40MB")
    tiny.tokenizer().save_pretrained(str(folder))
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    del model
    budget = on_disk // 3

    def within(budget: int | None, out: str) -> dict[str, Any]:
        code = WITHIN.format(
            root=str(ROOT), warm=str(tiny_model), model=str(folder), text=str(text_file), budget=budget, out=out
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    resident, streamed = within(None, ""), within(budget, str(tmp_path / "out"))
    assert {name: streamed[name] for name in ("list", "sums", "hash")} == {
        name: resident[name] for name in ("list", "sums", "hash")
    }
    # In memory, weights are pages of mapped files, and no anonymous memory: what is left are kernels' caches.
    libraries = resident["grown"]
    assert libraries < on_disk / 4
    assert streamed["grown"] - libraries <= budget, f"{streamed['grown'] / 1e6:.0f} MB of {budget / 1e6:.0f}"
    assert streamed["proved"]
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= budget / 2


def test_a_streamed_run_is_analysed_but_does_not_generate(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    settings: dict[str, Any] = {"calibration": str(text_file), "sequences": 2, "sequence_length": 16}
    run = sleb.analyze(str(folder), memory_budget=budget, dtype="float32", **settings)
    assert run.analysis is not None
    assert run.analysis.alignment.generated is None
    assert "read from disk" in (run.analysis.alignment.generated_reason or "")
    assert run.jobs[-1].attempt is not None
    assert run.jobs[-1].attempt.memory_budget == budget


def test_a_resumed_run_keeps_the_budget_of_the_last_try(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    spec = specs.run_spec(
        str(folder),
        calibration=str(text_file),
        sequences=2,
        sequence_length=16,
        remove=1,
        dtype="float32",
        analysis=False,
    )
    run = run_folder.create(spec)
    job_processes.next_job(run, specs.job_spec("search", processes=2, memory_budget=300_000))
    run = run_folder.load(run.run_dir)
    assert execution.as_before(run, None, None) == (2, 300_000)
    assert execution.as_before(run, 1, 400_000) == (1, 400_000)
    done = CliRunner().invoke(app, ["resume", str(run.run_dir), "--processes=1", "--prepare"])
    assert done.exit_code == 0, done.output
    found = job_folder.load_job(Path(done.stdout.strip())).spec
    assert (found.processes, found.memory_budget) == (1, 300_000)
