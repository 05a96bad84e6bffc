"""How close to the machine: the best rate of matrix products here, and the share of it that each hot part reaches.

    python benchmarks/roofline.py [MODEL] [--device auto] [--dtype auto] [--sequence-length 256] [--batch-size 4]
                                  [--candidates 28] [--rounds 3] [--compile]

One greedy step's sweep on one batch, several times: blocks, head and cross-entropy, the rest (embeddings, masks,
Python). Once as the model was loaded and once with the optimizations that gain here, in turn. A rate
counts
the multiplications and additions of matrix products that the mathematics asks for, as `FlopCounterMode` finds them in
a real call; causal attention counts the half that is not masked. What is computed beside them (norms, activations,
softmax, the loss) counts nothing and takes time.

Jobs run with OMP_WAIT_POLICY=PASSIVE; set it for a fair picture on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sleb.model.block_stack import BlockStack
from sleb.model.loading import load_model
from sleb.records import CalibrationSpec
from sleb.scoring.optimizations.choice import Compile, choose
from sleb.scoring.optimizations.packed_linear import pack, product
from sleb.scoring.readings import NegativeLogLikelihood
from sleb.scoring.scorer import Scorer
from sleb.scoring.sweep import HiddenLogits, swept_logits
from sleb.scoring.sweep_plan import cost_of
from sleb.text import calibration

SQUARES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}
_HEAD = "head and cross-entropy"
SECONDS = 0.2  # for so long a product is repeated, at least three times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="sequences at once; the scorer's own choice by default")
    parser.add_argument("--candidates", type=int, help="evenly spread ones instead of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the blocks as well")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    stack = BlockStack(loaded.model)
    length = args.sequence_length
    batch_size = args.batch_size or Scorer(stack, np.zeros((1, length), np.int64)).batch_size
    spec = CalibrationSpec(source="demo", sequences=max(batch_size, 2), sequence_length=length)
    ids = calibration.build(spec, 0, 0, loaded.tokenizer, stack.config.vocab_size).ids[:batch_size]
    scorer = Scorer(stack, ids, batch_size=batch_size)
    everybody = range(1, len(stack) - 1)
    count = min(args.candidates or len(everybody), len(everybody))
    candidates = [(everybody[place * len(everybody) // count],) for place in range(count)]

    flops = Flops.of(scorer)
    compiling: Compile = "yes" if args.compile else "no"
    chosen = choose(stack, ids, batch_size, float("inf"), compile=compiling)
    states: dict[str, list[Any]] = {"as loaded": []}
    if chosen:
        states["with " + ", ".join(each.name for each in chosen)] = chosen
    best: dict[str, float] = {}
    measured: dict[str, list[Parts]] = {name: [] for name in states}
    for number in range(args.rounds):
        for name, rate in best_rates(stack, ids.size):
            best[name] = max(best.get(name, 0.0), rate)
        for name, on in states.items():
            with ExitStack() as switched:
                for each in on:
                    switched.enter_context(each.on(scorer))
                measured[name].append(sweep(scorer, candidates, flops))
            print(f"round {number + 1}, {name}: {measured[name][-1].total:.2f} s", file=sys.stderr)
    report(scorer, candidates, loaded.name, loaded.dtype, best, measured)


@dataclass
class Flops:
    """Operations of matrix products, for one sequence."""

    blocks: list[float]
    head: float

    @classmethod
    def of(cls, scorer: Scorer) -> Flops:
        """Counted in real calls on a batch."""
        ids = scorer.ids.to(scorer.stack.device)
        with torch.no_grad():
            inputs = scorer.stack.capture(ids)
            stream = inputs.start()
            advance = scorer.stack.advance
            blocks = [_flops(partial(advance, block, inputs, stream)) for block in range(len(scorer.stack))]
            head = _flops(partial(NegativeLogLikelihood().of, HiddenLogits(scorer.stack, stream.hidden, ids), ids))
        return cls([each / len(ids) for each in blocks], head / len(ids))


def _flops(call: Callable[[], Any]) -> float:
    aten = torch.ops.aten
    places = {  # kernel -> where it is told that attention is causal
        aten._scaled_dot_product_flash_attention_for_cpu: 4,
        aten._scaled_dot_product_flash_attention: 4,
        aten._scaled_dot_product_efficient_attention: 6,
        aten._scaled_dot_product_cudnn_attention: 6,
    }
    with FlopCounterMode(display=False, custom_mapping={k: _attention(at) for k, at in places.items()}) as counter:
        call()
    return float(counter.get_total_flops())


def _attention(place: int) -> Callable[..., int]:
    def count(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
        causal = kwargs["is_causal"] if "is_causal" in kwargs else len(args) > place - 3 and args[place - 3]
        batch, heads, rows, size = query.shape
        full = 2 * batch * heads * rows * key.shape[2] * (size + value.shape[3])
        return full // 2 if causal else full

    count._get_raw = True  # type: ignore[attr-defined]
    return count


@dataclass
class Parts:
    """Seconds and products of one sweep."""

    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def sweep(scorer: Scorer, candidates: Sequence[tuple[int, ...]], flops: Flops) -> Parts:
    """One greedy step on the batch, its parts timed as they run."""
    stack, batch, device = scorer.stack, len(scorer.ids), scorer.stack.device
    parts, clock = Parts(), Clock(device)
    advance, reading = stack.advance, NegativeLogLikelihood(scorer.loss)
    ids = scorer.ids.to(device)

    def timed_advance(block: int, *args: Any) -> None:
        with clock.part("blocks"):
            advance(block, *args)
        parts.flops["blocks"] = parts.flops.get("blocks", 0.0) + flops.blocks[block] * batch

    scorer.score([()], np.arange(batch))  # what was switched on needs to be warm
    stack.advance = timed_advance  # type: ignore[method-assign]
    try:
        start = now(device)
        (of_candidates,) = swept_logits(stack, candidates, [ids], lambda units, where: None)
        for _, logits in of_candidates:
            with clock.part(_HEAD):
                reading.of(logits, ids)
        parts.total = now(device) - start
    finally:
        del stack.advance
    parts.flops[_HEAD] = flops.head * batch * len(candidates)
    parts.seconds = clock.seconds()
    return parts


class Clock:
    """Adds up the seconds of parts; on a GPU by events, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within it belongs to this part."""
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part."""
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            passed = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            totals[name] = totals.get(name, 0.0) + passed
        return totals

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def best_rates(stack: BlockStack, tokens: int) -> Iterator[tuple[str, float]]:
    """Products alone, operations a second: large squares, and the model's own shapes with a batch of tokens."""
    device, dtype = stack.device, stack.model.dtype
    shapes = {f"{size} x {size} x {size}": (size, size, size) for size in SQUARES[device.type]}
    linears = [module for module in stack.blocks[0].modules() if isinstance(module, nn.Linear)]
    for layer in [*linears, stack.model.get_output_embeddings()]:
        if isinstance(layer, nn.Linear):
            shape = (tokens, layer.in_features, layer.out_features)
            shapes[" x ".join(map(str, shape))] = shape
    for name, (rows, inner, columns) in shapes.items():
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        work = 2.0 * rows * inner * columns
        yield name, work / _best(partial(nn.functional.linear, left, weight), device)
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            try:
                packed = pack(weight, rows)
            except (RuntimeError, AttributeError):
                continue
            yield f"{name}, packed", work / _best(partial(product, left, packed), device)


