"""Prediction alignment: exit statistics -> figures and tables. Knows no Streamlit.

Shares are in per cent on the screen and between 0 and 1 in tables. Blocks keep their original, 0-based index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.records import Alignment, ExitStatistics
from sleb.report.figures import style

HEIGHT = 380
FIRST, SETTLED = style.BLUE, style.ORANGE
"""Colours, in every chart, of the first block that agrees and of the block from which the prediction stays."""
FIRST_NAME, SETTLED_NAME = "First agreement", "Settles"
_MARGIN = dict(b=46)
_STRIP = -7.5  # centre, in per cent, of the strip of removed blocks below the axis


def agreement(
    exits: ExitStatistics, name: str, removed: Collection[int] = (), other: tuple[ExitStatistics, str] | None = None
) -> go.Figure:
    """Share of tokens whose prediction after each block agrees with the final one (paper, Figure 5).

    `other` is drawn dotted, for comparison; `removed` blocks have hatched cells below the line.
    """
    num_blocks = len(exits.agreement)
    removed_blocks = sorted(block for block in removed if block < num_blocks)
    traces: list[Any] = []
    if other is not None:
        traces.append(_share_line(*other, mode="lines", line=dict(color=style.GREY, width=2, dash="dot")))
    traces.append(
        _share_line(
            exits,
            name,
            mode="lines+markers",
            line=dict(color=FIRST, width=2.5),
            marker=dict(size=7 if num_blocks <= 40 else 5),
        )
    )
    if removed_blocks:
        traces.append(_removed_strip(removed_blocks))
    return style.figure(
        HEIGHT,
        *traces,
        hovermode="x unified",
        hoverdistance=-1,  # wherever the pointer is
        margin=_MARGIN,
        xaxis=_blocks(num_blocks, "After block"),
        yaxis=dict(
            title="Tokens that agree",
            range=[-12 if removed_blocks else -2, 103],
            zeroline=False,
            **_ticks(0, 25, 50, 75, 100),
        ),
    )


def _share_line(exits: ExitStatistics, name: str, **look: Any) -> go.Scatter:
    return go.Scatter(
        x=list(range(len(exits.agreement))),
        y=_per_cent(exits.agreement),
        name=name,
        hovertemplate=f"{name}: %{{y:.1f}} %<extra></extra>",
        **look,
    )


def _removed_strip(blocks: Sequence[int]) -> go.Bar:
    """Hatched cells below the axis, one for each removed block."""
    return go.Bar(
        x=blocks,
        y=[5.0] * len(blocks),
        base=[_STRIP - 2.5] * len(blocks),
        width=0.86,
        name="Removed",
        marker=dict(
            color="rgba(0,0,0,0)",
            line=dict(color=style.REMOVED, width=1),
            pattern=dict(shape="/", size=5, solidity=0.4, fgcolor=style.REMOVED),
        ),
        hovertemplate="removed by this run<extra></extra>",
    )


def recorded_agreement(alignment: Alignment) -> go.Figure:
    """Agreement on the calibration text and, where there is one, the model's own: for a page without a server."""

    def line(shares: Iterable[float], name: str, colour: str, dash: str) -> go.Scatter:
        return go.Scatter(
            y=[round(100 * value, 3) for value in shares],
            name=name,
            mode="lines+markers",
            line=dict(color=colour, width=2, dash=dash),
            marker=dict(size=5),
            hovertemplate="after block %{x}: %{y:.1f} %<extra></extra>",
        )

    traces = [line(alignment.calibration.agreement, "Calibration text", style.BLUE, "solid")]
    if alignment.generated is not None:
        traces.append(line(alignment.generated.agreement, "Generated text", style.ORANGE, "dash"))
    return style.figure(
        460,
        *traces,
        xaxis=dict(title="After block", zeroline=False),
        yaxis=dict(title="Tokens that agree", ticksuffix=" %", range=[0, 102]),
        showlegend=len(traces) > 1,
    )


def agreement_table(exits: ExitStatistics, removed: Collection[int] = ()) -> pd.DataFrame:
    """One row a block: share of tokens that agree with the final prediction, and whether the run removes it."""
    blocks = range(len(exits.agreement))
    return pd.DataFrame(
        {"block": blocks, "agreement": exits.agreement, "removed": [block in set(removed) for block in blocks]}
    )


