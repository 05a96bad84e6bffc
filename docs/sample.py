"""Records the dashboard's sample runs anew: `make sample` (about a quarter of an hour on two cores).

One search per method on the demo model, into `assets/sample/`; what names the machine is taken out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sleb
from sleb.records import Method

SAMPLES = Path(__file__).resolve().parent.parent / "assets" / "sample"
RATIO = 0.4  # twelve steps: enough to watch, small enough to keep


def record(method: Method) -> None:
    """One run; what was there is replaced once the new one is whole."""
    target = SAMPLES / f"sample-smollm2-135m-{method.value}"
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    whole = method is Method.METRIC3  # the analyses are the same for all
    sleb.search("demo", ratio=RATIO, method=method, analysis=whole, run_dir=partial)
    tidy(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def tidy(run_dir: Path) -> None:
    """Without the lock, the log, and the machine's name and processes."""
    (run_dir / ".lock").unlink(missing_ok=True)
    for job in (run_dir / "jobs").iterdir():
        (job / "log.txt").unlink(missing_ok=True)
        for name, fields in (("status.json", {"host": None, "pid": None}), ("attempt.json", {"host": "recorded"})):
            path = job / name
            path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=1))


if __name__ == "__main__":
    for each in Method:
        print(f"Recording {each.value}", flush=True)
        record(each)
