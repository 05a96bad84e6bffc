"""Kill every command that writes, at every operation on a file and at random moments, and count what was lost.

`python scripts/kill_every_write.py --kills 300` shares so many kills out among the commands: half at operations, evenly
over all of them, half at random moments. What stood before must be as it was, or replaced as a whole; the next command
must leave nothing behind, and find what an undisturbed one finds. Exit code 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)  # before anything is imported that reads them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.killing import cases
from tests.support.killing.bench import Case, Count, kill_some


def main() -> int:
    """Kill, count, and print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="All commands together, about.")
    parser.add_argument("--only", default="", metavar="WORDS", help="Commands whose name holds one, by commas.")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    chosen = [case for case in cases.CASES if any(word in case.name for word in settings.only.split(","))]
    cases.preload()
    draw = random.Random(settings.seed)
    total = Count()
    for case in chosen:
        with tempfile.TemporaryDirectory(prefix="sleb-kills.") as folder:
            _one(case, Path(folder), -(-settings.kills // len(chosen)), draw, total)
    print(f"{total.kills} kills, {total.finished} commands done before theirs, {len(total.wrong)} things wrong")
    return 1 if total.wrong else 0


def _one(case: Case, folder: Path, kills: int, draw: random.Random, total: Count) -> None:
    began = time.perf_counter()
    count = kill_some(case, folder, kills, draw, cases.base)
    print(
        f"{case.name:26} {count.operations:4} operations, {count.kills:3} kills, {count.finished:2} too late, "
        f"{len(count.wrong)} wrong, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    for each in count.wrong[:20]:
        print("   ", each, flush=True)
    total.kills += count.kills
    total.finished += count.finished
    total.wrong += count.wrong


if __name__ == "__main__":
    sys.exit(main())
