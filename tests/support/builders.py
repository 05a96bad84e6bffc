"""Records made by hand, for tests that need a run and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleb.records import (
    Attempt,
    Baseline,
    CalibrationSpec,
    Candidate,
    Job,
    Measured,
    Run,
    RunSpec,
    SearchJob,
    SelfCheck,
    StackDescription,
    Step,
    Trace,
)

TOKENS = 1000


def measured(nats_per_token: float | None, tokens: int = TOKENS) -> Measured:
    """A likelihood with exp(nats_per_token) as its perplexity."""
    return Measured(nll_sum=None if nats_per_token is None else nats_per_token * tokens, token_count=tokens)


def make_stack(num_blocks: int = 30, **changes: Any) -> StackDescription:
    """A stack of blocks of one kind."""
    settings: dict[str, Any] = dict(
        model_class="LlamaForCausalLM",
        path="model.layers",
        block_class="LlamaDecoderLayer",
        num_blocks=num_blocks,
        block_parameters=(1000,) * num_blocks,
        total_parameters=1000 * num_blocks + 5000,
        hidden_size=32,
        vocab_size=128,
        dtype="bfloat16",
        revision="0123abc",
        weights_hash="feedbeef",
        tokens_hash="cafe",
        sequences=16,
        held_out=4,
        sequence_length=256,
        bos=False,
        text="a sample of 100 articles, 385,000 words",
        num_remove=3,
        protected=(0, num_blocks - 1),
        self_check=SelfCheck(scoring="sweep", candidates=num_blocks - 2, tokens=8, max_difference=0.0),
    )
    return StackDescription(**(settings | changes))


def make_step(
    number: int, removal_list: tuple[int, ...], removed: tuple[int, ...] | None = None, **changes: Any
) -> Step:
    """A decision that costs a tenth of a nat per step."""
    block = removal_list[-1]
    settings: dict[str, Any] = dict(
        number=number,
        removed=removed or (block,),
        removal_list=removal_list,
        candidates=(Candidate(block=block, skipped=removal_list, score_sum=3000.0 + 100 * number, token_count=TOKENS),),
        calibration=measured(3.0 + 0.1 * number),
        held_out=measured(3.1 + 0.1 * number, 250),
        margin=0.0017,
        margin_standard_error=0.024,
        tied=(5, 7),
        block_evaluations=100,
        head_evaluations=10,
        seconds=1.5,
    )
    return Step(**(settings | changes))


def make_run(
    removal_list: tuple[int, ...] = (14, 23, 11),
    num_blocks: int = 30,
    *,
    steps: tuple[Step, ...] | None = None,
    spec: dict[str, Any] | None = None,
    stack: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A finished search that removed one block after the other; `spec` and `stack` change their fields."""
    if steps is None:
        steps = tuple(make_step(count, removal_list[:count]) for count in range(1, len(removal_list) + 1))
    baseline = Baseline(
        calibration=measured(3.0),
        held_out=measured(3.1, 250),
        block_evaluations=480,
        head_evaluations=20,
        seconds=9.0,
    )
    request: dict[str, Any] = dict(
        model="example/model-1b",
        num_remove=max(len(removal_list), 1),
        calibration=CalibrationSpec(source="demo", sequences=16, sequence_length=256),
    )
    attempt = Attempt(
        device="cpu", batch_size=4, threads=2, host="host", versions={"torch": "2.13.0", "python": "3.11"}
    )
    folder = Path("runs") / "20260101-example"
    settings: dict[str, Any] = dict(
        run_id=folder.name,
        run_dir=folder,
        spec=RunSpec(**(request | (spec or {}))),
        stack=make_stack(num_blocks, **(stack or {})),
        trace=Trace(baseline=baseline, steps=steps, finished="removed 3 blocks, as asked"),
        jobs=(
            Job(
                name="1-search",
                directory=folder / "jobs" / "1-search",
                spec=SearchJob(),
                status={"state": "finished"},
                attempt=attempt,
            ),
        ),
    )
    return Run(**(settings | changes))
