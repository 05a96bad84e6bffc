"""Where lists cut into their stacks -> a figure with one cell a block, and its table. Knows lists; reads no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from sleb.report.figures import style
from sleb.report.summaries.compared_lists import Listed

_CELL: dict[str, Any] = dict(
    textposition="inside",
    insidetextanchor="middle",
    textangle=0,
    textfont=dict(size=12),
    constraintext="inside",
    hovertemplate="%{hovertext}<extra></extra>",
)


_KEPT, _EDGE, _GAP = "rgba(128,128,128,0.10)", "rgba(128,128,128,0.45)", "rgba(255,255,255,0.7)"


_VOTES = "Lists that remove it"


def strips(rows: Sequence[Listed], *, relative: bool = False) -> go.Figure:
    """One row a list, one cell a block: removed ones filled and hatched, with the order of removal (Figure 8).

    `relative` puts the blocks at their relative depth in per cent, so that stacks of different height line up.
    """
    labels = [each.label for each in rows]
    kept = go.Bar(marker=dict(color=_KEPT, line=dict(color=_EDGE, width=1)), **_cells(rows, relative, removed=False))
    traces = [kept]
    for each in rows:
        hatching = dict(
            fillmode="overlay", shape="\\" if each.is_published else "/", size=8, solidity=0.12, fgcolor="#ffffff"
        )
        marker = dict(color=each.colour, line=dict(color=_GAP, width=1), pattern=hatching)
        cells = _cells([each], relative, removed=True)
        traces.append(go.Bar(marker=marker, insidetextfont=dict(color=style.ink_on(each.colour)), **cells))
    if len(rows) > 2 and len({each.num_blocks for each in rows}) == 1:
        traces.append(_votes(rows, relative))
        labels.append(_VOTES)
    most = max((each.num_blocks for each in rows), default=1)
    figure = style.figure(
        58 + 33 * len(labels),
        *traces,
        barmode="overlay",
        bargap=0.24,
        showlegend=False,
        margin=dict(t=8, b=46),
        uniformtext=dict(minsize=9, mode="hide"),
        yaxis=dict(categoryorder="array", categoryarray=labels[::-1], showgrid=False, ticklabelstandoff=10),
        xaxis=dict(
            title=dict(text="Block", standoff=10),
            range=[-0.5, most - 0.5],
            showgrid=False,
            zeroline=False,
            **_block_ticks(most),
        ),
    )
    if relative:
        axis = dict(title_text="Depth in the stack", range=[-0.2, 100.2], ticksuffix=" %", dtick=10, tick0=0)
        figure.update_xaxes(**axis, tickvals=None, tickmode="linear")
        figure.update_layout(margin=dict(r=28))  # half of the last label
    return figure


def _block_ticks(num_blocks: int) -> dict[str, Any]:
    step = 1 if num_blocks <= 16 else 2 if num_blocks <= 40 else 5
    return dict(tickmode="array", tickvals=list(range(0, num_blocks, step)))


def _cells(rows: Sequence[Listed], relative: bool, *, removed: bool) -> dict[str, Any]:
    """Base, width, label, text and hover text of the removed cells, or of the kept ones."""
    base: list[float] = []
    width: list[float] = []
    label, text, hover = [], [], []
    for each in rows:
        order = {block: place for place, block in enumerate(each.removal_list, 1)}
        for block in range(each.num_blocks):
            if (block in order) is not removed:
                continue
            unit = 100 / each.num_blocks if relative else 1.0
            base.append(block * unit - (0 if relative else 0.5))
            width.append(unit)
            label.append(each.label)
            text.append("" if each.is_chunk else str(order.get(block, "")))
            state = f"removed as number {order[block]} of {len(order)}" if removed else "kept"
            state = "removed with its chunk" if removed and each.is_chunk else state
            depth = (block + 0.5) / each.num_blocks
            hover.append(f"{style.plain(each.name)}<br>block {block} of {each.num_blocks} ({depth:.0%} deep): {state}")
    return dict(orientation="h", base=base, x=width, y=label, text=text, hovertext=hover, **_CELL)


def _votes(rows: Sequence[Listed], relative: bool) -> go.Bar:
    """A row that counts the lists which remove each block: the more, the lighter."""
    num_blocks = rows[0].num_blocks
    counts = [sum(block in each.removal_list for each in rows) for block in range(num_blocks)]
    hit = [block for block in range(num_blocks) if counts[block]]
    unit = 100 / num_blocks if relative else 1.0
    colours = sample_colorscale(style.SCALE, [counts[block] / len(rows) for block in hit])
    return go.Bar(
        orientation="h",
        base=[block * unit - (0 if relative else 0.5) for block in hit],
        x=[unit for _ in hit],
        y=[_VOTES for _ in hit],
        text=[str(counts[block]) for block in hit],
        marker=dict(color=colours, line=dict(color=_GAP, width=1)),
        hovertext=[f"block {block}: removed by {counts[block]} of {len(rows)} lists" for block in hit],
        **_CELL,
    )


def strips_table(rows: Sequence[Listed]) -> pd.DataFrame:
    """One row a removed block: list, order of removal, block, its relative depth."""
    return pd.DataFrame(
        [
            (each.letter, each.name, each.num_blocks, place, block, round((block + 0.5) / each.num_blocks, 4))
            for each in rows
            for place, block in enumerate(each.removal_list, 1)
        ],
        columns=["letter", "list", "blocks", "order", "block", "relative_depth"],
    )
