"""Removal lists that others have published, and how far lists agree. Knows numbers and names; never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SLEB_TABLE_4 = "Song et al. 2024, SLEB (arXiv 2402.09025), Table 4"


@dataclass(frozen=True)
class PublishedList:
    """A removal list as it was printed: original, 0-based block indices in the order of removal."""

    key: str
    """A short name that an address can hold: `llama-2-7b`."""
    model: str
    num_blocks: int
    first: tuple[int, ...]
    """The list for the lower removal ratio (10 %)."""
    further: tuple[int, ...]
    """Blocks that are removed after it, for the higher ratio (20 %)."""
    source: str = SLEB_TABLE_4
    remark: str = ""

    @property
    def printed(self) -> tuple[int, ...]:
        """Everything as printed, whether the model has such a block or not."""
        return self.first + self.further

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks that the model has, in the order of removal."""
        return tuple(block for block in self.printed if block < self.num_blocks)


PUBLISHED = (
    PublishedList("opt-6.7b", "OPT-6.7B", 32, (6, 7, 3, 24), (18, 30, 11)),
    PublishedList("opt-13b", "OPT-13B", 40, (5, 4, 9, 2), (14, 25, 34, 10)),
    PublishedList("opt-30b", "OPT-30B", 48, (4, 17, 7, 12, 14), (40, 23, 2, 13, 43)),
    PublishedList(
        "opt-66b",
        "OPT-66B",
        64,
        (18, 12, 21, 46, 8, 16, 9),
        (65, 13, 27, 61, 35, 42),
        remark="The table prints block 65, which a model of 64 blocks (0 to 63) does not have; it is left out here.",
    ),
    PublishedList("llama-2-7b", "LLaMA-2-7B", 32, (14, 23, 11, 24), (10, 27, 15)),
    PublishedList("llama-2-13b", "LLaMA-2-13B", 40, (31, 27, 13, 12), (33, 29, 14, 2)),
    PublishedList("llama-2-70b", "LLaMA-2-70B", 80, (33, 29, 61, 11, 55, 30, 59, 28), (50, 27, 68, 32, 31, 15, 60, 4)),
)
"""The paper's own lists: 10 %, then what is added for 20 %."""

_NAMES = {
    each.key: re.compile(
        r"(?<![a-z0-9])" + re.escape(each.key).replace(r"\-", "[-_ ]?").replace(r"\.", "[._]") + r"(?![a-z0-9])",
    )
    for each in PUBLISHED
}
# The lists are those of the base models: what was trained further has other weights under nearly the same name.
_TRAINED_FURTHER = re.compile(r"(?<![a-z])(chat|instruct|sft|dpo|rlhf|lora|coder?|python|guard|iml|sleb)(?![a-z])")


def published_for(model_name: str, num_blocks: int) -> tuple[PublishedList, ...]:
    """Lists for this very model, by its name on the hub, or the last part of its folder or file; else nothing.

    The number of blocks must fit too. Raises nothing: a name from anywhere is only looked at.
    """
    parts = [part for part in re.split(r"[\\/]", model_name.lower()) if part]
    cached = [part.removeprefix("models--") for part in parts if part.startswith("models--")]  # a snapshot's folder
    names = [name for name in (*parts[-1:], *cached) if not _TRAINED_FURTHER.search(name)]
    return tuple(
        each
        for each in PUBLISHED
        if each.num_blocks == num_blocks and any(_NAMES[each.key].search(name) for name in names)
    )


def published(key: str) -> PublishedList | None:
    """The list of that key, if there is one."""
    return next((each for each in PUBLISHED if each.key == key), None)


def shared(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Blocks that both lists remove, ascending."""
    return tuple(sorted(set(one) & set(other)))


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Shared blocks over blocks that either list removes, 0 to 1; two empty lists are the same."""
    either = set(one) | set(other)
    return len(set(one) & set(other)) / len(either) if either else 1.0


def shared_by_chance(num_removed: int, candidates: int) -> float:
    """The average number of blocks that two random lists share, drawn from so many candidates."""
    return num_removed**2 / candidates if candidates else 0.0
