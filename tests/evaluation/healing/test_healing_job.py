"""Healing on tiny models: training and its resumption, refits at the cuts, what is written, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sleb
from sleb.errors import BadInput, ExportError, NotNumbers, OptionError, Stopped
from sleb.evaluation import perplexity
from sleb.evaluation.healing import healed_folder, healing_job, least_squares, lora
from sleb.export.removal import streamlined
from sleb.model.block_stack import BlockStack
from sleb.model.identity import weights_hash
from sleb.records import Healing, HealJob, HealSpec
from sleb.runtime.findings_folder import of_kind
from sleb.scoring.scorer import Scorer
from sleb.text import calibration
from tests.support import tiny
from tests.support.families import build

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: the extra heal")

LIST = (1, 3)
SETTINGS = lora.Settings(rank=4, learning_rate=1e-2, epochs=2, batch_sequences=4, seed=0)


def token_ids(count: int = 16, length: int = 24) -> np.ndarray:
    """Every sequence counts up from somewhere: easily learnt."""
    start = np.random.default_rng(0).integers(0, 90, (count, 1))
    return 4 + (start + np.arange(length)) % 100


def frozen(family: str = "llama") -> Any:
    return build(family).requires_grad_(False).eval()


def logits(model: Any, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids), use_cache=False).logits


def ask(text_file: Path, **more: Any) -> dict[str, Any]:
    settings = dict(
        removal_list=LIST, perplexity=[str(text_file)], window=64, limit=6, dtype="float32", source=str(text_file),
        sequences=24, sequence_length=32, batch_sequences=4, rank=4, learning_rate=1e-2,
    )  # fmt: skip
    return settings | more


# --- adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe", "gemma3"])
def test_training_learns_leaves_the_base_alone_and_merges_to_the_same(family: str, tmp_path: Path) -> None:
    model, ids = frozen(family), token_ids()
    before, before_logits = weights_hash(model), logits(model, ids)
    adapted = lora.adapt(streamlined(model, LIST), SETTINGS.rank, SETTINGS.seed)
    progress = lora.train(adapted, ids, SETTINGS, tmp_path / "checkpoint")
    assert len(progress.losses) == progress.updates == 8
    assert progress.losses[-1] < progress.losses[0] - 0.1
    after = logits(adapted, ids)
    merged = lora.merge(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, ids), after, rtol=0, atol=1e-4 * float(after.abs().max()))
    assert weights_hash(model) == before
    assert torch.equal(logits(model, ids), before_logits)


def test_the_gradients_are_those_of_the_mean_loss_however_the_batch_is_cut(tmp_path: Path) -> None:
    """Against the library's own loss, in one piece."""
    ids = torch.from_numpy(token_ids(4))
    adapted = lora.adapt(streamlined(frozen(), LIST), 4, 0)
    parameters = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for number, each in enumerate(parameters.values()):
            each.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    whole = adapted(input_ids=ids, labels=ids).loss
    whole.backward()
    expected = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}
    stack = BlockStack(adapted.get_base_model())
    limit = lora._LOGIT_BYTES["cpu"]
    lora._LOGIT_BYTES["cpu"] = 7 * 4 * stack.config.vocab_size  # a few tokens at a time
    try:
        loss, _ = lora._gradients(stack, parameters, ids, 3, in_pieces=True)
    finally:
        lora._LOGIT_BYTES["cpu"] = limit
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_adapters_of_a_short_type_are_float32_and_only_inside_the_blocks() -> None:
    model = frozen().to(torch.bfloat16)
    adapted = lora.adapt(streamlined(model, LIST), 4, 0)
    result = lora.weights(adapted)
    assert {each.dtype for each in result.values()} == {torch.float32}
    assert all(".model.layers." in name for name in result)
    assert len(result) == 4 * 7 * 2  # blocks, linear layers, A and B
    rows = torch.from_numpy(token_ids(2))
    loss, _ = lora._gradients(BlockStack(adapted.get_base_model()), lora._trainable(adapted), rows, 2, in_pieces=True)
    assert np.isfinite(loss)


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: Any) -> None:
    model, ids = frozen(), token_ids()
    whole = lora.adapt(streamlined(model, LIST), 4, 0)
    expected = lora.train(whole, ids, SETTINGS, tmp_path / "none")
    assert not (tmp_path / "none").exists()  # nothing is due within a minute

    monkeypatch.setattr(lora, "CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "checkpoint"

    def kill(done: int, updates: int, message: str) -> None:
        if done == 5:
            raise Stopped("Stopped on request.")

    with pytest.raises(Stopped):
        lora.train(lora.adapt(streamlined(model, LIST), 4, 0), ids, SETTINGS, checkpoint, kill)
    heard: list[int] = []
    resumed = lora.adapt(streamlined(model, LIST), 4, 1)  # another beginning: the checkpoint's is taken
    progress = lora.train(resumed, ids, SETTINGS, checkpoint, lambda done, *_: heard.append(done))
    assert heard == [5, 6, 7, 8]  # the update that was being told of is done again
    assert progress.losses == expected.losses
    for name, each in lora.weights(whole).items():
        torch.testing.assert_close(lora.weights(resumed)[name], each, rtol=0, atol=1e-7)


def test_a_damaged_checkpoint_is_begun_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint").write_bytes(b"torn")
    adapted = lora.adapt(streamlined(frozen(), LIST), 4, 0)
    progress = lora.train(adapted, token_ids(4), SETTINGS, tmp_path / "checkpoint")
    assert progress.updates == 2
    assert "begins again" in caplog.text


def test_a_model_without_numbers_is_not_trained(tmp_path: Path) -> None:
    model = frozen()
    model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(NotNumbers, match=r"^The model without its removed blocks .*not numbers in float32\. Check the"):
        lora.train(lora.adapt(model, 4, 0), token_ids(4), SETTINGS, tmp_path / "checkpoint")


def test_memory_that_runs_out_halves_what_goes_up_at_once(monkeypatch: Any) -> None:
    adapted = lora.adapt(streamlined(frozen(), LIST), 4, 0)
    stack, parameters = BlockStack(adapted.get_base_model()), lora._trainable(adapted)
    rows, real = torch.from_numpy(token_ids(4)), lora._backward
    whole, _ = lora._gradients(stack, parameters, rows, 4, True)
    gradients = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}

    def small(own: BlockStack, ids: torch.Tensor, in_pieces: bool) -> torch.Tensor:
        total = real(own, ids, in_pieces)
        if len(ids) > 1:  # after some of its gradients were added
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return total

    monkeypatch.setattr(lora, "_backward", small)
    loss, piece = lora._gradients(stack, parameters, rows, 4, True)
    assert piece == 1
    assert loss == pytest.approx(whole, rel=1e-6)
    for name, each in gradients.items():
        torch.testing.assert_close(parameters[name].grad, each, rtol=1e-4, atol=1e-7)


