"""Optimizations: the same nats as without them, the model as it was, and nothing that fails hurts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sleb.model.block_stack import BlockStack
from sleb.scoring.optimizations.causal_attention import PiecewiseAttention, causal_attention
from sleb.scoring.optimizations.choice import LEAST_WALKS, Optimization, _Trial, choose, compiling_pays, optimized
from sleb.scoring.optimizations.compiled_blocks import CompiledBlocks
from sleb.scoring.optimizations.packed_linear import PackedWeights
from sleb.scoring.plain_pass import plain_nll
from sleb.scoring.scorer import Scorer
from tests.support.families import build, token_ids

COMPILER = shutil.which("g++") or shutil.which("clang++")


def a_stack(family: str = "llama", dtype: torch.dtype = torch.float32, num_blocks: int = 4) -> BlockStack:
    return BlockStack(build(family, num_blocks).to(dtype))


@pytest.mark.parametrize("length", [2, 63, 64, 65, 200, 600])
@pytest.mark.parametrize(("heads", "shared", "value_size"), [(4, 4, 8), (6, 2, 8), (6, 1, 16)])
def test_attention_in_pieces_is_causal_attention(length: int, heads: int, shared: int, value_size: int) -> None:
    draw = torch.Generator().manual_seed(length)
    query = torch.randn(2, heads, length, 8, generator=draw)
    key = torch.randn(2, shared, length, 8, generator=draw)
    value = torch.randn(2, length, shared, value_size, generator=draw).transpose(1, 2)
    for scaling in (None, 0.2):
        expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        output = causal_attention(query, key, value, scaling)
        assert output.shape == (2, length, heads, value_size)
        torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral", "phi3", "bloom", "mamba", "qwen3-moe"])
def test_families_give_the_same_nats_with_attention_in_pieces(family: str) -> None:
    """Sliding windows, alibi and no attention at all: what the pieces do not know stays with what does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stack = a_stack(family)
    ids = token_ids(stack.model, batch=2, length=70)
    skip_sets = [(), (1,), (0, 2)]
    scorer = Scorer(stack, ids.numpy(), batch_size=2)
    before = scorer.score(skip_sets, np.arange(2))
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    pieces = PiecewiseAttention()
    with pieces.on(scorer):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is pieces.attend
        np.testing.assert_allclose(scorer.score(skip_sets, np.arange(2)), before, rtol=1e-5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    np.testing.assert_array_equal(scorer.score(skip_sets, np.arange(2)), before)


def test_the_attention_of_a_llama_is_replaced() -> None:
    """Else the test above would compare it with itself."""
    stack = a_stack()
    ids = token_ids(stack.model, batch=2, length=70)
    pieces = PiecewiseAttention()
    called: list[bool] = []
    attend = pieces.attend
    pieces.attend = lambda *args, **kwargs: called.append(True) or attend(*args, **kwargs)
    with pieces.on(Scorer(stack, ids.numpy())), torch.inference_mode():
        stack.forward(ids)
    assert len(called) == len(stack)


@pytest.fixture
def packed() -> tuple[BlockStack, PackedWeights]:
    stack = a_stack(dtype=torch.bfloat16)
    try:
        return stack, PackedWeights(stack, 24)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"this torch packs no weights here: {error}")


