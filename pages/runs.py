"""Runs: all of them, their progress, and the form that starts another."""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
import streamlit as st

from app import access, actions, data, page
from app.components.copy_link import copy_link
from app.page import choose
from app.panels import foreign_names, run_form
from app.widgets import badge, empty, log_of, progress
from app.wording import (
    duration,
    in_fields,
    method_name,
    model_name,
    plain,
    rise,
    share_of_parameters,
    state_word,
    text_name,
)
from sleb import execution, specs
from sleb.errors import RunError, SlebError
from sleb.records import Job, JobSpec, JobState, Measured, Run, RunSpec, UnreadableJob
from sleb.report.summaries.numbers import perplexity, search_seconds
from sleb.runtime import origin
from sleb.runtime.processes import job_processes
from sleb.runtime.run_index import Outline

LIVE_SECONDS = 1.5
"""Seconds between two drawings; constant, since runs start elsewhere too and a full redraw would lose clicks."""
_PAGES = {
    "similarity": ("Similarity", ":material/grid_on:"),
    "alignment": ("Prediction alignment", ":material/flag:"),
    "steps": ("Removal steps", ":material/layers_clear:"),
    "evaluate": ("Evaluate", ":material/balance:"),
    "export": ("Export", ":material/output:"),
}


def start(spec: RunSpec, job: JobSpec) -> None:
    """Start a new run in a process of its own."""
    try:
        run = actions.begin(spec, job)
    except SlebError as error:
        st.session_state["said"] = str(error)
        return
    choose(run.run_id)
    st.session_state["form"] = False


def act(action: str, run: Run) -> None:
    """Do what a button of the panel says, or show the sentence that says why not."""
    try:
        if action == "stop":
            actions.stop(run)
        elif action == "resume":
            if not foreign_names.go_on(run, _as_before(run), again=True):
                st.session_state["outside"] = True  # where the question is drawn
        elif action == "duplicate":
            first = run.jobs[0].spec if run.jobs else None
            run_form.fill(run.spec, None if isinstance(first, UnreadableJob) else first)
            st.session_state["form"] = st.session_state["outside"] = True
        elif action == "ask":
            st.session_state["deleting"] = run.run_id
            st.session_state["outside"] = True
        elif action == "delete":
            actions.delete(run)
            st.session_state.pop("chosen_run", None)
            st.query_params.pop("run", None)
    except SlebError as error:
        st.session_state["said"] = str(error)
        st.session_state["outside"] = True


def _as_before(run: Run) -> JobSpec:
    """The spec of the last attempt, with this server's permissions."""
    unanswered = job_processes.unanswered(run) if execution.is_finished(run) else None
    last = unanswered or job_processes.own_job(run)
    if last is None or isinstance(last.spec, UnreadableJob):
        return data.job_spec(run.spec.kind)
    changes: dict[str, Any] = dict(data.permissions())
    if not origin.is_written_here(run.run_dir, "jobs", last.name):  # never start a stranger's thousand processes
        changes["processes"], changes["memory_budget"] = execution.as_before(run, None, None)
    return last.spec.model_copy(update=changes)


def head() -> None:
    """Title, and the two buttons that start a run."""
    left, right = st.columns([5, 4], vertical_alignment="bottom")
    with left:
        page.title("Runs", "Which blocks can your model lose? Start a run, watch it, open its results.")
    with right, st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center"):
        if access.rule().read_only:
            st.badge("Read only", icon=":material/lock:", color="gray", help=plain(access.SHOWS_ONLY))
        else:
            _ways_to_start()
        copy_link()


def _ways_to_start() -> None:
    spec, job = specs.run_spec("demo"), data.job_spec("search")
    st.button(
        "Run the demo",
        icon=":material/play_arrow:",
        type="primary",
        on_click=start,
        args=(spec, job),
        help="SLEB on a model of 135 million parameters and a text that come with the installation: removes 3 of 30 "
        "blocks in about three minutes on two cores. No download, no GPU.",
    )
    st.toggle("New run", persist_state="session", key="form", help="Choose your own model, text and number of blocks.")


def form() -> None:
    """The form, with its forecast beside the start button."""
    with st.container(border=True):
        choice = run_form.draw()
        if choice is None:
            return
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        with left:
            run_form.forecast(choice)
        right.button(
            "Start",
            icon=":material/play_arrow:",
            type="primary",
            width="stretch",
            on_click=start,
            args=(choice.spec, choice.job),
            help="The run continues when you close this page or stop the dashboard.",
        )
        run_form.equivalent(choice)