def _best(call: Callable[[], Any], device: torch.device) -> float:
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < SECONDS:
        start = now(device)
        call()
        times.append(now(device) - start)
    return min(times)


def report(
    scorer: Scorer,
    candidates: Sequence[tuple[int, ...]],
    name: str,
    dtype: str,
    best: dict[str, float],
    measured: dict[str, list[Parts]],
) -> None:
    """Print the tables of one measurement."""
    stack, (batch, length) = scorer.stack, scorer.ids.shape
    giga = stack.device.type == "cpu"
    unit, scale = ("GFLOP/s", 1e9) if giga else ("TFLOP/s", 1e12)
    where = f"{torch.get_num_threads()} threads" if giga else torch.cuda.get_device_name(stack.device)
    cost = cost_of(candidates, len(stack), batch)
    print(
        f"{name}: {len(stack)} blocks, {dtype}, {stack.device}, {where}, {batch} sequences of {length} tokens at once"
    )
    print(f"matrix products alone, {unit}, best of {len(next(iter(measured.values())))} rounds:")
    for shape, rate in best.items():
        print(f"  {shape:<34}{rate / scale:8,.0f}")
    top = max(best.values())
    print(f"best: {top / scale:,.0f} {unit}")
    print(
        f"a greedy step's sweep: {len(candidates)} candidates, {cost.block_evaluations // batch} block evaluations and"
    )
    print(
        f"{cost.head_evaluations // batch} logits of whole sequences; the quickest of the rounds (median in brackets)"
    )
    quickest = {}
    for state, rounds in measured.items():
        parts = min(rounds, key=lambda each: each.total)
        quickest[state] = parts.total
        middle = statistics.median(each.total for each in rounds)
        print(f"\n{state}")
        print(f"  {'part':<24}{'s a sequence':>13}{'share':>8}{unit:>10}{'of the best':>13}")
        rest = parts.total - sum(parts.seconds.values())
        for part, seconds in {**parts.seconds, "the rest": rest}.items():
            line = f"  {part:<24}{seconds / batch:>13.3f}{seconds / parts.total:>8.1%}"
            if part in parts.flops:
                rate = parts.flops[part] / seconds
                line += f"{rate / scale:>10,.0f}{rate / top:>13.0%}"
            print(line)
        print(f"  {'together':<24}{parts.total / batch:>13.3f}  (median of the rounds {middle / batch:.3f})")
    first, *others = quickest
    for state in others:
        print(f"\n{state}: {quickest[first] / quickest[state]:.2f} times as fast as it was {first}")


if __name__ == "__main__":
    main()
