"""Commands that start a run or go on with one: search, analyze, resume."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from sleb import execution, specs
from sleb.cli.foreground import confirm_names, execute_evaluation, execute_here, prepare_job, print_all
from sleb.cli.options import (
    CHOICE,
    HOW,
    INDEX,
    AllowPickle,
    BatchSize,
    Bos,
    BosOption,
    Calibration,
    Chat,
    Device,
    Dtype,
    DtypeOption,
    HeldOut,
    JobOut,
    JobReplace,
    JobTaskFolder,
    Json,
    MemoryBudget,
    Model,
    Objective,
    Prepare,
    Processes,
    ProcessesAsBefore,
    Refine,
    Revision,
    RunDir,
    RunName,
    Sampling,
    SamplingOption,
    Search,
    Seed,
    SequenceLength,
    Sequences,
    Speedups,
    TrustPaths,
    TrustRemoteCode,
    as_bytes,
    permissions,
)
from sleb.cli.output import put
from sleb.cli.terminal import table
from sleb.errors import BadInput, OptionError, RunError, quoted
from sleb.records import Forecast, JobSpec, Method, Permissions, RunSpec
from sleb.runtime import files, run_folder
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import duration


def search(
    model: Model,
    calibration: Calibration = None,
    sequences: Sequences = None,
    sequence_length: SequenceLength = None,
    held_out: HeldOut = None,
    sampling: SamplingOption = Sampling.RANDOM,
    bos: BosOption = Bos.AUTO,
    chat: Chat = False,
    seed: Seed = 0,
    remove: Annotated[int | None, typer.Option(min=1, rich_help_panel=CHOICE, help="How many blocks.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(rich_help_panel=CHOICE, help="Or which share, rounded up. [default: 0.2; 0.1 for demo]"),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(rich_help_panel=CHOICE, help="metric3 is SLEB; the others are what the paper compares it with."),
    ] = Method.METRIC3,
    until_perplexity: Annotated[
        str | None,
        typer.Option(metavar="+10%", rich_help_panel=CHOICE, help="Stop before the held-out perplexity rises more."),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(
            metavar="0,29",
            rich_help_panel=CHOICE,
            help="Blocks never removed; '' for none. [default: first and last]",
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(
            rich_help_panel=CHOICE,
            help="What is lowest: nll of the text (the paper), or kl, the divergence from the model's own predictions.",
        ),
    ] = Objective.NLL,
    search: Annotated[
        Search,
        typer.Option(
            "--search",
            rich_help_panel=CHOICE,
            help="race drops candidates that cannot win; full scores all on everything; auto races from 32 sequences.",
        ),
    ] = Search.AUTO,
    refine: Annotated[
        Refine,
        typer.Option(
            rich_help_panel=CHOICE,
            help="swap goes on after metric3's last removal: one block back and another out, as long as that lowers "
            "the score beyond its error.",
        ),
    ] = Refine.NONE,
    confidence: Annotated[
        float, typer.Option(rich_help_panel=CHOICE, help="Of the interval that calls candidates tied, and of a race.")
    ] = 0.95,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    batch_size: BatchSize = None,
    processes: Processes = 1,
    memory_budget: MemoryBudget = None,
    speedups: Speedups = True,
    revision: Revision = None,
    run_dir: RunDir = None,
    analysis: Annotated[
        bool,
        typer.Option("--analysis/--no-analysis", rich_help_panel=HOW, help="Similarity and alignment as well."),
    ] = True,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    prepare: Prepare = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=HOW, help="Only say what it would take, after a short probe.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the blocks a model can lose, one removal at a time, with error bars.

    Each step scores every block that is left on the calibration text, under the model as streamlined so far, and
    removes the one whose absence costs least (Metric3 of the SLEB paper). Text kept out of every choice tells what it
    really costs.

    **sleb search demo** takes a few minutes on two CPU cores.
    """
    spec = specs.run_spec(
        model,
        remove=remove,
        ratio=ratio,
        method=method,
        calibration=calibration,
        sequences=sequences,
        sequence_length=sequence_length,
        held_out=held_out,
        sampling=sampling.value,
        seed=seed,
        protect=_blocks(protect),
        until_perplexity=_share(until_perplexity),
        confidence=confidence,
        objective=objective.value,
        search=search.value,
        refine=refine.value,
        bos=bos.value,
        chat=chat,
        dtype=dtype.value,
        revision=revision,
        analysis=analysis,
    )
    job = specs.job_spec(
        "search",
        device,
        batch_size,
        allow_pickle,
        trust_remote_code,
        processes,
        as_bytes(memory_budget),
        "auto" if speedups else "off",
    )
    if dry_run:
        _print_forecast(spec, job, execution.forecast(spec, job), as_json)
    elif prepare:
        prepare_job(run_folder.create(spec, run_dir), job, as_json)
    else:
        _start(spec, job, run_dir, as_json)


