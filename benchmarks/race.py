"""How much a race saves, and whether it chooses the same: replayed on a full search's recorded scores.

python benchmarks/race.py             # replays tests/data/race_table.npz: the demo model, 128 sequences of 128 tokens
python benchmarks/race.py --record    # makes that table again first: a full search, about a quarter of an hour

Prints block evaluations of the plain loop, of the sweep over everything and of the race, side by side: a race whose
doubt is shared out evenly in every step, and the race as it is, where it follows from the step before.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sleb.methods.problem import Problem
from sleb.methods.race import race
from sleb.methods.statistics import compare
from sleb.scoring.sweep_plan import Cost, cost_of

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "race_table.npz"
NUM_BLOCKS, LENGTH, SEQUENCES = 30, 128, 128
HEAD_WEIGHT = 8.0  # logits of the demo model in block evaluations


def main() -> None:
    """Record if asked, then replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="make the table again")
    parser.add_argument("--orders", type=int, default=100, help="random orders of the sequences")
    parser.add_argument("--first", type=int, default=0, help="seed of the first order: others than the tests see")
    args = parser.parse_args()
    if args.record:
        record()
    table = steps_of(TABLE)
    plain, full = Cost(0, 0), Cost(0, 0)
    for removed, blocks, nats in table:
        skip_sets = [(*removed, int(block)) for block in blocks]
        plain += cost_of(skip_sets, NUM_BLOCKS, nats.shape[1], plain=True)
        full += cost_of(skip_sets, NUM_BLOCKS, nats.shape[1])
    print(f"{'':<22}{'block evaluations':>18}{'logits':>12}{'fewer blocks':>14}{'less work':>11}  same list")

    def show(name: str, cost: Cost, same: str) -> None:
        fewer = plain.block_evaluations / cost.block_evaluations
        less = plain.units(HEAD_WEIGHT) / cost.units(HEAD_WEIGHT)
        counts = f"{cost.block_evaluations:>18,}{cost.head_evaluations:>12,}"
        print(f"{name:<22}{counts}{fewer:>13.2f}x{less:>10.2f}x  {same}")

    show("plain loop", plain, "by definition")
    show("sweep, all on all", full, "always")
    for name, even in (("race, even shares", True), ("race", False)):
        runs = [replay(table, seed, even=even) for seed in range(args.first, args.first + args.orders)]
        mean = Cost(
            round(float(np.mean([cost.block_evaluations for _, cost in runs]))),
            round(float(np.mean([cost.head_evaluations for _, cost in runs]))),
        )
        show(name, mean, f"in {sum(same for same, _ in runs)} of {len(runs)} random orders of the sequences")


def record() -> None:
    """A full search on the demo model; its scores as the table."""
    import sleb
    from sleb.runtime import trace_file

    with tempfile.TemporaryDirectory() as folder:
        run = sleb.search(
            "demo",
            ratio=0.2,
            sequences=SEQUENCES,
            sequence_length=LENGTH,
            search="full",
            analysis=False,
            run_dir=Path(folder) / "run",
        )
        assert run.trace is not None
        arrays: dict[str, np.ndarray] = {"removal_list": np.array(run.removal_list)}
        for step in run.trace.steps:
            scores = trace_file.read_scores(run.run_dir, f"step-{step.number:04d}")
            arrays[f"blocks_{step.number}"] = scores["blocks"].astype(np.int16)
            arrays[f"nats_{step.number}"] = scores["nats"].astype(np.float32)
    np.savez_compressed(TABLE, **arrays)  # type: ignore[arg-type]
    print(f"Wrote {TABLE}: {TABLE.stat().st_size / 1e3:.0f} kB")


def steps_of(path: Path) -> list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    """Blocks removed before each step, its candidates, and their scores (candidates, sequences)."""
    with np.load(path) as arrays:
        removal_list = [int(block) for block in arrays["removal_list"]]
        return [
            (tuple(removal_list[:step]), arrays[f"blocks_{step + 1}"], arrays[f"nats_{step + 1}"].astype(np.float64))
            for step in range(len(removal_list))
        ]


def replay(
    table: Sequence[tuple[tuple[int, ...], np.ndarray, np.ndarray]], seed: int, *, even: bool = False
) -> tuple[bool, Cost]:
    """Race every step of the full search's own path: whether each chose the same block, and what it took.

    `even`: as if nothing were known of the step before.
    """
    total, same, left = Cost(0, 0), True, dict[int, int]()
    for number, (removed, blocks, nats) in enumerate(table, 1):
        count = nats.shape[1]
        row = {int(block): index for index, block in enumerate(blocks)}

        def score(
            skip_sets: Sequence[tuple[int, ...]],
            sequences: np.ndarray,
            row: dict[int, int] = row,
            nats: np.ndarray = nats,
        ) -> np.ndarray:
            nonlocal total
            total += cost_of(skip_sets, NUM_BLOCKS, len(sequences))
            return nats[np.ix_([row[skipped[-1]] for skipped in skip_sets], sequences)]

        problem = Problem(
            num_blocks=NUM_BLOCKS,
            num_remove=1,
            protected=(),
            calibration=np.arange(count),
            held_out=np.arange(0),
            token_counts=np.full(count, LENGTH - 1),
            racing=True,
            seed=seed,
        )
        known = None if even or not left else np.fromiter((left[int(block)] for block in blocks), dtype=np.float64)
        scores, seen = race(problem, score, [(*removed, int(block)) for block in blocks], number, known)
        assert seen is not None
        left = dict(zip(blocks.tolist(), seen.sum(axis=1).tolist(), strict=True))
        winner = compare(scores, problem.token_counts, problem.confidence, seen).winner
        same &= winner == int(nats.sum(axis=1).argmin())
    return same, total


if __name__ == "__main__":
    main()
