"""A look of a few seconds at a model, before a run: what the search will take. Writes nothing."""

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
from sleb.records import Forecast, JobSpec, RunSpec
from sleb.scoring.scorer import Scorer
from sleb.scoring.self_check import self_check

SECONDS = 2.0
"""For so long blocks are timed, at least once."""


@torch.inference_mode()
def probe(spec: RunSpec, job: JobSpec) -> Forecast:
    """Load the model, time a few block evaluations on made-up tokens (times do not depend on them), and count.

    The text is not read, and whether it is long enough is not known. Raises a `SlebError` in one sentence.
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
    config, count = stack.config, len(stack)
    length = spec.calibration.sequence_length
    require_positions(config, length)
    cost, removing = cost_of_spec(spec, count) if spec.kind == "search" else (None, 0)

    batch = min(Scorer(stack, np.zeros((1, length), np.int64), batch_size=job.batch_size).batch_size, 64)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))
    scorer = Scorer(stack, ids, batch_size=batch)
    some = [(), *((block,) for block in range(1, count, max(1, count // 4)))]
    if not np.isfinite(scorer.score([()], np.arange(batch))).any():  # the first pass allocates
        raise NotNumbers(model_without(()), loaded.dtype)
    _settle(stack)
    waited = stack.streamed.seconds_waited if stack.streamed else 0.0
    blocks, heads, start = scorer.block_evaluations, scorer.head_evaluations, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        scorer.score(some, np.arange(batch))
        _settle(stack)
    elapsed = time.perf_counter() - start
    units = scorer.block_evaluations - blocks + scorer.head_weight * (scorer.head_evaluations - heads)
    if stack.streamed is not None:  # reading is counted by the pass below, not by the evaluation
        elapsed = max(elapsed - (stack.streamed.seconds_waited - waited), 0.1 * elapsed)
    per_unit = elapsed / units

    start = time.perf_counter()
    self_check(stack, list(range(min(2, count))), ids)
    checking = (time.perf_counter() - start) / 2 * count
    hidden = batch * length * config.hidden_size * torch.finfo(loaded.model.dtype).bits // 8
    memory = _memory(stack) + count * hidden
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


def _analysis_seconds(stack: BlockStack, sequences: float, per_unit: float, head_weight: float, length: int) -> float:
    """One forward pass, a read-out after every block, and a short generation with the same read-outs."""
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
    """How often a streamed search reads the model, about: each round of each step, as if no candidate ever left."""
    sequences = spec.calibration.sequences
    fits = scorer.round_size([(block,) for block in range(num_blocks)])
    ends = (*looks_of(sequences), sequences) if spec.races else (sequences,)
    rounds = sum(math.ceil((stop - start) / fits) for start, stop in zip((0, *ends), ends, strict=False))
    return 4 + removing * (rounds + 1)  # baseline, hash and self-check; held-out sequences in each step


def _pass_seconds(stack: BlockStack) -> float:
    """What reading all blocks once takes, as fast as it went so far."""
    assert stack.streamed is not None
    total = sum(stack.streamed.block_bytes(block) for block in range(len(stack)))
    return total / max(stack.streamed.bytes_read, 1) * stack.streamed.seconds_read


def _settle(stack: BlockStack) -> None:
    if stack.device.type == "cuda":
        torch.cuda.synchronize(stack.device)


def _memory(stack: BlockStack) -> int:
    """Bytes in use now: of the GPU where there is one, else of this process."""
    if stack.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(stack.device))
    return int(psutil.Process().memory_info().rss)
