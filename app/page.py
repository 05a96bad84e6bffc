"""The head of every page about a run: title, run picker, facts; and the run that all pages share."""

from __future__ import annotations

from collections.abc import Collection

import streamlit as st

from app import data
from app.components.copy_link import copy_link
from app.widgets import empty, link_to_runs
from app.wording import in_fields, model_name, plain, run_label
from sleb.errors import RunError
from sleb.formats.list_formats import without_folder
from sleb.records import Run
from sleb.runtime.run_index import Outline

TEXT_NAMES = {"demo": "the demo text", "wikitext2": "WikiText-2", "c4": "C4"}
"""Calibration texts as a sentence names them."""
MOST_SHOWN = 500
"""Runs in a table or a list to choose from; drawing thousands would take too long."""


def title(text: str, caption: str) -> None:
    """Draw the page's name, and the question that it answers."""
    st.title(text, anchor=False)
    st.caption(caption)


def newest(rows: list[Outline], also: Collection[str] = ()) -> list[Outline]:
    """Runs that a list to choose from offers: of thousands the newest, those in `also`, and the samples."""
    if len(rows) <= MOST_SHOWN:
        return rows
    return [each for i, each in enumerate(rows) if i < MOST_SHOWN or each.run_id in also or data.is_sample(each)]


def run_page(name: str, caption: str) -> Run:
    """Draw title, run picker and facts of a page about one run; returns the run.

    The run is that of the address, of the session, or the newest. Ends the page with a reason if none can be read.
    """
    rows = [each for each in data.outlines() if isinstance(each, Outline)]
    left, middle, right = st.columns([10, 8, 2.4], vertical_alignment="bottom")
    with left:
        title(name, caption)
    if not rows:
        empty("No runs yet", "Start one on the **Runs** page: the demo model needs no download and no GPU.")
        link_to_runs()
        st.stop()
    run_id = wanted_run(rows)
    with middle:
        offered = newest(rows, {run_id})
        labels = {each.run_id: run_label(each) for each in offered}
        picked = st.selectbox(
            "Run",
            list(labels),
            index=list(labels).index(run_id),
            format_func=lambda each: labels[each],
            help="Every page shows one run, which the address names. Start new runs on the Runs page."
            + (
                ""
                if len(offered) == len(rows)
                else f" Of {len(rows):,} runs, the newest are listed; find others there."
            ),
        )
    with right:
        copy_link()
    if picked != run_id:
        choose(picked)
        st.rerun()
    try:
        run = data.load(run_id)
    except RunError as error:
        empty("This run cannot be read", plain(in_fields(error)), icon=":material/broken_image:")
        st.stop()
    facts(run)
    return run


def wanted_run(rows: list[Outline]) -> str:
    """The run of the address or the session, else the default; warns of one that does not exist."""
    ids = {each.run_id for each in rows}
    wanted = st.query_params.get("run") or st.session_state.get("chosen_run")
    if wanted is not None and wanted not in ids:
        try:
            data.folder_of(wanted)
        except RunError as error:
            st.warning(plain(in_fields(error)), icon=":material/link_off:")
    run_id = wanted if wanted in ids else default_run_id(rows)
    choose(run_id)
    return run_id


def default_run_id(rows: list[Outline]) -> str:
    """The newest run that has something to show, else the recorded sample."""
    own = [each for each in rows if not data.is_sample(each)]
    with_steps = [each for each in own if each.last is not None]
    sample = [each for each in rows if each.run_id == data.SAMPLE]
    return (with_steps or sample or rows)[0].run_id


def choose(run_id: str) -> None:
    """Make a run that of all pages and of the address."""
    st.session_state["chosen_run"] = run_id
    if st.query_params.get("run") != run_id:
        st.query_params["run"] = run_id


def facts(run: Run) -> None:
    """Draw one line that says where the numbers on the page come from."""
    words = []
    if data.is_sample(run):
        words.append(":material/science: **Recorded sample**, made by this program on a real model.")
    if run.stack is not None:
        stack, source = run.stack, run.spec.calibration.source
        about = (
            f"{model_name(run.spec)} · {stack.num_blocks} blocks · {stack.total_parameters / 1e6:,.0f} M parameters · "
            f"{stack.dtype} · " + ("" if stack.quantisation is None else f"quantised: {stack.quantisation} · ")
        ) + (
            f"{stack.sequences} × {stack.sequence_length} tokens of {TEXT_NAMES.get(source, without_folder(source))}, "
            f"{stack.held_out} × held out"
            if stack.sequences
            else f"a given list: {list(run.removal_list)}"
        )
        words.append(plain(about))
    if words:
        st.caption(" ".join(words))