def distribution(exits: ExitStatistics, *, cumulative: bool = False) -> go.Figure:
    """Share of tokens that could leave after each block, or up to it."""
    num_blocks = len(exits.first_exit)
    blocks = list(range(num_blocks))
    traces: list[Any] = []
    for counts, colour, name, dash in (
        (exits.first_exit, FIRST, FIRST_NAME, "solid"),
        (exits.settled_exit, SETTLED, SETTLED_NAME, "dash"),
    ):
        share = np.asarray(counts) / max(exits.token_count, 1)
        if cumulative:
            traces.append(
                go.Scatter(
                    x=blocks,
                    y=_per_cent(np.cumsum(share)),
                    name=name,
                    mode="lines",
                    line=dict(color=colour, width=2.5, dash=dash, shape="hv"),
                    hovertemplate=f"{name}: %{{y:.1f}} % of tokens<extra></extra>",
                )
            )
        else:
            traces.append(
                go.Bar(
                    x=blocks,
                    y=_per_cent(share),
                    name=name,
                    marker=dict(color=colour, line=dict(width=0)),
                    customdata=list(counts),
                    hovertemplate=f"{name}: %{{y:.1f}} % (%{{customdata:,}} tokens)<extra></extra>",
                )
            )
    figure = style.figure(
        HEIGHT,
        *traces,
        hovermode="x unified",
        hoverdistance=-1,  # wherever the pointer is
        barmode="group",
        bargap=0.22,
        bargroupgap=0.0,
        margin=_MARGIN,
        xaxis=_blocks(num_blocks, "Decided after block" if cumulative else "Ideal exit after block"),
        yaxis=dict(title="Share of tokens", ticksuffix=" %", rangemode="tozero", zeroline=False),
    )
    if cumulative:
        figure.add_hline(y=50, line=dict(color=style.GREY, width=1.5, dash="dot"))
        figure.update_yaxes(range=[-2, 103], **_ticks(0, 25, 50, 75, 100))
    return figure


def distribution_table(exits: ExitStatistics) -> pd.DataFrame:
    """One row a block: tokens that agree there first, and tokens that settle there."""
    return pd.DataFrame(
        {
            "block": range(len(exits.first_exit)),
            "first_agreement_tokens": exits.first_exit,
            "settles_tokens": exits.settled_exit,
        }
    )


def skipping(exits: ExitStatistics, removed_share: float | None = None) -> go.Figure:
    """Share of blocks an ideal early exit skips, by batch size (paper, Tables 5 and 6).

    `removed_share`, between 0 and 1, is what the run's removal list skips: the same at every batch size.
    """
    sizes = list(exits.skipped_share)
    traces = []
    for shares, colour, name, symbol, dash in (
        (exits.skipped_share, FIRST, FIRST_NAME, "circle", "solid"),
        (exits.settled_skipped_share, SETTLED, SETTLED_NAME, "diamond", "dash"),
    ):
        traces.append(
            go.Scatter(
                x=[str(size) for size in sizes],
                y=_per_cent([shares[size] for size in sizes]),
                name=name,
                mode="lines+markers",
                line=dict(color=colour, width=2.5, dash=dash),
                marker=dict(symbol=symbol, size=9),
                customdata=[exits.speedup(shares[size]) for size in sizes],
                hovertemplate=f"{name}: %{{y:.1f}} % of blocks, %{{customdata:.2f}} ×<extra></extra>",
            )
        )
    if removed_share:
        name = "This run's removal list"
        traces.append(
            go.Scatter(
                x=[str(size) for size in sizes],
                y=_per_cent([removed_share] * len(sizes)),
                name=name,
                mode="lines",
                line=dict(color=style.GREY, width=2, dash="dot"),
                customdata=[exits.speedup(removed_share)] * len(sizes),
                hovertemplate=f"{name}: %{{y:.1f}} % of blocks, %{{customdata:.2f}} ×<extra></extra>",
            )
        )
    return style.figure(
        HEIGHT,
        *traces,
        hovermode="x unified",
        hoverdistance=-1,  # wherever the pointer is
        xaxis=dict(
            title=dict(text="Batch size: tokens decoded together", standoff=10),
            type="category",
            showgrid=False,
            unifiedhovertitle=dict(text="batch of %{x}"),
        ),
        margin=_MARGIN,
        yaxis=dict(title="Blocks skipped", ticksuffix=" %", rangemode="tozero", zeroline=False),
    )


def skipping_table(exits: ExitStatistics) -> pd.DataFrame:
    """One row a batch size: share of blocks skipped and speedup, at the first agreement and once settled."""
    sizes = list(exits.skipped_share)
    first = [exits.skipped_share[size] for size in sizes]
    settled = [exits.settled_skipped_share[size] for size in sizes]
    return pd.DataFrame(
        {
            "batch": sizes,
            "first_skipped": first,
            "first_speedup": [exits.speedup(share) for share in first],
            "settled_skipped": settled,
            "settled_speedup": [exits.speedup(share) for share in settled],
        }
    )


def _per_cent(shares: Iterable[float]) -> list[float]:
    return [round(100 * float(share), 4) for share in shares]


def _ticks(*values: int) -> dict[str, Any]:
    """Ticks at these per cents; Plotly leaves out the suffix of ticks that are given one by one."""
    return dict(tickmode="array", tickvals=values, ticktext=[f"{value} %" for value in values])


def _blocks(num_blocks: int, title: str) -> dict[str, Any]:
    """An axis of block indices with ticks at whole numbers."""
    step = 1 if num_blocks <= 12 else 2 if num_blocks <= 24 else 5 if num_blocks <= 50 else 10
    return dict(
        title=dict(text=title, standoff=10),
        range=[-0.7, num_blocks - 0.3],
        tick0=0,
        dtick=step,
        zeroline=False,
        showgrid=False,
        unifiedhovertitle=dict(text="after block %{x}"),
    )
