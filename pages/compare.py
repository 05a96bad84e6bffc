"""Compare: several runs and published lists side by side; what they remove, what it costs, how far they agree."""

from __future__ import annotations

import streamlit as st

from app import data
from app.components.copy_link import copy_link
from app.page import title
from app.panels.run_choice import choose_published, choose_runs
from app.widgets import PERPLEXITY_AS, PERPLEXITY_AS_HELP, chart, csv, empty, link_to_runs, switch
from app.wording import plain
from sleb.formats.published_lists import shared_by_chance
from sleb.records import Run
from sleb.report.figures import compare, stack_strips, style
from sleb.report.summaries import compared_lists
from sleb.report.summaries.compared_lists import Listed
from sleb.report.summaries.numbers import number
from sleb.runtime.run_index import Outline


def main() -> None:
    """The screen, from top to bottom."""
    left, right = st.columns([10, 1.3], vertical_alignment="bottom")
    with left:
        title("Compare", "Do methods, texts and models agree on which blocks to remove, and what does each list cost?")
    with right:
        copy_link()
    outlines = [each for each in data.outlines() if isinstance(each, Outline)]
    if not any(each.spec.kind == "search" for each in outlines):
        empty(
            "Nothing to compare yet",
            "A search finds a removal list: start one on the **Runs** page. Analyses alone remove no block.",
        )
        link_to_runs()
        return
    left, right = st.columns([5, 2])
    with left:
        runs = choose_runs(outlines)
    with right:
        lists = choose_published(runs)
    opened = [run for run in runs if run.stack is not None]
    rows = compared_lists.listed(opened, lists)
    for run in runs:
        if run.stack is None:
            st.caption(f"{plain(run.run_id)} is not shown: it has not opened its model yet.")
    if not rows:
        empty("Nothing chosen", "Choose at least one run or published list above.")
        return
    if changed := compared_lists.same_name_other_model(opened, rows):
        st.warning(f"{'; '.join(changed)}: their results do not compare.", icon=":material/warning:")
    _places(rows)
    if opened:
        left, right = st.columns([3, 2], gap="large")
        with left:
            _costs(opened, rows)
        with right:
            _agreement(rows)
    else:
        _agreement(rows)
    _table(opened, rows)


def _places(rows: list[Listed]) -> None:
    st.subheader("Where in the stack", anchor=False)
    differ = len({each.num_blocks for each in rows}) > 1
    scale = st.segmented_control(
        "Blocks by",
        ["index", "depth"],
        default="depth" if differ else "index",
        required=True,
        format_func=lambda each: {"index": "Block index", "depth": "Relative depth"}[each],
        key="align" if differ else "across",  # each with its own default
        bind="query-params",
        help="Original, 0-based index; or depth in per cent of the stack, which lines up models with different numbers "
        "of blocks (paper, Figure 8).",
    )
    chart(
        stack_strips.strips(rows, relative=scale == "depth"),
        key="removed-blocks",
        alt="One row for each list: its stack of blocks, removed ones hatched and numbered in the order of removal",
        table=lambda: stack_strips.strips_table(rows),
    )


def _costs(runs: list[Run], rows: list[Listed]) -> None:
    st.subheader("What it costs", anchor=False)
    own = rows[: len(runs)]
    view = _view(relative=len({row.num_blocks for row in own}) > 1)
    points = compared_lists.curve_table(runs, rows)
    if points.empty:
        empty("No perplexity yet", "None of these runs has measured its baseline.")
        return
    texts = [run.stack.tokens_hash for run in runs if run.stack]
    chart(
        compare.perplexity(points, own, view, texts=texts),
        key="perplexity-against-removed",
        alt="Perplexity against the number of blocks removed, one line for each run",
        table=lambda: points,
    )
    beyond = compared_lists.letters_beyond(points, view.column, style.READABLE)
    if view.cut is not None and beyond:
        st.caption(f"Beyond the upper edge of the chart: {', '.join(beyond)}. **All** shows them.")
    _which_texts(rows, texts)


