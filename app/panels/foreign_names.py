"""The question before a job reads what a run folder from elsewhere names: a user has to confirm it."""

from __future__ import annotations

import streamlit as st

from app import actions, data
from app.page import choose
from app.wording import in_fields, plain
from sleb.errors import RunError, SlebError, UnconfirmedNames
from sleb.records import JobSpec, Run

_WAITING = "foreign-names"
"""Key, in the session, of runs and their jobs that wait for an answer, in order."""


def go_on(run: Run, job: JobSpec, *, again: bool = False) -> bool:
    """Start a job of a run; False where `ask` has to ask the user first. Raises `SlebError` where it cannot start."""
    try:
        actions.go_on(run, job, again=again)
    except UnconfirmedNames:
        st.session_state.setdefault(_WAITING, []).append((run.run_id, job, again))
        return False
    return True


def is_asked() -> bool:
    """Whether a question waits for an answer."""
    return bool(st.session_state.get(_WAITING))


def ask() -> None:
    """Draw the question, if a job waits for an answer.

    The page itself calls it, never a part that is drawn by itself (see `really_delete` of the Runs page).
    """
    while waiting := st.session_state.get(_WAITING):
        run_id, job, again = waiting[0]
        try:
            run = data.load(run_id)
            names = actions.unconfirmed(run, job)
        except RunError:  # deleted meanwhile
            names = ()
        if names:
            _really_read(run, job, again, names)
            return
        _answered()


def _answered() -> None:
    """Forget the question, however it was closed."""
    if st.session_state.get(_WAITING):
        st.session_state[_WAITING].pop(0)


@st.dialog("Read what this run names?", on_dismiss=_answered)
def _really_read(run: Run, job: JobSpec, again: bool, names: tuple[str, ...]) -> None:
    st.markdown(
        "This run folder was written on another machine, or changed since. The job would read the following on this "
        "one; continue only if you know all of it:"
    )
    st.code("\n".join(map(_on_one_line, names)), language=None, wrap_lines=True)
    with st.container(horizontal=True):
        if st.button("Read them", type="primary", icon=":material/play_arrow:"):
            try:
                actions.go_on(run, job, again=again, seen=names)
            except SlebError as error:
                st.error(plain(in_fields(error)), icon=":material/error:")
                return
            _answered()
            choose(run.run_id)
            st.rerun()
        if st.button("Leave it"):
            _answered()
            st.rerun()


def _on_one_line(name: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
