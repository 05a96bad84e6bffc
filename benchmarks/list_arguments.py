"""Arguments of the benchmarks that search lists and evaluate them on a text, and their remarks. Runs nothing itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(description: str | None, ratios: list[float]) -> argparse.ArgumentParser:
    """The arguments that these benchmarks have in common; `ratios` are the default shares of blocks to remove."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", nargs="?", default="demo")
    made.add_argument("--text", type=_file, required=True, help="wiki.test.raw, of the WikiText-2 raw archive")
    made.add_argument("--calibration", default="demo", help="as for sleb search; wiki.valid.raw, for one")
    made.add_argument("--sequences", type=int, default=32)
    made.add_argument("--sequence-length", type=int, default=256)
    made.add_argument("--ratios", type=float, nargs="+", default=ratios, help="shares of blocks to remove")
    made.add_argument("--limit", type=int, help="windows of the test text, evenly spread (default: all)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", default="auto")
    return made


def say(text: str) -> None:
    """Print a remark on the progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{name} is not a file")
    return path
