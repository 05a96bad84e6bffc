"""Nothing is lost: commands are killed at operations on files and at random moments, and the next one goes on.

A sample; `scripts/kill_every_write.py` kills all commands at all operations.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "kill_every_write.py"


def test_killed_commands_change_nothing_that_stood_before_and_the_next_one_leaves_nothing_behind() -> None:
    """In a process of its own, which forks: this one has threads."""
    command = [sys.executable, str(SCRIPT), "--kills", "27", "--only", "search,resume,hf,json,import,delete"]
    done = subprocess.run(
        [*command, "--seed", str(random.randrange(10**6))], capture_output=True, text=True, env=os.environ, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 24


def test_the_harness_sees_what_is_lost(tmp_path: Path) -> None:
    """The test of the test: an export that removes the old folder before the new one has its name is found out."""
    code = """
import os, shutil, sys
from pathlib import Path
from sleb.export import destination
from tests.support.killing import cases
from tests.support.killing.bench import Bench, Count

def carelessly(new, target):
    shutil.rmtree(target, ignore_errors=True)
    os.rename(new, target)

destination.put_in_place = carelessly
cases.preload()
case = next(case for case in cases.CASES if case.name.startswith("export hf"))
bench, count = Bench(case, Path(sys.argv[1]), cases.base), Count()
for operation in range(bench.operations - 12, bench.operations):
    bench.kill(count, operation=operation)
print(any("neither the old nor the new" in each for each in count.wrong))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bench")], capture_output=True, text=True, env=os.environ, cwd=ROOT
    )
    assert done.stdout.strip().endswith("True"), done.stdout + done.stderr[-3000:]
