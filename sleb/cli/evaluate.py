"""Commands that evaluate removal lists: evaluate, benchmark, quantize, heal, generate. Parse, call, print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sleb import specs
from sleb.cli.foreground import confirm_names, execute_evaluation
from sleb.cli.groups import grouped
from sleb.cli.options import (
    Allowed,
    BatchSize,
    Chat,
    Device,
    Dtype,
    Json,
    MemoryBudget,
    Revision,
    RunDir,
    Seed,
    as_bytes,
)
from sleb.errors import BadInput, OptionError, RunBusy, quoted
from sleb.evaluation import request
from sleb.formats import spelling
from sleb.records import BenchmarkSpec, EvaluateSpec, GenerateSpec, HealSpec, Permissions, QuantizeSpec
from sleb.runtime import files, findings_folder, run_folder
from sleb.runtime.processes import job_processes

LIST, MEASURED = "Which list", "What is measured"


class Scheme(StrEnum):
    """How weights are stored. An enumeration, because typer takes no list of literals."""

    INT8 = "int8"
    INT4 = "int4"


Subject = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN", help="A run, or a model: a Hugging Face name, a local folder, a .gguf file, or **demo**."
    ),
]
RemovalListOption = Annotated[
    str | None,
    typer.Option(
        metavar="'[14, 23]'",
        rich_help_panel=LIST,
        help="Blocks to remove; '[]' measures the baseline only.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=0, rich_help_panel=LIST, help="Take the run's list as it was after this many steps. [default: the last]"
    ),
]
AllSteps = Annotated[
    bool, typer.Option("--all-steps", rich_help_panel=LIST, help="Take the run's list after each number of removals.")
]
Perplexity = Annotated[
    str | None,
    typer.Option(
        metavar="TEXTS",
        rich_help_panel=MEASURED,
        help="Texts, separated by commas: wikitext2 and c4 (published protocols), demo (comes with the installation), "
        "or files: .raw is read as WikiText rows, .jsonl and .parquet (FILE:COLUMN) as documents, any other as one "
        "text; none measures no text. "
        "[default: wikitext2; demo for the demo model]",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=MEASURED,
        help="Take at most this many windows of each text and examples of each task, which gives an estimate.",
    ),
]
Window = Annotated[
    int, typer.Option(min=2, rich_help_panel=MEASURED, help="Tokens of each window; published numbers use 2048.")
]


@dataclass(frozen=True)
class OneList:
    """A removal list: of a run, or given with a model."""

    subject: Subject
    removal_list: RemovalListOption = None
    steps: Steps = None


@dataclass(frozen=True)
class Lists(OneList):
    """One removal list, or all those of a run."""

    all_steps: AllSteps = False


@dataclass(frozen=True)
class Texts:
    """Texts whose perplexity is measured."""

    perplexity: Perplexity = None
    limit: Limit = None
    window: Window = 2048

    def settings(self) -> dict[str, Any]:
        """The options as fields of a request."""
        return dict(texts=_texts(self.perplexity), limit=self.limit, window=self.window)


@dataclass(frozen=True)
class Executed(Allowed):
    """How the model is opened, and what the job is allowed."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    revision: Revision = None
    run_dir: RunDir = None

    def job_options(self) -> dict[str, Any]:
        """The options that the job has."""
        return {"device": self.device, **self.of_job()}


@dataclass(frozen=True)
class ExecutedInBatches(Executed):
    """How the model is opened for a job that computes several sequences at once."""

    batch_size: BatchSize = None

    def job_options(self) -> dict[str, Any]:
        """The options that the job has."""
        return super().job_options() | {"batch_size": self.batch_size}


@dataclass(frozen=True)
class ExecutedWithinMemory(ExecutedInBatches):
    """How the model is opened for a job that can read blocks from disk."""

    memory_budget: MemoryBudget = None

    def job_options(self) -> dict[str, Any]:
        """The options that the job has."""
        return super().job_options() | {"memory_budget": as_bytes(self.memory_budget)}


@dataclass(frozen=True)
class Written:
    """Where a model is written."""

    out: Annotated[Path | None, typer.Option(help="Write the resulting model to this folder, with its proof.")] = None
    replace: Annotated[bool, typer.Option("--replace", help="Replace what an earlier command left at --out.")] = False

    def settings(self) -> dict[str, Any]:
        """The options as fields of a request."""
        return dict(out=specs.path_name(self.out), replace=self.replace)


