"""How alike the outputs of any two blocks are -> heatmaps and a table. Knows records; knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.analysis.similarity import TokenSimilarity
from sleb.records import Similarity
from sleb.report.figures import style
from sleb.report.summaries.block_pair import EMBEDDING, MEASURE_NAMES, Measure, Pick, label, number

Colours = Literal["fitted", "ranks", "whole"]
"""The range of colours: that of most pairs of blocks; by rank, each colour with as many cells; or 0 to 1."""

PICKED, _HALO = "#ffffff", "#000000"


def colour_range(matrix: np.ndarray, measure: Measure) -> tuple[float, float]:
    """The ends of fitted colours: over pairs of different blocks, without the two per cent least alike.

    The diagonal and the embedding would take most of the scale, and leave one colour for all blocks.
    """
    blocks = matrix[1:, 1:]
    others = blocks[~np.eye(len(blocks), dtype=bool)]
    if len(others) == 0:
        return 0.0, 1.0
    ends = np.quantile(others, [0.02, 1.0] if measure == "cosine" else [0.0, 0.98])
    return (float(ends[0]), float(ends[1])) if ends[1] - ends[0] > 1e-9 else (float(ends[0]) - 1e-3, float(ends[1]))


def ranks(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` (one dimension) that are lower than each value, in [0, 1]; NaN stays."""
    return np.where(np.isnan(values), np.nan, np.searchsorted(np.sort(others), values) / max(1, len(others)))


def coloured(
    values: np.ndarray, others: np.ndarray, fitted: tuple[float, float], measure: Measure, colours: Colours
) -> dict[str, Any]:
    """Values and colour bar of a heatmap; ranks are counted among `others`."""
    bar, scale = _colour_bar(MEASURE_NAMES[measure]), dict(colorscale=style.SCALE, reversescale=measure == "angular")
    if colours == "ranks":
        quarters = np.quantile(others, [0, 0.25, 0.5, 0.75, 1])
        bar |= dict(tickvals=[0, 0.25, 0.5, 0.75, 1], ticktext=[number(float(each)) for each in quarters])
        return dict(z=ranks(values, others).astype(np.float32), zmin=0, zmax=1, colorbar=bar, **scale)
    low, high = (0.0, 1.0) if colours == "whole" else fitted
    return dict(z=values.astype(np.float32), zmin=low, zmax=high, colorbar=bar, **scale)


def heatmap(
    similarities: TokenSimilarity,
    measure: Measure,
    *,
    removed: Collection[int] = (),
    pick: Pick | None = None,
    colours: Colours = "fitted",
    height: int = 590,
) -> go.Figure:
    """Every output against every other (paper, Figure 6): bright is alike, in either measure.

    Its last trace is transparent and catches clicks: a heatmap's own do not reach Streamlit.
    """
    matrix = similarities.mean if measure == "cosine" else similarities.angular
    blocks = np.arange(EMBEDDING, len(matrix) - 1)
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    shown = coloured(matrix, pairs, colour_range(matrix, measure), measure, colours)
    last, strip, edge = len(matrix) - 2, 0.035 * len(matrix), 0.012 * len(matrix)
    axis: dict[str, Any] = dict(
        showgrid=False, zeroline=False, constrain="domain", ticks="", **_ticks(len(matrix) - 1)
    )  # fmt: skip
    return style.figure(
        height,
        go.Heatmap(x=blocks, y=blocks, hoverinfo="skip", **shown),
        *_edge_marks(sorted(removed), last, strip, len(matrix)),
        click_catcher(
            x=np.tile(blocks, len(blocks)),
            y=np.repeat(blocks, len(blocks)),
            size=max(5, round(480 / len(matrix))),
            customdata=np.stack([similarities.mean.ravel(), similarities.angular.ravel()], axis=1).astype(np.float32),
            hovertemplate="outputs of %{y} and %{x}<br>cosine similarity %{customdata[0]:.6~f}"
            "<br>angular distance %{customdata[1]:.6~f}<extra></extra>",
        ),
        shapes=[*_outlined(removed), *_picked(pick, len(matrix))],
        margin=dict(t=30, r=4),
        hovermode="closest",
        uirevision="heatmap",
        xaxis=dict(
            title=dict(text="Output of block", standoff=6),
            range=[-1.5 - strip, last + 0.5 + edge],
            scaleanchor="y",
            **axis,
        ),
        yaxis=dict(title=dict(text="Output of block", standoff=14), range=[last + 0.5 + strip, -1.5 - edge], **axis),
    )


