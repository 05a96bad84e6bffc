"""One greedy step, the plain loop and the sweep in turn on the same sequences: evaluations, seconds, the ratio.

    python benchmarks/search.py [--sequences 16] [--sequence-length 256] [--rounds 4] [MODEL]

"Plain" skips one candidate at a time and runs all its blocks, with the same dtype, batch and pieces of logits as the
sweep, so that only the sharing differs; "whole logits" is the textbook loop, which upcasts nothing in pieces. The
ceiling is what sharing can give on this model: blocks are shared, the head is not. Afterwards: the forecast time of a
short search, and the time it took.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record

import sleb
from sleb import execution, specs
from sleb.model.block_stack import BlockStack
from sleb.model.loading import load_model
from sleb.records import CalibrationSpec
from sleb.scoring.readings import NegativeLogLikelihood
from sleb.scoring.scorer import Scorer
from sleb.scoring.sweep import HiddenLogits
from sleb.scoring.sweep_plan import cost_of
from sleb.text import calibration


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-forecast", action="store_true", help="leave out the three short searches at the end")
    parser.add_argument("--record", type=Path, help="keep the ratio in this file, and say what it held before")
    args = parser.parse_args()

    loaded = load_model(args.model, dtype=args.dtype)
    stack = BlockStack(loaded.model)
    spec = CalibrationSpec(source="demo", sequences=args.sequences, sequence_length=args.sequence_length)
    text = calibration.build(spec, 0, 0, loaded.tokenizer, stack.config.vocab_size)
    candidates = [(block,) for block in range(1, len(stack) - 1)]
    per_round = max(1, args.sequences // args.rounds)
    scorer = Scorer(stack, text.ids, batch_size=args.batch_size)

    def sweep(sequences: np.ndarray) -> np.ndarray:
        return scorer.score(candidates, sequences)

    def plain(sequences: np.ndarray) -> np.ndarray:
        return np.concatenate([scorer.score([candidate], sequences) for candidate in candidates])

    textbook = Scorer(stack, text.ids, batch_size=scorer.batch_size, plain=True)

    def whole_logits(sequences: np.ndarray) -> np.ndarray:
        return textbook.score(candidates, sequences)

    loops: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "sweep": sweep,
        "plain": plain,
        "plain, whole logits": whole_logits,
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    sweep(np.arange(1))  # warm up
    largest = 0.0
    for start in range(0, args.sequences - per_round + 1, per_round):
        sequences = np.arange(start, start + per_round)
        results = {}
        for name, loop in loops.items():
            began = time.perf_counter()
            results[name] = loop(sequences)
            seconds[name].append(time.perf_counter() - began)
            print(f"sequences {start} to {start + per_round - 1}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        largest = max(largest, *(float(np.abs(nats - results["sweep"]).max()) for nats in results.values()))

    shared, alone = (cost_of(candidates, len(stack), plain=loop) for loop in (False, True))
    block, head = _times(scorer, text.ids)
    ceiling = (alone.block_evaluations * block + alone.head_evaluations * head) / (
        shared.block_evaluations * block + shared.head_evaluations * head
    )
    bound = (len(stack) ** 2 + len(stack)) // 2
    tokens = args.sequence_length
    threads = torch.get_num_threads()
    print(f"{loaded.name}: {len(stack)} blocks, {loaded.dtype}, {threads} threads, batch {scorer.batch_size}")
    print(f"one greedy step, {len(candidates)} candidates, {tokens} tokens a sequence, {len(seconds['sweep'])} rounds")
    print(f"block evaluations: sweep {shared.block_evaluations} (bound {bound}), plain {alone.block_evaluations}")
    for name, times in seconds.items():
        spread = f"{min(times) / per_round:.2f} to {max(times) / per_round:.2f}"
        print(f"  {name:20} {statistics.median(times) / per_round:6.2f} s a sequence ({spread})")
    settings = f"{args.model}, {args.sequences} x {args.sequence_length} tokens, {args.rounds} rounds"
    for name in ("plain", "plain, whole logits"):
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["sweep"], strict=True)]
        middle, lowest, highest = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name} / sweep: {middle:.2f} (rounds {lowest:.2f} to {highest:.2f})")
        if args.record and name == "plain":
            print(record(args.record, f"{name} / sweep", settings, middle, lowest, highest))
    print(f"ceiling on this model: {ceiling:.2f} (logits cost {head / block:.1f} blocks)")
    print(f"largest difference of a score: {largest:.3g} nats")
    if not args.no_forecast:
        _forecasts(args.model, args.dtype)


def _forecasts(model: str, dtype: str) -> None:
    """Three times, because the machine does other things as well."""
    settings: dict[str, Any] = dict(dtype=dtype, sequences=8, sequence_length=128, remove=1, analysis=False)
    for _ in range(3):
        promised = execution.forecast(specs.run_spec(model, **settings)).search_seconds
        with tempfile.TemporaryDirectory() as folder:
            run = sleb.search(model, run_dir=Path(folder) / "run", **settings)
        assert run.trace is not None
        taken = run.trace.baseline.seconds + sum(step.seconds for step in run.trace.steps)
        verdict = "within" if 0.7 <= promised / taken <= 1.3 else "MISSES"
        print(f"a search of {taken:.1f} s was forecast to take {promised:.1f} s: {verdict} 30 %")


@torch.inference_mode()
def _times(scorer: Scorer, ids: np.ndarray) -> tuple[float, float]:
    """Seconds of one block and of the logits with their loss for a batch, medians."""
    batch = torch.from_numpy(ids[: scorer.batch_size]).to(scorer.stack.device)
    inputs = scorer.stack.capture(batch)
    blocks, heads = [], []
    for _ in range(5):
        stream = inputs.start()
        for block in range(len(scorer.stack)):
            began = time.perf_counter()
            scorer.stack.advance(block, inputs, stream)
            blocks.append(time.perf_counter() - began)
        began = time.perf_counter()
        NegativeLogLikelihood().of(HiddenLogits(scorer.stack, stream.hidden, batch), batch)
        heads.append(time.perf_counter() - began)
    return statistics.median(blocks), statistics.median(heads)


if __name__ == "__main__":
    main()
