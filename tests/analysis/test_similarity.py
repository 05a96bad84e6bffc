"""Similarity against plain loops, and on vectors made by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sleb.analysis import similarity, token_sample
from sleb.analysis.similarity import (
    block_influence,
    choose_tokens,
    cosine_matrices,
    in_batches,
    over_tokens,
    similarity_from,
)
from sleb.errors import ScoringError
from sleb.model.block_stack import BlockStack
from tests.support.families import build, token_ids
from tests.support.runs.stores import write_run


def test_cosine_of_vectors_made_by_hand() -> None:
    outputs = np.array(  # two tokens, three points, two dimensions
        [[[1.0, 0.0], [3.0, 4.0]], [[0.0, 2.0], [6.0, 8.0]], [[-5.0, 0.0], [4.0, -3.0]]], dtype=np.float32
    )
    cosine = cosine_matrices(outputs)
    assert cosine.dtype == np.float32
    np.testing.assert_allclose(cosine[0], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(cosine[1], [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-7)


def test_cosine_survives_huge_tiny_and_zero_hidden_states() -> None:
    direction = np.array([3.0, 4.0], dtype=np.float32)
    outputs = np.stack([direction * 1e36, direction * 1e-36, direction * 0])[:, None]
    cosine = cosine_matrices(outputs)[0]
    np.testing.assert_allclose(cosine, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)


def test_chunks_do_not_change_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = np.random.default_rng(0).standard_normal((5, 37, 8)).astype(np.float32)
    whole = cosine_matrices(outputs)
    monkeypatch.setattr("sleb.analysis.similarity._CHUNK_BYTES", 4 * 5 * 8 * 7)
    np.testing.assert_allclose(cosine_matrices(outputs), whole, atol=1e-6)
    assert over_tokens(whole).mean == pytest.approx(whole.astype(np.float64).mean(axis=0), abs=1e-12)


def test_chunk_angular_distance_is_indexed_by_length_and_start() -> None:
    angles = np.array([0.0, 0.1, 0.4, 0.8])  # of each point, times pi
    cosine = np.cos(np.pi * (angles[:, None] - angles[None, :]))[None].astype(np.float32)
    chunks = over_tokens(cosine).chunk_angular_distance
    expected = [[0.1, 0.3, 0.4], [0.4, 0.7, math.nan], [0.8, math.nan, math.nan]]
    np.testing.assert_allclose(chunks, expected, atol=1e-6)


def test_choose_tokens() -> None:
    sequence, position = np.repeat([0, 1, 2], 4), np.tile(np.arange(4), 3)
    assert choose_tokens(sequence, position).tolist() == list(range(12))
    assert choose_tokens(sequence, position, without_first=True).tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert choose_tokens(sequence, position, sequences=[1], start=1, stop=3).tolist() == [5, 6]
    assert choose_tokens(sequence, position, sequences=[2], stop=1, without_first=True).tolist() == []


def test_no_token_is_said_to_be_none() -> None:
    with pytest.raises(ValueError, match="No token"):
        over_tokens(np.ones((3, 2, 2), dtype=np.float32), np.array([], dtype=np.int64))


def test_record_equals_plain_means() -> None:
    rng = np.random.default_rng(1)
    cosine = cosine_matrices(rng.standard_normal((4, 10, 6)).astype(np.float32))
    position = np.tile(np.arange(5), 2)
    record = similarity_from(cosine, position, cosine[3], 42)
    assert record.token_count == 10
    assert record.random_token_id == 42
    np.testing.assert_allclose(record.mean, cosine.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(record.mean_without_first, cosine[position > 0].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(record.random_token, cosine[3], atol=1e-6)
    angular = np.arccos(np.clip(cosine.astype(np.float64), -1, 1)) / np.pi
    assert record.chunk_angular_distance[1][0] == pytest.approx(angular[:, 0, 2].mean(), abs=1e-5)
    assert record.chunk_angular_distance[1][2] is None
    assert record.metric1[1] == pytest.approx(1 - cosine[:, 1, 2].astype(np.float64).mean(), abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "mamba"])
def test_block_influence_equals_a_plain_loop(family: str) -> None:
    model = build(family)
    ids = token_ids(model, batch=3, length=7)
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    stack = BlockStack(model)

    def hook(index: int):  # type: ignore[no-untyped-def]
        def remember(_module, args, kwargs, output):  # type: ignore[no-untyped-def]
            inputs[index] = (args[0] if args else kwargs["hidden_states"]).clone()
            outputs[index] = (output[0] if isinstance(output, tuple) else output).clone()

        return remember

    handles = [b.register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(stack.blocks)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    expected = np.zeros((len(stack), 3))
    for block in range(len(stack)):
        for sequence in range(3):
            for token in range(7):
                a = inputs[block][sequence, token].double()
                b = outputs[block][sequence, token].double()
                expected[block, sequence] += 1 - float(a @ b / (a.norm() * b.norm()))
    for batch_size in (None, 2):
        recorded = block_influence(stack, ids.numpy(), batch_size)
        assert recorded.dtype == np.float64
        np.testing.assert_allclose(recorded, expected, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []

    def work(start: int, stop: int) -> None:
        if stop - start > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append((start, stop))

    assert in_batches(8, 8, work) == 2
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert "batches of 2" in caplog.text


def test_one_sequence_that_does_not_fit_is_an_error_and_a_bug_stays_a_bug() -> None:
    def full(start: int, stop: int) -> None:
        raise MemoryError

    def broken(start: int, stop: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(ScoringError, match="`sequence_length`"):
        in_batches(4, 4, full)
    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(4, 4, broken)


def test_pages_get_similarities_without_torch() -> None:
    code = (
        "import sys; import numpy as np;"
        "from sleb.analysis import block_output_cache, prediction_alignment, similarity;"
        "cosine = similarity.cosine_matrices(np.ones((3, 4, 2), np.float32));"
        "similarity.similarity_from(cosine, np.arange(4), cosine[0], 0);"
        "prediction_alignment.exit_statistics(np.zeros((3, 4), np.int32), 'tokens');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_run_recorded_is_what_its_tokens_give(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12, 2)
    kept = token_sample.read(run.run_dir, 12)
    assert kept is not None
    assert run.analysis is not None
    for which, rows in (("all", kept.position >= 0), ("without first", kept.position > 0)):
        recorded = similarity.recorded(run.analysis, which)
        again = similarity.over_tokens(kept.cosine, np.flatnonzero(rows))
        np.testing.assert_allclose(recorded.mean, again.mean, atol=1e-4)
        assert recorded.token_count == again.token_count
    assert similarity.recorded(run.analysis, "random").token_count == 1


def test_the_best_chunk_of_each_length_turns_least() -> None:
    distances = np.array([[0.3, 0.1, 0.2], [0.4, 0.2, np.nan], [0.5, np.nan, np.nan]])
    assert list(similarity.best_chunks(distances)) == [1, 1, 0]
