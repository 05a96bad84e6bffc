"""How long ten thousand runs take to list: on a terminal, as JSON, and on the dashboard's first page.

python benchmarks/listing.py [--runs 10000] [--without-plain]

Prints seconds of the processors (user and system) and by the clock, beside the simple way: every run read again, whole
where that is printed, and all of them drawn. Makes the runs in a temporary folder, 1 GB for 10,000 with the index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.runs import stores

COMMAND = "import sys\nfrom sleb.cli.main import main\nsys.argv = ['sleb', 'runs'{}]\nmain()"
PLAIN_TABLE = """
from rich.console import Console
from rich.table import Table
from sleb.cli import main
from sleb.runtime import run_folder, run_index
grid = Table(box=None)
for directory in run_folder.run_dirs():
    run = run_index.outline(directory)
    grid.add_row(run.run_id, run.state.value, run.spec.model, run.spec.what, str(list(run.removal_list)))
Console(width=240).print(grid)
"""
PLAIN_JSON = """
import json
from sleb.cli import main
from sleb.formats.run_json import summary
from sleb.runtime import run_folder
from sleb.runtime.processes import job_processes
rows = [{**summary(run), "state": job_processes.state_of(run).value} for run in run_folder.list_runs()]
print(json.dumps({"runs": rows}))
"""
PAGE = """
import statistics, time
from tests.support.dashboard import open_page
from app import data, page
from sleb.runtime import run_folder
from sleb.runtime.listing.run_list import RunList
if {plain}:
    page.MOST_SHOWN = 10**9
    data._runs_of = lambda home: RunList(run_folder.runs_folder())
began = time.process_time()
app = open_page("runs")
first = time.process_time() - began
assert not app.exception, app.exception
taken = []
for _ in range({again}):
    began = time.process_time()
    app.run()
    taken.append(time.process_time() - began)
print(first, statistics.median(taken))
"""


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--without-plain", action="store_true", help="the simple way takes minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        home = Path(folder)
        os.environ["SLEB_HOME"] = folder
        write(home / "runs", options.runs)
        time.sleep(2.5)  # what changed a moment ago is not kept
        plain = not options.without_plain
        index = home / "cache" / "run-index.sqlite"
        measure("sleb runs", COMMAND.format(""), PLAIN_TABLE if plain else None, first=True)
        print(f"{'  the index':<44} {index.stat().st_size / options.runs:8.0f} bytes a run")
        measure("Runs page", PAGE.format(plain=False, again=5), PAGE.format(plain=True, again=1) if plain else None)
        measure("sleb runs --json", COMMAND.format(", '--json'"), PLAIN_JSON if plain else None, first=True)
        print(f"{'  the index':<44} {index.stat().st_size / options.runs:8.0f} bytes a run")


def write(runs: Path, count: int) -> None:
    """One search of 30 blocks and 6 steps, and copies of it."""
    stores.write_run(runs / "run-00000", 30, 6, analysis=False)
    shutil.rmtree(runs / "run-00000" / "scores")
    for number in range(1, count):
        shutil.copytree(runs / "run-00000", runs / f"run-{number:05d}")


def measure(label: str, code: str, plain: str | None, first: bool = False) -> None:
    """Lines of the table."""
    if first:
        show(f"{label}, the first time", *spent(code)[:2])
    processors, clock, printed = spent(code)
    show(label, processors, clock, promised=3.0)
    first_page, again = map(float, printed.split()) if printed else (None, None)
    if first_page is not None and again is not None:
        show("  of that the first page, with its imports", first_page, None, promised=3.0)
        show("  drawn once more", again, None, promised=0.15)
    if plain is None:
        return
    before, clock, printed = spent(plain)
    show("  the simple way", before, clock, ratio=before / processors)
    if again is not None:
        once_more = float(printed.split()[1])
        show("  the simple way, once more", once_more, None, ratio=once_more / again)


def spent(code: str) -> tuple[float, float, str]:
    """Seconds of the processors and of the clock that a fresh interpreter takes, and a short line that it printed."""
    before, began = os.times(), time.perf_counter()
    with tempfile.TemporaryFile() as out:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, stderr=subprocess.DEVNULL, check=True)
        clock, after = time.perf_counter() - began, os.times()
        size = out.tell()
        out.seek(0)
        printed = out.read(100).decode().strip() if size < 100 else ""
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, clock, printed


def show(
    label: str, processors: float, clock: float | None, promised: float | None = None, ratio: float | None = None
) -> None:
    """A line of the table."""
    words = [f"{label:<44} {processors:8.2f} s of the processors"]
    if clock is not None:
        words.append(f"{clock:8.2f} s by the clock")
    if promised is not None:
        kept = (processors if clock is None else clock) <= promised
        words.append(f"{'within' if kept else 'MISSES'} {promised:g} s")
    if ratio is not None:
        words.append(f"ratio {ratio:.1f}")
    print("   ".join(words), flush=True)


if __name__ == "__main__":
    main()
