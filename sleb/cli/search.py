"""Commands that start a run or go on with one: search, analyze, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sleb import execution, specs
from sleb.cli.foreground import confirm_names, execute_evaluation, execute_here, prepare_job, print_all
from sleb.cli.groups import grouped
from sleb.cli.options import (
    AllowedAgain,
    AnalysisArguments,
    AnalysisJobArguments,
    JobArguments,
    Json,
    Model,
    NewRun,
    Prepare,
    ResumingJobArguments,
    RunArguments,
    RunName,
)
from sleb.cli.output import put
from sleb.cli.terminal import table
from sleb.errors import BadInput, RunError
from sleb.records import Forecast, JobSpec, Permissions, RunSpec
from sleb.records.options import EXECUTION
from sleb.runtime import files, run_folder
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import duration


@grouped
def search(
    model: Model,
    options: RunArguments,
    job_options: JobArguments,
    new_run: NewRun,
    prepare: Prepare = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=EXECUTION,
            help="Only forecast time and memory, after timing a few blocks for some seconds.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the blocks a model can lose, one removal at a time, with error bars.

    Each step scores every block that is left on the calibration text, under the model as streamlined so far, and
    removes the one whose absence costs least (Metric3 of the SLEB paper). Text kept out of every choice tells what it
    really costs.

    **sleb search demo** takes a few minutes on two CPU cores.
    """
    spec = specs.run_spec(model, **options)
    job = specs.job_spec("search", **new_run.of_job(), **job_options)
    if dry_run:
        _print_forecast(spec, job, execution.forecast(spec, job), as_json)
    elif prepare:
        prepare_job(run_folder.create(spec, new_run.run_dir), job, as_json)
    else:
        _start(spec, job, new_run.run_dir, as_json)


@grouped
def analyze(
    model: Model,
    options: AnalysisArguments,
    job_options: AnalysisJobArguments,
    new_run: NewRun,
    as_json: Json = False,
) -> None:
    """Measure how similar the blocks' outputs are, and where the prediction is already decided."""
    options["held_out"] = 0
    spec = specs.run_spec(model, kind="analyze", **options)
    job = specs.job_spec("analyze", **new_run.of_job(), **job_options)
    _start(spec, job, new_run.run_dir, as_json)


@grouped
def resume(
    run: RunName,
    job_options: ResumingJobArguments,
    allowed: AllowedAgain,
    prepare: Prepare = False,
    as_json: Json = False,
) -> None:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is printed.

    What a job needs to be allowed (code, pickles, task files, a place to write to) is given again: a run folder may
    come from anybody, and allows nothing by itself.
    """
    resumed = run_folder.load(run)
    run_folder.refuse_sample(resumed.run_dir)
    permissions = allowed.permissions()
    run_folder.tidy(resumed.run_dir)
    if execution.is_finished(resumed):
        unanswered = job_processes.unanswered(resumed)
        if unanswered is not None:
            confirm_names(resumed, allowed.trust_paths, unanswered.name)
            if prepare:
                prepare_job(resumed, unanswered.require_spec(), as_json)
            else:
                execute_evaluation(resumed, unanswered.require_spec(), permissions, as_json)
            return
        if prepare:
            raise RunError(f"Run {resumed.run_id} is finished; there is nothing to prepare.")
    else:
        confirm_names(resumed, allowed.trust_paths)
        job = execution.resuming_job(resumed, job_options, allowed.allow_pickle, allowed.trust_remote_code)
        if prepare:
            prepare_job(resumed, job, as_json)
            return
        resumed = execute_here(resumed, job, permissions, as_json)
        if not as_json:
            return
    print_all(resumed, as_json)


def _print_forecast(spec: RunSpec, job: JobSpec, forecast: Forecast, as_json: bool) -> None:
    if as_json:
        put(forecast.model_dump_json())
        return
    sequences = f"{spec.calibration.sequences} sequences of {spec.calibration.sequence_length} tokens"
    table(
        f"What it would take ({forecast.device}, {forecast.dtype})",
        ("", ""),
        [
            ("blocks", f"{forecast.num_remove} of {forecast.num_blocks} removed, scored on {sequences}"),
            (
                "block evaluations",
                f"{forecast.block_evaluations:,}, and {forecast.head_evaluations:,} of the LM head"
                + ("; one round of swaps is counted, each swap takes another" if spec.refine == "swap" else ""),
            ),
            ("loading and checking", f"about {duration(forecast.loading_seconds)}"),
            ("search", f"about {duration(forecast.search_seconds)}"),
            ("analyses", f"about {duration(forecast.analysis_seconds)}" if forecast.analysis_seconds else "none"),
            (
                "memory",
                f"about {forecast.peak_memory / 1e9:.1f} GB" + (" in each process" * (job.processes > 1)),
            ),
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