def test_packed_weights_give_the_same_nats_and_are_put_away(packed: tuple[BlockStack, PackedWeights]) -> None:
    stack, weights = packed
    linears = [module for module in stack.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(weights.layers) == len(linears) == 4 * 7 + 1
    ids = token_ids(stack.model, batch=2, length=12)
    scorer = Scorer(stack, ids.numpy(), batch_size=2)
    before = scorer.score([(), (1,)], np.arange(2))
    with weights.on(scorer):
        assert all("forward" in vars(layer) for layer in linears)
        nats = scorer.score([(), (1,)], np.arange(2))
    np.testing.assert_allclose(nats, before, atol=11 * 0.02)
    assert not any("forward" in vars(layer) for layer in linears)
    np.testing.assert_array_equal(scorer.score([(), (1,)], np.arange(2)), before)


def test_packed_weights_have_a_limit(packed: tuple[BlockStack, PackedWeights], monkeypatch: pytest.MonkeyPatch) -> None:
    stack, _ = packed
    total = sum(parameter.nbytes for block in stack.blocks for parameter in block.parameters())
    free = type("Memory", (), {"available": 2 * total})  # a quarter of it is half of the blocks
    monkeypatch.setattr(
        "sleb.scoring.optimizations.packed_linear.psutil.virtual_memory", lambda: free
    )  # a quarter: half of the blocks
    weights = PackedWeights(stack, 24)
    assert 0 < sum(weight.nbytes for weight, _ in weights.packed.values()) <= total / 2
    assert 0 < len(weights.layers) < 4 * 7


def test_the_sweep_still_equals_the_plain_pass_to_the_last_bit(packed: tuple[BlockStack, PackedWeights]) -> None:
    stack, weights = packed
    ids = token_ids(stack.model, batch=2, length=70)
    skip_sets = [(), (1,), (2,), (0, 3)]
    scorer = Scorer(stack, ids.numpy(), batch_size=2)
    with PiecewiseAttention().on(scorer), weights.on(scorer), torch.inference_mode():
        swept = scorer.score(skip_sets, np.arange(2))
        for row, skipped in zip(swept, skip_sets, strict=True):
            np.testing.assert_array_equal(row, plain_nll(stack, skipped, ids).numpy())


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_compiled_blocks_give_the_same_nats() -> None:
    from torch._dynamo.utils import counters

    stack = a_stack(num_blocks=3)
    ids = token_ids(stack.model, batch=5, length=8)
    scorer = Scorer(stack, ids.numpy(), batch_size=3)  # and then 2
    before = scorer.score([(), (1,)], np.arange(5))
    compiled = CompiledBlocks(stack, 8)
    counters.clear()
    with compiled.on(scorer):
        assert all("forward" in vars(block) for block in stack.blocks)
        nats = scorer.score([(), (1,)], np.arange(5))
        assert counters["stats"]["unique_graphs"] == 2, "one piece of code for all blocks and batches, one for the loss"
        shorter = Scorer(stack, ids[:, :6].numpy(), batch_size=3).score([(1,)], np.arange(5))
        assert counters["stats"]["unique_graphs"] == 2, "another length runs as before"
    assert np.isfinite(shorter).all()
    np.testing.assert_allclose(nats, before, atol=7e-5)
    assert not any("forward" in vars(block) for block in stack.blocks)
    np.testing.assert_array_equal(scorer.score([(), (1,)], np.arange(5)), before)


def test_without_a_compiler_the_blocks_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier
    stack = a_stack(num_blocks=3)
    ids = token_ids(stack.model, batch=2, length=10)
    scorer = Scorer(stack, ids.numpy(), batch_size=2)
    before = scorer.score([(1,)], np.arange(2))
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        optimized(scorer, 1e9, compile="yes") as names,
    ):
        np.testing.assert_array_equal(scorer.score([(1,)], np.arange(2)), before)
    assert names == ()
    assert "Trying compiled blocks failed" in caplog.text
    assert not any("forward" in vars(block) for block in stack.blocks)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        optimized(scorer, 1e9, known=["compiled blocks"]) as names,
    ):
        np.testing.assert_array_equal(scorer.score([(1,)], np.arange(2)), before)
    assert names == ()
    assert "Not available here: compiled blocks" in caplog.text


def test_known_optimizations_are_used_again_without_being_timed() -> None:
    stack = a_stack(dtype=torch.bfloat16)
    ids = token_ids(stack.model, batch=2, length=70).numpy()
    scorer = Scorer(stack, ids, batch_size=2)
    with PiecewiseAttention().on(scorer):
        expected = scorer.score([(), (1,)], np.arange(2))
    with optimized(scorer, 0.0, known=["attention in pieces"]) as names:
        assert names == ("attention in pieces",)
        np.testing.assert_array_equal(scorer.score([(), (1,)], np.arange(2)), expected)
    with optimized(scorer, 1e9, known=()) as names:
        assert names == ()


def test_blocks_with_hooks_in_their_place_are_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    stack = a_stack(num_blocks=3)
    ids = token_ids(stack.model).numpy()
    kind = type(stack.blocks[1])
    hook = lambda *args, **kwargs: kind.forward(stack.blocks[1], *args, **kwargs)  # noqa: E731
    stack.blocks[1].forward = hook  # as accelerate's hooks do
    assert choose(stack, ids, 2, 1e9, compile="yes") == []
    assert "hooks" in caplog.text
    assert stack.blocks[1].forward is hook


def test_with_little_work_ahead_nothing_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    stack = a_stack(dtype=torch.bfloat16)
    ids = token_ids(stack.model).numpy()
    walk = 2 * (len(stack) + Scorer(stack, ids).head_weight)
    with caplog.at_level("INFO"):
        assert choose(stack, ids, 2, 0.9 * LEAST_WALKS * walk) == []
        assert not caplog.text
        choose(stack, ids, 2, 1.1 * LEAST_WALKS * walk)
    assert "attention in pieces" in caplog.text  # used or not


def test_compiling_is_forecast_to_pay() -> None:
    assert not compiling_pays(60.0)
    assert compiling_pays(3600.0)


class Wrong:
    """Blocks that do something else."""

    name = "something else"

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack

    @contextmanager
    def on(self, scorer: Scorer) -> Iterator[None]:
        handle = self.stack.blocks[1].register_forward_hook(lambda _module, _args, output: output * 1.5)
        yield
        handle.remove()


class Failing(Wrong):
    """Blocks that cannot be run."""

    @contextmanager
    def on(self, scorer: Scorer) -> Iterator[None]:
        def fail(*_: object) -> None:
            raise RuntimeError("on purpose")

        handle = self.stack.blocks[1].register_forward_pre_hook(fail)
        try:
            yield
        finally:
            handle.remove()


@pytest.mark.parametrize(
    ("kind", "message"), [(Wrong, "changes a token's nats"), (Failing, "RuntimeError: on purpose")]
)
def test_what_is_wrong_or_fails_is_left_out(kind: type[Wrong], message: str, caplog: pytest.LogCaptureFixture) -> None:
    stack = a_stack()
    ids = token_ids(stack.model)
    trial = _Trial(stack, ids.numpy(), 2)
    before = trial.nats()
    tried: Optimization = kind(stack)
    assert not trial.gains(tried)
    assert message in caplog.text
    np.testing.assert_array_equal(trial.nats(), before)
