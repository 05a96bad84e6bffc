"""What lists of several methods cost on text they were not chosen on: swaps, greedy, best chunk, Metric2, Metric1.

    python benchmarks/quality.py --text wiki.test.raw --calibration wiki.valid.raw [--limit 20] [MODEL]

One search of each method serves all ratios, and swaps go on from the greedy list of each. Lists are chosen on the
calibration text, as `sleb search` does it. Test perplexity is that of the published WikiText-2 protocol: the rows of
wiki.test.raw joined by blank lines, no special tokens, windows of 2048 tokens, the rest dropped; the model as it was
loaded runs with the blocks skipped, and log-likelihoods are taken in float32. `--limit` takes that many of the
windows, evenly spread over the text: then the perplexity is an estimate of the published number, and the differences
between lists, which are paired over windows, say more than the numbers themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import list_arguments
import numpy as np
from list_arguments import say

from sleb.analysis.similarity import block_influence
from sleb.errors import SlebError
from sleb.evaluation import perplexity as published
from sleb.methods import strategies
from sleb.methods.problem import Problem, number_to_remove
from sleb.methods.statistics import mean_and_error, measured
from sleb.model.block_stack import BlockStack
from sleb.model.loading import load_model
from sleb.records import RACE_SEQUENCES, Baseline, CalibrationSpec, Method, Step
from sleb.scoring.scorer import Scorer
from sleb.text import calibration

WINDOW = 2048
METHODS = (Method.METRIC1, Method.METRIC2, Method.BEST_CHUNK, Method.METRIC3)
NAMES = {
    Method.METRIC1: "metric1",
    Method.METRIC2: "metric2",
    Method.BEST_CHUNK: "best chunk",
    Method.METRIC3: "greedy",
}


@dataclass(frozen=True)
class Removal:
    """A removal list, and the time of the search that gave it."""

    name: str
    removal_list: tuple[int, ...]
    perplexity: float
    """Perplexity on the calibration text."""
    seconds: float
    """Seconds of the whole search that gave it; for swaps, on top of the greedy search."""
    remark: str = ""


def main() -> None:
    """Search, evaluate, print."""
    parser = list_arguments.parser(__doc__, ratios=[0.2, 0.3])
    left_out = "methods left out; greedy and its swaps always run"
    parser.add_argument(
        "--without", nargs="+", choices=[NAMES[each] for each in METHODS[:-1]], default=[], help=left_out
    )
    parser.add_argument("--confidence", type=float, default=0.95)
    args = parser.parse_args()
    try:
        measure(args)
    except SlebError as error:
        sys.exit(f"quality.py: {error}")


def measure(args: argparse.Namespace) -> None:
    """All of it. Raises a `SlebError` in one sentence."""
    loaded = load_model(args.model, dtype=args.dtype)
    stack = BlockStack(loaded.model)
    spec = CalibrationSpec(source=args.calibration, sequences=args.sequences, sequence_length=args.sequence_length)
    text = calibration.build(spec, 0, args.seed, loaded.tokenizer, stack.config.vocab_size)
    test = published.windows(str(args.text), loaded.tokenizer, stack.config.vocab_size, limit=args.limit)
    windows = test.ids
    print(f"{loaded.name}: {len(stack)} blocks, {loaded.dtype}")
    print(f"calibration: {text.text}; {text.sequences} sequences of {args.sequence_length} tokens, seed {args.seed}")
    print(f"test: {test.text.description}", flush=True)

    counts = [number_to_remove(len(stack), len(stack) - 2, None, ratio) for ratio in sorted(args.ratios)]
    removals = search(args, stack, text.ids, counts)
    lists = list(dict.fromkeys(tuple(sorted(each.removal_list)) for column in removals.values() for each in column))
    began = time.perf_counter()
    nats = Scorer(stack, windows, batch_size=1).score([(), *lists], np.arange(len(windows)))
    say(f"evaluated {len(lists) + 1} lists in {time.perf_counter() - began:.0f} s")
    rows = dict(zip([(), *lists], nats, strict=True))
    tokens = np.full(len(windows), WINDOW - 1)
    print(f"baseline: test perplexity {perplexity(rows[()]):.2f}")
    for count, column in removals.items():
        print(f"\n{count} of {len(stack)} blocks removed")
        print(
            f"{'':<12}{'calibration':>12}{'test':>9}  {'test - greedy, nats per token':<31}{'seconds':>8}  removal list"
        )
        greedy = next(rows[tuple(sorted(each.removal_list))] for each in column if each.name == "greedy")
        for each in column:
            own = rows[tuple(sorted(each.removal_list))]
            mean, error = mean_and_error(own - greedy, tokens)
            apart = "" if each.name == "greedy" else f"{mean:+.4f} ± {error:.4f}"
            print(
                f"{each.name:<12}{each.perplexity:>12.2f}{perplexity(own):>9.2f}  {apart:<31}{each.seconds:>8.0f}  "
                f"{list(each.removal_list)}{each.remark}"
            )
    print("\n± is one standard error over the windows, in pairs. Seconds of swaps come on top of greedy's.")


def search(
    args: argparse.Namespace, stack: BlockStack, ids: np.ndarray, counts: Sequence[int]
) -> dict[int, list[Removal]]:
    """Lists of each method for each number of blocks to remove."""
    scorer = Scorer(stack, ids)
    removals: dict[int, list[Removal]] = {count: [] for count in counts}
    greedy: tuple[Step, ...] = ()
    for method in [each for each in METHODS if NAMES[each] not in args.without]:
        problem = Problem(
            num_blocks=len(stack),
            num_remove=max(counts),
            protected=(0, len(stack) - 1) if method.protects_ends else (),
            calibration=np.arange(len(ids)),
            held_out=np.arange(0),
            token_counts=scorer.token_counts,
            confidence=args.confidence,
            racing=len(ids) >= RACE_SEQUENCES,
            seed=args.seed,
        )
        steps, seconds = taken(method, problem, stack, scorer, ())
        say(f"{NAMES[method]}: {seconds:.0f} s")
        for count in counts:
            removals[count].append(of(NAMES[method], steps[count - 1], seconds))
        greedy = steps if method is Method.METRIC3 else greedy
    for count in counts:
        swapping = replace(problem, num_remove=count, refine="swap")
        swaps, seconds = taken(Method.METRIC3, swapping, stack, scorer, greedy[:count])
        say(f"swaps at {count}: {seconds:.0f} s")
        summary = "; ".join(
            f"{step.restored[0]} back, {step.removed[0]} out: -{step.improvement or 0:.4f} "
            f"± {step.improvement_standard_error or 0:.4f}"
            for step in swaps
        )
        last = swaps[-1] if swaps else greedy[count - 1]
        removals[count].append(
            of("refined", last, seconds, f"  ({summary or 'the best swap lowers the score by no more than its error'})")
        )
    return removals


def taken(
    method: Method, problem: Problem, stack: BlockStack, scorer: Scorer, steps: tuple[Step, ...]
) -> tuple[tuple[Step, ...], float]:
    """The steps after these, and the seconds they took."""

    def influence() -> np.ndarray:
        return block_influence(stack, scorer.ids.numpy(), scorer.batch_size)

    nothing = measured(np.zeros(0), np.zeros(0, dtype=np.int64))
    first = Baseline(calibration=nothing, held_out=nothing, block_evaluations=0, head_evaluations=0, seconds=0)
    began = time.perf_counter()
    decisions = strategies.search(method, problem, scorer.score, first, steps, influence)
    return tuple(decision.step for decision in decisions), time.perf_counter() - began


def of(name: str, step: Step, seconds: float, remark: str = "") -> Removal:
    """The list that a step leaves."""
    return Removal(name, step.removal_list, step.perplexity or float("nan"), seconds, remark)


def perplexity(nats: np.ndarray) -> float:
    """Perplexity of whole windows, whose first token is not predicted, from nats, float64 (windows,)."""
    return float(np.exp(nats.sum() / (len(nats) * (WINDOW - 1))))


if __name__ == "__main__":
    main()
