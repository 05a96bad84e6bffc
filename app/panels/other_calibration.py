"""How far a list depends on the text it was chosen on: another search of the same weights beside this one."""

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
from sleb.report.figures import evaluate
from sleb.report.summaries.list_curves import lists_of
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes import job_processes


def draw(run: Run, findings: Sequence[Finding], busy: bool) -> None:
    """Choice of the other run, the table of both lists on all texts, and the button that measures what is missing."""
    rivals = data.rivals_of(run)
    if run.trace is None or not run.trace.steps or not rivals:
        empty(
            "No other calibration set yet",
            "A list depends on the text it was chosen on (paper, Figure 9). Search the same model on another text, by "
            "**Duplicate** on the Runs page, and both lists are compared here on every text.",
            icon=":material/compare:",
        )
        return
    labels = {each.run_id: f"{text_name(each.spec)}, {method_name(each.spec)} ({each.run_id})" for each in rivals}
    left, right = st.columns([3, 2], gap="large", vertical_alignment="bottom")
    if st.session_state.get("other") not in (None, *labels):
        del st.session_state["other"]
    with left:
        other_id = st.selectbox(
            "Against the blocks chosen on", list(labels), format_func=labels.__getitem__, key="other",
            bind="query-params", help="Searches of the same weights on another calibration set.",
        )  # fmt: skip
    try:
        other = data.load(other_id)
    except RunError as error:
        st.warning(plain(error), icon=":material/broken_image:")
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
                help="Both lists at the same length.",
            )  # fmt: skip
    sides = [
        evaluate.Side(text_name(each.spec), each.spec.calibration.source, lists_of(each, known)[count], known)
        for each, known in ((run, findings), (other, theirs))
    ]
    _table(sides)
    _measure(run, other, sides, busy)


def _table(sides: list[evaluate.Side]) -> None:
    texts = evaluate.texts_of(sides)
    shared = sorted(set(sides[0].removal_list) & set(sides[1].removal_list))
    words = f"They share {len(shared)} of {len(sides[0].removal_list)} blocks"
    st.markdown(words + (f": `{', '.join(map(str, shared))}`." if shared else "."))
    if not texts:
        empty("Neither list was measured yet", "Choose texts below: both lists are measured on them.")
        return
    st.table(evaluate.rivals_table(sides, texts, plain), border="horizontal")
    notes = ["Perplexity, and its rise over the unmodified model ± one standard error."]
    notes += ["**Bold** is lower by more than both errors together."]
    notes += ["≈: from some of the windows."] if not all(each.is_whole for each in texts) else []
    shown = [each for side in sides for each in of_kind(side.findings, TextPerplexity) if each.text in texts]
    own = [each for each in shown if each.removal_list in ((), *(side.removal_list for side in sides))]
    st.caption(" ".join([*notes, *(plain(in_fields(each)) for each in without_numbers(own))]))


def _measure(run: Run, other: Run, sides: list[evaluate.Side], busy: bool) -> None:
    """One form for both runs, with what makes the numbers compare: the same texts, windows and limit."""
    if access.rule().read_only:
        st.caption(plain(access.SHOWS_ONLY))
        return
    busy = busy or job_processes.active(other) is not None
    known = evaluation_forms.known_files(run, other)
    texts = evaluate.texts_of(sides)
    offered = [each.name for each in texts if each.name in known or each.name in NAMED_TEXTS]
    with st.container(border=True):
        left, middle, right = st.columns([3, 1.2, 1.2], vertical_alignment="bottom")
        with left:
            chosen = st.multiselect(
                "Measure both lists on", [*NAMED_TEXTS, *known], list(dict.fromkeys(offered)) or ["wikitext2"],
                key=f"other-texts-{run.run_id}-{other.run_id}", accept_new_options=True,
                help="Names, or paths of files on the server." + plain(access.explained()),
            )  # fmt: skip
        part = next((each.windows for each in texts if not each.is_whole), None)
        key = f"other-limit-{run.run_id}-{other.run_id}"
        limit = evaluation_forms.limit_control(middle, key, part if texts else 4)
        if right.button(
            "Measure both", icon=":material/play_arrow:", type="primary", disabled=busy or not chosen, width="stretch",
            help="One process for each of the two runs; on the same device the second waits for the first. What is "
            "known is not measured again.",
        ):  # fmt: skip
            names = evaluation_forms.named(chosen, known)
            missing = [
                (each, side) for each, side in zip((run, other), sides, strict=True) if _lacks(side, chosen, limit)
            ]
            if not missing:
                st.info("Everything asked for is in the table already.")
            started = [
                job_panel.start(each, EvaluateSpec, (side.removal_list,), texts=names, limit=limit)
                for each, side in missing
            ]
            if (started and all(started)) or foreign_names.is_asked():
                st.rerun()
        if job_processes.active(other) is not None:
            st.caption(f"Run {plain(other.run_id)} is being measured; its numbers appear when it is done.")
            _wait(other)


@st.fragment(run_every=1.5)
def _wait(other: Run) -> None:
    """Draw the page anew once the other run's process is over."""
    try:
        if job_processes.active(data.load(other.run_id)) is None:
            st.rerun()
    except RunError:
        st.rerun()


def _lacks(side: evaluate.Side, names: Sequence[str], limit: int | None) -> bool:
    """Whether a text, as it is asked for, is missing on a side."""
    own = [
        each.text.name
        for each in of_kind(side.findings, TextPerplexity)
        if each.removal_list == side.removal_list
        and each.text.windows == (min(limit, each.text.of_windows) if limit else each.text.of_windows)
    ]
    return any(evaluation_forms.short(each) not in own for each in names)
