"""A job in the foreground: executed with its progress on the screen, prepared for later, or printed."""

from __future__ import annotations

import json
import shlex
import sys

from sleb import execution
from sleb.cli.findings_output import print_findings
from sleb.cli.output import put, require_yes, say
from sleb.cli.terminal import Screen, print_run
from sleb.errors import BadInput, SlebError, Stopped, UnconfirmedNames
from sleb.evaluation import request
from sleb.formats.run_json import finding, summary
from sleb.records import JobSpec, Permissions, Run
from sleb.runtime import findings_folder, origin, run_folder
from sleb.runtime.processes import job_processes


def confirm_names(run: Run, trust_paths: bool, *jobs: str) -> None:
    """Show what a run folder from elsewhere, and these jobs of it, would make this machine read; ask, and remember.

    Raises `UnconfirmedNames` where no user can be asked.
    """
    names = origin.unconfirmed(run.run_dir, *jobs)
    if not names:
        return
    if not trust_paths:
        if not sys.stdin.isatty():
            raise UnconfirmedNames(str(run.run_dir), names)
        say(f"{run.run_dir} was not written here, or was changed since. It asks for:")
        for name in names:
            one_line = name.replace("\n", "\\n")  # a second line could pass for another name
            say(f"  {one_line}")  # whole: what is left out could be what matters
        require_yes("Go on?", "Nothing was read", "--trust-paths")
    origin.confirm(run.run_dir, *jobs)


def execute_here(run: Run, job: JobSpec, permissions: Permissions, as_json: bool) -> Run:
    """Execute a job with its progress on the screen; what ends it early says how to go on."""
    with Screen(as_json) as screen:
        screen.begin(run)
        try:
            done = execution.execute(run, job, screen.watcher(), permissions)
        except (KeyboardInterrupt, Stopped) as stopped:
            now = run_folder.load(run.run_dir)
            count = len(now.trace.steps) if now.trace else 0
            advice = f"Go on with: sleb resume {run_folder.reference(run)}"
            steps = "1 finished step" if count == 1 else f"{count} finished steps"
            raise Stopped(f"Stopped after {steps}. {advice}") from stopped
        except BadInput:
            raise
        except SlebError as error:
            advice = f"Go on with: sleb resume {run_folder.reference(run)}"
            raise type(error)(f"{error} {advice}") from error
        screen.end(done)
    return done


def prepare_job(run: Run, spec: JobSpec, as_json: bool) -> None:
    """Write a job for `sleb work` to execute, and print its folder, with the permissions that it needs."""
    job = job_processes.next_job(run, spec)
    if needed := job_processes.permission_options(Permissions.of(spec).given):
        say(f"Give sleb work these options as well: {shlex.join(needed)}")
    put(json.dumps({"run_id": run.run_id, "job": str(job.directory)}) if as_json else str(job.directory))


def print_all(run: Run, as_json: bool) -> None:
    """Print a run with all findings about its lists."""
    findings = findings_folder.findings(run.run_dir)
    if as_json:
        rows = [finding(each) for each in findings]
        put(json.dumps(summary(run) | {"findings": rows}))
    else:
        print_run(run)
        print_findings(findings)


def execute_evaluation(run: Run, job: JobSpec, permissions: Permissions, as_json: bool) -> None:
    """Execute a job that evaluates lists here, and print its findings."""
    done = _evaluated(run, job, permissions, as_json)
    answers = request.answers(done)
    if as_json:
        rows = [finding(each) for each in answers]
        put(json.dumps({"run_id": done.run_id, "run_dir": str(done.run_dir), "findings": rows}))
    else:
        print_findings(answers)


def _evaluated(run: Run, job: JobSpec, permissions: Permissions, as_json: bool) -> Run:
    with Screen(as_json) as screen:
        screen.begin(run)
        try:
            return execution.execute(run, job, screen.watcher(), permissions)
        except (KeyboardInterrupt, Stopped) as stopped:
            raise Stopped("Stopped; what was found is kept, and the same command goes on from there.") from stopped
