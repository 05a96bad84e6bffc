"""Work without bounds ends, with a clause that says of what. The work is what Python itself brings."""

from __future__ import annotations

import builtins
import itertools
import operator
import threading
from typing import Any

import pytest

from sleb import bounded
from sleb.errors import WorkEnded


def test_an_answer_comes_back() -> None:
    assert bounded.call(sorted, [3, 1, 2]) == [1, 2, 3]
    assert bounded.call(builtins.print, "no answer") is None


def test_it_can_be_called_from_any_thread() -> None:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(bounded.call(operator.add, "a", "b")))
    thread.start()
    thread.join()
    assert result == ["ab"]


@pytest.mark.parametrize(
    ("work", "arguments", "reason"),
    [
        (all, (itertools.repeat(1),), "more than 1 seconds"),  # a loop in C, which hears no signal handler
        (operator.mul, ("a", 10**11), "memory"),
        (operator.mul, ("a", 1 << 21), "more than 1 MB"),
        (int, ("four\x1b[31m" * 1000,), "ValueError: invalid literal"),
    ],
)
def test_work_without_bounds_is_ended_in_a_clause(work: Any, arguments: Any, reason: str) -> None:
    with pytest.raises(WorkEnded, match=reason) as ended:
        bounded.call(work, *arguments, seconds=1, answer=1 << 20)
    assert str(ended.value).isprintable()
    assert len(str(ended.value)) <= 200


def test_arguments_nested_too_deeply_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WorkEnded, match="nested too deeply"):
        bounded.call(len, deep)
