"""Published lists: as printed, recognised by name, and compared."""

from __future__ import annotations

import math
import re

import pytest

from sleb.formats.published_lists import PUBLISHED, jaccard, published, published_for, shared, shared_by_chance
from tests.support.paths import SHARED

PAPER = SHARED / "paper" / "sleb-paper.md"


@pytest.mark.parametrize("each", PUBLISHED, ids=lambda each: each.key)
def test_a_list_is_as_long_as_the_paper_says(each) -> None:  # type: ignore[no-untyped-def]
    """A ratio is rounded up (4.1), and no block goes twice."""
    assert len(each.first) == math.ceil(0.1 * each.num_blocks)
    assert len(each.printed) == math.ceil(0.2 * each.num_blocks)
    assert len(set(each.printed)) == len(each.printed)
    assert set(each.printed) - set(each.removal_list) == ({65} if each.key == "opt-66b" else set())
    assert bool(each.remark) == (each.key == "opt-66b")


def test_the_numbers_are_those_of_table_4() -> None:
    if not PAPER.is_file():
        pytest.skip(f"needs the paper's text in {PAPER}")
    table = PAPER.read_text().partition("Table 4. Number and indices")[2].partition("<sup>")[0]
    rows = re.findall(r"(\d+B|6\.7B)\t(\d+)\t\d+\t([\d, ]+)\t\d+\t\+ ([\d, ]+)", table)
    result = [
        (int(blocks), tuple(map(int, first.split(","))), tuple(map(int, further.split(","))))
        for _, blocks, first, further in rows
    ]
    assert result == [(each.num_blocks, each.first, each.further) for each in PUBLISHED]


@pytest.mark.parametrize(
    ("name", "num_blocks", "key"),
    [
        ("meta-llama/Llama-2-7b-hf", 32, "llama-2-7b"),
        ("facebook/opt-6.7b", 32, "opt-6.7b"),
        ("llama-2-7b", 32, "llama-2-7b"),
        ("/data/models/Llama2-7B/", 32, "llama-2-7b"),
        ("C:\\models\\llama-2-70b.Q4_0.gguf", 80, "llama-2-70b"),
        ("~/.cache/models--facebook--opt-66b/snapshots/0123abc", 64, "opt-66b"),
    ],
)
def test_a_model_is_recognised_by_its_name(name: str, num_blocks: int, key: str) -> None:
    assert [each.key for each in published_for(name, num_blocks)] == [key]
    assert published_for(name, num_blocks + 1) == ()


@pytest.mark.parametrize(
    "name",
    [
        "codellama/CodeLlama-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "llama-2-70b", "opt-6.7bx", "xopt-6.7b",
        "/llama-2-7b/other", "demo", "", "/",
    ],
)  # fmt: skip
def test_no_other_model_is_taken_for_it(name: str) -> None:
    assert published_for(name, 32) == ()


def test_lists_are_compared() -> None:
    llama = published("llama-2-7b")
    assert llama is not None
    assert published("nothing") is None
    assert shared(llama.first, (24, 11, 0)) == (11, 24)
    assert jaccard((1, 2, 3), (2, 3, 4)) == pytest.approx(0.5)
    assert jaccard((), ()) == 1.0
    # The mean over all pairs of lists of 2 among 4 blocks, counted.
    pairs = [(i, j) for i in range(4) for j in range(i)]
    counted = sum(len(shared(one, other)) for one in pairs for other in pairs) / len(pairs) ** 2
    assert shared_by_chance(2, 4) == pytest.approx(counted)