@dataclass(frozen=True)
class Healing:
    """How a model is healed."""

    healing_method: Annotated[
        Literal["lora", "linear", "both"],
        typer.Option(
            "--how",
            rich_help_panel=MEASURED,
            help="lora trains adapters; linear refits a layer before each cut by least squares; both does one after "
            "the other.",
        ),
    ] = "lora"
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            rich_help_panel=MEASURED,
            help="Text to heal on; it takes what --calibration of sleb search takes. "
            "[default: wikitext2; demo for the demo model]",
        ),
    ] = None
    chat: Chat = False
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MEASURED,
            help="How many sequences of that text to heal on. [default: 1024; 128 for linear]",
        ),
    ] = None
    sequence_length: Annotated[int, typer.Option(min=8, rich_help_panel=MEASURED, help="Tokens of each sequence.")] = (
        512
    )
    epochs: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEASURED, help="How often LoRA training sees each sequence.")
    ] = 1
    rank: Annotated[int, typer.Option(min=1, rich_help_panel=MEASURED, help="Rank of the LoRA adapters.")] = 8
    learning_rate: Annotated[
        float, typer.Option(rich_help_panel=MEASURED, help="Highest learning rate of LoRA training.")
    ] = 1e-4
    batch_sequences: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEASURED, help="Sequences per update of LoRA training.")
    ] = 8
    seed: Seed = 0

    def settings(self) -> dict[str, Any]:
        """The options as fields of a request."""
        settings = dict(vars(self), source=None if self.source is None else specs.absolute(self.source))
        return settings | {"how": settings.pop("healing_method")}


@grouped
def evaluate(
    lists: Lists,
    texts: Texts,
    executed: ExecutedWithinMemory,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=MEASURED,
            help="Tasks of lm-eval, separated by commas, such as piqa,winogrande,hellaswag,arc_easy,arc_challenge; "
            "lm-eval ls tasks lists all.",
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=MEASURED, help="A folder with more tasks, in lm-eval's own YAML."),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            rich_help_panel=MEASURED,
            help="How many solved examples stand in the prompt of each task. [default: the task's own]",
        ),
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            rich_help_panel=MEASURED,
            help="Whether each window begins with a BOS token: no (as published), yes, or auto, which follows the "
            "tokenizer.",
        ),
    ] = "no",
    as_json: Json = False,
) -> None:
    """Measure what a removal list costs: perplexity by the published protocols, accuracy by lm-eval.

    The baseline is measured beside it. What is known already is not computed again, so that a stopped evaluation goes
    on where it was.
    """
    own = dict(tasks=_names(tasks), task_folder=specs.path_name(task_folder), shots=shots, bos=bos)
    settings = texts.settings() | own
    if settings["texts"] == () and not settings["tasks"]:
        raise OptionError("Nothing to evaluate: name a text with --perplexity, or tasks with --tasks.")
    _execute(EvaluateSpec, settings, lists, executed, as_json)


@grouped
def benchmark(
    lists: Lists,
    executed: Executed,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="1x2048",
            rich_help_panel=MEASURED,
            help="Sequences x tokens of the prompt that is timed; none skips it.",
        ),
    ] = "1x2048",
    generation: Annotated[
        str,
        typer.Option(
            metavar="64x128",
            rich_help_panel=MEASURED,
            help="Sequences x tokens whose generation is timed; none skips it.",
        ),
    ] = "64x128",
    generation_prompt: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=MEASURED, help="Tokens of the prompt from which each sequence is generated."
        ),
    ] = 64,
    prompt_repetitions: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEASURED, help="How often the prompt is timed, after one warm-up.")
    ] = 50,
    generation_repetitions: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEASURED, help="How often the generation is timed, after one warm-up.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Measure what a removal list buys: seconds of prompt processing and of generation, memory, parameters.

    The baseline and the list alternate on the same input, with the blocks really removed.
    """
    settings = dict(
        prompt=_shape("prompt", prompt),
        generation=_shape("generation", generation),
        generation_prompt=generation_prompt,
        prompt_repetitions=prompt_repetitions,
        generation_repetitions=generation_repetitions,
    )
    if settings["prompt"] is None and settings["generation"] is None:
        raise OptionError("Nothing to measure: give --prompt or --generation a shape such as 1x2048.")
    _execute(BenchmarkSpec, settings, lists, executed, as_json)


@grouped
def quantize(
    lists: OneList,
    texts: Texts,
    executed: ExecutedInBatches,
    written: Written,
    scheme: Annotated[
        list[Scheme],
        typer.Option(
            rich_help_panel=MEASURED,
            help="Type in which weights are stored (weight-only, by torchao); may be given twice.",
        ),
    ] = [Scheme.INT8],  # noqa: B006
    group_size: Annotated[
        int,
        typer.Option(
            min=16,
            rich_help_panel=MEASURED,
            help="How many weights share an int4 scale; halved until it divides a row.",
        ),
    ] = 128,
    as_json: Json = False,
) -> None:
    """Quantise weights to int8 or int4: perplexity before and after, of the baseline and without the list.

    The model that is written has the blocks removed, and is in the last scheme.
    """
    settings = (
        texts.settings()
        | written.settings()
        | dict(schemes=tuple(each.value for each in dict.fromkeys(scheme)), group_size=group_size)
    )
    _execute(QuantizeSpec, settings, lists, executed, as_json)


@grouped
def heal(
    lists: OneList,
    healing: Healing,
    texts: Texts,
    executed: Executed,
    written: Written,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter and the smaller model apart, instead of merging them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the smaller model a little (LoRA), or repair its cuts without training: perplexity before and after.

    A stopped training goes on from its last checkpoint when the same command is given again.
    """
    settings = healing.settings() | texts.settings() | written.settings() | dict(adapter=adapter)
    _execute(HealSpec, settings, lists, executed, as_json)


