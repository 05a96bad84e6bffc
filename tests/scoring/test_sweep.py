"""The sweep and its reference implementation, the plain forward pass: equal for every candidate, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sleb.model.block_stack import BlockStack
from sleb.records import Method
from sleb.scoring.plain_pass import plain_nll
from sleb.scoring.scorer import Scorer
from sleb.scoring.self_check import self_check
from sleb.scoring.sweep_plan import cost_of
from sleb.scoring.token_loss import UPCAST_BYTES
from tests.support.families import FAMILIES, build, token_ids

# Families in which a block needs what another one computed, or the model does something between blocks: the naive
# replay is wrong there, and the self-check must find it out.
STATEFUL = {"gemma4-shared-kv", "rwkv", "glm-moe-dsa"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, BlockStack, np.ndarray]:
    model = build(request.param)
    return request.param, BlockStack(model), token_ids(model, batch=3, length=12).numpy()


def test_sweep_equals_plain_skip(family: tuple[str, BlockStack, np.ndarray]) -> None:
    name, stack, ids = family
    check = self_check(stack, range(len(stack)), ids)
    if name in STATEFUL and check.scoring == "plain":
        assert check.reason
        return
    assert check.scoring == "sweep", check.reason
    free = [block for block in range(len(stack)) if block not in check.protected]
    skip_sets = [
        (),
        *((block,) for block in free),
        (free[0], free[-1]),
        tuple(free[1:3]),
        (free[-1], free[1]),
    ]
    scorer = Scorer(stack, ids, batch_size=2)
    swept = scorer.score(skip_sets, np.arange(len(ids)))
    with torch.inference_mode():
        for row, skipped in zip(swept, skip_sets, strict=True):
            for start, stop in ((0, 2), (2, 3)):  # the same batches: kernels may round differently by shape
                plain = plain_nll(stack, skipped, torch.from_numpy(ids[start:stop])).numpy()
                np.testing.assert_allclose(row[start:stop], plain, rtol=1e-6, err_msg=f"{name} {skipped}")
    assert len({round(float(total), 6) for total in swept.sum(axis=1)}) > len(free), "skipping must be visible"


def test_removal_lists_of_sweep_and_plain_are_equal(family: tuple[str, BlockStack, np.ndarray]) -> None:
    name, stack, ids = family
    check = self_check(stack, range(1, len(stack) - 1), ids)
    results = []
    for plain in (False, True):
        if not plain and check.scoring == "plain":
            assert name in STATEFUL
            return
        scorer = Scorer(stack, ids, batch_size=3, plain=plain)
        results.append([d.step.removal_list for d in _search(scorer, stack, check.protected)])
    assert results[0] == results[1]
    assert len(results[0]) == 2


def _search(scorer: Scorer, stack: BlockStack, protected: dict[int, str]) -> list:
    from sleb.methods.problem import Problem
    from sleb.methods.strategies import search
    from sleb.records import Baseline, Measured

    problem = Problem(
        num_blocks=len(stack),
        num_remove=2,
        protected=tuple({0, len(stack) - 1, *protected}),
        calibration=np.arange(3),
        held_out=np.arange(0),
        token_counts=scorer.token_counts,
    )
    nothing = Measured(nll_sum=0.0, token_count=1)
    first = Baseline(calibration=nothing, held_out=nothing, block_evaluations=0, head_evaluations=0, seconds=0)
    return list(search(Method.METRIC3, problem, scorer.score, first))


def test_at_least_twenty_families_take_the_sweep() -> None:
    assert len(set(FAMILIES) - STATEFUL) >= 20


def test_a_block_that_others_need_is_protected_and_the_naive_replay_found_out() -> None:
    """Gemma 4 with shared key and value caches: skipping a writer raises; naive replay is silently wrong."""
    model = build("gemma4-shared-kv")
    stack = BlockStack(model)
    ids = token_ids(model, batch=2, length=12)
    check = self_check(stack, range(len(stack)), ids.numpy())
    assert check.protected
    assert all("KeyError" in reason for reason in check.protected.values())

    class Naive(BlockStack):
        """What a replay without the stream's own copies of shared containers would do."""

        def capture(self, ids: torch.Tensor):
            inputs = super().capture(ids)
            start = type(inputs).start

            class Shared(type(inputs)):  # type: ignore[misc]
                def start(self):
                    stream = start(self)
                    stream.own.clear()
                    return stream

            return Shared(inputs.embeddings, inputs.calls)

    free = [block for block in range(len(stack)) if block not in check.protected]
    naive = self_check(Naive(model), free, ids.numpy())
    assert naive.scoring == "plain"
    assert "differs" in (naive.reason or "")
    honest = self_check(stack, free, ids.numpy())
    assert honest.scoring == "sweep", honest.reason


def test_the_model_is_left_as_it_was_found() -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model)
    with torch.inference_mode():
        before = stack.forward(ids)
        marker = lambda *args, **kwargs: type(stack.blocks[1]).forward(stack.blocks[1], *args, **kwargs)  # noqa: E731
        stack.blocks[1].forward = marker  # as accelerate's hooks do
        with pytest.raises(RuntimeError, match="on purpose"), stack.skipping({1, 2}):
            raise RuntimeError("on purpose")
        Scorer(stack, ids.numpy()).score([(), (1,), (2,)], np.arange(2))
        assert stack.blocks[1].forward is marker
        assert "forward" not in stack.blocks[2].__dict__
        assert torch.equal(stack.forward(ids), before)