def test_what_peft_cannot_adapt_is_said() -> None:
    with pytest.raises(OptionError, match=r"peft cannot adapt MambaForCausalLM \(Module 'out_proj' is incompatible"):
        lora.adapt(frozen("mamba"), 4, 0)


def test_a_rank_that_no_layer_has_is_refused_before_memory_is_taken_for_it() -> None:
    with pytest.raises(OptionError, match=r"`rank=33` is more than the model's layers have \(32 at most\)"):
        lora.adapt(frozen(), 33, 0)


# --- least-squares refits and both


def test_cuts_are_maximal_runs_with_a_block_before_them() -> None:
    assert least_squares.cuts((1, 2, 4), 6) == [(0, 3), (3, 5)]
    assert least_squares.cuts((0, 1, 5), 6) == [(4, 6)]
    assert least_squares.cuts((0,), 6) == []


@pytest.mark.parametrize(
    ("family", "name", "scale"),
    [
        ("llama", "mlp.down_proj", 1.0),
        ("gpt2", "mlp.c_proj", 1.0),
        ("opt", "fc2", 1.0),
        ("gptj", "mlp.fc_out", 1.0),
        ("granite", "mlp.down_proj", None),
    ],
)
def test_a_mended_layer_is_the_least_squares_answer(
    family: str, name: str, scale: float | None, monkeypatch: Any
) -> None:
    """Against a dense solve over all tokens at once, from hooks that share nothing with the module."""
    monkeypatch.setattr(least_squares, "RIDGES", (0.1,))
    model, ids = frozen(family), token_ids(12)
    scale = model.config.residual_multiplier if scale is None else scale
    before = weights_hash(model)
    smaller = streamlined(model, (2, 3))
    stack = BlockStack(smaller)
    old = weight_of(stack.blocks[1].get_submodule(name)).double()
    (refits,) = least_squares.refit(BlockStack(model), stack, (2, 3), ids, 4)
    assert refits.name == f"{stack.path}.1.{name}.weight"
    assert refits.error_after < refits.error_before
    assert weights_hash(model) == before

    module = BlockStack(model).blocks[1].get_submodule(name)
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
    with torch.no_grad():
        outputs = BlockStack(model).outputs(torch.from_numpy(ids[:8]))
    handle.remove()
    entering, leaving = (each.double().flatten(0, -2) for each in seen[-2:])
    goal, out = (outputs[index].double().flatten(0, -2) for index in (4, 2))
    bias = 0.0 if module.bias is None else module.bias.double()
    wanted = (goal - (out - scale * leaving)) / scale - bias
    weight = 1 / goal.norm(dim=-1, keepdim=True)
    a, r = entering * weight, wanted * weight
    ridge = 0.1 * float((a * a).sum() / a.shape[1])
    rows = torch.cat([a, ridge**0.5 * torch.eye(a.shape[1], dtype=torch.float64)])
    goals = torch.cat([r, ridge**0.5 * old])
    expected = torch.linalg.lstsq(rows, goals).solution
    result = weight_of(stack.blocks[1].get_submodule(name)).double()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def weight_of(module: Any) -> torch.Tensor:
    """The weight of a linear layer, (inputs, outputs)."""
    return module.weight.detach().T if isinstance(module, nn.Linear) else module.weight.detach()