@grouped
def generate(
    lists: Lists,
    executed: Executed,
    prompt: Annotated[str, typer.Option(help="Text that both models continue.")],
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="At most how many tokens each model generates.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give the prompt as a user's message in the model's chat template.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the baseline and the smaller model side by side, and show which predictions flipped."""
    _execute(GenerateSpec, dict(prompt=prompt, tokens=tokens, chat=chat), lists, executed, as_json)


def _execute(record: type[Any], settings: dict[str, Any], lists: OneList, executed: Executed, as_json: bool) -> None:
    """Find or make the run, execute the job here, print its findings."""
    for name in ("source", "texts"):
        if settings.get(name, "") is None:
            usual = request.usual_text(lists.subject)
            settings[name] = usual if name == "source" else (usual,)
    request.ask_of(record, **settings)  # refused before a run is made
    options = executed.job_options()
    blocks = _blocks(lists.removal_list)
    before = set(run_folder.run_dirs())
    run_dir = executed.run_dir
    had_folder = run_dir is not None and files.expanded(run_dir).is_dir()
    run = request.subject_run(lists.subject, blocks, dtype=executed.dtype, revision=executed.revision, run_dir=run_dir)
    is_new = not run.jobs and run.spec.kind == "evaluate" and run.run_dir not in before
    try:
        wanted = request.lists_of(run, blocks, lists.steps, isinstance(lists, Lists) and lists.all_steps)
        confirm_names(run, executed.trust_paths)
        job = request.job_of(request.ask_of(record, lists=wanted, **settings), **options)
        execute_evaluation(run, job, Permissions.of(job, trust_paths=True), as_json)
    except RunBusy:  # another process made it at the same moment, and has it
        raise
    except BadInput:
        if is_new and not findings_folder.findings(run.run_dir):
            job_processes.delete(run.run_dir, keep_folder=had_folder)  # it never began: there is nothing to keep
        raise


def _blocks(text: str | None) -> list[int] | None:
    """Read a removal list: `[14, 23]` or `14,23`."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(?:\[([^\[\]]*)\]|([^\[\]]*))\s*", text)
    blocks = spelling.blocks(match[1] or match[2] or "") if match else None
    if blocks is None:
        raise OptionError(f"--removal-list takes block indices such as '[14, 23]'; found {quoted(text)}.")
    return list(blocks)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _texts(text: str | None) -> tuple[str, ...] | None:
    """Texts by name; None is the default, which depends on the model."""
    if text is None:
        return None
    if "none" in _names(text) and len(_names(text)) > 1:
        raise OptionError("--perplexity none stands alone: it means no text at all.")
    return () if text.strip() in ("", "none") else tuple(request.text_name(name) for name in _names(text))


def _shape(option: str, text: str) -> tuple[int, int] | None:
    """Read sequences and tokens: `1x2048` -> (1, 2048)."""
    if text.strip() == "none":
        return None
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*x\s*([0-9]{1,15})\s*", text, re.IGNORECASE)
    shape = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(shape) < 1:
        raise OptionError(f"--{option} takes sequences x tokens such as 1x2048, or none; found {quoted(text)}.")
    return shape
