"""Exits on a table made by hand; logits of hidden states against the model's; generation against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sleb.analysis.prediction_alignment import (
    BATCH_SIZES,
    GenerationUnavailable,
    exit_blocks,
    exit_statistics,
    generate,
    passage_from,
    predictions_after_blocks,
    skipped_shares,
    top_after_blocks,
)
from sleb.errors import Stopped
from sleb.model import block_stack
from sleb.model.block_stack import BlockStack
from sleb.records import ExitStatistics
from tests.model.test_token_text import Pieces
from tests.support.families import build, token_ids

# Four blocks, five tokens; the last row is the final prediction.
PREDICTIONS = np.array(
    [
        [7, 1, 9, 4, 0],
        [3, 1, 2, 4, 0],
        [7, 5, 2, 4, 0],
        [7, 1, 8, 4, 6],
    ],
    dtype=np.int32,
)


def test_exits_of_a_table_made_by_hand() -> None:
    first, settled = exit_blocks(PREDICTIONS)
    assert first.tolist() == [0, 0, 3, 0, 3]  # token 1 agrees at once, and changes its mind at block 2
    assert settled.tolist() == [2, 3, 3, 0, 3]
    result = exit_statistics(PREDICTIONS, "five tokens")
    assert result.token_count == 5
    assert result.agreement == (0.6, 0.4, 0.4, 1.0)
    assert result.first_exit == (3, 0, 0, 2)
    assert result.settled_exit == (1, 0, 1, 3)
    assert result.skipped_share[1] == pytest.approx((3 + 3 + 0 + 3 + 0) / 5 / 4)
    assert result.settled_skipped_share[1] == pytest.approx((1 + 0 + 0 + 3 + 0) / 5 / 4)
    # Pairs of distinct tokens: 3 of 10 are two early ones, which skip 3 of 4 blocks; all others skip nothing.
    assert result.skipped_share[2] == pytest.approx(0.3 * 3 / 4)
    # One token can be left out of four: a batch has a late one unless it is drawn from the three early ones.
    assert result.skipped_share[4] == 0.0
    assert list(result.skipped_share) == [1, 2, 4]  # eight of five cannot be drawn
    assert ExitStatistics.speedup(result.skipped_share[2]) == pytest.approx(1 / (1 - 0.225))


def test_batch_shares_equal_drawing_batches() -> None:
    rng = np.random.default_rng(0)
    exits = rng.choice(12, size=300, p=np.arange(1, 13) / 78)
    shares = skipped_shares(np.bincount(exits, minlength=12))
    assert tuple(shares) == BATCH_SIZES
    assert shares[1] == pytest.approx((11 - exits).mean() / 12, abs=1e-12)
    for batch in BATCH_SIZES:
        drawn = np.array([rng.permutation(exits)[:batch].max() for _ in range(4000)])
        skipped = (11 - drawn) / 12
        assert shares[batch] == pytest.approx(skipped.mean(), abs=5 * skipped.std() / 4000**0.5 + 1e-4)


def test_batch_shares_at_the_ends() -> None:
    assert set(skipped_shares([0, 0, 100]).values()) == {0.0}  # everything waits for the last block
    assert skipped_shares([100, 0, 0]) == pytest.approx(dict.fromkeys(BATCH_SIZES, 2 / 3))
    assert skipped_shares([0, 0, 0]) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere2", "granite", "opt", "qwen3-moe", "jamba"])
def test_predictions_equal_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    stack = BlockStack(model)
    ids = token_ids(model, batch=3, length=11)
    monkeypatch.setitem(block_stack._LOGIT_BYTES, "cpu", 7 * 4 * model.config.get_text_config().vocab_size)
    with torch.inference_mode():
        result = predictions_after_blocks(stack, stack.outputs(ids), ids)
        assert result.dtype == np.int32
        assert result.shape == (6, 33)
        assert result[-1].tolist() == model(ids).logits.argmax(-1).flatten().tolist()
        # After block 2: the same as the model with every later block skipped.
        with stack.skipping({3, 4, 5}):
            shortened = model(ids).logits.argmax(-1).flatten().tolist()
        assert result[2].tolist() == shortened


def test_predictions_of_some_tokens() -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=2, length=9)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, 3] = keep[1, 5:] = True
    with torch.inference_mode():
        outputs = stack.outputs(ids)
        everything = predictions_after_blocks(stack, outputs, ids)
        some = predictions_after_blocks(stack, outputs, ids, keep)
        none = predictions_after_blocks(stack, outputs, ids, torch.zeros_like(keep))
    assert some.tolist() == everything[:, keep.flatten().numpy()].tolist()
    assert none.shape == (6, 0)


def test_top_five_are_probabilities_and_start_with_the_prediction() -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=1, length=9)
    with torch.inference_mode():
        outputs = stack.outputs(ids)
        tops, probabilities = top_after_blocks(stack, outputs, ids)
        predictions = predictions_after_blocks(stack, outputs, ids)
        expected = model(ids).logits[0].softmax(-1).topk(5)
    assert tops.shape == probabilities.shape == (9, 6, 5)
    assert tops[:, -1].tolist() == expected.indices.tolist()
    np.testing.assert_allclose(probabilities[:, -1], expected.values.numpy(), rtol=1e-4)
    assert (predictions == tops[:, :, 0].T).all()


def test_equal_logits_go_to_the_first_token_everywhere() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[64:] = model.lm_head.weight[:64]  # every token has an equal
    stack = BlockStack(model)
    ids = token_ids(model, batch=1, length=9)
    with torch.inference_mode():
        outputs = stack.outputs(ids)
        predictions = predictions_after_blocks(stack, outputs, ids)
        tops, _ = top_after_blocks(stack, outputs, ids)
    assert (predictions < 64).all()
    assert (predictions == tops[:, :, 0].T).all()


def test_generation_is_the_plain_greedy_loop_and_stops_at_the_end_token() -> None:
    model = build("llama")
    stack = BlockStack(model)
    prompts = token_ids(model, batch=4, length=5)
    model.generation_config.eos_token_id = None
    free, _ = generate(stack, prompts, 10)
    ids = prompts
    with torch.inference_mode():
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert free.tolist() == ids.tolist()

    end = int(free[2, 8])  # let one of the sentences end there
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = 0
    ticks: list[int] = []
    ids, generated = generate(stack, prompts, 10, lambda: ticks.append(1))
    assert not generated[:, :5].any()
    for row in range(4):
        continuation = free[row, 5:].tolist()
        length = continuation.index(end) + 1 if end in continuation else 10
        assert generated[row, 5:].tolist() == [True] * length + [False] * (generated.shape[1] - 5 - length)
        assert ids[row][generated[row]].tolist() == continuation[:length]
    assert len(ticks) == generated[:, 5:].any(dim=0).sum()


def test_a_model_that_samples_by_habit_is_greedy_here() -> None:
    model = build("llama")
    stack = BlockStack(model)
    prompts = token_ids(model, batch=2, length=5)
    expected = generate(stack, prompts, 12)[0].tolist()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.7)
    assert generate(stack, prompts, 12)[0].tolist() == expected


def test_a_model_that_cannot_generate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    stack = BlockStack(model)
    prompts = token_ids(model, batch=2, length=5)

    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no cache here\nand more")

    monkeypatch.setattr(model, "generate", refuse)
    with pytest.raises(GenerationUnavailable, match=r"^LlamaForCausalLM cannot generate .*no cache here\)\.$"):
        generate(stack, prompts, 4)
    monkeypatch.setattr(model, "generation_config", None)
    with pytest.raises(GenerationUnavailable, match="generate"):
        generate(stack, prompts, 4)


def test_a_stop_between_tokens_is_heard() -> None:
    def stop() -> None:
        raise Stopped("Stopped.")

    model = build("llama")
    with pytest.raises(Stopped):
        generate(BlockStack(model), token_ids(model, batch=1, length=5), 4, stop)


def test_passage() -> None:
    tops = np.array([[[1, 2], [2, 1]], [[4, 0], [4, 1]]], dtype=np.int32)  # two tokens, two blocks, top two
    shares = np.array([[[0.5, 0.25], [0.75, 0.125]], [[0.123456, 0.1], [1.0, 0.0]]], dtype=np.float32)
    result = passage_from(Pieces(), np.array([0, 1]), tops[:, :, 0].T, tops, shares)
    assert [token.token for token in result.tokens] == ["<s>", " the"]
    assert result.tokens[0].top == (((" the", 0.5), ("ing", 0.25)), (("ing", 0.75), (" the", 0.125)))
    assert result.tokens[1].top[0][0] == ("<script>", 0.12346)
    assert [(token.first_exit, token.settled_exit) for token in result.tokens] == [(1, 1), (0, 0)]
    assert [token.id for token in result.tokens] == [0, 1]
    assert result.tokens[1].top_ids == ((4, 0), (4, 1))
