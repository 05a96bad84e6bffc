"""What pages are made of: badges, progress, empty states, switches, charts with their downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app import actions, data
from app.wording import STATES, duration, in_fields, plain
from sleb.errors import SlebError
from sleb.records import Job, JobState, Run
from sleb.report.figures import style

Choice = TypeVar("Choice", bound=str)
PERPLEXITY_AS = {"perplexity": "Perplexity", "times": "× baseline"}
PERPLEXITY_AS_HELP = "Perplexity, or perplexity divided by the baseline's on the same text."


def badge(state: JobState) -> None:
    """State of a run: a word, an icon and a colour."""
    word, icon, colour = STATES[state]
    st.badge(word, icon=icon, color=colour)


def progress(job: Job) -> None:
    """A bar that shows how far the job is."""
    now = job.status.progress
    if now is None:
        st.progress(0.0, "Starting" if job.status.state is JobState.RUNNING else "Waiting for its process")
        return
    text = f"Step {now.step} of {now.steps}" if now.steps and now.step else now.phase
    text += f": {now.message}" if now.message else ""
    if now.eta_seconds is not None:
        text += f" · {duration(now.eta_seconds)} left"
    st.progress(min(max(now.fraction, 0.0), 1.0), plain(text))


def stop_job(run: Run) -> None:
    """Stop the process that executes the run and draw the page again, or say why that is not possible."""
    try:
        with st.spinner("Stopping"):
            actions.stop(run)
    except SlebError as error:
        st.error(plain(in_fields(error)))
    else:
        st.rerun()


def log_of(run: Run, job: Job) -> None:
    """The log of one job, folded, if it wrote any."""
    log = data.log_of(run.model_copy(update={"jobs": (job,)}))
    if log:
        with st.expander("Log", icon=":material/notes:"):
            st.code(log, language=None, wrap_lines=True, height=240)


def empty(headline: str, text: str, *, icon: str = ":material/inbox:") -> None:
    """A box that says why a page is empty and what to do. `text` is Markdown: escape what comes from outside."""
    with st.container(border=True):
        st.markdown(f"#### {icon} {headline}")
        st.markdown(text)


def link_to_runs(run_id: str | None = None) -> None:
    """A link to the Runs page, with a run chosen there."""
    query = None if run_id is None else {"run": run_id}
    st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:", query_params=query)


def switch(
    label: str,
    key: str,
    words: Mapping[Choice, str],
    help: str,
    *,
    default: Choice | None = None,
    hidden_label: bool = False,
) -> Choice:
    """A choice between two or three, kept in the address; the default is the first one, unless it is given."""
    choice: Choice = st.segmented_control(
        label, list(words), default=default or next(iter(words)), required=True, format_func=words.__getitem__, key=key,
        bind="query-params", help=help, label_visibility="collapsed" if hidden_label else "visible",
    )  # fmt: skip
    return choice


def chart(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    table: Callable[[], pd.DataFrame] | None = None,
    on_pick: Callable[[], None] | None = None,
) -> Any:
    """A chart as wide as its place, with its data and figure as downloads.

    `key` names the files too. `table` gives the data; `on_pick` is called when a point is clicked, and finds it in
    `st.session_state[key]["selection"]["points"]`.
    """
    selection = st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        config=style.CONFIG | {"toImageButtonOptions": {"format": "svg", "filename": key}},
        on_select=on_pick or "ignore",
        selection_mode="points",
    )
    if table is not None:
        downloads(figure, key, table)
    return selection


def downloads(figure: go.Figure, key: str, table: Callable[[], pd.DataFrame]) -> None:
    """Data and figure as files, made when they are downloaded."""
    with st.popover("Download", icon=":material/download:", type="tertiary"):
        st.download_button(
            "Data (CSV)", lambda: csv(table()), f"{key}.csv", "text/csv", key=f"{key}-csv", on_click="ignore"
        )
        st.download_button(
            "Figure (HTML, self-contained)",
            lambda: figure.to_html(include_plotlyjs=True, config=style.CONFIG),
            f"{key}.html",
            "text/html",
            key=f"{key}-html",
            on_click="ignore",
        )
        st.caption("As SVG: the camera in the chart's corner.")


def csv(table: pd.DataFrame) -> bytes:
    """A table as a CSV file without cells that a spreadsheet would execute."""
    shown = table.map(lambda value: f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value)
    return shown.to_csv(index=False).encode()
