"""No input ends in a traceback, a hang, a control character on the screen, or a file elsewhere: a few examples of each.

`scripts/fuzz.py` makes as many as wanted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harness import Breach, watch_files
from tests.fuzz.targets import Bench, fuzz

EXAMPLES = {
    "options": 40,
    "run folders": 40,
    "specs": 200,
    "work": 5,
    "models": 10,
    "gguf headers": 10,
}
"""Task files are left to the script: lm-eval's own index takes half a minute to read."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_input_does_what_it_must_not(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    fuzz(name, bench, EXAMPLES[name])
    assert sum(bench.sandbox.counts.values()) >= EXAMPLES[name] // 2


def test_the_fuzzer_sees_what_it_forbids(tmp_path: Path) -> None:
    """The test of the test: each kind of breach is found."""
    sandbox = Bench(tmp_path).sandbox
    watch_files()
    print_ = print

    def divide() -> None:
        1 / 0  # noqa: B018

    for function, sentence in (
        (divide, "ZeroDivisionError"),
        (lambda: (tmp_path / "elsewhere").write_text("x"), "written elsewhere"),
        (lambda: print_("\x1b[31m"), "control characters"),
        (lambda: print_("Traceback (most recent call last)"), "a traceback"),
        (lambda: bytearray(1 << 40), "MemoryError"),
    ):
        with pytest.raises(Breach, match=sentence):
            sandbox.call(function)
