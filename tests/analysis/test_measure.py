"""The two analyses of a model against plain computations, and the cache behind them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleb.analysis import block_output_cache, cache_folder, measure, prediction_alignment
from sleb.analysis.measure import Sample, analysis_of, analyze
from sleb.errors import ModelError, ScoringError, Stopped
from sleb.model.block_stack import BlockStack
from tests.support.families import VOCAB, build, token_ids


class Numbers:
    """A tokenizer whose tokens are numbers."""

    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return VOCAB

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"<{token}>" for token in ids)


def run(stack: BlockStack, ids: Any, home: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(model_key="w", dtype="float32", model_name="tiny", home=home, seed=0)
    return analyze(stack, Numbers(), ids, **(settings | changes))[0]


def calls_of(model: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def entry_of(home: Path, analysis: Any) -> block_output_cache.BlockOutputs:
    entry = block_output_cache.read(home, analysis.description.cache_key)
    assert entry is not None
    return entry


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "mamba"])
def test_everything_against_plain_computations(family: str, tmp_path: Path) -> None:
    model = build(family)
    stack = BlockStack(model)
    ids = token_ids(model, batch=5, length=12)
    analysis = run(stack, ids, tmp_path, batch_size=2)
    entry = entry_of(tmp_path, analysis)

    # Block outputs by hooks of our own; the last one before the final norm.
    states: list[torch.Tensor] = []

    def keep(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not states:
            states.append(args[0] if args else kwargs["hidden_states"])
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in stack.blocks]
    with torch.no_grad():
        result = model(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for index in range(7):
        np.testing.assert_allclose(entry.outputs[index], states[index].reshape(60, -1), atol=1e-5)
    assert not np.allclose(entry.outputs[-1], result.hidden_states[-1].reshape(60, -1), atol=1e-2)

    # Similarity: two tokens by hand, the means by torch.
    stacked = torch.stack([state.reshape(60, -1) for state in states]).double()
    cosine = torch.nn.functional.cosine_similarity(stacked[:, None], stacked[None], dim=-1)  # (7, 7, 60)
    np.testing.assert_allclose(entry.cosine[17], cosine[:, :, 17], atol=1e-5)
    np.testing.assert_allclose(analysis.similarity.mean, cosine.mean(-1), atol=1e-5)
    later = (torch.arange(60) % 12) > 0
    np.testing.assert_allclose(analysis.similarity.mean_without_first, cosine[..., later].mean(-1), atol=1e-5)
    for block in range(6):
        assert analysis.similarity.metric1[block] == pytest.approx(1 - float(cosine[block, block + 1].mean()), abs=1e-5)
    with torch.no_grad():
        alone = stack.outputs(torch.tensor([[analysis.similarity.random_token_id]]))
    paper = torch.nn.functional.cosine_similarity(alone[1][0, 0], alone[4][0, 0], dim=0)
    assert analysis.similarity.random_token[1][4] == pytest.approx(float(paper), abs=1e-5)
    assert analysis.similarity.random_token_id >= 3  # no special token

    # Alignment: the final predictions are the model's own.
    final = result.logits.argmax(-1).flatten()
    assert entry.predictions[-1].tolist() == final.tolist()
    with torch.no_grad(), stack.skipping({4, 5}):
        third = model(ids).logits.argmax(-1).flatten()
    assert analysis.alignment.calibration.agreement[3] == pytest.approx(float((third == final).float().mean()))
    assert analysis.alignment.calibration.token_count == 60
    assert sum(analysis.alignment.calibration.first_exit) == 60

    # Generated tokens: one by one, without a cache.
    assert analysis.alignment.generated is not None
    assert entry.generated_predictions[-1].tolist() == entry.generated_ids.tolist()
    own = entry.generated_ids[entry.generated_sequence == 3]
    text = ids[3:4]
    with torch.no_grad():
        for token in own[:10]:
            assert int(model(text).logits[0, -1].argmax()) == token
            text = torch.cat([text, torch.tensor([[token]])], dim=1)

    assert [token.token for token in analysis.passage.tokens] == [f"<{token}>" for token in ids[0].tolist()]
    assert analysis.passage.tokens[4].top[5][0][0] == f"<{final[4]}>"
    assert analysis.description.sequences == 5
    assert analysis.description.token_count == 60
    assert not analysis.description.cached


def test_a_second_analysis_makes_no_forward_pass(tmp_path: Path) -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=3, length=10)
    calls = calls_of(model)
    first = run(stack, ids, tmp_path)
    assert calls
    made = len(calls)
    heard: list[tuple[float, str]] = []
    second = run(stack, ids.numpy(), tmp_path, progress=lambda *each: heard.append(each))
    assert len(calls) == made
    assert second.description.cached
    assert heard[-1][0] == 1.0
    same = {"description"}
    assert second.model_dump(exclude=same) == first.model_dump(exclude=same)
    again = analysis_of(entry_of(tmp_path, first), Numbers(), first.description.cache_key)
    assert again.model_dump(exclude=same) == first.model_dump(exclude=same)


def test_each_sampled_sequence_goes_through_once(tmp_path: Path) -> None:
    model = build("llama")
    stack = BlockStack(model)
    tokens: list[int] = []
    # Inside the block: the LM head's pass calls blocks as well, but they only return their input.
    stack.blocks[0].mlp.register_forward_hook(lambda _m, args, _out: tokens.append(args[0].shape[:2].numel()))
    stack.model.generation_config = None  # leave out the generated tokens
    run(stack, token_ids(model, batch=7, length=10), tmp_path, batch_size=3)
    assert sum(tokens) == 70 + 1  # and the paper's random token


@pytest.mark.parametrize(
    "changes",
    [dict(model_key="v"), dict(dtype="bfloat16"), dict(seed=1)],
    ids=lambda changes: next(iter(changes)),
)
def test_what_it_depends_on_changes_the_key(changes: dict[str, Any], tmp_path: Path) -> None:
    stack = BlockStack(build("llama", num_blocks=2))
    ids = token_ids(stack.model, batch=2, length=8)
    first = run(stack, ids, tmp_path)
    assert not run(stack, ids, tmp_path, **changes).description.cached
    assert run(stack, ids, tmp_path, model_name="another name", batch_size=1).description.cached
    assert first.description.cached is False


def test_other_tokens_or_versions_change_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama", num_blocks=2))
    ids = token_ids(stack.model, batch=2, length=8)
    run(stack, ids, tmp_path)
    assert not run(stack, ids.reshape(4, 4), tmp_path).description.cached
    assert not run(stack, ids.flip(0), tmp_path).description.cached
    monkeypatch.setattr(measure, "_versions", lambda: {"torch": "3.0"})  # said, and no part of the key
    again = run(stack, ids, tmp_path).description
    assert again.cached
    assert again.versions["torch"] != "3.0"
    monkeypatch.setattr(measure, "ANALYSIS_VERSION", 99)
    assert run(stack, ids, tmp_path).description.versions == {"torch": "3.0"}


def test_a_damaged_entry_is_computed_again(tmp_path: Path) -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=3, length=10)
    first = run(stack, ids, tmp_path)
    path = tmp_path / "cache" / "block-outputs" / first.description.cache_key / "cosine.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    second = run(stack, ids, tmp_path)
    assert not second.description.cached
    assert second.similarity == first.similarity
    assert run(stack, ids, tmp_path).description.cached


def test_an_analysis_without_a_cache_is_an_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))
    ids = token_ids(stack.model, batch=3, length=10)
    kept = run(stack, ids, tmp_path)
    (tmp_path / "file").write_text("")
    unwritable = run(stack, ids, tmp_path / "file")
    monkeypatch.setenv(block_output_cache.LIMIT_VARIABLE, "0")
    switched_off = run(stack, ids, tmp_path / "other")
    assert kept.similarity == unwritable.similarity == switched_off.similarity
    assert not (tmp_path / "other").exists()


def test_sampling_takes_whole_sequences_first() -> None:
    ids = np.arange(5 * 8).reshape(5, 8)
    sample = Sample.of(ids, 20)
    assert [piece.tolist() for piece in sample.pieces] == [ids[:2].tolist(), ids[2:3, :4].tolist()]
    assert sample.sequences == 3
    assert sample.token_ids.tolist() == list(range(20))
    assert sample.position.tolist() == [*range(8), *range(8), *range(4)]
    assert sample.sequence.tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert Sample.of(ids, 100).sequences == 5
    assert Sample.of(ids, 16).sequences == 2
    assert [piece.shape for piece in Sample.of(ids, 3).pieces] == [(1, 3)]


def test_the_cut_sequence_is_the_same_as_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))
    ids = token_ids(stack.model, batch=4, length=10)
    whole = entry_of(tmp_path, run(stack, ids, tmp_path))
    monkeypatch.setattr(block_output_cache, "MOST_TOKENS", 26)
    monkeypatch.setattr(block_output_cache, "FEWEST_TOKENS", 1)
    cut = run(stack, ids, tmp_path)
    assert (cut.description.sequences, cut.description.token_count) == (3, 26)
    np.testing.assert_allclose(entry_of(tmp_path, cut).outputs, whole.outputs[:, :26], atol=1e-5)
    assert entry_of(tmp_path, cut).predictions.tolist() == whole.predictions[:, :26].tolist()


def test_bfloat16_is_kept_exactly(tmp_path: Path) -> None:
    model = build("llama").bfloat16()
    stack = BlockStack(model)
    ids = token_ids(model, batch=2, length=10)
    analysis = run(stack, ids, tmp_path, dtype="bfloat16")
    entry = entry_of(tmp_path, analysis)
    with torch.inference_mode():
        outputs = stack.outputs(ids)
        assert entry.predictions[-1].tolist() == model(ids).logits.argmax(-1).flatten().tolist()
    for index, output in enumerate(outputs):
        assert (torch.from_numpy(np.array(entry.outputs[index])) == output.float().reshape(20, -1)).all()
    top = [int(token.top[-1][0][0].strip("<>")) for token in analysis.passage.tokens]
    assert top == entry.predictions[-1, : len(top)].tolist()


def test_out_of_memory_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))
    ids = token_ids(stack.model, batch=8, length=10)
    expected = run(stack, ids, tmp_path / "roomy")
    plain = BlockStack.outputs
    batches: list[int] = []

    def outputs(self: BlockStack, ids: torch.Tensor) -> list[torch.Tensor]:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        batches.append(len(ids))
        return plain(self, ids)

    monkeypatch.setattr(BlockStack, "outputs", outputs)
    analysis = run(stack, ids, tmp_path / "tight", batch_size=8)
    assert max(batches) == 2
    np.testing.assert_allclose(analysis.similarity.mean, expected.similarity.mean, atol=1e-5)
    assert analysis.alignment.calibration == expected.alignment.calibration
    assert analysis.alignment.generated == expected.alignment.generated


def test_a_model_that_cannot_generate_has_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))
    ids = token_ids(stack.model, batch=3, length=10)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("This architecture keeps no cache.")

    monkeypatch.setattr(stack.model, "generate", refuse)
    for cached in (False, True):
        analysis = run(stack, ids, tmp_path)
        assert analysis.description.cached is cached
        assert analysis.alignment.generated is None
        assert "keeps no cache" in str(analysis.alignment.generated_reason)
        assert analysis.alignment.calibration.token_count == 30


def test_a_model_that_generates_nonsense_is_not_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))

    def nonsense(stack: BlockStack, prompts: torch.Tensor, new_tokens: int, tick: object) -> Any:
        ids = torch.cat([prompts, torch.full((len(prompts), 20), 7)], dim=1)
        return ids, torch.arange(ids.shape[1]).expand_as(ids) >= prompts.shape[1]

    monkeypatch.setattr(prediction_alignment, "generate", nonsense)
    analysis = run(stack, token_ids(stack.model, batch=3, length=10), tmp_path)
    assert analysis.alignment.generated is None
    assert "forward pass" in str(analysis.alignment.generated_reason)


def test_no_room_to_generate(tmp_path: Path) -> None:
    model = build("opt")
    model.config.max_position_embeddings = 10
    analysis = run(BlockStack(model), token_ids(model, batch=2, length=10), tmp_path)
    assert "10 positions" in str(analysis.alignment.generated_reason)


def test_outputs_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(build("llama"))
    stack = BlockStack(model)
    with torch.no_grad():
        stack.blocks[3].mlp.down_proj.weight.fill_(torch.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(ScoringError, match=r"^Block 3 .*not numbers in float16\. Use `dtype=bfloat16` or"):
        run(stack, token_ids(model, batch=2, length=8), tmp_path, dtype="float16")
    assert cache_folder.usage(tmp_path) == []


def test_blocks_that_put_out_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = BlockStack(build("llama"))
    plain = BlockStack.outputs
    monkeypatch.setattr(BlockStack, "outputs", lambda self, ids: [x[None] for x in plain(self, ids)])
    with pytest.raises(ModelError, match="not one hidden state for each"):
        run(stack, token_ids(stack.model, batch=2, length=8), tmp_path)


def test_progress_rises_to_one_and_a_stop_is_heard(tmp_path: Path) -> None:
    stack = BlockStack(build("llama"))
    ids = token_ids(stack.model, batch=6, length=10)
    heard: list[float] = []
    run(stack, ids, tmp_path, batch_size=2, progress=lambda fraction, _: heard.append(fraction))
    assert heard == sorted(heard)
    assert (heard[0], heard[-1]) == (0.0, 1.0)

    def stop(fraction: float, message: str) -> None:
        if fraction > 0.3:
            raise Stopped("Stopped.")

    with pytest.raises(Stopped):
        run(stack, ids, tmp_path, seed=1, progress=stop)
    assert len(cache_folder.usage(tmp_path)) == 1
