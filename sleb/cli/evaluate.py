"""Commands that evaluate removal lists: evaluate, benchmark, quantize, heal, generate. Parse, call, print."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb import specs
from sleb.cli.foreground import confirm_names, execute_evaluation
from sleb.cli.options import (
    INDEX,
    AllowPickle,
    BatchSize,
    Chat,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MemoryBudget,
    Revision,
    RunDir,
    Seed,
    TrustPaths,
    TrustRemoteCode,
    as_bytes,
)
from sleb.errors import BadInput, OptionError, RunBusy, RunError, quoted
from sleb.evaluation import request
from sleb.records import BenchmarkSpec, EvaluateSpec, GenerateSpec, HealSpec, JobSpec, Permissions, QuantizeSpec
from sleb.runtime import files, findings_folder, run_folder
from sleb.runtime.processes import job_processes

WHICH, WHAT = "Which list", "What is measured"


class Scheme(StrEnum):
    """How weights are stored."""

    INT8 = "int8"
    INT4 = "int4"


class How(StrEnum):
    """How a model is healed."""

    LORA = "lora"
    LINEAR = "linear"
    BOTH = "both"


Subject = Annotated[
    str,
    typer.Argument(metavar="MODEL|RUN", help="A run, or a model: a Hugging Face name, a folder, a .gguf file, demo."),
]
RemovalListOption = Annotated[
    str | None,
    typer.Option(metavar="'[14, 23]'", rich_help_panel=WHICH, help="These blocks; '[]' for the unmodified model only."),
]
Steps = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=WHICH, help="The run's list after so many steps. [default: the last]"),
]
AllSteps = Annotated[
    bool, typer.Option("--all-steps", rich_help_panel=WHICH, help="The run's list after each number of removals.")
]
Perplexity = Annotated[
    str | None,
    typer.Option(
        metavar="TEXTS",
        rich_help_panel=WHAT,
        help="wikitext2, c4 (published protocols), or files, separated by commas: .raw as WikiText rows, .jsonl and "
        ".parquet (FILE:COLUMN) as documents, any other as one text; demo, the text that is there; none for none. "
        "[default: wikitext2; demo for the demo model]",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, rich_help_panel=WHAT, help="At most so many windows of a text and examples of a task: an estimate."
    ),
]
Window = Annotated[int, typer.Option(min=2, rich_help_panel=WHAT, help="Tokens; published numbers have 2048.")]


def evaluate(
    subject: Subject,
    removal_list: RemovalListOption = None,
    steps: Steps = None,
    all_steps: AllSteps = False,
    perplexity: Perplexity = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=WHAT,
            help="Of lm-eval: piqa,winogrande,hellaswag,arc_easy,arc_challenge … All of them: lm-eval ls tasks",
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=WHAT, help="More tasks, in lm-eval's own YAML.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=WHAT, help="Examples in the prompt. [default: the task's own]")
    ] = None,
    limit: Limit = None,
    window: Window = 2048,
    bos: Annotated[
        str, typer.Option(rich_help_panel=WHAT, help="BOS at the head of each window: no (published), yes, or auto.")
    ] = "no",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    batch_size: BatchSize = None,
    memory_budget: MemoryBudget = None,
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """What a removal list costs: perplexity by the published protocols, accuracy by lm-eval.

    The unmodified model is measured beside it. What is known already is not computed again, so that a stopped
    evaluation goes on where it was.
    """
    ask = dict(
        texts=_texts(perplexity),
        tasks=_names(tasks),
        task_folder=specs.path_name(task_folder),
        shots=shots,
        limit=limit,
        window=window,
        bos=bos,
    )
    if ask["texts"] == () and not ask["tasks"]:
        raise OptionError("Nothing to evaluate: name a text with --perplexity, or tasks with --tasks.")
    job = _job(device, batch_size, memory_budget, allow_pickle, trust_remote_code)
    _go(
        EvaluateSpec,
        ask,
        subject,
        removal_list,
        steps,
        all_steps,
        (dtype, revision, run_dir),
        job,
        trust_paths,
        as_json,
    )


def benchmark(
    subject: Subject,
    removal_list: RemovalListOption = None,
    steps: Steps = None,
    all_steps: AllSteps = False,
    prompt: Annotated[
        str, typer.Option(metavar="1x2048", rich_help_panel=WHAT, help="Sequences x tokens of a prompt; none for none.")
    ] = "1x2048",
    generation: Annotated[
        str, typer.Option(metavar="64x128", rich_help_panel=WHAT, help="Sequences x tokens generated; none for none.")
    ] = "64x128",
    generation_prompt: Annotated[
        int, typer.Option(min=1, rich_help_panel=WHAT, help="Tokens that generation begins from, each.")
    ] = 64,
    prompt_repetitions: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT, help="After one warm-up.")] = 50,
    generation_repetitions: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT, help="After one warm-up.")] = 10,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """What a removal list buys: seconds of prompt processing and of generation, memory, parameters.

    The baseline and the list take turns on the same input, with the blocks really gone.
    """
    ask = dict(
        prompt=_shape("prompt", prompt),
        generation=_shape("generation", generation),
        generation_prompt=generation_prompt,
        prompt_repetitions=prompt_repetitions,
        generation_repetitions=generation_repetitions,
    )
    if ask["prompt"] is None and ask["generation"] is None:
        raise OptionError("Nothing to measure: give --prompt or --generation a shape such as 1x2048.")
    job = _job(device, None, None, allow_pickle, trust_remote_code)
    _go(
        BenchmarkSpec,
        ask,
        subject,
        removal_list,
        steps,
        all_steps,
        (dtype, revision, run_dir),
        job,
        trust_paths,
        as_json,
    )


def quantize(
    subject: Subject,
    removal_list: RemovalListOption = None,
    steps: Steps = None,
    scheme: Annotated[
        list[Scheme], typer.Option(rich_help_panel=WHAT, help="Weight-only, by torchao; may be given twice.")
    ] = [Scheme.INT8],  # noqa: B006
    group_size: Annotated[
        int,
        typer.Option(
            min=16, rich_help_panel=WHAT, help="Weights that share an int4 scale; halved until it divides a row."
        ),
    ] = 128,
    perplexity: Perplexity = None,
    limit: Limit = None,
    window: Window = 2048,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the model without the blocks, in the last scheme; proven.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="What an earlier one left at --out may go.")] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    batch_size: BatchSize = None,
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Quantise weights to int8 or int4: perplexity before and after, unmodified and without the list."""
    ask = dict(
        schemes=tuple(each.value for each in dict.fromkeys(scheme)),
        group_size=group_size,
        texts=_texts(perplexity),
        limit=limit,
        window=window,
        out=specs.path_name(out),
        replace=replace,
    )
    job = _job(device, batch_size, None, allow_pickle, trust_remote_code)
    _go(QuantizeSpec, ask, subject, removal_list, steps, False, (dtype, revision, run_dir), job, trust_paths, as_json)


