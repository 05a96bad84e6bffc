"""The request for a run: the model, the method, the calibration text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sleb.records.base import FORMAT_VERSION, MOST, Record
from sleb.records.options import BLOCKS, EXECUTION, TEXT, Option

RACE_SEQUENCES = 32
"""The number of calibration sequences from which on a race saves more than it may lose."""


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
    """The calibration text, and how it is cut. `sequences` counts rows for `wikitext2-rows`, else windows."""

    source: Annotated[
        str,
        Option(
            "Calibration text",
            "wikitext2, c4, wikitext2-rows (the reference's loader), demo, a local .txt, .jsonl or .parquet file "
            "(FILE:COLUMN), or a hub data set NAME:CONFIG:SPLIT:COLUMN.",
            TEXT,
            name="calibration",
            details="Its likelihood decides: choose text like what the model will be used for (paper, Table 8).",
            metavar="SPEC",
            demo="demo",
        ),
    ] = "wikitext2"
    sequences: Annotated[
        int,
        Field(ge=1, le=MOST, strict=True),
        Option(
            "Sequences",
            "Calibration sequences.",
            TEXT,
            details="More of them distinguish more blocks, and take longer.",
            demo=16,
        ),
    ] = 128
    sequence_length: Annotated[
        int,
        Field(ge=2, le=MOST, strict=True),
        Option("Tokens each", "Tokens of each sequence.", TEXT, unit="tokens", demo=256),
    ] = 2048
    sampling: Annotated[
        Literal["random", "first"],
        Option("Windows", "Whether windows are drawn at random, without overlap, or are the first of the text.", TEXT),
    ] = "random"
    bos: Annotated[
        Literal["auto", "yes", "no"],
        Option("BOS token", "Whether each window begins with a BOS token; auto follows the tokenizer.", TEXT),
    ] = "auto"
    chat: Annotated[
        bool,
        Option("Conversations", "Read the text as conversations, and write them with the model's chat template.", TEXT),
    ] = False


def is_gguf(model: str) -> bool:
    """Whether the name of a model is that of a GGUF file."""
    return model.lower().endswith(".gguf")


def default_held_out(sequences: int) -> int:
    """A quarter of the calibration set, at least one."""
    return max(1, round(sequences / 4))


class RunSpec(Record):
    """The request for a run, immutable once written. Permissions and devices are not part of it: see `JobSpec`."""

    format_version: int = FORMAT_VERSION
    kind: Literal["search", "analyze", "evaluate"] = "search"
    """What the run does first; with `evaluate` nothing is searched, and the removal list was given."""
    model: str
    revision: Annotated[str | None, Option("Revision", "Branch, tag or commit of the model on the hub.", EXECUTION)] = (
        None
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Computed in",
            "Number type in which the model computes; auto takes what is fast on the device, 16 bits where possible.",
            EXECUTION,
        ),
    ] = "auto"
    calibration: CalibrationSpec = CalibrationSpec()
    held_out: Annotated[
        Annotated[int, Field(ge=0, le=MOST, strict=True)] | None,
        Option(
            "Held-out sequences",
            "How many more sequences to hold out: they take no part in any choice.",
            TEXT,
            details="They show what a removal really costs.",
            otherwise="a quarter",
            search_only=True,
        ),
    ] = None
    method: Annotated[
        Method,
        Option(
            "Method",
            "metric3 is SLEB; the others are what the paper compares it with.",
            BLOCKS,
            details="Metric3 scores all blocks again after each removal (paper, Algorithm 1). The others take less "
            "time and choose worse (Figures 4 and 7).",
            search_only=True,
        ),
    ] = Method.METRIC3
    num_remove: Annotated[
        Annotated[int, Field(ge=1, le=MOST, strict=True)] | None,
        Option(
            "Blocks",
            "How many blocks to remove.",
            BLOCKS,
            name="remove",
            details="Every step is kept, so a longer list contains all shorter ones (but for best-chunk).",
            search_only=True,
        ),
    ] = None
    ratio: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Option(
            "Share of the blocks",
            "Share of the blocks to remove, rounded up.",
            BLOCKS,
            details="Shares are of whole blocks, as in the paper (4.1).",
            usual=0.2,
            demo=0.1,
            percent=(1, 99),
            search_only=True,
        ),
    ] = None
    """Without a number or a share, every block that can be removed is a candidate to the end."""
    protected: Annotated[
        tuple[int, ...] | None,
        Option(
            "Protected blocks",
            "Blocks that are never removed; none protects no block.",
            BLOCKS,
            name="protect",
            details="By default, early exit and best chunk protect none.",
            metavar="0,29",
            otherwise="first and last",
            search_only=True,
        ),
    ] = None
    candidates: Annotated[
        tuple[int, ...] | None,
        Option(
            "Candidate blocks",
            "Blocks that may be removed; all others are kept.",
            BLOCKS,
            details="Protected blocks are kept even where they are named here.",
            metavar="8-20,22",
            otherwise="all",
            search_only=True,
        ),
    ] = None
    until_perplexity: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
        Option(
            "Rise of perplexity",
            "Stop before the held-out perplexity rises by more than this.",
            BLOCKS,
            metavar="+10%",
            unit="rise",
            percent=(1, 1000),
            search_only=True,
        ),
    ] = None
    """The allowed rise of the held-out perplexity as a share: 0.1 is ten per cent."""
    confidence: Annotated[
        float,
        Field(ge=1e-6, le=1 - 1e-6),
        Option(
            "Confidence",
            "Confidence level of the interval that decides which candidates are tied, and of a race.",
            BLOCKS,
            details="At 0.95, a race loses the best candidate in at most 5 % of its steps.",
            percent=(50, 99),
            search_only=True,
        ),
    ] = 0.95
    objective: Annotated[
        Literal["nll", "kl"],
        Option(
            "Objective",
            "The score to minimise: nll, the negative log-likelihood of the text (the paper), or kl, the divergence "
            "from the baseline's predictions.",
            BLOCKS,
            details="kl is EvoPress's (arXiv 2410.14649). Metric1 has a measure of its own and takes neither.",
            search_only=True,
        ),
    ] = "nll"
    search: Annotated[
        Literal["auto", "full", "race"],
        Option(
            "Search",
            "race drops candidates that can no longer win; full scores every candidate on all sequences; auto races "
            "from 32 sequences on.",
            BLOCKS,
            details="A race takes several times less work for the same list, but for bad luck in at most 5 % of the "
            "steps.",
            search_only=True,
        ),
    ] = "auto"
    """How candidates are scored; `races` says what `auto` comes to."""
    refine: Annotated[
        Literal["none", "swap"],
        Option(
            "Refine by swaps",
            "swap goes on after metric3's last removal: one block back and another out, as long as that lowers the "
            "score beyond its error.",
            BLOCKS,
            details="A round takes about as long as one step for every removed block.",
            on_off=("swap", "none"),
            methods=("metric3",),
            search_only=True,
        ),
    ] = "none"
    seed: Annotated[
        int,
        Field(ge=0, lt=2**63, strict=True),
        Option("Seed", "Seed of all random choices.", TEXT),
    ] = 0
    analysis: Annotated[
        bool,
        Option("Analyses too", "Measure similarity and prediction alignment as well.", EXECUTION, search_only=True),
    ] = True
    given: tuple[int, ...] | None = None
    """Blocks removed in a run that searches nothing, in the order in which they were given."""

    @property
    def method_or_kind(self) -> str:
        """The method, or the kind of a run without a search: one word for lists of runs."""
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
        if self.candidates == ():
            raise ValueError("`candidates` names no block that can be removed; name some, or leave it out")
        if self.objective != "nll" and self.method is Method.METRIC1:
            raise ValueError("Metric1 compares hidden states; `objective` is for the other methods")
        if self.refine != "none" and self.method is not Method.METRIC3:
            raise ValueError(
                f"`refine={self.refine}` goes on from Metric3's list; leave it out with {self.method.value}"
            )
        return self
