"""The runs and published lists of a comparison: chosen on the page, kept in the address and the session."""

from __future__ import annotations

import streamlit as st

from app import data, page
from app.page import default_run_id
from app.wording import in_fields, method_name, model_name, plain
from sleb.errors import RunError
from sleb.formats.published_lists import PUBLISHED, PublishedList, published, published_for
from sleb.records import Run
from sleb.runtime.run_index import Outline

MOST_RUNS, MOST_AT_FIRST = 8, 6


def choose_runs(rows: list[Outline]) -> list[Run]:
    """Runs of the address, of the session, or the current one and its kin; warns of those that do not exist."""
    searches = [each for each in rows if each.spec.kind == "search"]
    by_id = {each.run_id: each for each in searches}
    address = st.query_params.get("runs")
    wanted = address.split(",") if address is not None else st.session_state.get("compare_runs")
    if wanted is None:
        current = page.wanted_run(rows)
        wanted = _kin(by_id, current if current in by_id else default_run_id(searches))
    known = list(dict.fromkeys(each for each in wanted if each in by_id))[:MOST_RUNS]
    for missing in [each for each in dict.fromkeys(wanted) if each and each not in by_id][:3]:
        why = f"Run {plain(missing[:80])} cannot be compared: it was deleted, or it is not a search."
        st.warning(why, icon=":material/link_off:")
    if address is not None and not known and any(wanted):
        known = _kin(by_id, default_run_id(searches))
    if st.session_state.get("compare-runs") != known:
        st.session_state["compare-runs"] = known
    if st.query_params.get("runs") != ",".join(known):
        st.query_params["runs"] = ",".join(known)
    chosen = st.multiselect(
        "Runs",
        [each.run_id for each in page.newest(searches, known)],
        format_func=lambda each: _run_label(by_id[each]),
        key="compare-runs",
        on_change=_remember_runs,
        max_selections=MOST_RUNS,
        wrap=True,
        placeholder="Choose runs to compare",
        help="All searches. At first, the current run and others of the same model are chosen. The address names them, "
        "so a copied link shows the same comparison.",
    )
    return _load(chosen)


def _run_label(run: Outline) -> str:
    """A label of a run, shorter than elsewhere because several stand in one line."""
    name = f"{model_name(run.spec).split('/')[-1]}, {method_name(run.spec)}"
    return f"{name} (sample)" if data.is_sample(run) else f"{name}, {len(run.removal_list)} removed ({run.run_id})"


def _remember_runs() -> None:
    st.session_state["compare_runs"] = st.session_state["compare-runs"]
    st.query_params["runs"] = ",".join(st.session_state["compare-runs"])


def _kin(by_id: dict[str, Outline], run_id: str) -> list[str]:
    """The run and, for each other method on the same model, the one that removed most, the same text first.

    With swaps and without are two methods here.
    """
    chosen = by_id[run_id].spec
    others = [each for each in by_id.values() if each.spec.model == chosen.model and each.last]
    others.sort(key=lambda each: (each.spec.calibration != chosen.calibration, -len(each.removal_list)))
    kin = {(chosen.method, chosen.refine): run_id}
    for each in others:
        kin.setdefault((each.spec.method, each.spec.refine), each.run_id)
    return list(kin.values())[:MOST_AT_FIRST]


def _load(run_ids: list[str]) -> list[Run]:
    runs = []
    for run_id in run_ids:
        try:
            runs.append(data.load(run_id))
        except RunError as error:
            st.warning(plain(in_fields(error)), icon=":material/broken_image:")
    return runs


def choose_published(runs: list[Run]) -> list[PublishedList]:
    """Published lists of the address; without a choice, those for the models of the runs."""
    fitting = {
        each.key: None for run in runs if run.stack for each in published_for(run.spec.model, run.stack.num_blocks)
    }
    address = st.query_params.get("published")
    wanted = list(fitting) if address is None else [each for each in address.split(",") if published(each)]
    if st.session_state.get("compare-published") != wanted:
        st.session_state["compare-published"] = wanted
    chosen = st.multiselect(
        "Published lists",
        [each.key for each in PUBLISHED],
        format_func=_published_label,
        key="compare-published",
        on_change=_remember_published,
        wrap=True,
        placeholder="Add a list from the paper",
        help="Removal lists of the SLEB paper (Table 4): 10 %, then the blocks added for 20 %. Lists for the models of "
        "the chosen runs are shown from the start; add any other.",
    )
    lists = [each for each in map(published, chosen) if each is not None]
    for each in lists:
        if each.remark:
            st.caption(f"{plain(each.model)}: {plain(each.remark)}")
    return lists


def _published_label(key: str) -> str:
    each = published(key)
    return f"{each.model} ({each.num_blocks} blocks)" if each else key


def _remember_published() -> None:
    st.query_params["published"] = ",".join(st.session_state["compare-published"])
