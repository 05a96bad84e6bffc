"""How far a list depends on its calibration text: another search of the same weights beside this one."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from app import access, data
from app.panels import evaluation_forms, foreign_names, job_panel
from app.widgets import empty
from app.wording import in_fields, method_name, plain, text_name
from sleb.errors import RunError
from sleb.formats.findings_tables import without_numbers
from sleb.records import NAMED_TEXTS, EvaluateSpec, Finding, Run, TextPerplexity
from sleb.report.summaries import evaluation_tables
from sleb.report.summaries.list_curves import lists_of
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes import job_processes


def draw(run: Run, findings: Sequence[Finding], busy: bool) -> None:
    """Draw the choice of the other run, the table of both lists on all texts, and the form that fills it."""
    rivals = data.rivals_of(run)
    if run.trace is None or not run.trace.steps or not rivals:
        empty(
            "No other calibration set yet",
            "A list depends on its calibration text (paper, Figure 9). **Duplicate** this run on the **Runs** page "
            "with another text, and both lists are compared here on every text.",
            icon=":material/compare:",
        )
        return
    labels = {each.run_id: f"{text_name(each.spec)}, {method_name(each.spec)} ({each.run_id})" for each in rivals}
    left, right = st.columns([3, 2], gap="large", vertical_alignment="bottom")
    if st.session_state.get("other") not in (None, *labels):
        del st.session_state["other"]
    with left:
        other_id = st.selectbox(
            "Compare with blocks chosen on", list(labels), format_func=labels.__getitem__, key="other",
            bind="query-params", help="Searches of the same weights on another text.",
        )  # fmt: skip
    try:
        other = data.load(other_id)
    except RunError as error:
        st.warning(plain(in_fields(error)), icon=":material/broken_image:")
        return
    theirs = data.findings_of(other)
    ours = lists_of(run, findings)
    both = sorted(set(ours) & set(lists_of(other, theirs)) - {0})
    if not both:
        empty("Nothing to compare", "The two searches have no list of the same length.")
        return
    with right:
        count = both[-1]
        if len(both) > 1:
            if st.session_state.get("other-after") not in (None, *both):
                del st.session_state["other-after"]
            count = st.select_slider(
                "After how many removals", both, both[-1], key="other-after",
                help="Both lists are compared at the same length.",
            )  # fmt: skip
    sides = [
        evaluation_tables.Side(text_name(each.spec), each.spec.calibration.source, lists_of(each, known)[count], known)
        for each, known in ((run, findings), (other, theirs))
    ]
    _table(sides)
    _measure(run, other, sides, busy)


def _table(sides: list[evaluation_tables.Side]) -> None:
    texts = evaluation_tables.texts_of(sides)
    shared = sorted(set(sides[0].removal_list) & set(sides[1].removal_list))
    words = f"They share {len(shared)} of {len(sides[0].removal_list)} blocks"
    st.markdown(words + (f": `{', '.join(map(str, shared))}`." if shared else "."))
    if not texts:
        empty("Nothing measured yet", "Choose texts below to measure both lists on them.")
        return
    st.table(evaluation_tables.rivals_table(sides, texts, plain), border="horizontal")
    notes = ["Perplexity, and its rise over the baseline ± one standard error."]
    notes += ["**Bold** is lower by more than both standard errors together."]
    notes += ["≈: from some of the windows."] if not all(each.is_whole for each in texts) else []
    shown = [each for side in sides for each in of_kind(side.findings, TextPerplexity) if each.text in texts]
    own = [each for each in shown if each.removal_list in ((), *(side.removal_list for side in sides))]
    st.caption(" ".join([*notes, *(plain(in_fields(each)) for each in without_numbers(own))]))


def _measure(run: Run, other: Run, sides: list[evaluation_tables.Side], busy: bool) -> None:
    """Draw the form that measures both runs on the same texts and windows, so that the numbers compare."""
    if access.rule().read_only:
        st.caption(plain(access.SHOWS_ONLY))
        return
    busy = busy or job_processes.active(other) is not None
    known = evaluation_forms.known_files(run, other)
    texts = evaluation_tables.texts_of(sides)
    offered = [each.name for each in texts if each.name in known or each.name in NAMED_TEXTS]
    with st.container(border=True):
        left, middle, right = st.columns([3, 1.2, 1.2], vertical_alignment="bottom")
        with left:
            chosen = st.multiselect(
                "Measure both lists on", [*NAMED_TEXTS, *known], list(dict.fromkeys(offered)) or ["wikitext2"],
                key=f"other-texts-{run.run_id}-{other.run_id}", accept_new_options=True,
                help="Names of texts, or paths of files on the server." + plain(access.explained()),
            )  # fmt: skip
        part = next((each.windows for each in texts if not each.is_whole), None)
        key = f"other-limit-{run.run_id}-{other.run_id}"
        limit = evaluation_forms.limit_control(middle, key, part if texts else 4)
        if right.button(
            "Measure both", icon=":material/play_arrow:", type="primary", disabled=busy or not chosen, width="stretch",
            help="Starts a process for each run; on the same device, the second waits for the first. Known results are "
            "not measured again.",
        ):  # fmt: skip
            names = evaluation_forms.named(chosen, known)
            missing = [
                (each, side) for each, side in zip((run, other), sides, strict=True) if _lacks(side, chosen, limit)
            ]
            if not missing:
                st.info("The table has all of it already.")
            started = [
                job_panel.start(each, EvaluateSpec, (side.removal_list,), texts=names, limit=limit)
                for each, side in missing
            ]
            if (started and all(started)) or foreign_names.is_asked():
                st.rerun()
        if job_processes.active(other) is not None:
            st.caption(f"Run {plain(other.run_id)} is being measured; its numbers appear when it has finished.")
            _wait(other)


@st.fragment(run_every=1.5)
def _wait(other: Run) -> None:
    """Draw the page again once the other run's process has ended."""
    try:
        if job_processes.active(data.load(other.run_id)) is None:
            st.rerun()
    except RunError:
        st.rerun()


def _lacks(side: evaluation_tables.Side, names: Sequence[str], limit: int | None) -> bool:
    """Whether a side lacks one of these texts at this limit."""
    own = [
        each.text.name
        for each in of_kind(side.findings, TextPerplexity)
        if each.removal_list == side.removal_list
        and each.text.windows == (min(limit, each.text.of_windows) if limit else each.text.of_windows)
    ]
    return any(evaluation_forms.short(each) not in own for each in names)
