"""Similarity: how alike block outputs are (paper, 3.1, Figure 6, equation 3), and which blocks lie between two."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import data
from app.page import run_page
from app.panels.token_choice import EVERYTHING, Chosen, analysis_of, calibration_tokens, nothing_chosen, origin
from app.widgets import chart, switch
from sleb.analysis.similarity import TokenSimilarity, recorded
from sleb.records import Analysis, Run, StackDescription
from sleb.report.figures import block_turns, similarity
from sleb.report.figures.similarity import Colours
from sleb.report.summaries import block_pair
from sleb.report.summaries.block_pair import Measure, Pick

MAP, CHUNKS, PANEL = "similarity-map", "chunks", "pair-details"
TOKENS = {"mean": "Calibration tokens", "random": "One random token"}
MEASURES: dict[Measure, str] = {"cosine": "Cosine", "angular": "Angular distance"}
COLOURS: dict[Colours, str] = {"fitted": "Fitted", "ranks": "By rank", "whole": "0 to 1"}
PANEL_STYLE = f"<style>div:has(> .st-key-{PANEL}) {{min-width: 380px; max-width: 720px}}</style>"
"""Puts the panel beside the map while there is room, else below it."""
COLOURS_EXPLAINED: dict[Colours, str] = {
    "fitted": "Values beyond the colour bar have the colour of its end.",
    "ranks": "Colours follow the order of all pairs, not their values.",
    "whole": "Values below 0 have the colour of 0.",
}
READING = """
**A bright cell** says that the outputs of its two blocks point in nearly the same direction: the blocks between them
turned the hidden states only a little. Each block adds to its input, so neighbours are mostly alike, and the diagonal,
an output with itself, is 1. Look for bright squares along it: consecutive blocks that together change little. A dark
seam is a block that changes much, often the first or the last.

**The first token dominates.** Many models give the first token of every sequence a huge vector that later blocks hardly
turn. The paper's single random token, fed alone, is such a first token, which is why its map is often brighter than the
mean over a text. The shorter the sequences, the larger the share of first tokens: *Leave out first tokens* shows the
others.

**Metric1** is 1 − the similarity of a block's own input and output. It says how far a block turns its input, not what
the rest of the model makes of it: the model is never run without the block. A small turn can matter much, and blocks
that are each unimportant can be important together. All of this is measured on the baseline; once a block is removed,
later blocks see other inputs. That is why the paper removes blocks by Metric3 (3.2, Figure 7): see **Removal steps**.