def test_two_cuts_are_mended_one_after_the_other() -> None:
    model, ids = frozen(), token_ids(12)
    smaller = BlockStack(streamlined(model, (2, 4)))
    refits = least_squares.refit(BlockStack(model), smaller, (2, 4), ids, 4)
    assert [each.name for each in refits] == [f"model.layers.{at}.mlp.down_proj.weight" for at in (1, 2)]
    again = streamlined(model, (2, 4))
    least_squares.put(again, {each.name: each.weight for each in refits})
    assert torch.equal(logits(again, ids), logits(smaller.model, ids))


def test_a_family_with_a_norm_behind_its_last_layer_is_refused() -> None:
    model = frozen("gemma3")
    with pytest.raises(OptionError, match="adds no linear layer's output to its hidden state before a cut"):
        least_squares.refit(BlockStack(model), BlockStack(streamlined(model, LIST)), LIST, token_ids(12), 4)
    model = frozen()
    with pytest.raises(OptionError, match="The only cut is before the first block"):
        least_squares.refit(BlockStack(model), BlockStack(streamlined(model, (0,))), (0,), token_ids(12), 4)


# --- the job


def windows_with_text_of(result: Healing, text_file: Path) -> int:
    """Evaluated windows with sixteen characters in a row of what was healed on; a token is a character."""
    healed = calibration.build(healing_job._text_of(result.ask), 3, result.ask.seed, tiny.tokenizer(), 128)
    passages = {tuple(row[start : start + 16]) for row in healed.ids[:24].tolist() for start in range(17)}
    windows = perplexity.windows(str(text_file), tiny.tokenizer(), 128, window=64, limit=6).ids.tolist()
    return sum(any(tuple(row[start : start + 16]) in passages for start in range(49)) for row in windows)


