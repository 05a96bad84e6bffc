"""Prediction alignment: after which block the next token is decided, and what an early exit could make of it."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import data
from app.components.token_view import has_ids, token_view
from app.page import run_page
from app.panels.token_choice import EVERYTHING, analysis_of, calibration_tokens, nothing_chosen, origin
from app.widgets import chart, empty
from app.wording import plain
from sleb.analysis.prediction_alignment import half_decided
from sleb.records import Analysis, ExitStatistics, Run
from sleb.report.figures import alignment

CALIBRATION, GENERATED = "calibration", "generated"
NAMES = {CALIBRATION: "Calibration text", GENERATED: "Generated text"}


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page(
        "Prediction alignment", "After which block is the next token decided, and could the model stop there?"
    )
    analysis, stack = analysis_of(run)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        which, exits, about = _tokens(run, analysis)
    st.caption(f"On {plain(about)}.{_why_not_generated(analysis)}")
    _headline(exits)
    left, right = st.columns(2, gap="large")
    with left:
        _agreement(run, analysis, which, exits)
    with right:
        _distribution(exits)
    _skipping(run, exits, stack.num_blocks)
    _passage(run, analysis, stack.num_blocks)
    _how_to_read()


def _tokens(run: Run, analysis: Analysis) -> tuple[str, ExitStatistics, str]:
    """Controls; which tokens were chosen, the statistics over them, and what they are in words."""
    recorded = analysis.alignment
    which = CALIBRATION
    if recorded.generated is not None:
        which = st.segmented_control(
            "Tokens",
            [CALIBRATION, GENERATED],
            default=CALIBRATION,
            required=True,
            format_func=NAMES.__getitem__,
            key="source",
            bind="query-params",
            help="The calibration text, or text the model wrote itself, as in the paper's Table 6. Models are usually "
            "surer of their own words, so those leave a little earlier.",
        )
    if which == GENERATED and recorded.generated is not None:
        return which, recorded.generated, recorded.generated.source
    chosen = calibration_tokens(run, analysis, disabled=data.tokens_of(run) is None)
    if chosen.available is None or chosen.tokens == EVERYTHING:
        return which, recorded.calibration, recorded.calibration.source
    exits = data.exits_over(run, chosen.tokens)
    if exits is None:
        nothing_chosen()
    return which, exits, f"{exits.source} {origin(analysis, chosen)}"


def _why_not_generated(analysis: Analysis) -> str:
    why = analysis.alignment.generated_reason
    return f" No text of the model's own: {plain(why)}" if why else ""


def _headline(exits: ExitStatistics) -> None:
    first, settled = exits.skipped_share, exits.settled_skipped_share
    for column, size in zip(columns := st.columns(4), (1, 16), strict=False):
        with column:
            st.metric(
                f"Skipped at batch {size}",
                f"{first[size]:.1%}" if size in first else "–",
                f"{exits.speedup(first[size]):.2f} × · settled {settled[size]:.1%}" if size in first else None,
                delta_color="off",
                delta_arrow="off",
                border=True,
                help="Share of blocks that an exit which always knows the right moment would skip, and the speedup, if "
                f"{size} token{'s leave' if size > 1 else ' leaves'} together (paper, Tables 5 and 6). Settled: where "
                "the exit waits until the prediction stays.",
            )
    half, last = half_decided(exits.first_exit), exits.first_exit[-1] / max(exits.token_count, 1)
    half_settled = half_decided(exits.settled_exit)
    with columns[2]:
        st.metric(
            "Half first agree by",
            f"block {half}" if half is not None else "–",
            f"settled after block {half_settled}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="The first block by which the top prediction of at least half of the tokens has been the final one.",
        )
    with columns[3]:
        st.metric(
            "Need the last block",
            f"{last:.1%}",
            f"settled {exits.settled_exit[-1] / max(exits.token_count, 1):.1%}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="Tokens whose final prediction no earlier block has made. One of them in a batch, and nothing is "
            "skipped.",
        )


def _agreement(run: Run, analysis: Analysis, which: str, exits: ExitStatistics) -> None:
    _heading("Agreement with the final prediction")
    recorded = analysis.alignment
    other = None
    if recorded.generated is not None:
        other = (
            (recorded.calibration, NAMES[CALIBRATION]) if which == GENERATED else (recorded.generated, NAMES[GENERATED])
        )
    chart(
        alignment.agreement(exits, NAMES[which], run.removal_list, other),
        key="alignment-agreement",
        alt="Share of tokens whose prediction after each block is the model's final one; removed blocks are hatched",
        table=lambda: alignment.agreement_table(exits, run.removal_list),
    )


def _distribution(exits: ExitStatistics) -> None:
    with _heading("Ideal exits"):
        count = st.segmented_control(
            "Count",
            ["per-block", "up-to"],
            default="per-block",
            required=True,
            format_func={"per-block": "Per block", "up-to": "Up to block"}.__getitem__,
            key="exits",
            bind="query-params",
            label_visibility="collapsed",
            help="Tokens that leave after each block, or all that have left by then.",
        )
    chart(
        alignment.distribution(exits, cumulative=count == "up-to"),
        key="alignment-exits",
        alt="Share of tokens by ideal exit block: the first that agrees, and the one from which the prediction stays",
        table=lambda: alignment.distribution_table(exits),
    )


def _skipping(run: Run, exits: ExitStatistics, num_blocks: int) -> None:
    st.subheader("What an ideal early exit would skip", anchor=False)
    left, right = st.columns(2, gap="large")
    table = alignment.skipping_table(exits)
    with left:
        chart(
            alignment.skipping(exits, len(run.removal_list) / num_blocks),
            key="alignment-skipped",
            alt="Share of blocks an ideal early exit skips, by batch size, beside what the run's removal list skips",
            table=lambda: table,
        )
    with right:
        st.caption("A batch leaves when its slowest token does: the more tokens, the less is skipped.")
        st.dataframe(
            table.style.format("{:.1%}", subset=["first_skipped", "settled_skipped"]).format(
                "{:.2f} ×", subset=["first_speedup", "settled_speedup"]
            ),
            hide_index=True,
            height="content",
            column_config={
                "batch": st.column_config.NumberColumn("Batch", help="Tokens decoded together."),
                "first_skipped": st.column_config.NumberColumn(
                    "Skipped", help="Share of blocks, if tokens leave at the first agreement (paper, Table 5)."
                ),
                "first_speedup": st.column_config.NumberColumn(
                    "Speedup", help="1 / (1 − share skipped) (paper, Table 6)."
                ),
                "settled_skipped": st.column_config.NumberColumn(
                    "Settled", help="Share of blocks skipped, if tokens leave only once their prediction stays."
                ),
                "settled_speedup": st.column_config.NumberColumn(
                    "Speedup", help="The same as a speedup, if tokens leave only once their prediction stays."
                ),
            },
            alt="Share of blocks skipped and speedup at each batch size",
        )


@st.fragment
def _passage(run: Run, analysis: Analysis, num_blocks: int) -> None:
    with _heading("Token by token"):
        at = st.segmented_control(
            "Colour by",
            ["first", "settled"],
            default="settled",
            required=True,
            format_func={"first": "First agreement", "settled": "Settles"}.__getitem__,
            key="colour",
            bind="query-params",
            label_visibility="collapsed",
            help="First agreement: the first block whose top prediction is the final one (the paper's ideal exit). "
            "Settles: the block from which on it stays.",
        )
    st.caption(
        "The beginning of the calibration text. A token's colour says when the model has decided what comes **after** "
        "it. Click one, or walk with the arrow keys."
    )
    if not analysis.passage.tokens:
        empty("No passage", "This run recorded no text for the token view.")
        return
    token_view(run, analysis.passage, num_blocks, at)
    if not has_ids(analysis.passage):
        st.caption(
            "This was recorded without token ids, and different tokens may look the same: the final prediction is "
            "marked where it is known to be the first choice, at the first agreement and from where it settles on. "
            "Whether the text goes on in the same way is not said. Analyse again to see both."
        )


def _heading(text: str) -> DeltaGenerator:
    """A subheader, and a place beside it for its switch; as tall without one, so that charts in a row line up."""
    row = st.container(
        horizontal=True, horizontal_alignment="distribute", vertical_alignment="center", height=52, border=False
    )
    with row:
        st.subheader(text, anchor=False, width="content")
    return row


def _how_to_read() -> None:
    with st.expander("How to read this", icon=":material/help:"):
        st.markdown(
            "Read out after every block, with the model's own final norm and head, each token has a prediction of the "
            "next one. **First agreement** is the first block whose top prediction is the one the whole model ends up "
            "with: the paper's *ideal exit* (B.1). It may be luck, and later blocks may change their mind: the "
            "prediction **settles** at the block from which all later ones agree too. An exit would have to know "
            "that moment without having run the rest, so both are upper bounds.\n\n"
            "**Why the batch size matters.** Tokens that are decoded together go through the blocks together. The "
            "batch can stop only where its slowest token can, and among many there is nearly always one that needs the "
            "last block. The figures are exact averages over all batches that can be drawn from the measured tokens."
            "\n\n"
            "**Why the paper removes blocks instead** (section 2.2). What is removed is skipped for every token, at "
            "every batch size, needs no predictor and saves memory; an ideal exit saved the paper's models 8 to 13 % "
            "at batch 1 and nothing at batch 16. The price is another one: an ideal exit changes no prediction, a "
            "removed block does. **Removal steps** shows how much."
        )


main()
