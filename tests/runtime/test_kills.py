"""Nothing is lost: commands are killed at operations on files and at random moments, and the next one goes on.

A sample; `scripts/kill_every_write.py` kills all commands at all operations.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SAMPLE = """
import os, random, sys
from pathlib import Path
from tests.support.killing import cases
from tests.support.killing.bench import Bench, Count, kill_some

cases.preload(everything=False)
draw = random.Random()
for case in cases.CASES:
    if case.name in ("search", "export hf --replace", "delete"):
        found = kill_some(case, Path(sys.argv[1], case.name), 4, draw, cases.base)
        print("careful", found.kills, *found.wrong, sep="|")

def carelessly(source, target, really=os.replace):
    if str(target).endswith("list.json") and os.path.exists(target):
        os.remove(target)
    really(source, target)

os.replace = carelessly
(case,) = (case for case in cases.CASES if case.name == "export json --replace")
bench, count = Bench(case, Path(sys.argv[1], "careless"), cases.base), Count()
for operation in range(1, bench.operations + 1):
    bench.kill(count, operation=operation)
print("careless", *count.wrong, sep="|")
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The output of a process that forks: this one has threads."""
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-c", SAMPLE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_killed_commands_change_nothing_that_stood_before_and_the_next_one_leaves_nothing_behind(
    lines: list[str],
) -> None:
    assert len(lines) == 4
    for line in lines[:3]:
        _, kills, *wrong = line.split("|")
        assert wrong == []
        assert int(kills) >= 3


def test_the_harness_sees_what_is_lost(lines: list[str]) -> None:
    """The test of the test: a text that is removed before the new one has its name."""
    assert "out/list.json is neither the old nor the new one" in lines[-1]