def test_a_healing_is_measured_kept_and_not_computed_again(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    answers = sleb.heal(str(tiny_model), **ask(text_file), run_dir=tmp_path / "run")
    (result,) = of_kind(answers, Healing)
    assert result.removal_list == LIST
    assert result.change is not None
    assert result.change < -0.1  # the text it was trained on
    assert result.after.nll_sum == pytest.approx(result.before.nll_sum + result.change * result.after.token_count)
    assert result.windows_healed_on == windows_with_text_of(result, text_file) > 0
    assert result.held_out_before is not None
    assert result.held_out_after is not None
    assert result.held_out_after.nll_sum < result.held_out_before.nll_sum
    assert len(result.losses) == 6
    assert result.trained_tokens == 24 * 32
    (folder,) = (tmp_path / "run" / "healing").iterdir()
    assert [each.name for each in folder.iterdir()] == ["healed.safetensors"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(lora, "train", never)
    assert of_kind(sleb.heal(tmp_path / "run", **ask(text_file, dtype="auto")), Healing) == [result]
    longer = sleb.heal(tmp_path / "run", **ask(text_file, dtype="auto", limit=8))  # another text: measured, not trained
    assert of_kind(longer, Healing)[0].after != result.after


def test_a_healed_folder_proves_itself_and_gives_the_perplexity_that_was_measured(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answers = sleb.heal(str(tiny_model), **ask(text_file), run_dir=tmp_path / "run", out=out)
    (result,) = of_kind(answers, Healing)
    assert result.out == str(out)
    proof = json.loads((out / "proof.json").read_text())
    assert proof["passed"]
    assert proof["kept_blocks"] == [0, 2, 4, 5]
    assert proof["max_logit_difference"] < 1e-5
    assert not list(out.glob("*expected*"))
    card = (out / "README.md").read_text()
    assert "LoRA, rank 4" in card
    assert "Reloaded in a fresh process" in card
    assert "- counts and lists in config.json that are named after layers or blocks follow the blocks" in card
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(proof["files"])
    again = sleb.evaluate(str(out), removal_list=[], perplexity=[str(text_file)], window=64, limit=6, dtype="float32")
    assert again[0].measured.nll_sum == pytest.approx(result.after.nll_sum, rel=1e-6)  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="is not empty"):
        sleb.heal(tmp_path / "run", **ask(text_file, dtype="auto"), out=out)
    sleb.heal(tmp_path / "run", **ask(text_file, dtype="auto", how="both"), out=out, replace=True)
    assert "by least squares" in (out / "README.md").read_text()


def test_an_adapter_belongs_to_the_streamlined_folder_that_it_names(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "adapter"
    (result,) = of_kind(sleb.heal(str(tiny_model), **ask(text_file), out=out, adapter=True), Healing)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base"
    card = (out / "README.md").read_text()
    assert "base_model_relation" not in card  # a folder is not a name on the hub
    assert "`./base` (`base_model_name_or_path`)" in card
    assert all(str(tmp_path) not in path.read_text() for path in out.rglob("*.json"))
    assert str(tmp_path) not in card
    assert json.loads((out / "base" / "proof.json").read_text())["passed"]
    assert "belongs to the streamlined model in `base` in this folder" in (out / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    ids = token_ids(2)
    plain = logits(base, ids)
    adapted = PeftModel.from_pretrained(base, out).eval()
    assert float((logits(adapted, ids) - plain).abs().max()) > 1e-2
    windows = perplexity.windows(str(text_file), tiny.tokenizer(), 128, window=64, limit=6)
    nats = Scorer(BlockStack(adapted.get_base_model()), windows.ids).score([()], np.arange(6))
    assert float(nats.sum()) == pytest.approx(result.after.nll_sum, rel=1e-5)
    assert result.out == str(out)


def test_an_adapter_that_answers_otherwise_is_not_written(tmp_path: Path) -> None:
    adapted = lora.adapt(streamlined(frozen(), LIST), 4, 0)
    adapted.save_pretrained(str(tmp_path))
    healed_folder._require_same(tmp_path, adapted, streamlined(frozen(), LIST))
    with torch.no_grad():
        for each in lora._trainable(adapted).values():
            each += 0.05
    with pytest.raises(ExportError, match="is not the one that was trained"):
        healed_folder._require_same(tmp_path, adapted, streamlined(frozen(), LIST))


def test_a_run_that_exported_the_list_lends_its_folder_to_the_adapter(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    run = sleb.search(
        str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=24, remove=1, dtype="float32",
        analysis=False,
    )  # fmt: skip
    sleb.export_model(run, tmp_path / "smaller")
    settings = {key: value for key, value in ask(text_file).items() if key not in ("removal_list", "dtype")}
    sleb.heal(run, **settings, out=tmp_path / "adapter", adapter=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./smaller"
    assert not (tmp_path / "adapter" / "base").exists()


def test_a_killed_job_goes_on_and_leaves_nothing_at_out(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lora, "CHECKPOINT_SECONDS", 0.0)
    whole = of_kind(sleb.heal(str(tiny_model), **ask(text_file), run_dir=tmp_path / "whole"), Healing)[0]
    real, out = lora.cross_entropy, tmp_path / "out"
    calls = []

    def dying(*args: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(lora, "cross_entropy", dying)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        sleb.heal(str(tiny_model), **ask(text_file), run_dir=tmp_path / "run", out=out)
    (folder,) = (tmp_path / "run" / "healing").iterdir()
    assert [each.name for each in folder.iterdir()] == ["checkpoint.safetensors"]
    calls.clear()
    monkeypatch.setattr(lora, "cross_entropy", lambda *args: (calls.append(None), real(*args))[1])

    def failing(*_: Any, **__: Any) -> None:
        raise ExportError("The exported model is not the one that was scored: made up.")

    monkeypatch.setattr("sleb.export.proven_folder.run_proof", failing)
    with pytest.raises(ExportError):
        sleb.heal(tmp_path / "run", **ask(text_file, dtype="auto"), out=out)
    assert len(calls) == 3  # of six updates
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    (result,) = of_kind(sleb.findings_of(tmp_path / "run"), Healing)
    assert result.out is None
    assert result.after.nll_sum == pytest.approx(whole.after.nll_sum, rel=1e-6)
    assert result.losses == whole.losses
    assert [each.name for each in folder.iterdir()] == ["healed.safetensors"]


def test_mended_cuts_are_measured_and_do_not_depend_on_settings_of_a_training(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = ask(text_file, how="linear", sequences=48)
    (result,) = of_kind(sleb.heal(str(tiny_model), **settings, run_dir=tmp_path / "run"), Healing)
    assert result.losses == ()
    assert result.trained_parameters == 2 * 32 * 64  # two cuts
    assert result.trained_tokens == 48 * 32
    assert result.change == pytest.approx((result.after.nll_sum - result.before.nll_sum) / result.after.token_count)
    again = of_kind(
        sleb.heal(tmp_path / "run", **ask(text_file, how="linear", sequences=48, rank=2, dtype="auto")), Healing
    )
    assert again == [result]  # a rank does not matter without training


def test_adapters_are_trained_on_what_mending_gave_and_a_killed_job_does_not_mend_twice(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    settings = ask(text_file, how="both", learning_rate=1e-9)  # too little to move anything
    (refits,) = of_kind(sleb.heal(str(tiny_model), **settings | {"how": "linear"}, run_dir=tmp_path / "run"), Healing)
    train = lora.train

    def dying(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "train", dying)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        sleb.heal(tmp_path / "run", **settings | {"dtype": "auto"})
    monkeypatch.setattr(lora, "train", train)
    monkeypatch.setattr(least_squares, "refit", dying)
    (both,) = of_kind(sleb.heal(tmp_path / "run", **settings | {"dtype": "auto"}), Healing)
    assert both.after.nll_sum == pytest.approx(refits.after.nll_sum, rel=1e-5)
    assert both.before == refits.before
    assert len(both.losses) == 6
    names = sorted(each.name for each in (tmp_path / "run" / "healing").rglob("*.safetensors"))
    assert names == ["healed.safetensors", "healed.safetensors"]
    (further,) = of_kind(
        sleb.heal(tmp_path / "run", **ask(text_file, how="linear", dtype="auto", limit=8)), Healing
    )  # read back, not refit again
    assert further.text.windows == 8


def test_without_a_number_of_sequences_each_way_has_its_own() -> None:
    assert HealSpec().sequences == 1024
    assert HealSpec(how="linear").sequences == 128
    assert HealSpec(how="linear", sequences=7).sequences == 7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"removal_list": []}, "There is nothing to heal in the baseline"),
        ({"perplexity": []}, "Nothing to measure: give `perplexity` a text"),
        ({"perplexity": ["missing.raw"]}, "file"),
        ({"source": "missing.txt"}, "file"),
        ({"sequences": 10_000}, r"asks for 10000 sequences of 32 tokens and 32 held out; text\.txt gives 187"),
        ({"adapter": True}, "name a folder with `out`"),
        ({"adapter": True, "how": "linear", "out": "somewhere"}, "leave `adapter` out"),
        ({"adapter": True, "how": "both", "out": "somewhere"}, "leave `adapter` out"),
        ({"memory_budget": 200_000}, "healing needs all of it in memory. Leave `memory_budget` out"),
        ({"removal_list": [9]}, "names block 9; the model has blocks 0 to 5"),
        ({"rank": 0}, "rank"),
        ({"rank": 999_999_999_999}, "rank"),
        ({"learning_rate": 1e99}, "learning.rate"),
        ({"learning_rate": float("nan")}, "learning.rate"),
        ({"how": "bias"}, "how"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    tiny_model: Path, text_file: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        sleb.heal(str(tiny_model), **ask(text_file, **changes))
    assert "\n" not in str(caught.value)


def test_without_peft_the_extra_is_named(monkeypatch: Any, text_file: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs peft: pip install 'sleb\[heal\]'"):
        healing_job.require(HealJob(ask=HealSpec(lists=(LIST,), source=str(text_file), texts=(str(text_file),))))
    healing_job.require(
        HealJob(ask=HealSpec(lists=(LIST,), source=str(text_file), texts=(str(text_file),), how="linear"))
    )
