"""Commands about processes: stop, work, dashboard."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from sleb import execution, specs
from sleb.cli.foreground import confirm_names
from sleb.cli.groups import grouped
from sleb.cli.options import AllowedAgain, AllowPickle, RunName, TrustRemoteCode
from sleb.cli.output import say
from sleb.errors import OptionError, RunBusy, RunError, quoted
from sleb.records import JobState, Permissions, Run
from sleb.runtime import dashboard_files, files, job_folder, run_folder
from sleb.runtime.processes import distributed, job_processes

_NO_DASHBOARD = f"The dashboard's files are missing from {dashboard_files.ROOT}: install sleb again."


def stop(run: RunName) -> None:
    """Stop the process that is executing a run; what it finished is kept."""
    stopped = run_folder.load(run)
    job = job_processes.stop(stopped)
    is_export = job.spec.kind == "export"  # which begins at its beginning
    advice = "Export once more." if is_export else f"Go on with: sleb resume {run_folder.reference(stopped)}"
    say(f"Stopped {stopped.run_id}. {advice}")


@grouped
def work(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A job folder, or a run folder: its newest job.")],
    allowed: AllowedAgain,
) -> None:
    """Execute a job that is waiting in a run folder (what the dashboard and clusters start).

    Under torchrun give the job folder that --prepare printed: all processes must mean the same job. What the job needs
    to be allowed is given here: a run folder may come from anybody, and allows nothing by itself.
    """
    permissions = allowed.permissions()
    directory = files.expanded(directory).absolute()
    if not directory.is_dir():
        raise OptionError(f"The folder {directory} does not exist. Give a job's, as --prepare prints it, or a run's.")
    rank = distributed.rank_here()
    if rank.size > 1 and directory.parent.name != "jobs":
        raise OptionError(f"Several processes need a job folder, as --prepare prints it; found {directory}.")
    if rank.rank > 0:  # the first one has taken the job
        execution.work(directory, permissions=permissions)
        return
    job_dir = _job_dir(directory, permissions)
    if rank.size == 1:
        confirm_names(run_folder.load(job_dir.parent.parent), allowed.trust_paths, job_dir.name)
    try:
        with_others = f" with {rank.size} processes" if rank.size > 1 else ""
        say(f"Working on {job_dir}{with_others}. See how far it is: sleb show {job_dir.parent.parent}")
        done = execution.work(job_dir, permissions=permissions)
        say(f"Finished {done.run_id}.")
    except RunBusy:  # two asked at the same moment, and the other one has it
        job_folder.withdraw_job(job_folder.load_job(job_dir))
        raise


def dashboard(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port at which the dashboard is served.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Address to listen on: localhost, or 0.0.0.0 for the whole network, without a password.")
    ] = "localhost",
    allow_path: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Read and write only below this folder, besides SLEB_HOME; may be given again. On another address "
            "than localhost no path is taken without it.",
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Only show: start, stop, change and delete nothing.")
    ] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Open the dashboard: start runs and watch them, look at the evidence, take the list or the model away.

    More options go to Streamlit. Nothing in the browser can turn on pickled weights or remote code, or reach other
    folders: only the options here can, for all runs started from it.
    """
    _require_dashboard()
    folders = [str(_allowed(each)) for each in allow_path or ()]
    _require_free(address, port)
    allowed = {"SLEB_DASHBOARD_ALLOW_PICKLE": allow_pickle, "SLEB_DASHBOARD_TRUST_REMOTE_CODE": trust_remote_code}
    allowed[dashboard_files.READ_ONLY] = read_only
    os.environ.update({name: "1" if wanted else "0" for name, wanted in allowed.items()})
    os.environ[dashboard_files.ALLOW_PATH] = json.dumps(folders)
    if read_only:
        say("The dashboard is read-only: it shows runs, and starts or changes nothing.")
    elif not folders and not dashboard_files.is_local(address):
        say("Beyond localhost the dashboard takes no path but from --allow-path DIR; none was given.")
    settings = [f"--server.port={port}", f"--server.address={address}"]
    os.execv(sys.executable, dashboard_files.command([*settings, *context.args]))


def _require_dashboard() -> None:
    """Raise `OptionError` where the dashboard's files are missing; an installation of the whole package has them."""
    if not dashboard_files.MAIN.is_file():
        raise OptionError(_NO_DASHBOARD)


def _allowed(folder: Path) -> Path:
    """A folder that may be used, absolute and with its links followed."""
    absolute = files.expanded(folder).absolute()
    if not absolute.is_dir():
        raise OptionError(f"The folder {absolute} does not exist; --allow-path takes one that does.")
    return absolute.resolve()


def _require_free(address: str, port: int) -> None:
    """Raise `OptionError` where the dashboard cannot listen, before it starts."""
    try:
        if not address.strip():
            raise OSError
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"--address {quoted(address)} is not an address; use localhost, or one of this machine."
        ) from error
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                elsewhere = ' (make run ARGS="--port 8502")' if (dashboard_files.ROOT / "Makefile").is_file() else ""
                raise OptionError(
                    f"Port {port} is in use, perhaps by another dashboard. Name another one with --port{elsewhere}."
                ) from error
            raise OptionError(
                f"The dashboard cannot listen on {quoted(address)}, port {port} ({error.strerror})."
            ) from error


def _job_dir(directory: Path, allowed: Permissions) -> Path:
    if directory.parent.name == "jobs":
        run = job_processes.watched(run_folder.load(directory.parent.parent))
        state = next((job.status.state for job in run.jobs if job.name == directory.name), None)
        if state is JobState.RUNNING:
            job_processes.require_idle(run)
        if state not in (JobState.QUEUED, JobState.INTERRUPTED):
            state_word = state.value if state else "missing"
            raise RunError(f"Job {directory.name} is {state_word}, not waiting. {_how_to_go_on(run)}")
        return directory
    run = job_processes.watched(run_folder.load(directory))
    waiting = [job for job in run.jobs if job.status.state in (JobState.QUEUED, JobState.INTERRUPTED)]
    if not waiting:
        if execution.is_finished(run):
            raise RunError(f"Run {run.run_id} has no job waiting. {_how_to_go_on(run)}")
        confirm_names(run, allowed.trust_paths)
        spec = specs.job_spec(
            run.spec.kind, allow_pickle=allowed.allow_pickle, trust_remote_code=allowed.trust_remote_code
        )
        return job_processes.next_job(run, spec).directory
    return waiting[-1].directory


def _how_to_go_on(run: Run) -> str:
    """What is left to do with a run, or to see of it."""
    if execution.is_finished(run) and job_processes.unanswered(run) is None:
        return f"It is finished; see what it found with: sleb show {run_folder.reference(run)}"
    return f"Go on with: sleb resume {run_folder.reference(run)}"
