"""Findings about a run's lists, made by hand: as many kinds as a page shows, with numbers that look like real ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from sleb.records import (
    EvaluatedText,
    Finding,
    Flip,
    GenerateSpec,
    Generation,
    Healing,
    HealSpec,
    Measured,
    Quantization,
    RemovalList,
    Run,
    TaskAccuracy,
    TextPerplexity,
    Timing,
    sorted_list,
)
from sleb.runtime import findings_folder

BASE = {"wikitext2": 12.7, "c4": 19.3, "wiki.valid.raw": 13.4}
TASKS = {"piqa": 0.68, "winogrande": 0.53, "hellaswag": 0.43, "arc_easy": 0.58, "arc_challenge": 0.29}
PROMPT = ("The", " capital", " of", " France", " is")
CONTINUATION = (
    " Paris",
    ",",
    " a",
    " city",
    " of",
    " light",
    " and",
    " of",
    " <b>",
    "bridges",
    "</b>",
    ".",
    "\n",
    "It",
    " is",
)
CONTINUATION_BY_LIST = (" Paris", ".", "\n", "The", " city", " of", " light", " is", " old", ".")


def lists_of(run: Run) -> list[RemovalList]:
    """The search's after each number of removals."""
    return [sorted_list(step.removal_list) for step in run.trace.by_length] if run.trace else []


def facts(run: Run, blocks: RemovalList, **changes: Any) -> dict[str, Any]:
    """What every finding says."""
    assert run.stack is not None
    settings = dict(removal_list=blocks, dtype=run.stack.dtype, device="cpu", seconds=3.0, finished=time.time())
    return settings | changes


def text(name: str = "wikitext2", windows: int = 62, of_windows: int = 62, window: int = 2048) -> EvaluatedText:
    """A text, cut."""
    some = f"{windows} of {of_windows} windows" if windows < of_windows else f"{windows} windows"
    return EvaluatedText(
        name=name, description=f"{name}: {some} of {window} tokens", tokens_hash=f"{name}-{windows}-{window}",
        windows=windows, of_windows=of_windows, window=window, bos=False,
    )  # fmt: skip


def nats(perplexity: float, tokens: int) -> Measured:
    """A sum that gives this perplexity."""
    return Measured(nll_sum=math.log(perplexity) * tokens, token_count=tokens)


def perplexity(
    run: Run, blocks: RemovalList, rise: float, error: float | None = 0.01, **of_text: Any
) -> TextPerplexity:
    """Of one list, so many nats over the baseline's."""
    result = text(**of_text)
    tokens = result.windows * (result.window - 1)
    return TextPerplexity(
        **facts(run, blocks), text=result, measured=nats(BASE.get(result.name, 15.0) * math.exp(rise), tokens),
        rise=rise if blocks else None, rise_standard_error=error if blocks else None,
    )  # fmt: skip


def accuracy(
    run: Run, blocks: RemovalList, task: str, share: float, error: float = 0.011, **changes: Any
) -> TaskAccuracy:
    """Of one list on one task."""
    settings: dict[str, Any] = dict(
        task=task, metrics={"acc": share - 0.01, "acc_norm": share}, standard_errors={"acc": error, "acc_norm": error},
        higher_is_better={"acc": True, "acc_norm": True}, examples=1838, shots=0, limit=None,
        version="1.0, lm-eval 0.4.9",
    )  # fmt: skip
    return TaskAccuracy(**facts(run, blocks), **(settings | changes))


def timing(run: Run, blocks: RemovalList, shape: str = "prompt", times: float = 1.2, **changes: Any) -> Timing:
    """Of one list, so many times as fast, give or take two per cent."""
    assert run.stack is not None
    count, first = run.stack.num_blocks, 0.84 if shape == "prompt" else 6.1
    before = tuple(first * (1 + 0.01 * each) for each in range(5))
    kept = count - len(blocks)
    cache = 64 * 128 * 2 * count * 384
    settings: dict[str, Any] = dict(
        shape=shape, sequences=1, tokens=256 if shape == "prompt" else 32, baseline_times=before,
        times=tuple(each / times * (1 + 0.02 * (place % 3 - 1)) for place, each in enumerate(before)), threads=2,
        host="host", baseline_cache_bytes=cache, cache_bytes=cache * kept // count,
        baseline_parameters=run.stack.total_parameters,
        parameters=run.stack.total_parameters - sum(run.stack.block_parameters[block] for block in blocks),
        proportional=count / kept,
    )  # fmt: skip
    return Timing(**facts(run, blocks), **(settings | changes))


