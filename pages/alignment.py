"""Prediction alignment: after which block the next token is decided, and what an early exit could make of it."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import data
from app.components.token_view import has_ids, token_view
from app.page import run_page
from app.panels.token_choice import EVERYTHING, analysis_of, calibration_tokens, nothing_chosen, origin
from app.widgets import chart, empty, switch
from app.wording import plain
from sleb.records import Analysis, ExitStatistics, Run
from sleb.report.figures import alignment
from sleb.report.summaries import early_exits

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
    """Draw the controls; returns the chosen tokens, the statistics over them, and their description."""
    recorded = analysis.alignment
    which = CALIBRATION
    if recorded.generated is not None:
        which = switch(
            "Tokens",
            "source",
            NAMES,
            "The calibration text, or text that the model generated, as in the paper's Table 6. Models are usually "
            "surer of their own text, so its tokens leave a little earlier.",
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
    return f" No generated text: {plain(why)}" if why else ""


def _headline(exits: ExitStatistics) -> None:
    columns = st.columns(4)
    for column, batch in zip(columns, (1, 16), strict=False):
        skipped = early_exits.skipped(exits, batch)
        with column:
            _metric(
                f"Skipped at batch size {batch}",
                "–" if skipped is None else f"{skipped.first:.1%}",
                None if skipped is None else f"{skipped.first_speedup:.2f} × · settled {skipped.settled:.1%}",
                "Share of blocks that an ideal exit, which always knows the right moment, would skip, and the speedup, "
                f"if {batch} token{'s leave' if batch > 1 else ' leaves'} together (paper, Tables 5 and 6). Settled: "
                "if the exit waits until the prediction stays.",
            )
    decided = early_exits.decided(exits)
    with columns[2]:
        _metric(
            "Half agree by",
            "–" if decided.half_first is None else f"block {decided.half_first}",
            f"settled after block {decided.half_settled}",
            "The block by which the top prediction of at least half of the tokens has once been the final one.",
        )
    with columns[3]:
        _metric(
            "Need the last block",
            f"{decided.last_first:.1%}",
            f"settled {decided.last_settled:.1%}",
            "Share of tokens whose final prediction no earlier block makes. With one of them in a batch, nothing is "
            "skipped.",
        )


def _metric(label: str, value: str, below: str | None, help: str) -> None:
    st.metric(label, value, below, delta_color="off", delta_arrow="off", border=True, help=help)


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
        alt="Share of tokens whose prediction after each block agrees with the final one; removed blocks are hatched",
        table=lambda: alignment.agreement_table(exits, run.removal_list),
    )


def _distribution(exits: ExitStatistics) -> None:
    with _heading("Ideal exits"):
        count = switch(
            "Count",
            "exits",
            {"per-block": "Per block", "up-to": "Up to block"},
            "Tokens that leave after each block, or all that have left by then.",
            hidden_label=True,
        )
    chart(
        alignment.distribution(exits, cumulative=count == "up-to"),
        key="alignment-exits",
        alt="Share of tokens by ideal exit: the first block that agrees, and the block from which the prediction stays",
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
            alt="Share of blocks that an ideal early exit skips, by batch size, and that of the run's removal list",
            table=lambda: table,
        )
    with right:
        st.caption("A batch leaves with its slowest token: the more tokens, the fewer skipped blocks.")
        st.dataframe(
            table.style.format("{:.1%}", subset=["first_skipped", "settled_skipped"]).format(
                "{:.2f} ×", subset=["first_speedup", "settled_speedup"]
            ),
            hide_index=True,
            height="content",
            column_config={
                "batch": st.column_config.NumberColumn("Batch", help="Batch size: tokens decoded together."),
                "first_skipped": st.column_config.NumberColumn(
                    "Skipped", help="Share of blocks skipped, if tokens leave at the first agreement (paper, Table 5)."
                ),
                "first_speedup": st.column_config.NumberColumn(
                    "Speedup", help="1 / (1 − share skipped) (paper, Table 6)."
                ),
                "settled_skipped": st.column_config.NumberColumn(
                    "Settled", help="Share of blocks skipped, if tokens leave once their prediction has settled."
                ),
                "settled_speedup": st.column_config.NumberColumn(
                    "Speedup", help="Speedup, if tokens leave once their prediction has settled."
                ),
            },
            alt="Share of blocks skipped and speedup at each batch size",
        )


@st.fragment
def _passage(run: Run, analysis: Analysis, num_blocks: int) -> None:
    with _heading("Token by token"):
        at = switch(
            "Colour by",
            "colour",
            {"first": "First agreement", "settled": "Settles"},
            "First agreement: the first block whose top prediction is the final one (the paper's ideal exit). Settles: "
            "the block from which on it stays.",
            default="settled",
            hidden_label=True,
        )
    st.caption(
        "The beginning of the calibration text. A token's colour says by which block the **next** token is decided. "
        "Click a token, or use the arrow keys."
    )
    if not analysis.passage.tokens:
        empty("No passage", "This run recorded no text for the token view.")
        return
    token_view(run, analysis.passage, num_blocks, at)
    if not has_ids(analysis.passage):
        st.caption(
            "Recorded without token ids, so different tokens may look the same: the final prediction is marked only at "
            "the first agreement and from where it settles, and it is not compared with the token that follows. "
            "Analyse again to see both."
        )


def _heading(text: str) -> DeltaGenerator:
    """A subheader with a place for its switch; as tall without one, so that charts in a row line up."""
    row = st.container(
        horizontal=True, horizontal_alignment="distribute", vertical_alignment="center", height=52, border=False
    )
    with row:
        st.subheader(text, anchor=False, width="content")
    return row


def _how_to_read() -> None:
    with st.expander("How to read this", icon=":material/help:"):
        st.markdown(
            "The model's final norm and LM head, applied after every block, give each token a prediction of the next "
            "one. **First agreement** is the first block whose top prediction is the final one: the paper's *ideal "
            "exit* (B.1). It may be luck, and later blocks may change the prediction: it **settles** at the block from "
            "which all later ones agree too. A real exit would have to know that moment without running the remaining "
            "blocks, so both are upper bounds.\n\n**Why the batch size matters.** Tokens that are decoded together go "
            "through the blocks together. The batch can stop only where its slowest token can, and among many there is "
            "nearly always one that needs the last block. The numbers are exact averages over all batches that can be "
            "drawn from the measured tokens.\n\n**Why the paper removes blocks instead** (section 2.2). A removed "
            "block is skipped for every token, at every batch size, needs no predictor and saves memory; an ideal exit "
            "saved the paper's models 8 to 13 % at batch size 1 and nothing at batch size 16. But an ideal exit "
            "changes no prediction, and a removed block does. **Removal steps** shows how much."
        )


main()
