"""Commands for existing runs and the cache: show, runs, delete, import, cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sleb import api
from sleb.cli.foreground import print_all
from sleb.cli.options import Json, RunName
from sleb.cli.output import fail, put, require_yes, say
from sleb.cli.terminal import MOST_SHOWN, print_runs, table
from sleb.errors import OptionError, RunError
from sleb.formats.run_json import listed_text, summary_text
from sleb.runtime import run_folder
from sleb.runtime.listing import run_list
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import duration
from sleb.runtime.run_index import Outline


def show(run: RunName, as_json: Json = False) -> None:
    """Print a run: baseline, steps with their evidence, removal list, and what was measured of its lists."""
    print_all(api.load(run), as_json)


def runs(
    every: Annotated[
        bool,
        typer.Option("--all", help=f"List all runs on a terminal, too, which otherwise shows the newest {MOST_SHOWN}."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List all runs, newest first."""
    listed = run_list.of_home(run_folder.home())
    if as_json:
        errors = _print_json(listed)
    else:
        outlines = listed.outlines()
        print_runs([run for run in outlines if isinstance(run, Outline)], every)
        errors = [each for each in outlines if isinstance(each, RunError)]
    for error in errors:
        fail(str(error))


def _print_json(listed: run_list.RunList) -> list[RunError]:
    """One object with all runs, written piece by piece: together they may be larger than the memory."""
    errors: list[RunError] = []
    before = ""
    put('{"runs": [', newline=False)
    for each in listed.summaries(summary_text):
        if isinstance(each, RunError):
            errors.append(each)
        else:
            run, text = each
            put(before + listed_text(run, text), newline=False)
            before = ", "
    put("]}")
    return errors


def delete(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete a run folder for good."""
    try:
        directory = run_folder.locate(run)
    except RunError:
        if not run_folder.delete_again(run):
            raise
        say(f"Deleted what was left of {run}.")
        return
    if not run_folder.is_link(directory):
        run_folder.refuse_sample(directory)
    if not yes:
        require_yes(f"Delete {directory} for good?", "Nothing was deleted", "--yes")
    job_processes.delete(directory)
    say(f"Deleted {directory}.")


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
    clear: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="What to delete: block-outputs, demo, partial (what killed processes left), or all."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is cached, and what killed processes left (partial), or clear it. Runs are not touched."""
    from sleb.analysis import cache_folder

    if clear is not None:
        cleared = cache_folder.clear(run_folder.home(), clear)
        freed = sum(entry.bytes for entry in cleared)
        if as_json:
            put(json.dumps({"cleared": [entry.name for entry in cleared], "bytes": freed}))
        counted = "1 entry" if len(cleared) == 1 else f"{len(cleared)} entries"
        say(f"Cleared {counted}, {freed / 1e6:,.0f} MB.")
        return
    entries = cache_folder.usage(run_folder.home())
    if as_json:
        rows = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        put(json.dumps({"entries": rows}))
        return
    table(
        f"Cache in {run_folder.home() / 'cache'}",
        ("folder", "entry", "model", "MB", "last used"),
        [(e.folder, e.name, e.model or "", f"{e.bytes / 1e6:,.0f}", f"{duration(e.age)} ago") for e in entries],
    )
