"""Jobs that evaluate lists, from the browser: start and stop one, watch it, say how it ended.

Everything shown is read from the run folder, so a reload loses nothing; no browser owns the process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import access, data
from app.panels import foreign_names
from app.widgets import badge, log_of, progress, stop_job
from app.wording import duration, in_fields, plain, state_word
from sleb.errors import SlebError
from sleb.evaluation import request
from sleb.records import Job, JobState, RemovalList, Run
from sleb.runtime import job_folder, run_index
from sleb.runtime.processes import job_processes

WORDS = {
    "evaluate": "Measuring what lists cost",
    "benchmark": "Timing",
    "generate": "Generating",
    "quantize": "Quantising",
    "heal": "Healing",
    "search": "Searching",
    "analyze": "Analysing",
    "export": "Exporting",
}


def start(run: Run, record: type[Any], lists: Sequence[RemovalList], *, device: str = "auto", **settings: Any) -> bool:
    """Start a job about the run's lists, or show the sentence that says why not; returns whether it started.

    `record` is the class of the request and `settings` its fields.
    """
    try:
        ask = request.ask_of(record, lists=tuple(each for each in lists if each), **settings)
        spec = request.job_of(ask, device=device.strip() or "auto", **data.permissions())
        return foreign_names.go_on(run, spec)
    except SlebError as error:
        st.error(plain(in_fields(error)), icon=":material/error:")
        return False


def bar(run: Run) -> None:
    """Draw the run's process while there is one, else why the last one did not finish."""
    if job_processes.active(run) is not None:
        _watch(run)
        return
    own = [job for job in run.jobs if job.ask is not None]
    if own:
        _how_it_ended(run, own[-1])


@st.fragment(run_every=1)
def _watch(run: Run) -> None:
    """Draw the job every second until it has ended, and the page again with each finding."""
    job = job_processes.active(run.model_copy(update={"jobs": job_folder.read_jobs(run.run_dir)}))
    if job is None:
        st.rerun()
    drawn, now = st.session_state.get("drawn-findings"), len(run_index.findings_signature(run.run_dir))
    if drawn is not None and drawn != (run.run_id, now):
        st.rerun()
    with st.container(border=True):
        left, right = st.columns([6, 1], vertical_alignment="center")
        with left, st.container(horizontal=True, vertical_alignment="center"):
            badge(job.status.state)
            st.markdown(f"**{WORDS[job.spec.kind]}**{plain(_about(job))}")
            if job.status.started is not None:
                st.caption(duration(max(0.0, time.time() - job.status.started)))
        with right:
            if not access.rule().read_only and st.button(
                "Stop", icon=":material/stop:", help="Results so far are kept.", width="stretch"
            ):
                stop_job(run)
        progress(job)


def _about(job: Job) -> str:
    ask = job.ask
    if ask is None:
        return ""
    count = len(ask.lists)
    return f": {count} list{'s' if count > 1 else ''} beside the baseline" if count else ""


def _how_it_ended(run: Run, job: Job) -> None:
    state = job.status.state
    if state is JobState.FINISHED:
        return
    message = plain(in_fields(job_processes.last_word(job)))
    work = WORDS[job.spec.kind]
    if state is JobState.FAILED:
        st.error(f"{work} failed: {message}", icon=":material/error:")
    elif state is JobState.QUEUED:
        st.warning(f"{work} did not start: its process never ran.", icon=":material/stop:")
    else:
        word = state_word(state).lower()
        why = "" if state is JobState.STOPPED else f": {message}"
        st.warning(f"{work} was {word}{why or '.'} Results until then are kept.", icon=":material/stop:")
    log_of(run, job)
