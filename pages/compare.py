"""Compare: several runs and published lists side by side; where they cut, what it costs, how far they agree."""

from __future__ import annotations

import streamlit as st

from app import data
from app.components.copy_link import copy_link
from app.page import title
from app.panels.run_choice import choose_published, choose_runs
from app.widgets import chart, csv, empty
from app.wording import number, plain
from sleb.formats.published_lists import shared_by_chance
from sleb.records import Run
from sleb.report.figures import compare
from sleb.runtime.run_index import Outline

READABLE = 30


def main() -> None:
    """The screen, from top to bottom."""
    left, right = st.columns([10, 1.3], vertical_alignment="bottom")
    with left:
        title("Compare", "Do methods, texts and models agree on which blocks can go, and what does each cost?")
    with right:
        copy_link()
    outlines = [each for each in data.outlines() if isinstance(each, Outline)]
    if not any(each.spec.kind == "search" for each in outlines):
        empty(
            "Nothing to compare yet",
            "A search finds a removal list; start one on the **Runs** page. Analyses alone remove no block.",
        )
        st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:")
        return
    left, right = st.columns([5, 2])
    with left:
        runs = choose_runs(outlines)
    with right:
        lists = choose_published(runs)
    opened = [run for run in runs if run.stack is not None]
    rows = compare.listed(opened, lists)
    for run in runs:
        if run.stack is None:
            st.caption(f"{plain(run.run_id)} has not opened its model yet: it appears once it has.")
    if not rows:
        empty("Choose runs to compare", "Pick at least one run above, or a published list.")
        return
    if changed := compare.same_name_other_model(opened, rows):
        st.warning(f"{'; '.join(changed)}: what they found does not add up to one answer.", icon=":material/warning:")
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


def _places(rows: list[compare.Listed]) -> None:
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
        help="By original, 0-based index, or by depth in per cent of the stack, which lines up models with different "
        "numbers of blocks (paper, Figure 8).",
    )
    chart(
        compare.strips(rows, relative=scale == "depth"),
        key="removed-blocks",
        alt="One row for each list: its stack of blocks, removed ones filled and hatched, numbered in order of removal",
        table=lambda: compare.strips_table(rows),
    )


def _costs(runs: list[Run], rows: list[compare.Listed]) -> None:
    st.subheader("What it costs", anchor=False)
    with st.container(horizontal=True, gap="medium"):
        text = _switch(
            "Text", "text", {"held-out": "Held-out", "calibration": "Calibration"},
            "Held-out sequences took no part in any choice. On the calibration text the blocks were chosen, "
            "so its perplexity is too good.",
        )  # fmt: skip
        unit = _switch(
            "As", "as", {"perplexity": "Perplexity", "times": "× baseline"},
            "Perplexity, or how many times the unmodified model's perplexity on the same text.",
        )  # fmt: skip
        axis = _switch(
            "Axis", "axis", {"log": "Log", "linear": "Linear"},
            "A logarithmic axis shows gentle and steep methods together.",
        )  # fmt: skip
        extent = _switch(
            "Up to", "upto", {"readable": f"{READABLE} × baseline", "all": "All"},
            "Some methods break the model at once and would squeeze all others to the bottom: their lines leave "
            "the chart at its upper edge.",
        )  # fmt: skip
    points = compare.curve_table(runs, rows)
    if points.empty:
        empty("No perplexity yet", "None of these runs has measured its unmodified model so far.")
        return
    texts = [run.stack.tokens_hash for run in runs if run.stack]
    chart(
        compare.perplexity(
            points, rows[: len(runs)], held_out=text == "held-out", log=axis == "log", over_baseline=unit == "times",
            relative=len({row.num_blocks for row in rows[: len(runs)]}) > 1, texts=texts,
            cut=READABLE if extent == "readable" else None,
        ),
        key="perplexity-against-removed",
        alt="Perplexity against the number of blocks removed, one line for each run",
        table=lambda: points,
    )  # fmt: skip
    column = "held_out" if text == "held-out" else "calibration"
    beyond = points[points[column] > READABLE * points[column].min()]["letter"].unique()
    if extent == "readable" and len(beyond):
        st.caption(f"Leaving the chart at its upper edge: {', '.join(beyond)}. **All** shows the whole.")
    if len(set(texts)) > 1:
        groups: dict[str, list[str]] = {}
        for row, each in zip(rows, texts, strict=False):
            groups.setdefault(each, []).append(row.letter)
        sharing = "; ".join(", ".join(letters) for letters in groups.values())
        st.warning(
            f"Measured on different texts (lines of one kind of dash share a text: {sharing}). Perplexities compare only "
            "on the same text and tokenizer; **× baseline** is the fairer view here.",
            icon=":material/warning:",
        )
    elif len(runs) > 1:
        st.caption("All on the same tokens, so these perplexities compare. Bands: one standard error of the rise.")


def _switch(label: str, key: str, words: dict[str, str], explained: str) -> str:
    """A choice between two or three, kept in the URL."""
    return st.segmented_control(
        label, list(words), default=next(iter(words)), required=True, format_func=words.__getitem__, key=key,
        bind="query-params", help=explained,
    )  # fmt: skip


def _agreement(rows: list[compare.Listed]) -> None:
    st.subheader("How far they agree", anchor=False)
    rows = [each for each in rows if each.prefixes]
    if len(rows) < 2:
        empty("One list has nothing to agree with", "Choose another run, or a published list.")
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
            help="Lists are compared at the same length, up to the shortest: the blocks each had removed by then.",
        )
    chart(
        compare.agreement(rows, removals),
        key="agreement",
        alt="Matrix of lists against lists: how many removed blocks each pair shares",
        table=lambda: compare.agreement_table(rows, removals),
    )
    heights = [each.num_blocks for each in rows]
    words = "; ".join(
        f"{shared_by_chance(removals, height):.2g} among {height} blocks"
        for height in sorted({each for each in heights if heights.count(each) > 1})
    )
    st.caption(
        f"Blocks that two lists share, of {removals}; only lists over as many blocks are compared. "
        + (f"Drawn blindly, two would share on average {words}." if words else "")
    )


def _table(runs: list[Run], rows: list[compare.Listed]) -> None:
    st.subheader("Side by side", anchor=False)
    table = compare.summary_table(runs, rows)
    numbers = [name for name in table if name.endswith((" before", " after"))]
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
                help="Of the held-out negative log-likelihood per token over the baseline, ± one standard error",
            ),
            "Seconds": st.column_config.NumberColumn(format="%.0f", width=80, help="Spent on the search itself"),
            "Removal list": st.column_config.TextColumn(width="large", help="In the order of removal, 0-based"),
        },
        alt="What each run was asked, what it removed and what that costs",
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
