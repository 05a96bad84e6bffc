"""Parts of both analysis pages: their empty states, and the controls that choose calibration tokens."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import streamlit as st

from app import data
from app.data import TokenChoice
from app.page import choose
from app.widgets import empty
from app.wording import in_fields, plain
from sleb.records import Analysis, JobState, Run, StackDescription
from sleb.runtime.processes import job_processes

ALL = -1
"""The option that chooses all sequences."""
EVERYTHING = TokenChoice()


class Chosen(NamedTuple):
    """A choice of calibration tokens, and how many it is made from."""

    tokens: TokenChoice
    """The choice; `EVERYTHING` where nothing was narrowed down."""
    available: int | None
    """Number of tokens to choose from; None where the run has only its recorded means."""


def analysis_of(run: Run) -> tuple[Analysis, StackDescription]:
    """The run's analyses. Ends the page, saying why and what to do, where there are none."""
    if run.analysis is not None and run.stack is not None:
        return run.analysis, run.stack
    headline, text = _missing(run)
    empty(headline, text)
    if run.run_id != data.SAMPLE and st.button(
        "Open the recorded sample", icon=":material/science:", help="A finished run of a real model, with its analyses."
    ):
        choose(data.SAMPLE)
        st.rerun()
    st.stop()


def _missing(run: Run) -> tuple[str, str]:
    if run.spec.kind == "evaluate":
        return "Not analysed", "This run evaluates a given list. Start a search or an analysis on the **Runs** page."
    own = job_processes.own_job(run)
    if run.analysis_unavailable is not None:
        return "This model cannot be analysed", plain(run.analysis_unavailable)
    if own is not None and job_processes.is_active(own):
        return (
            "Not analysed yet",
            "The analyses follow the last step of the search; the **Runs** page shows its progress.",
        )
    if own is not None and own.status.state is not JobState.FINISHED:
        why = plain(in_fields(job_processes.last_word(own)))
        about = f"The run ended before its analyses: {why}"
        return "Not analysed", f"{about}\n\nResume it on the **Runs** page: finished work is kept."
    if own is None:
        return "Not started", "Start this run on the **Runs** page."
    return (
        "Recorded without analyses",
        "This run searched without analyses. Duplicate it on the **Runs** page with *Analyses too* switched on, or run "
        "`sleb analyze` on the same model.",
    )


def calibration_tokens(run: Run, analysis: Analysis, *, disabled: bool = False) -> Chosen:
    """Draw controls for a sequence, a range of positions and the first tokens; disabled where nothing can be chosen."""
    tokens = data.tokens_of(run)
    length = analysis.description.sequence_length if tokens is None else int(tokens.position.max()) + 1
    sequences = [] if tokens is None else sorted({int(each) for each in tokens.sequence})
    needs = "" if tokens is not None else " This run kept means only, so nothing can be chosen."
    sequence = st.selectbox(
        "Sequence",
        [ALL, *sequences],
        format_func=lambda each: "All" if each == ALL else str(each),
        key="sequence",
        bind="query-params",
        width=130,
        disabled=disabled or tokens is None,
        help="One sequence of the calibration text, counted from 0, or all." + needs,
    )
    start, stop = st.slider(
        "Positions in the sequence",
        0,
        max(1, length - 1),
        (0, max(1, length - 1)),
        key="positions",
        bind="query-params",
        width=260,
        disabled=disabled or tokens is None,
        help="Only tokens at these positions, both ends included. Position 0 is the first token of a sequence." + needs,
    )
    without_first = st.toggle(
        "Leave out first tokens",
        key="skip-first",
        bind="query-params",
        disabled=disabled,
        help="Many models give each sequence's first token a huge vector (an attention sink). Later blocks hardly turn "
        "it, so it looks the same everywhere and hides the other tokens.",
    )
    chosen = TokenChoice(
        sequences=None if sequence in (ALL, None) else (sequence,),
        start=start,
        stop=None if stop >= length - 1 else stop + 1,
        without_first=without_first,
    )
    return Chosen(chosen, None if tokens is None else len(tokens))


def origin(analysis: Analysis, chosen: Chosen) -> str:
    """Where chosen tokens come from, as the end of a sentence."""
    analysed = analysis.description.token_count
    if chosen.available is None:
        return "recorded by the run"
    if chosen.available >= analysed:
        return f"of the {analysed:,} analysed tokens, which the cache keeps"
    return f"of the {chosen.available:,} tokens in the run folder (drawn from the {analysed:,} analysed ones)"


def nothing_chosen() -> NoReturn:
    """Ends the page for a choice without tokens."""
    empty(
        "No tokens chosen",
        "None of the analysed tokens is in this choice. Widen the range of positions, or choose all sequences.",
        icon=":material/filter_alt_off:",
    )
    st.stop()