@pytest.mark.parametrize("alive", [4, 6, 9])
def test_a_greedy_step_costs_at_most_half_the_square(alive: int) -> None:
    model = build("llama", num_blocks=alive)
    stack = BlockStack(model)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    ids = token_ids(model, batch=4).numpy()
    scorer = Scorer(stack, ids, batch_size=4)
    for block in stack.blocks:
        block.self_attn.register_forward_hook(count)  # what returns its input runs no attention
    skip_sets = [(block,) for block in range(alive)]
    scorer.score(skip_sets, np.arange(4))
    assert calls <= (alive**2 + alive) / 2
    assert scorer.block_evaluations == calls * 4 == cost_of(skip_sets, alive, 4).block_evaluations
    assert scorer.head_evaluations == alive * 4
    assert cost_of(skip_sets, alive, plain=True).block_evaluations == alive * (alive - 1)


def test_logits_come_in_pieces_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=2, length=32).numpy()
    whole = Scorer(stack, ids).score([(), (2,)], np.arange(2))
    monkeypatch.setattr("sleb.scoring.sweep._LOGIT_BYTES", {"cpu": 5 * 2 * 128 * 4})  # five positions of both sequences
    monkeypatch.setattr("sleb.scoring.token_loss.UPCAST_BYTES", {"cpu": 3 * 4 * 128})  # three rows
    pieces = Scorer(stack, ids).score([(), (2,)], np.arange(2))
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)


def test_bfloat16_sums_keep_their_digits() -> None:
    model = build("llama").to(torch.bfloat16)
    stack = BlockStack(model)
    ids = token_ids(model, batch=2, length=40)
    nats = Scorer(stack, ids.numpy()).score([()], np.arange(2))[0]
    with torch.inference_mode():
        logits = stack.forward(ids)[:, :-1].double()
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(nats, exact.view(2, -1).sum(dim=1).numpy(), rtol=1e-6)


def test_out_of_memory_halves_the_batch_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model, batch=7).numpy()
    expected = Scorer(stack, ids, batch_size=1).score([(), (3,)], np.arange(7))

    def small_memory(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = stack.blocks[3].register_forward_pre_hook(small_memory)
    scorer = Scorer(stack, ids, batch_size=7)
    nats = scorer.score([(), (3,)], np.arange(7))
    handle.remove()
    assert scorer.batch_size == 1  # 7, 3, 1
    assert "Out of memory" in caplog.text
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert scorer.head_evaluations == 2 * 7


def test_one_sequence_that_does_not_fit_is_a_sentence() -> None:
    from sleb.errors import ScoringError

    model = build("llama")
    stack = BlockStack(model)

    def no_memory(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    stack.blocks[0].register_forward_pre_hook(no_memory)
    with pytest.raises(ScoringError, match="`sequence_length`"):
        Scorer(stack, token_ids(model).numpy(), batch_size=2).score([()], np.arange(2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba", "gpt2"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_divergence_equals_that_of_plain_forward_passes(family: str, plain: bool) -> None:
    model = build(family)
    stack = BlockStack(model)
    ids = token_ids(model)
    skip_sets = [(), (1,), (2, 3), (3, 2), (4,)]
    scorer = Scorer(stack, ids.numpy(), plain=plain)
    nats = scorer.diverge(skip_sets, np.arange(len(ids)))
    with torch.inference_mode():
        base = stack.forward(ids)[:, :-1].double().log_softmax(-1)
        for skipped, row in zip(skip_sets, nats, strict=True):
            with stack.skipping(skipped):
                own = stack.forward(ids)[:, :-1].double().log_softmax(-1)
            reference = torch.nn.functional.kl_div(own, base, log_target=True, reduction="none").sum(dim=(1, 2))
            np.testing.assert_allclose(row, reference.numpy(), rtol=1e-4, atol=1e-5)
    assert (nats[0] == 0).all()
    assert (nats[1:] > 0).all()
    expected = cost_of([*skip_sets, ()], len(stack), len(ids), plain=plain)
    assert (scorer.block_evaluations, scorer.head_evaluations) == (
        expected.block_evaluations,
        expected.head_evaluations,
    )


def test_the_divergence_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    stack = BlockStack(model)
    ids = token_ids(model)
    whole = Scorer(stack, ids.numpy()).diverge([(2,)], np.arange(len(ids)))
    shapes = []
    logits = stack.logits
    monkeypatch.setattr(stack, "logits", lambda hidden, part: shapes.append(part.shape[1]) or logits(hidden, part))
    monkeypatch.setitem(UPCAST_BYTES, "cpu", 4 * len(ids) * model.config.vocab_size * 2)
    np.testing.assert_allclose(Scorer(stack, ids.numpy()).diverge([(2,)], np.arange(len(ids))), whole, rtol=1e-6)
    assert max(shapes) == 2