def recorded_heatmap(similarity: Similarity) -> go.Figure:
    """Mean cosine similarity as a run recorded it, without choices: for a page without a server."""
    count = len(similarity.mean)
    names = [label(block) for block in range(EMBEDDING, count - 1)]
    every = max(1, math.ceil(count / 16))
    ticks = dict(tickvals=list(range(0, count, every)), ticktext=names[::every], showgrid=False, zeroline=False)
    return style.figure(
        460,
        go.Heatmap(
            z=[[round(value, 4) for value in row] for row in similarity.mean],
            customdata=[[(row, column) for column in names] for row in names],
            colorscale=style.SCALE,
            colorbar=dict(thickness=12, outlinewidth=0),
            hovertemplate="%{customdata[0]} and %{customdata[1]}: %{z:.3f}<extra></extra>",
        ),
        xaxis=dict(title="Output of block", constrain="domain", **ticks),
        yaxis=dict(title="Output of block", scaleanchor="x", constrain="domain", autorange="reversed", **ticks),
    )


def click_catcher(**trace: Any) -> go.Scattergl:
    """Transparent squares of a `size` in pixels over the cells of a heatmap: they catch clicks and show hover texts."""
    clear = dict(marker=dict(opacity=0))
    marker = dict(size=trace.pop("size"), symbol="square", opacity=0)
    return go.Scattergl(mode="markers", marker=marker, selected=clear, unselected=clear, showlegend=False, **trace)


def frame_around(x: float, y: float, half_side: float) -> list[dict[str, Any]]:
    """Shapes that frame a picked cell, on dark and on bright ground."""
    frame = dict(type="rect", x0=x - half_side, x1=x + half_side, y0=y - half_side, y1=y + half_side)
    return [frame | dict(line=dict(color=_HALO, width=5)), frame | dict(line=dict(color=PICKED, width=2.5))]


def _colour_bar(title: str) -> dict[str, Any]:
    return dict(title=dict(text=title, side="right"), thickness=14, outlinewidth=0, x=1.01, xpad=4, len=1.0, ypad=0)


def _ticks(num_blocks: int) -> dict[str, Any]:
    step = tick_step(num_blocks)
    shown = [EMBEDDING, *range(0 if num_blocks <= 16 else step, num_blocks, step)]
    return dict(tickmode="array", tickvals=shown, ticktext=[label(block) for block in shown])


def tick_step(num_blocks: int) -> int:
    """Distance of the ticks on an axis of so many blocks."""
    return 1 if num_blocks <= 16 else 2 if num_blocks <= 34 else 5 if num_blocks <= 50 else 10


def _edge_marks(removed: Sequence[int], last: int, strip: float, points: int) -> list[Any]:
    """A triangle at the row and at the column of every removed block."""
    if not removed:
        return []
    hover = [f"block {block}: removed by this run" for block in removed]
    size = 9 if points <= 40 else 7
    places = (
        ("triangle-right", [-1.5 - strip / 2] * len(removed), removed),
        ("triangle-up", removed, [last + 0.5 + strip / 2] * len(removed)),
    )
    return [
        go.Scatter(
            x=list(x),
            y=list(y),
            mode="markers",
            marker=dict(symbol=symbol, size=size, color=style.ORANGE),
            hovertext=hover,
            hoverinfo="text",
            name="removed by this run",
            legendgroup="removed",
            showlegend=symbol == "triangle-right",
        )
        for symbol, x, y in places
    ]


def _outlined(removed: Collection[int]) -> list[dict[str, Any]]:
    """The cells of removed blocks on the diagonal."""
    if not removed:
        return []
    path = " ".join(
        f"M{block - 0.5},{block - 0.5} H{block + 0.5} V{block + 0.5} H{block - 0.5} Z" for block in sorted(removed)
    )
    return [dict(type="path", path=path, line=dict(color=style.ORANGE, width=2), fillcolor="rgba(0,0,0,0)")]


def _picked(pick: Pick | None, points: int) -> list[dict[str, Any]]:
    """A frame around the picked cell, and lines to its labels."""
    if pick is None:
        return []
    row, column = pick
    half_side = max(0.5, points / 90)
    lines = [
        dict(type="line", x0=-1.5, x1=column - half_side, y0=row, y1=row),
        dict(type="line", x0=column, x1=column, y0=row + half_side, y1=points - 1.5),
    ]
    return [
        *(each | dict(line=dict(color=PICKED, width=1, dash="dot")) for each in lines),
        *frame_around(column, row, half_side),
    ]


def heatmap_table(similarities: TokenSimilarity) -> pd.DataFrame:
    """One row a pair of outputs, the earlier one first, each pair once."""
    earlier, later = np.triu_indices(len(similarities.mean))
    return pd.DataFrame(
        {
            "output": [label(int(index) - 1) for index in earlier],
            "other_output": [label(int(index) - 1) for index in later],
            "cosine": similarities.mean[earlier, later],
            "angular_distance": similarities.angular[earlier, later],
        }
    )