def _view(*, relative: bool) -> compare.CurveView:
    """The switches above the chart."""
    with st.container(horizontal=True, gap="medium"):
        text = switch(
            "Text",
            "text",
            {"held-out": "Held-out", "calibration": "Calibration"},
            "No block was chosen on held-out text. Blocks were chosen on the calibration text, so its perplexity is "
            "too good.",
        )
        unit = switch("As", "as", PERPLEXITY_AS, PERPLEXITY_AS_HELP)
        axis = switch(
            "Axis",
            "axis",
            {"log": "Log", "linear": "Linear"},
            "A logarithmic axis shows gentle and steep curves together.",
        )
        extent = switch(
            "Up to",
            "upto",
            {"readable": f"{style.READABLE} × baseline", "all": "All"},
            "Some methods break the model at once and would press all other lines to the bottom: they leave the chart "
            "at its upper edge.",
        )
    return compare.CurveView(
        held_out=text == "held-out",
        log=axis == "log",
        over_baseline=unit == "times",
        relative=relative,
        cut=style.READABLE if extent == "readable" else None,
    )


def _which_texts(rows: list[Listed], texts: list[str]) -> None:
    """Whether the perplexities compare: only on the same tokens."""
    if len(set(texts)) > 1:
        groups: dict[str, list[str]] = {}
        for row, each in zip(rows, texts, strict=False):
            groups.setdefault(each, []).append(row.letter)
        sharing = "; ".join(", ".join(letters) for letters in groups.values())
        st.warning(
            f"Measured on different texts (lines with the same dash share one: {sharing}). Perplexities compare only "
            "on the same text and tokenizer; **× baseline** is fairer here.",
            icon=":material/warning:",
        )
    elif len(texts) > 1:
        st.caption("All on the same tokens, so these perplexities compare. Bands: one standard error of the rise.")


def _agreement(rows: list[Listed]) -> None:
    st.subheader("How far they agree", anchor=False)
    rows = [each for each in rows if each.prefixes]
    if len(rows) < 2:
        empty("Only one list", "Choose another run or a published list to compare it with.")
        return
    longest = min(len(each.prefixes) for each in rows)
    removals = longest
    if longest > 1:
        if st.session_state.get("after", 1) > longest:  # a shorter list was chosen since
            st.session_state["after"] = longest
        removals = st.slider(
            "After how many removals",
            1,
            longest,
            longest,
            key="after",
            bind="query-params",
            help="Lists are compared at the same length, at most that of the shortest.",
        )
    chart(
        compare.agreement(rows, removals),
        key="agreement",
        alt="Matrix of lists: how many removed blocks each pair shares",
        table=lambda: compare.agreement_table(rows, removals),
    )
    heights = [each.num_blocks for each in rows]
    words = "; ".join(
        f"{shared_by_chance(removals, height):.2g} among {height} blocks"
        for height in sorted({each for each in heights if heights.count(each) > 1})
    )
    st.caption(
        f"Blocks that two lists share, of {removals}; only stacks of the same height are compared. "
        + (f"Two random lists share on average {words}." if words else "")
    )


def _table(runs: list[Run], rows: list[Listed]) -> None:
    st.subheader("Side by side", anchor=False)
    table = compared_lists.summary_table(runs, rows)
    numbers = [name for name in compared_lists.PERPLEXITY_COLUMNS if name in table]
    shown = table.style.format(number, subset=numbers, na_rep="–")
    st.dataframe(
        shown,
        hide_index=True,
        placeholder="–",
        column_config={
            "": st.column_config.TextColumn(width=40, pinned=True),
            "Blocks": st.column_config.NumberColumn(width=70),
            "Removed": st.column_config.NumberColumn(width=80),
            **{name: st.column_config.NumberColumn(width=130, help="Perplexity") for name in numbers},
            "Rise, nats": st.column_config.TextColumn(
                width=130,
                help="Rise of the held-out negative log-likelihood per token over the baseline, ± one standard error",
            ),
            "Seconds": st.column_config.NumberColumn(format="%.0f", width=80, help="Time spent on the search"),
            "Removal list": st.column_config.TextColumn(width="large", help="Blocks in the order of removal, 0-based"),
        },
        alt="Settings of each run, the blocks it removed and their cost",
    )
    st.download_button(
        "Table (CSV)",
        lambda: csv(table),
        "comparison.csv",
        "text/csv",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        key="comparison-csv",
    )


main()