def heal(
    subject: Subject,
    removal_list: RemovalListOption = None,
    steps: Steps = None,
    how: Annotated[
        How, typer.Option(rich_help_panel=WHAT, help="lora trains; linear fits a layer before each cut anew; both.")
    ] = How.LORA,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            rich_help_panel=WHAT,
            help="Text to heal on, as --calibration of search. [default: wikitext2; demo for the demo model]",
        ),
    ] = None,
    chat: Chat = False,
    sequences: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=WHAT, help="Of that text. [default: 1024; linear 128]")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=8, rich_help_panel=WHAT, help="Tokens each.")] = 512,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT, help="Of lora.")] = 1,
    rank: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT, help="Of lora's adapters.")] = 8,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=WHAT, help="Of lora, at its highest.")] = 1e-4,
    batch_sequences: Annotated[int, typer.Option(min=1, rich_help_panel=WHAT, help="Of lora, per update.")] = 8,
    seed: Seed = 0,
    perplexity: Perplexity = None,
    limit: Limit = None,
    window: Window = 2048,
    out: Annotated[Path | None, typer.Option(help="A folder for the healed model, or its adapter.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter alone, and the streamlined folder it needs.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="What an earlier one left at --out may go.")] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the smaller model a little (LoRA), or mend its cuts without training: perplexity before and after.

    A stopped training goes on from its last checkpoint when the same command is given again.
    """
    ask = dict(
        how=how.value,
        source=None if source is None else specs.absolute(source),
        chat=chat,
        sequences=sequences,
        sequence_length=sequence_length,
        epochs=epochs,
        rank=rank,
        learning_rate=learning_rate,
        batch_sequences=batch_sequences,
        seed=seed,
        texts=_texts(perplexity),
        limit=limit,
        window=window,
        out=specs.path_name(out),
        adapter=adapter,
        replace=replace,
    )
    job = _job(device, None, None, allow_pickle, trust_remote_code)
    _go(HealSpec, ask, subject, removal_list, steps, False, (dtype, revision, run_dir), job, trust_paths, as_json)


def generate(
    subject: Subject,
    prompt: Annotated[str, typer.Option(help="What both models go on from.")],
    removal_list: RemovalListOption = None,
    steps: Steps = None,
    all_steps: AllSteps = False,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="How many.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's turn in the model's chat template.")] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """The unmodified model and the smaller one side by side on a prompt, and which predictions flipped."""
    ask = dict(prompt=prompt, tokens=tokens, chat=chat)
    job = _job(device, None, None, allow_pickle, trust_remote_code)
    _go(
        GenerateSpec,
        ask,
        subject,
        removal_list,
        steps,
        all_steps,
        (dtype, revision, run_dir),
        job,
        trust_paths,
        as_json,
    )


def _go(
    record: type[Any],
    settings: dict[str, Any],
    subject: str,
    removal_list: str | None,
    steps: int | None,
    all_steps: bool,
    of_model: tuple[Dtype, str | None, Path | None],
    job_for: Callable[[Any], JobSpec],
    trust_paths: bool,
    as_json: bool,
) -> None:
    """Find or make the run, execute the job here, print what answers it."""
    if settings.get("texts", ()) is None:
        settings["texts"] = (_usual_text(subject),)
    if settings.get("source", "") is None:
        settings["source"] = _usual_text(subject)
    request.ask_of(record, **settings)  # refused before a run is made
    blocks = _blocks(removal_list)
    dtype, revision, run_dir = of_model
    before = set(run_folder.run_dirs())
    had_folder = run_dir is not None and files.expanded(run_dir).is_dir()
    run = request.subject_run(subject, blocks, dtype=dtype.value, revision=revision, run_dir=run_dir)
    is_new = not run.jobs and run.spec.kind == "evaluate" and run.run_dir not in before
    try:
        lists = request.lists_of(run, blocks, steps, all_steps)
        confirm_names(run, trust_paths)
        job = job_for(request.ask_of(record, lists=lists, **settings))
        execute_evaluation(run, job, Permissions.of(job, trust_paths=True), as_json)
    except RunBusy:  # somebody else found it at the same moment, and has it
        raise
    except BadInput:
        if is_new and not findings_folder.findings(run.run_dir):
            job_processes.delete(run.run_dir, keep_folder=had_folder)  # it never began: there is nothing to keep
        raise


def _usual_text(subject: str) -> str:
    """The demo model comes with a text; the others' is fetched from the hub."""
    with suppress(RunError):
        subject = run_folder.load(subject).spec.model
    return "demo" if subject == "demo" else "wikitext2"


def _job(
    device: str, batch_size: int | None, memory_budget: str | None, allow_pickle: bool, trust_remote_code: bool
) -> Callable[[Any], JobSpec]:
    how = dict(
        device=device,
        batch_size=batch_size,
        memory_budget=as_bytes(memory_budget),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return lambda ask: request.job_of(ask, **how)


def _blocks(text: str | None) -> list[int] | None:
    """`[14, 23]` or `14,23`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(?:\[([^\[\]]*)\]|([^\[\]]*))\s*", text)
    parts = [part.strip() for part in (found[1] or found[2] or "").split(",")] if found else ["?"]
    if parts == [""]:
        return []
    if not all(INDEX.fullmatch(part) for part in parts):
        raise OptionError(f"--removal-list takes block indices such as '[14, 23]'; found {quoted(text)}.")
    return [int(part) for part in parts]


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _texts(text: str | None) -> tuple[str, ...] | None:
    """None is the default, which depends on the model."""
    if text is None:
        return None
    if "none" in _names(text) and len(_names(text)) > 1:
        raise OptionError("--perplexity none stands alone: it means no text at all.")
    return () if text.strip() in ("", "none") else tuple(request.text_name(name) for name in _names(text))


def _shape(option: str, text: str) -> tuple[int, int] | None:
    """`1x2048` -> (1, 2048)."""
    if text.strip() == "none":
        return None
    found = re.fullmatch(r"\s*([0-9]{1,15})\s*x\s*([0-9]{1,15})\s*", text, re.IGNORECASE)
    shape = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(shape) < 1:
        raise OptionError(f"--{option} takes sequences x tokens such as 1x2048, or none; found {quoted(text)}.")
    return shape
