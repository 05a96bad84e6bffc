"""Fuzzes options, specs, run folders, models, GGUF headers and task files for as long as wanted, and counts.

    python scripts/fuzz.py --examples 1000
    python scripts/fuzz.py --examples 5000 --target "run folders"

Prints how many examples ended how, and everything that no input may do (`tests/fuzz/harness.py` says what); the exit
code is 1 where there was any of that.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tests.fuzz.targets import TARGETS, Bench, fuzz


def main() -> int:
    """Fuzz, and print counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=1000, help="of each target (default: %(default)s)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this one; may be repeated")
    parser.add_argument("--repeatable", action="store_true", help="the same examples each time, as in the tests")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.target or TARGETS:
            start = time.monotonic()
            place = Path(folder) / name
            place.mkdir()
            bench = Bench(place)
            faulthandler.dump_traceback_later(3600, exit=True)  # not even an alarm is heard in a loop of C
            fuzz(name, bench, options.examples, counts=result, repeatable=options.repeatable)
            counts = bench.sandbox.counts
            ends = ", ".join(f"{count} {end}" for end, count in counts.most_common())
            print(f"{name}: {sum(counts.values())} examples in {time.monotonic() - start:.0f} s ({ends})", flush=True)
    for breach, count in result.most_common():
        print(f"{count:>6}  {breach}")
    print(f"{sum(result.values())} breaches of {len(result)} kinds")
    return 1 if result else 0


if __name__ == "__main__":
    sys.exit(main())