def quantization(run: Run, blocks: RemovalList, scheme: str = "int8", before: float = 14.1) -> Quantization:
    """Of one list in one scheme."""
    return Quantization(
        **facts(run, blocks), scheme=scheme, group_size=128 if scheme == "int4" else None, text=text(),
        before=nats(before, 1000), measured=nats(before * (1.004 if scheme == "int8" else 1.09), 1000),
        weight_bytes_before=269_000_000,
        weight_bytes=163_000_000 if scheme == "int8" else 117_000_000, library="torchao 0.15",
    )  # fmt: skip


def healing(run: Run, blocks: RemovalList, method: str = "lora") -> Healing:
    """Of one list."""
    trained = method == "lora"
    return Healing(
        **facts(run, blocks, seconds=214.0), ask=HealSpec(lists=(blocks,), how=method), text=text(),
        baseline=nats(12.7, 1000),
        before=nats(16.0, 1000), after=nats(14.2 if trained else 15.4, 1000), change=-0.1193 if trained else -0.0382,
        change_standard_error=0.0041, trained_parameters=620_000 if trained else 0, trained_tokens=524_288,
        losses=tuple(3.1 - 0.3 * (1 - math.exp(-each / 8)) for each in range(40)) if trained else (),
    )  # fmt: skip


def generation(run: Run, blocks: RemovalList, prompt: str = "The capital of France is", **changes: Any) -> Generation:
    """Two continuations that part after a token, and two flips."""
    settings: dict[str, Any] = dict(
        ask=GenerateSpec(lists=(blocks,), prompt=prompt, tokens=16), prompt_tokens=PROMPT, baseline_tokens=CONTINUATION,
        tokens=CONTINUATION_BY_LIST, baseline_text="".join(CONTINUATION), text="".join(CONTINUATION_BY_LIST),
        flips=(
            Flip(position=6, before=",", after=".", before_probability=0.41, after_probability=0.33),
            Flip(position=13, before=" <b>", after=" <i>", before_probability=0.2, after_probability=0.7),
            Flip(position=17, before="\n", after=" ", before_probability=0.62, after_probability=0.0004),
        ),
        compared=19, baseline_seconds=1.92, list_seconds=1.58,
    )  # fmt: skip
    return Generation(**facts(run, blocks), **(settings | changes))


def keep(run: Run, findings: Sequence[Finding]) -> None:
    """Write them down."""
    for each in findings:
        findings_folder.keep(run.run_dir, each)


def everything(run: Run, *, worse: float = 0.035) -> list[Finding]:
    """All kinds, for the baseline and every list of the run; `worse` nats a block at first."""
    result: list[Finding] = []
    for count, blocks in enumerate([(), *lists_of(run)]):
        rise = worse * count * (1 + 0.12 * count)
        result += [
            perplexity(run, blocks, rise, 0.004 * count),
            perplexity(run, blocks, 1.15 * rise, 0.01, name="c4", of_windows=256, windows=8),
        ]
        result += [
            accuracy(run, blocks, name, 0.25 + (share - 0.25) * math.exp(-0.09 * count))
            for name, share in TASKS.items()
        ]
        if blocks:
            result += [
                timing(run, blocks, "prompt", 1 + 0.031 * count),
                timing(run, blocks, "generation", 1 + 0.036 * count),
            ]
    if len(blocks):
        result += [quantization(run, each, scheme) for each in ((), blocks) for scheme in ("int8", "int4")]
        result += [healing(run, blocks), healing(run, blocks, "linear")]
        result += [generation(run, blocks, "Write a list of <i>five</i> fruits."), generation(run, blocks)]
    return result