**Counting.** Block indices are original and 0-based. Between the output of block *a* and the output of block *b* lie
blocks *a* + 1 to *b*, both included; as a half-open range, as in Python and mergekit, `[a+1, b+1)`.
"""


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page("Similarity", "Which blocks change the hidden states least?")
    analysis, stack = analysis_of(run)
    with st.container(horizontal=True, gap="medium"):
        tokens = switch(
            "Tokens",
            "tokens",
            TOKENS,
            "The paper feeds a single random token to the model (3.1, Figure 6). The mean over many calibration tokens "
            "is closer to real text.",
        )
        measure = switch(
            "Measure",
            "measure",
            MEASURES,
            "Cosine similarity: 1 is the same direction, 0 a right angle (paper, equation 2). Angular distance is the "
            "angle divided by 180 degrees: 0 is the same direction, 0.5 a right angle; it distinguishes very similar "
            "outputs.",
        )
        colours = switch(
            "Colours",
            "colours",
            COLOURS,
            "Fitted: over the range of most pairs of blocks. By rank: each colour has the same number of cells, so "
            "that the smallest differences show. 0 to 1: the same for all runs and choices.",
        )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = calibration_tokens(run, analysis, disabled=tokens == "random")
    similarities, about = _numbers(run, analysis, tokens, chosen)
    st.caption(f"{about} Measured on the baseline: no block is removed here.")
    st.html(PANEL_STYLE)
    _pictures(run, stack, similarities, measure, colours)
    with st.expander("How to read this", icon=":material/help:"):
        st.markdown(READING)
        st.page_link("../pages/steps.py", label="Go to Removal steps", icon=":material/layers_clear:")


def _numbers(run: Run, analysis: Analysis, tokens: str, chosen: Chosen) -> tuple[TokenSimilarity, str]:
    """The similarities over the chosen tokens, and a sentence that names these tokens."""
    about = analysis.description
    if tokens == "random":
        token = analysis.similarity.random_token_id
        return recorded(
            analysis, "random"
        ), f"Over 1 token, fed alone: entry {token} of the vocabulary, drawn at random."
    if chosen.tokens == EVERYTHING:
        text = f"Mean over all {about.token_count:,} tokens analysed, of {about.sequences} calibration sequences."
        return recorded(analysis, "all"), text
    if chosen.available is None:
        means = recorded(analysis, "without first")
        return means, (
            f"Mean over {means.token_count:,} tokens, recorded by the run. Its angular distances are those of the mean "
            "cosine here. Sequences and positions can be chosen only where the tokens are: this folder has none."
        )
    over = data.similarity_over(run, chosen.tokens)
    if over is None:
        nothing_chosen()
        st.stop()
    return over, f"Mean over {over.token_count:,} {origin(analysis, chosen)}."


@st.fragment
def _pictures(
    run: Run, stack: StackDescription, similarities: TokenSimilarity, measure: Measure, colours: Colours
) -> None:
    """Everything that a click changes; nothing else runs again for it."""
    pick = block_pair.parse(st.query_params.get("cell"), stack.num_blocks)
    with st.container(horizontal=True, gap="large"):
        with st.container(width=640):
            _map(run, similarities, measure, colours, pick)
        with st.container(border=True, key=PANEL):
            _details(run, stack, similarities, pick)
    left, right = st.columns(2, gap="large")
    with left:
        _neighbours(run, similarities)
    with right:
        _chunks(similarities, colours, pick)


def _map(run: Run, similarities: TokenSimilarity, measure: Measure, colours: Colours, pick: Pick | None) -> None:
    removed = run.removal_list
    chart(
        similarity.heatmap(similarities, measure, removed=removed, pick=pick, colours=colours),
        key=MAP,
        alt=f"{MEASURES[measure]} between the outputs of every two blocks, the embedding first; removed blocks have "
        "triangles at the axes and outlined cells on the diagonal",
        table=lambda: similarity.heatmap_table(similarities),
        on_pick=lambda: _picked(MAP, lambda row, column: (row, column)),
    )
    st.caption(
        f"Bright is alike. {COLOURS_EXPLAINED[colours]} "
        "“in” is the embedding, which is block 0's input."
        + (f" Triangles and outlines: the {len(removed)} blocks that this run removed." if removed else "")
    )


def _picked(key: str, cell: Callable[[int, int], Pick]) -> None:
    """Put the clicked cell into the address, from which the page is drawn; a second click changes nothing."""
    points = st.session_state[key]["selection"]["points"]
    if points:
        st.query_params["cell"] = block_pair.address(cell(round(points[0]["y"]), round(points[0]["x"])))


def _listed() -> None:
    """Put the blocks that were chosen from the lists into the address: the way without a mouse."""
    row, column = st.session_state["cell-row"], st.session_state["cell-column"]
    if row is not None and column is not None:
        st.query_params["cell"] = block_pair.address((row, column))


def _details(run: Run, stack: StackDescription, similarities: TokenSimilarity, pick: Pick | None) -> None:
    """Facts about the two outputs of a cell, and about the blocks between them."""
    if pick is None:
        st.markdown("#### Click a cell")
        st.markdown(
            "Facts about its two outputs and the blocks between them appear here. A cell beside the diagonal compares "
            "a block's input and output; the farther from it, the more blocks lie between. Or choose from the lists:"
        )
    else:
        st.markdown(f"#### {block_pair.pair_title(pick)}")
        st.session_state["cell-row"], st.session_state["cell-column"] = pick
    with st.container(horizontal=True):
        for side in ("row", "column"):
            st.selectbox(
                f"Output of ({side})",
                range(block_pair.EMBEDDING, stack.num_blocks),
                index=None,
                format_func=lambda block: block_pair.name(block).capitalize(),
                placeholder="Choose",
                key=f"cell-{side}",
                on_change=_listed,
                width=190,
                help=f"The {side} of the cell. A click on the map or on a chunk further below sets it.",
            )
    if pick is None:
        return
    facts = block_pair.pair(similarities, pick, run.removal_list)
    with st.container(horizontal=True, gap="large"):
        st.metric("Cosine similarity", block_pair.number(facts.cosine), width="content")
        st.metric("Angular distance", block_pair.number(facts.angular), width="content")
        st.metric("Blocks between", len(facts.between), width="content")
    st.markdown(block_pair.between_words(facts, run.spec.kind == "search"))
    st.markdown(block_pair.details_table(run, similarities, pick))


def _neighbours(run: Run, similarities: TokenSimilarity) -> None:
    st.subheader("Single blocks: Metric1", anchor=False)
    chart(
        block_turns.neighbours(similarities, removed=run.removal_list),
        key="metric1",
        alt="Metric1 of every block, removed blocks as crosses, the lowest five labelled",
        table=lambda: block_turns.neighbours_table(run, similarities),
    )
    least = ", ".join(map(str, block_turns.least(similarities.metric1)))
    st.caption(
        "1 − cosine similarity of a block's input and output (paper, equation 3; elsewhere called Block Influence). "
        f"The lowest, in order: {least}."
    )


def _chunks(similarities: TokenSimilarity, colours: Colours, pick: Pick | None) -> None:
    st.subheader("Contiguous chunks", anchor=False)
    chart(
        block_turns.chunks(similarities, pick=pick, colours=colours),
        key=CHUNKS,
        alt="Angular distance between input and output of every contiguous chunk, by first block and length; the best "
        "chunk of each length has a dot",
        table=lambda: block_turns.chunks_table(similarities),
        on_pick=lambda: _picked(CHUNKS, lambda length, start: (start - 1, start + length - 1)),
    )
    st.caption(
        "Angular distance between input and output of a chunk of consecutive blocks. A dot marks the chunk of each "
        "length that turns its input least: the one that the “deeper layers” papers would remove."
    )


main()
