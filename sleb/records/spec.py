"""What a run is asked: the model, the method, the calibration text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sleb.records.base import FORMAT_VERSION, MOST, Record

RACE_SEQUENCES = 32
"""From so many calibration sequences on a race saves more than it may lose."""


class Method(StrEnum):
    """How blocks are chosen; the paper's Metric3 and what it is compared with (paper, 3.2 and Figures 4 and 7)."""

    METRIC3 = "metric3"
    METRIC2 = "metric2"
    METRIC1 = "metric1"
    EARLY_EXIT = "early-exit"
    BEST_CHUNK = "best-chunk"

    @property
    def protects_ends(self) -> bool:
        """Whether the first and last block are protected unless the user says otherwise."""
        return self not in (Method.EARLY_EXIT, Method.BEST_CHUNK)


class CalibrationSpec(Record):
    """Which text, cut how. `sequences` counts rows for `wikitext2-rows`, windows for every other source."""

    source: str = "wikitext2"
    sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 128
    sequence_length: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    sampling: Literal["random", "first"] = "random"
    bos: Literal["auto", "yes", "no"] = "auto"
    chat: bool = False


def default_held_out(sequences: int) -> int:
    """A quarter of the calibration set, at least one."""
    return max(1, round(sequences / 4))


class RunSpec(Record):
    """What was asked; immutable once written. Permissions and devices are no part of it: see `JobSpec`."""

    format_version: int = FORMAT_VERSION
    kind: Literal["search", "analyze", "evaluate"] = "search"
    """`evaluate`: nothing is searched; the removal list was given."""
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibration: CalibrationSpec = CalibrationSpec()
    held_out: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Held-out sequences; None is a quarter of the calibration set."""
    method: Method = Method.METRIC3
    num_remove: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the blocks to remove, rounded up. With neither, every block that may go is a candidate to the end."""
    protected: tuple[int, ...] | None = None
    """Blocks that are never candidates; None is the method's default."""
    until_perplexity: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Stop before the held-out perplexity rises by more than this share: 0.1 is ten per cent."""
    confidence: Annotated[float, Field(ge=1e-6, le=1 - 1e-6)] = 0.95
    """Of the interval by which two candidates are told apart, or called tied; and of a race, in each of its steps."""
    objective: Literal["nll", "kl"] = "nll"
    """What is lowest: the negative log-likelihood of the text (the paper), or the divergence from the unmodified
    model's own predictions (as in EvoPress, arXiv 2410.14649). Metric1 has a measure of its own."""
    search: Literal["auto", "full", "race"] = "auto"
    """Whether every candidate sees the whole calibration set, or leaves once it cannot win. See `races`."""
    refine: Literal["none", "swap"] = "none"
    """What follows Metric3's last removal: `swap` tries one block back and another out, while that lowers the score."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    analysis: bool = True
    given: tuple[int, ...] | None = None
    """Blocks removed in a run that searches nothing, in the order in which they were given."""

    @property
    def what(self) -> str:
        """One word for lists of runs: the method, or what else it is."""
        return {"analyze": "analysis", "evaluate": "evaluation"}.get(self.kind, self.method.value)

    @property
    def races(self) -> bool:
        """Whether candidates race: where a method chooses one of many, from 32 sequences on unless asked otherwise."""
        if self.method not in (Method.METRIC3, Method.BEST_CHUNK):
            return False
        return self.search == "race" or (self.search == "auto" and self.calibration.sequences >= RACE_SEQUENCES)

    @model_validator(mode="after")
    def _one_target(self) -> RunSpec:
        if self.num_remove is not None and self.ratio is not None:
            raise ValueError("give either the number of blocks to remove or the ratio, not both")
        if self.objective != "nll" and self.method is Method.METRIC1:
            raise ValueError("Metric1 compares hidden states; --objective is for the other methods")
        if self.refine != "none" and self.method is not Method.METRIC3:
            raise ValueError(
                f"--refine {self.refine} goes on from Metric3's list; leave it out with {self.method.value}"
            )
        return self