def matching(rows: list[Outline]) -> list[Outline]:
    """The runs that the table shows: all, or of thousands the newest that match the words of a search field."""
    if len(rows) <= page.MOST_SHOWN:
        return rows
    wanted = st.text_input("Find", key="find-run", placeholder="Part of a run's id, model, method or state")
    words = (wanted or "").lower().split()
    matches = [each for each in rows if not words or _has(each, words)]
    shown = page.newest(matches)
    st.caption(f"{len(shown):,} of {len(matches):,} {'matching ' if words else ''}runs, the newest first.")
    return shown


def _has(each: Outline, words: list[str]) -> bool:
    text = f"{each.run_id} {each.spec.model} {method_name(each.spec)} {state_word(each.state)}".lower()
    return all(word in text for word in words)


def table(rows: list[Outline]) -> None:
    """Draw the table of runs, the newest first; a click chooses one."""

    def chosen() -> None:
        picked = st.session_state["runs-table"]["selection"]["rows"]
        if picked:
            choose(rows[picked[0]].run_id)

    shown = pd.DataFrame([_row(each) for each in rows])
    chosen_run = st.session_state.get("chosen_run")
    current = [i for i, each in enumerate(rows) if each.run_id == chosen_run]
    st.dataframe(
        shown,
        key="runs-table",
        on_select=chosen,
        selection_mode="single-row",
        selection_default={"selection": {"rows": current[:1]}},
        hide_index=True,
        height=min(36 * len(rows) + 38, 440),
        placeholder="–",
        column_config={
            "State": st.column_config.TextColumn(
                width="small", help="Samples are recorded runs that come with the program."
            ),
            "Removal list": st.column_config.TextColumn(
                help="Blocks in the order of removal, 0-based.", width="medium"
            ),
            "Before": st.column_config.NumberColumn(
                format="%.4g", help="Perplexity of the calibration text, baseline."
            ),
            "After": st.column_config.NumberColumn(
                format="%.4g", help="Perplexity of the calibration text after the last step."
            ),
            "Held-out": st.column_config.TextColumn(
                help="Rise of the perplexity of held-out text, on which no block was chosen, ± its standard error."
            ),
            "Seconds": st.column_config.NumberColumn(format="%.0f", help="Time spent on the search."),
            "Started": st.column_config.DatetimeColumn(format="D MMM, HH:mm"),
        },
    )


def _row(each: Outline) -> dict[str, object]:
    return {
        "State": "Sample" if data.is_sample(each) else state_word(each.state),
        "Started": None if data.is_sample(each) else pd.Timestamp(each.created, unit="s"),
        "Model": model_name(each.spec),
        "Method": method_name(each.spec),
        "Blocks": each.num_blocks,
        "Removed": len(each.removal_list) if each.baseline or each.spec.given is not None else None,
        "Before": each.baseline.perplexity if each.baseline else None,
        "After": each.last.perplexity if each.last else None,
        "Removal list": ", ".join(map(str, each.removal_list)) or None,
        "Held-out": rise(each.baseline, each.last) if each.baseline and each.last else None,
        "Calibration": text_name(each.spec) if each.spec.given is None else None,
        "Seconds": each.seconds,
        "Run": each.run_id,
    }


def panel(run: Run) -> None:
    """Draw the chosen run: its progress or end, its results, its buttons."""
    state, job, sample = job_processes.state_of(run), job_processes.active(run), data.is_sample(run)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{plain(model_name(run.spec))}**, {plain(method_name(run.spec))}")
            st.badge("Recorded sample", icon=":material/science:") if sample else badge(state)
            st.caption(plain(run.run_id))
            st.space("stretch")
            if not access.rule().read_only:
                buttons(run, job, sample)
        if job is not None:
            progress(job)
        elif state is not JobState.FINISHED and not sample:
            trouble(run)
        results(run)
        with st.container(horizontal=True):
            for name, (title, icon) in _PAGES.items():
                st.page_link(f"../pages/{name}.py", label=title, icon=icon, query_params={"run": run.run_id})


def trouble(run: Run) -> None:
    """Say why the run does not continue, with its log."""
    own = job_processes.own_job(run)
    if own is None:
        st.warning("This run has not been started.", icon=":material/error:")
        return
    show = st.error if own.status.state is JobState.FAILED else st.warning
    show(plain(in_fields(job_processes.last_word(own))), icon=":material/error:")
    log_of(run, own)


