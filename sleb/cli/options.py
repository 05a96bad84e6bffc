"""The options of the command line that several commands share: their types, names and help."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sleb import specs
from sleb.errors import OptionError, quoted
from sleb.records import Permissions


class Sampling(StrEnum):
    """Which windows of the text."""

    RANDOM = "random"
    FIRST = "first"


class Search(StrEnum):
    """Whether candidates race."""

    AUTO = "auto"
    FULL = "full"
    RACE = "race"


class Refine(StrEnum):
    """What follows the last removal."""

    NONE = "none"
    SWAP = "swap"


class Objective(StrEnum):
    """What is lowest."""

    NLL = "nll"
    KL = "kl"


class Bos(StrEnum):
    """Whether windows begin with BOS."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


class Dtype(StrEnum):
    """What the model computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Format(StrEnum):
    """What a removal list is written as."""

    JSON = "json"
    CSV = "csv"
    LIST = "list"
    SLEB = "sleb"
    MERGEKIT = "mergekit"
    LLAMA_QUANTIZE = "llama-quantize"
    HF = "hf"
    GGUF = "gguf"


TEXT, CHOICE, HOW = "Which text", "Which blocks", "How"
INDEX = re.compile(r"-?[0-9]{1,15}")
"""A block's index as it is typed: digits of other scripts, which Python reads as numbers too, are none."""

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face name, a local folder, a .gguf file, or **demo**."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run id (see sleb runs), a run folder, or a sample's name.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        rich_help_panel=TEXT,
        help="wikitext2, c4, wikitext2-rows (the reference's loader), demo, a local .txt, .jsonl or .parquet file "
        "(FILE:COLUMN), or a hub data set NAME:CONFIG:SPLIT:COLUMN. [default: wikitext2; demo for demo]",
    ),
]
Sequences = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=TEXT, help="Calibration sequences. [default: 128; 16 for demo]"),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(min=2, rich_help_panel=TEXT, help="Tokens each. [default: 2048; 256 for demo]"),
]
HeldOut = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=TEXT, help="Sequences that take no part in any choice. [default: a quarter]"),
]
SamplingOption = Annotated[
    Sampling, typer.Option(rich_help_panel=TEXT, help="Windows drawn without overlap, or the first ones.")
]
BosOption = Annotated[
    Bos,
    typer.Option(rich_help_panel=TEXT, help="BOS at the head of every window; auto follows the tokenizer."),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", rich_help_panel=TEXT, help="The column holds conversations: use the chat template."),
]
Seed = Annotated[int, typer.Option(min=0, rich_help_panel=TEXT, help="Of everything that is drawn.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(rich_help_panel=HOW, help="auto is what is fast on the device (16 bits where it can)."),
]
Device = Annotated[str, typer.Option(rich_help_panel=HOW, help="auto, cpu, cuda:0 …, or all: spread over all GPUs.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=HOW, help="Sequences at once; halved when memory runs out."),
]
Processes = Annotated[
    int,
    typer.Option(min=1, rich_help_panel=HOW, help="Processes that share the sequences; one GPU each if there are any."),
]
ProcessesAsBefore = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=HOW, help="As for search. [default: as in the last try]")
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="24GB",
        rich_help_panel=HOW,
        help="For weights and hidden states; blocks that do not fit are read from disk when they are needed.",
    ),
]
Speedups = Annotated[
    bool,
    typer.Option(
        "--speedups/--no-speedups",
        rich_help_panel=HOW,
        help="In long searches, try faster ways through the blocks first; they round a little differently.",
    ),
]
Prepare = Annotated[
    bool,
    typer.Option(
        "--prepare", rich_help_panel=HOW, help="Only write the job and print its folder, for sleb work or torchrun."
    ),
]
Revision = Annotated[str | None, typer.Option(rich_help_panel=HOW, help="Branch, tag or commit on the hub.")]
RunDir = Annotated[
    Path | None,
    typer.Option(rich_help_panel=HOW, help="A new folder for the run. [default: under SLEB_HOME]"),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", rich_help_panel=HOW, help="Read weights that can run code when read."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=HOW, help="Run code that comes with the model, or with tasks."),
]
TrustPaths = Annotated[
    bool,
    typer.Option(
        "--trust-paths", rich_help_panel=HOW, help="Read the model and texts that a run folder from elsewhere names."
    ),
]
JobOut = Annotated[
    Path | None, typer.Option("--out", rich_help_panel=HOW, help="Allow the job to write this folder or file.")
]
JobReplace = Annotated[
    bool,
    typer.Option("--replace", rich_help_panel=HOW, help="Allow the job to replace what an earlier one left there."),
]
JobTaskFolder = Annotated[
    Path | None,
    typer.Option("--task-folder", metavar="DIR", rich_help_panel=HOW, help="Allow the job these task files."),
]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable object on stdout.")]


def permissions(
    allow_pickle: bool,
    trust_remote_code: bool,
    trust_paths: bool,
    out: Path | None = None,
    replace: bool = False,
    task_folder: Path | None = None,
) -> Permissions:
    """What the options of this command allow a job."""
    return Permissions(
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        trust_paths=trust_paths,
        out=specs.path_name(out),
        replace=replace,
        task_folder=specs.path_name(task_folder),
    )


def as_bytes(text: str | None) -> int | None:
    """`24GB` -> 24 billion; decimal units, and GiB and so on where they are meant."""
    if text is None:
        return None
    size = r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt])(i?)b?|b)\s*"
    found = re.fullmatch(size, text, re.IGNORECASE | re.ASCII)
    if not found or not float(found[1]):
        raise OptionError(f"--memory-budget takes a size such as 24GB or 500MB; found {quoted(text)}.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index((found[2] or " ").lower()))
