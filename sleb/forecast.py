"""The timing probe of a model, which forecasts in a few seconds what a search will take. Writes nothing."""

from __future__ import annotations

import math
import time

import numpy as np
import psutil
import torch

from sleb.analysis import block_output_cache
from sleb.analysis.measure import NEW_TOKENS, PROMPTS
from sleb.errors import NotNumbers, model_without
from sleb.methods.cost_forecast import cost_of_spec
from sleb.methods.race import looks_of
from sleb.model.block_stack import BlockStack
from sleb.model.generation import require_positions
from sleb.model.loading import load_model
from sleb.model.stack_discovery import call_model
from sleb.records import Forecast, JobSettings, RunSpec
from sleb.scoring.scorer import Scorer
from sleb.scoring.self_check import self_check

SECONDS = 2.0
"""Seconds for which blocks are timed, at least once."""


@torch.inference_mode()
def timing_probe(spec: RunSpec, job: JobSettings) -> Forecast:
    """Load the model, time a few block evaluations on made-up tokens (times do not depend on them), and count.

    The text is not read, and whether it is long enough is unknown. Raises a `SlebError` in one sentence.
    """
    began = time.perf_counter()
    loaded = load_model(
        spec.model,
        revision=spec.revision,
        dtype=spec.dtype,
        device=job.device,
        allow_pickle=job.allow_pickle,
        trust_remote_code=job.trust_remote_code,
        memory_budget=job.memory_budget,
    )
    stack = BlockStack(loaded.model)
    loading = time.perf_counter() - began
    config, count, length = stack.config, len(stack), spec.calibration.sequence_length
    require_positions(config, length)
    cost, removing = cost_of_spec(spec, count) if spec.kind == "search" else (None, 0)
    ids = _made_up_tokens(stack, length, job.batch_size)
    scorer = Scorer(stack, ids, batch_size=len(ids))
    if not np.isfinite(scorer.score([()], np.arange(len(ids)))).any():  # the first pass allocates
        raise NotNumbers(model_without(()), loaded.dtype)
    per_unit = _seconds_per_unit(stack, scorer, len(ids))
    checking = _checking_seconds(stack, ids)
    memory = _memory(stack) + count * len(ids) * length * config.hidden_size * torch.finfo(stack.model.dtype).bits // 8
    analysing = 0.0
    if spec.kind == "analyze" or spec.analysis:
        tokens = min(block_output_cache.tokens_that_fit(count, config.hidden_size), spec.calibration.sequences * length)
        analysing = _analysis_seconds(stack, tokens / length, per_unit, scorer.head_weight, length)
        memory = max(memory, _memory(stack) + 4 * (count + 1) * tokens * (config.hidden_size + count + 1))
    searching = cost.units(scorer.head_weight) * per_unit / job.processes if cost else 0.0
    if stack.streamed is not None and cost is not None:
        searching = max(searching, _passes(spec, scorer, count, removing) * _pass_seconds(stack))
    return Forecast(
        num_blocks=count,
        num_remove=removing,
        block_evaluations=cost.block_evaluations if cost else 0,
        head_evaluations=cost.head_evaluations if cost else 0,
        head_weight=scorer.head_weight,
        seconds_per_unit=per_unit,
        loading_seconds=loading + checking,
        search_seconds=searching,
        analysis_seconds=analysing,
        peak_memory=memory,
        device=str(loaded.device),
        dtype=loaded.dtype,
    )


def _made_up_tokens(stack: BlockStack, length: int, batch_size: int | None) -> np.ndarray:
    """Token ids (sequences, length): one batch of a search, of at most 64 sequences."""
    one = Scorer(stack, np.zeros((1, length), np.int64), batch_size=batch_size)
    return np.random.default_rng(0).integers(0, stack.config.vocab_size, (min(one.batch_size, 64), length))


def _seconds_per_unit(stack: BlockStack, scorer: Scorer, sequences: int) -> float:
    """Seconds for one block evaluation, measured on the baseline and a few candidates for `SECONDS`."""
    some = [(), *((block,) for block in range(1, len(stack), max(1, len(stack) // 4)))]
    _settle(stack)
    waited = stack.streamed.seconds_waited if stack.streamed else 0.0
    blocks, heads, start = scorer.block_evaluations, scorer.head_evaluations, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        scorer.score(some, np.arange(sequences))
        _settle(stack)
    elapsed = time.perf_counter() - start
    if stack.streamed is not None:  # reading is counted by the pass, not by the evaluation
        elapsed = max(elapsed - (stack.streamed.seconds_waited - waited), 0.1 * elapsed)
    return elapsed / (scorer.block_evaluations - blocks + scorer.head_weight * (scorer.head_evaluations - heads))


def _checking_seconds(stack: BlockStack, ids: np.ndarray) -> float:
    """Seconds for the self-check of all blocks, from that of two."""
    start = time.perf_counter()
    self_check(stack, list(range(min(2, len(stack)))), ids)
    return (time.perf_counter() - start) / 2 * len(stack)


def _analysis_seconds(stack: BlockStack, sequences: float, per_unit: float, head_weight: float, length: int) -> float:
    """Seconds for a forward pass and a short generation, both with the LM head applied after every block."""
    one = torch.zeros((PROMPTS, 1), dtype=torch.long, device=stack.device)
    call_model(stack.model, one)
    _settle(stack)
    start = time.perf_counter()
    call_model(stack.model, one)
    _settle(stack)
    token = time.perf_counter() - start
    generated = PROMPTS * NEW_TOKENS / length
    return len(stack) * (1 + head_weight) * (sequences + generated) * per_unit + NEW_TOKENS * token


def _passes(spec: RunSpec, scorer: Scorer, num_blocks: int, removing: int) -> float:
    """About how many times a streamed search reads the model: the rounds of all steps, as if no candidate left."""
    sequences = spec.calibration.sequences
    fits = scorer.round_size([(block,) for block in range(num_blocks)])
    ends = (*looks_of(sequences), sequences) if spec.races else (sequences,)
    rounds = sum(math.ceil((stop - start) / fits) for start, stop in zip((0, *ends), ends, strict=False))
    return 4 + removing * (rounds + 1)  # baseline, hash and self-check; held-out sequences in each step


def _pass_seconds(stack: BlockStack) -> float:
    """Seconds for reading all blocks once, at the speed measured so far."""
    assert stack.streamed is not None
    total = sum(stack.streamed.block_bytes(block) for block in range(len(stack)))
    return total / max(stack.streamed.bytes_read, 1) * stack.streamed.seconds_read


def _settle(stack: BlockStack) -> None:
    if stack.device.type == "cuda":
        torch.cuda.synchronize(stack.device)


def _memory(stack: BlockStack) -> int:
    """Memory in use now in bytes, of the GPU where there is one, else of this process."""
    if stack.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(stack.device))
    return int(psutil.Process().memory_info().rss)