def results(run: Run) -> None:
    """Draw the results so far."""
    trace = run.trace
    if trace is None:
        return
    for warning in trace.baseline.warnings:
        st.warning(plain(in_fields(warning)), icon=":material/warning:")
    last = trace.steps[-1] if trace.steps else None
    first, second, third, fourth = st.columns(4)
    blocks = run.stack.num_blocks if run.stack else 0
    first.metric(
        "Blocks removed",
        f"{len(run.removal_list)} of {blocks}",
        delta=f"−{share_of_parameters(run):.1%} parameters" if last else None,
        delta_color="off",
        delta_arrow="off",
        help="Blocks removed by the finished steps, and their share of all parameters.",
    )
    second.metric(
        "Perplexity",
        _from_to(trace.baseline.calibration, last.calibration if last else None),
        help="Perplexity of the calibration text.",
    )
    third.metric(
        "Held-out perplexity",
        _from_to(trace.baseline.held_out, last.held_out if last else None),
        delta=rise(trace.baseline, last) if last else None,
        delta_color="off",
        delta_arrow="off",
        help="Perplexity of text on which no block was chosen: what the removal really costs.",
    )
    job = job_processes.active(run)
    if job is not None and job.status.started is not None:
        fourth.metric(
            "Running for", duration(time.time() - job.status.started), help="Time since this process started."
        )
    else:
        fourth.metric("Search", duration(search_seconds(trace)), help="Time spent on the finished steps.")
    if run.removal_list:
        st.markdown(f"Removal list: `{list(run.removal_list)}`")
    attempts = [job.attempt for job in run.jobs if job.is_own(run.spec) and job.attempt is not None]
    if attempts:
        st.caption(f"Searched {plain(attempts[-1].described)}.")


def _from_to(before: Measured, after: Measured | None) -> str:
    return perplexity(before) + (f" → {perplexity(after)}" if after is not None else "")


def buttons(run: Run, job: Job | None, sample: bool) -> None:
    """Draw the buttons that change the run."""

    def button(word: str, icon: str, help: str, **options: Any) -> bool:
        return st.button(word, key=f"do-{word}", icon=f":material/{icon}:", help=help, type="tertiary", **options)

    if job is not None:
        button("Stop", "stop", "Finished steps are kept.", on_click=act, args=("stop", run))
    elif not sample and (not execution.is_finished(run) or job_processes.unanswered(run) is not None):
        button("Resume", "play_arrow", "Continues after the last finished step.", on_click=act, args=("resume", run))
    help = "Opens the form with the settings of this run."
    button("Duplicate", "content_copy", help, on_click=act, args=("duplicate", run))
    help = "Asks for confirmation. Stop a running run first."
    if not sample:
        button("Delete", "delete", help, disabled=job is not None, on_click=act, args=("ask", run))


def keep() -> None:
    """Forget the question, however it was closed."""
    st.session_state.pop("deleting", None)


@st.dialog("Delete this run?", on_dismiss=keep)
def really_delete(run: Run) -> None:
    """Ask for confirmation. The whole page draws the question for as long as it is not answered.

    If a button drew it once, in the part of the page that is drawn every few seconds, it would belong to that part. On
    a busy machine the next drawing could then discard the question unseen, or the answer that arrives with it.
    """
    st.markdown("This deletes the run folder and everything in it for good. Exported models stay.")
    st.code(run.run_id, language=None, wrap_lines=True)
    with st.container(horizontal=True):
        if st.button("Delete for good", type="primary", icon=":material/delete:"):
            keep()
            act("delete", run)
            st.rerun()
        if st.button("Keep it"):
            keep()
            st.rerun()


def ask() -> None:
    """Draw the question whether to delete the chosen run, if Delete was pressed."""
    run_id = st.session_state.get("deleting")
    if run_id is None or run_id != st.session_state.get("chosen_run"):
        return
    try:
        run = data.load(run_id)
    except RunError:  # deleted elsewhere
        keep()
    else:
        really_delete(run)


def say() -> None:
    """Show why an action failed."""
    if st.session_state.get("outside"):  # the page is about to be drawn again
        return
    message = st.session_state.pop("said", None)
    if message:
        st.error(plain(in_fields(message)), icon=":material/error:")


def main() -> None:
    """Draw everything below the form, again every few seconds."""
    if st.session_state.pop("outside", False):  # a button in here changed the rest of the page
        st.rerun()
    listed = data.outlines(st.session_state.get("chosen_run"))
    rows = [each for each in listed if isinstance(each, Outline)]
    for error in listed:
        if isinstance(error, RunError):
            st.warning(plain(in_fields(error)), icon=":material/broken_image:")
    run_id = page.wanted_run(rows) if rows else None
    if run_id is None:
        hint = (
            plain(access.SHOWS_ONLY)
            if access.rule().read_only
            else "Press **Run the demo**: it needs no download and no GPU."
        )
        empty("No runs yet", hint)
        return
    try:
        panel(data.load(run_id))
    except RunError as error:
        empty("This run cannot be read", plain(in_fields(error)), icon=":material/broken_image:")
    table(matching(rows))


head()
say()
if st.session_state.get("form") and not access.rule().read_only:
    form()
ask()
if "deleting" not in st.session_state:  # one question at a time
    foreign_names.ask()
st.fragment(main, run_every=LIVE_SECONDS)()
