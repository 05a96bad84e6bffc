"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import socket
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from . import api, dashboard_files, distributed, files, jobs, judge, results, store
from .answers import print_findings
from .errors import BadInput, OptionError, RunBusy, RunError, SlebError, Stopped
from .meter import duration
from .options import (
    CHOICE,
    HOW,
    AllowPickle,
    BatchSize,
    Bos,
    BosOption,
    Calibration,
    Chat,
    Device,
    Dtype,
    DtypeOption,
    Format,
    HeldOut,
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
    TrustRemoteCode,
    as_bytes,
)
from .outline import Outline, list_outlines
from .records import Forecast, JobSpec, JobState, Method, Run, RunSpec
from .screen import Screen, print_run, print_runs, table
from .summary import finding, summary

_NO_DASHBOARD = f"The dashboard's files are missing from {dashboard_files.ROOT}: install sleb anew."

app = typer.Typer(
    name="sleb",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Which transformer blocks can a language model lose, what does it cost, and how sure is that?\n\n"
        "Try **sleb search demo** first: a real model and real text come with the installation.\n\n"
        "Then **sleb search MODEL --ratio 0.2**, **sleb show RUN** and "
        "**sleb export RUN --format hf --out FOLDER**."
    ),
)


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
    spec = api.run_spec(
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
    job = api.job_spec(
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
        _print_forecast(spec, job, api.forecast(spec, job), as_json)
    elif prepare:
        _prepare(store.create(spec, run_dir), job, as_json)
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
    spec = api.run_spec(
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
    job = api.job_spec(
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
    prepare: Prepare = False,
    as_json: Json = False,
) -> None:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is printed."""
    found = store.load(run)
    store.refuse_sample(found.run_dir)
    if api.is_finished(found):
        unanswered = jobs.unanswered(found)
        if prepare and unanswered is None:
            raise RunError(f"Run {found.run_id} is finished; there is nothing to prepare.")
        if prepare and unanswered is not None:
            _prepare(found, unanswered, as_json)
            return
        if unanswered is not None:
            judge.carry_out(found, unanswered, as_json)
            return
    if not api.is_finished(found):
        number, budget = api.as_before(found, processes, as_bytes(memory_budget))
        job = api.job_spec(
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
            _prepare(found, job, as_json)
            return
        found = _execute(found, job, as_json)
        if not as_json:
            return
    _print(found, as_json)


def show(run: RunName, as_json: Json = False) -> None:
    """Print a run: baseline, steps with their evidence, removal list, and what was measured of its lists."""
    _print(api.load(run), as_json)


def runs(as_json: Json = False) -> None:
    """List all runs, newest first."""
    found: list[Any] = list(store.list_runs() if as_json else list_outlines())
    if as_json:
        rows = [{**summary(run), "state": jobs.state_of(run).value} for run in found if isinstance(run, Run)]
        typer.echo(json.dumps({"runs": rows}))
    else:
        print_runs([run for run in found if isinstance(run, Outline)])
    for error in found:
        if isinstance(error, RunError):
            typer.echo(f"sleb: {error}", err=True)


def stop(run: RunName) -> None:
    """Stop the process that is executing a run; what it finished is kept."""
    found = store.load(run)
    jobs.stop(found)
    typer.echo(f"Stopped {found.run_id}. Go on with: sleb resume {store.reference(found)}", err=True)


def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run folder for good."""
    directory = store.locate(run)
    store.refuse_sample(directory)
    if not yes and not typer.confirm(f"Delete {directory} for good?", err=True):
        raise typer.Exit(1)
    jobs.delete(directory)
    typer.echo(f"Deleted {directory}.", err=True)


def bring_in(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run folder from elsewhere, or a recorded sample's name.")
    ],
) -> None:
    """Copy a run folder into the runs folder, so that it has an id, is listed, and can be worked with."""
    typer.echo(jobs.bring_in(folder).run_id)


def export(
    run: RunName,
    format: Annotated[
        Format,
        typer.Option("--format", "-f", help="hf and gguf write the smaller model and prove it; the others, the list."),
    ] = Format.JSON,
    steps: Annotated[int | None, typer.Option(min=1, help="The list after so many steps. [default: all]")] = None,
    out: Annotated[Path | None, typer.Option(help="File, or folder for hf. [default: stdout]")] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A GGUF file of the model, for gguf. [default: the model, if it is one]"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="What an earlier export left at --out may go.")] = False,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Take the removal list away, or the smaller model itself.

    **hf**: safetensors with the blocks really gone, reloaded in a fresh process and compared with the
    original before the folder appears. **gguf**: the same for a GGUF file; the weights that stay are copied
    as they are. **mergekit**: a passthrough merge. **llama-quantize**: for llama.cpp's own tool. **sleb**:
    the reference's own option.
    """
    from .formats import removal_list_after, render

    found = store.load(run)
    if gguf is not None and format is not Format.GGUF:
        raise OptionError("--gguf names the file that --format gguf cuts; add that, or leave it out.")
    if format not in (Format.HF, Format.GGUF):
        text = render(found, format.value, steps)
        if out is not None:
            files.save_text(out, text, replace=replace)
            typer.echo(f"Wrote {out}.", err=True)
        if as_json:
            taken = list(removal_list_after(found, steps))
            typer.echo(json.dumps({"format": format.value, "removal_list": taken, "text": text}))
        elif out is None:
            typer.echo(text, nl=False)
        return
    if out is None:
        what = "a folder" if format is Format.HF else "a file"
        raise OptionError(f"--format {format.value} writes {what}: name it with --out.")
    with Screen(as_json) as screen:
        try:
            proof = api.export_model(
                found,
                out,
                format="gguf" if format is Format.GGUF else "hf",
                gguf=gguf,
                steps=steps,
                replace=replace,
                device=device,
                memory_budget=as_bytes(memory_budget),
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                watcher=screen.watcher(),
            )
        except (KeyboardInterrupt, Stopped) as stopped:
            raise Stopped(f"Stopped; nothing was written to {out}.") from stopped
    if as_json:
        typer.echo(proof.model_dump_json())
        return
    table(
        f"Wrote and proved {out}",
        ("", "before", "after"),
        [
            ("blocks", str(proof.blocks_before), str(proof.blocks_after)),
            ("parameters", f"{proof.parameters_before:,}", f"{proof.parameters_after:,}"),
            *(
                [("megabytes", f"{proof.bytes_before / 1e6:,.1f}", f"{proof.bytes_after / 1e6:,.1f}")]
                if proof.bytes_before is not None
                else []
            ),
        ],
    )
    typer.echo(
        f"Reloaded in a fresh process: logits of {proof.tokens} tokens differ by at most "
        f"{proof.max_logit_difference:.2g} (allowed {proof.tolerance:.2g}), {proof.generated_tokens} tokens generated "
        "equal with and without cache."
    )


def report(
    run: RunName,
    out: Annotated[Path, typer.Option(help="The file to write, such as report.html.")],
    steps: Annotated[int | None, typer.Option(min=1, help="The list after so many steps. [default: all]")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="A file that is there already may go.")] = False,
) -> None:
    """Write a run as one HTML file to hand to a colleague: evidence, charts, list; needs no network to be read."""
    from .formats import removal_list_after

    found = api.load(run)
    removal_list_after(found, steps)  # refused before anything is drawn
    _require_dashboard()
    dashboard_files.put_first()
    render = import_module("app.report").of  # the dashboard draws it; it stands above this package
    files.save_text(out, render(found, steps), replace=replace)
    typer.echo(f"Wrote {out}.", err=True)


def cache(
    clear: Annotated[str | None, typer.Option(metavar="WHAT", help="Delete: all, block-outputs, or demo.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is cached, or clear it. Runs are not touched."""
    from . import cache as block_cache

    if clear is not None:
        gone = block_cache.clear(store.home(), clear)
        freed = sum(entry.bytes for entry in gone)
        if as_json:
            typer.echo(json.dumps({"cleared": [entry.name for entry in gone], "bytes": freed}))
        typer.echo(f"Cleared {len(gone)} entries, {freed / 1e6:,.0f} MB.", err=True)
        return
    found = block_cache.usage(store.home())
    if as_json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in found]
        typer.echo(json.dumps({"entries": rows}))
        return
    table(
        f"Cache in {store.home() / 'cache'}",
        ("folder", "entry", "model", "MB", "last used"),
        [(e.folder, e.name, e.model or "", f"{e.bytes / 1e6:,.0f}", f"{duration(e.age)} ago") for e in found],
    )


def work(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A job folder, or a run folder: its newest job.")],
) -> None:
    """Execute a job that is waiting in a run folder (what the dashboard and clusters start).

    Under torchrun give the job folder that --prepare printed: all processes must mean the same job.
    """
    directory = files.expanded(directory).absolute()
    if not directory.is_dir():
        raise OptionError(f"There is no folder {directory}. Give a job's, as --prepare prints it, or a run's.")
    rank = distributed.rank_here()
    if rank.size > 1 and directory.parent.name != "jobs":
        raise OptionError(f"Several processes need a job folder, as --prepare prints it; found {directory}.")
    if rank.rank > 0:  # the first one has taken the job
        api.work(directory)
        return
    job_dir = _job_dir(directory)
    try:
        with_others = f" with {rank.size} processes" if rank.size > 1 else ""
        typer.echo(f"Working on {job_dir}{with_others}. See how far it is: sleb show {job_dir.parent.parent}", err=True)
        done = api.work(job_dir)
        typer.echo(f"Finished {done.run_id}.", err=True)
    except RunBusy:  # two asked at the same moment, and the other one has it
        store.withdraw_job(store.load_job(job_dir))
        raise


def dashboard(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Who may reach it: localhost, or 0.0.0.0 for the whole network, without a password.")
    ] = "localhost",
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Open the dashboard: start runs and watch them, look at the evidence, take the list or the model away.

    More options go to Streamlit. Nothing in the browser can turn on pickled weights or remote code: only the two
    options here can, for all runs started from it.
    """
    _require_dashboard()
    _require_free(address, port)
    allowed = {"SLEB_DASHBOARD_ALLOW_PICKLE": allow_pickle, "SLEB_DASHBOARD_TRUST_REMOTE_CODE": trust_remote_code}
    os.environ.update({name: "1" if wanted else "0" for name, wanted in allowed.items()})
    settings = [f"--server.port={port}", f"--server.address={address}"]
    os.execv(sys.executable, dashboard_files.command([*settings, *context.args]))


def _require_dashboard() -> None:
    """Whether it is there, which it is wherever the package was installed whole."""
    if not dashboard_files.MAIN.is_file():
        raise OptionError(_NO_DASHBOARD)


def _require_free(address: str, port: int) -> None:
    """Whether the dashboard can listen there, said before it starts."""
    try:
        if not address.strip():
            raise OSError
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OptionError(f"--address {address!r} is no address; use localhost, or one of this machine.") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                how = ' (make run ARGS="--port 8502")' if (dashboard_files.ROOT / "Makefile").is_file() else ""
                raise OptionError(
                    f"Port {port} is in use, perhaps by another dashboard. Name another one with --port{how}."
                ) from error
            raise OptionError(f"The dashboard cannot listen on {address}, port {port} ({error.strerror}).") from error


def _print_forecast(spec: RunSpec, job: JobSpec, found: Forecast, as_json: bool) -> None:
    if as_json:
        typer.echo(found.model_dump_json())
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


def _register() -> None:
    """The commands, in the order in which --help lists them."""
    passing = {"allow_extra_args": True, "ignore_unknown_options": True}
    for command in (search, analyze, resume, show, runs, stop, delete):
        app.command()(command)
    app.command("import")(bring_in)
    app.command()(export)
    for judging in (judge.evaluate, judge.benchmark, judge.quantize, judge.heal, judge.generate):
        app.command()(judging)
    for command in (report, cache, work):
        app.command()(command)
    app.command(context_settings=passing)(dashboard)


def _say_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"sleb {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What comes before any command."""


_register()


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback, unless it is a bug."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells every retry; we tell the end
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours says how far the whole is
    handler = _ToScreen()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± must not end a search
    try:
        app(prog_name="sleb", standalone_mode=True)
    except SlebError as error:
        typer.echo(f"sleb: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads any more, and Python flushes once again
        sys.exit(1)
    except (OSError, UnicodeError) as error:
        typer.echo(f"sleb: {error}", err=True)
        sys.exit(1)


class _ToScreen(logging.Handler):
    """Warnings go to stderr as it is when they come: a live progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _start(spec: RunSpec, job: JobSpec, run_dir: Path | None, as_json: bool) -> None:
    had_folder = run_dir is not None and files.expanded(run_dir).is_dir()
    run = store.create(spec, run_dir)
    try:
        done = _execute(run, job, as_json)
    except BadInput:
        if store.load(run.run_dir).trace is None:  # it never began: there is nothing to keep
            jobs.delete(run.run_dir, keep_folder=had_folder)
        raise
    if as_json:
        _print(done, as_json)


def _execute(run: Run, job: JobSpec, as_json: bool) -> Run:
    with Screen(as_json) as screen:
        screen.begin(run)
        try:
            done = api.execute(run, job, screen.watcher())
        except (KeyboardInterrupt, Stopped) as stopped:
            now = store.load(run.run_dir)
            count = len(now.trace.steps) if now.trace else 0
            how = f"Go on with: sleb resume {store.reference(run)}"
            steps = "1 finished step" if count == 1 else f"{count} finished steps"
            raise Stopped(f"Stopped after {steps}. {how}") from stopped
        except BadInput:
            raise
        except SlebError as error:
            how = f"Go on with: sleb resume {store.reference(run)}"
            raise type(error)(f"{error} {how}") from error
        screen.end(done)
    return done


def _prepare(run: Run, spec: JobSpec, as_json: bool) -> None:
    job = jobs.next_job(run, spec)
    typer.echo(json.dumps({"run_id": run.run_id, "job": str(job.directory)}) if as_json else str(job.directory))


def _print(run: Run, as_json: bool) -> None:
    found = results.findings(run.run_dir)
    if as_json:
        rows = [finding(each) for each in found]
        typer.echo(json.dumps(summary(run) | {"findings": rows}))
    else:
        print_run(run)
        print_findings(found)


def _job_dir(directory: Path) -> Path:
    if directory.parent.name == "jobs":
        run = jobs.watched(store.load(directory.parent.parent))
        state = next((job.status.state for job in run.jobs if job.name == directory.name), None)
        if state is JobState.RUNNING:
            jobs.require_idle(run)
        if state not in (JobState.QUEUED, JobState.INTERRUPTED):
            how = f"Go on with: sleb resume {store.reference(run)}"
            raise RunError(f"Job {directory.name} is {state.value if state else 'not there'}, not waiting. {how}")
        return directory
    run = jobs.watched(store.load(directory))
    waiting = [job for job in run.jobs if job.status.state in (JobState.QUEUED, JobState.INTERRUPTED)]
    if not waiting:
        if api.is_finished(run):
            raise RunError(f"Run {run.run_id} has no job waiting. Go on with: sleb resume {store.reference(run)}")
        return jobs.next_job(run, api.job_spec(run.spec.kind)).directory
    return waiting[-1].directory


def _blocks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError as error:
        raise OptionError(f"--protect takes block indices such as 0,29; found {text!r}.") from error


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = text.strip().removeprefix("+")
        value = float(number.removesuffix("%")) / 100 if number.endswith("%") else float(number)
    except ValueError as error:
        raise OptionError(f"--until-perplexity takes a rise such as +10%; found {text!r}.") from error
    if not 0 <= value < 1e6 or (value > 1 and not text.strip().endswith("%")):
        raise OptionError(f"--until-perplexity takes a rise such as +10%; found {text!r}.")
    return value