def analyze(
    model: Model,
    calibration: Calibration = None,
    sequences: Sequences = None,
    sequence_length: SequenceLength = None,
    sampling: SamplingOption = Sampling.RANDOM,
    bos: BosOption = Bos.AUTO,
    chat: Chat = False,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    batch_size: BatchSize = None,
    processes: Processes = 1,
    memory_budget: MemoryBudget = None,
    revision: Revision = None,
    run_dir: RunDir = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """How similar the blocks' outputs are, and where the prediction is already decided."""
    spec = specs.run_spec(
        model,
        kind="analyze",
        calibration=calibration,
        sequences=sequences,
        sequence_length=sequence_length,
        held_out=0,
        sampling=sampling.value,
        seed=seed,
        bos=bos.value,
        chat=chat,
        dtype=dtype.value,
        revision=revision,
    )
    job = specs.job_spec(
        "analyze", device, batch_size, allow_pickle, trust_remote_code, processes, as_bytes(memory_budget)
    )
    _start(spec, job, run_dir, as_json)


def resume(
    run: RunName,
    device: Device = "auto",
    batch_size: BatchSize = None,
    processes: ProcessesAsBefore = None,
    memory_budget: MemoryBudget = None,
    speedups: Speedups = True,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    out: JobOut = None,
    replace: JobReplace = False,
    task_folder: JobTaskFolder = None,
    prepare: Prepare = False,
    as_json: Json = False,
) -> None:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is printed.

    What a job needs to be allowed (code, pickles, task files, a place to write to) is given again: a run folder may
    come from anybody, and allows nothing by itself.
    """
    found = run_folder.load(run)
    run_folder.refuse_sample(found.run_dir)
    allowed = permissions(allow_pickle, trust_remote_code, trust_paths, out, replace, task_folder)
    run_folder.tidy(found.run_dir)
    if execution.is_finished(found):
        unanswered = job_processes.unanswered(found)
        if prepare and unanswered is None:
            raise RunError(f"Run {found.run_id} is finished; there is nothing to prepare.")
        if unanswered is not None:
            confirm_names(found, trust_paths, unanswered.name)
            if prepare:
                prepare_job(found, unanswered.require_spec(), as_json)
            else:
                execute_evaluation(found, unanswered.require_spec(), allowed, as_json)
            return
    if not execution.is_finished(found):
        confirm_names(found, trust_paths)
        number, budget = execution.as_before(found, processes, as_bytes(memory_budget))
        job = specs.job_spec(
            found.spec.kind,
            device,
            batch_size,
            allow_pickle,
            trust_remote_code,
            number,
            budget,
            "auto" if speedups else "off",
        )
        if prepare:
            prepare_job(found, job, as_json)
            return
        found = execute_here(found, job, allowed, as_json)
        if not as_json:
            return
    print_all(found, as_json)


def _print_forecast(spec: RunSpec, job: JobSpec, found: Forecast, as_json: bool) -> None:
    if as_json:
        put(found.model_dump_json())
        return
    sequences = f"{spec.calibration.sequences} sequences of {spec.calibration.sequence_length} tokens"
    table(
        f"What it would take ({found.device}, {found.dtype})",
        ("", ""),
        [
            ("blocks", f"{found.num_remove} of {found.num_blocks} removed, scored on {sequences}"),
            (
                "block evaluations",
                f"{found.block_evaluations:,}, and {found.head_evaluations:,} read-outs"
                + ("; one round of swaps is counted, each swap found takes another" if spec.refine == "swap" else ""),
            ),
            ("loading and checking", f"about {duration(found.loading_seconds)}"),
            ("search", f"about {duration(found.search_seconds)}"),
            ("analyses", f"about {duration(found.analysis_seconds)}" if found.analysis_seconds else "none"),
            ("memory", f"about {found.peak_memory / 1e9:.1f} GB" + (" in each process" if job.processes > 1 else "")),
            *([("processes", str(job.processes))] if job.processes > 1 else []),
            *([("memory budget", f"{job.memory_budget / 1e6:,.0f} MB")] if job.memory_budget is not None else []),
        ],
    )


def _start(spec: RunSpec, job: JobSpec, run_dir: Path | None, as_json: bool) -> None:
    had_folder = run_dir is not None and files.expanded(run_dir).is_dir()
    run = run_folder.create(spec, run_dir)
    try:
        done = execute_here(run, job, Permissions.of(job, trust_paths=True), as_json)
    except BadInput:
        if run_folder.load(run.run_dir).trace is None:  # it never began: there is nothing to keep
            job_processes.delete(run.run_dir, keep_folder=had_folder)
        raise
    if as_json:
        print_all(done, as_json)


def _blocks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part for part in text.replace(" ", "").split(",") if part]
    if not all(INDEX.fullmatch(part) for part in parts):
        raise OptionError(f"--protect takes block indices such as 0,29; found {quoted(text)}.")
    return [int(part) for part in parts]


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*\+?([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(%?)\s*", text, re.ASCII)
    value = float(found[1]) / (100 if found[2] else 1) if found else math.inf
    if not 0 <= value < 1e6 or (value > 1 and found and not found[2]):
        raise OptionError(f"--until-perplexity takes a rise such as +10%; found {quoted(text)}.")
    return value
