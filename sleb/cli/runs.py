"""Commands about what there is: show, runs, delete, import, cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb import api
from sleb.cli.foreground import print_all
from sleb.cli.options import Json, RunName
from sleb.cli.output import fail, put, say
from sleb.cli.terminal import print_runs, table
from sleb.errors import OptionError, RunError, Stopped, printable
from sleb.formats.run_json import summary
from sleb.records import Run
from sleb.runtime import job_processes, run_folder
from sleb.runtime.progress import duration
from sleb.runtime.run_index import Outline, list_outlines


def show(run: RunName, as_json: Json = False) -> None:
    """Print a run: baseline, steps with their evidence, removal list, and what was measured of its lists."""
    print_all(api.load(run), as_json)


def runs(as_json: Json = False) -> None:
    """List all runs, newest first."""
    found: list[Any] = list(run_folder.list_runs() if as_json else list_outlines())
    if as_json:
        rows = [{**summary(run), "state": job_processes.state_of(run).value} for run in found if isinstance(run, Run)]
        put(json.dumps({"runs": rows}))
    else:
        print_runs([run for run in found if isinstance(run, Outline)])
    for error in found:
        if isinstance(error, RunError):
            fail(str(error))


def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run folder for good."""
    directory = run_folder.locate(run)
    if not run_folder.is_link(directory):
        run_folder.refuse_sample(directory)
    if not yes:
        _require_yes(directory)
    job_processes.delete(directory)
    say(f"Deleted {directory}.")


def _require_yes(directory: Path) -> None:
    """Asks whether it may go. Raises `Stopped` where nobody answers, or the answer is no."""
    try:
        if not typer.confirm(printable(f"Delete {directory} for good?"), err=True):
            raise typer.Exit(1)
    except typer.Abort as error:
        say("")  # under the question
        raise Stopped("Nothing was deleted, for want of an answer. Answer y, or add --yes.") from error


def bring_in(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A run folder from elsewhere, or a recorded sample's name.")
    ],
) -> None:
    """Copy a run folder into the runs folder, so that it has an id, is listed, and can be worked with."""
    if not folder.strip():
        raise OptionError("sleb import takes the folder of a run, or a recorded sample's name; found an empty one.")
    put(job_processes.bring_in(Path(folder)).run_id)


def cache(
    clear: Annotated[str | None, typer.Option(metavar="WHAT", help="Delete: all, block-outputs, or demo.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is cached, or clear it. Runs are not touched."""
    from sleb.analysis import block_output_cache as block_cache

    if clear is not None:
        gone = block_cache.clear(run_folder.home(), clear)
        freed = sum(entry.bytes for entry in gone)
        if as_json:
            put(json.dumps({"cleared": [entry.name for entry in gone], "bytes": freed}))
        say(f"Cleared {len(gone)} entries, {freed / 1e6:,.0f} MB.")
        return
    found = block_cache.usage(run_folder.home())
    if as_json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in found]
        put(json.dumps({"entries": rows}))
        return
    table(
        f"Cache in {run_folder.home() / 'cache'}",
        ("folder", "entry", "model", "MB", "last used"),
        [(e.folder, e.name, e.model or "", f"{e.bytes / 1e6:,.0f}", f"{duration(e.age)} ago") for e in found],
    )
