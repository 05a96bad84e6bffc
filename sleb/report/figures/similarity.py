"""How alike block outputs are -> figures and tables. Knows records; knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.analysis.similarity import TokenSimilarity, best_chunks
from sleb.records import Run
from sleb.report.figures import style
from sleb.report.summaries.block_pair import EMBEDDING, FLOOR, MEASURE_NAMES, Measure, Pick, label, number, state_of

Colours = Literal["fitted", "ranks", "whole"]
"""Over the range of most pairs of blocks; by rank, so that every colour has as many cells; or 0 to 1 for every run."""

_PICKED, _HALO = "#ffffff", "#000000"


def colour_range(matrix: np.ndarray, measure: Measure) -> tuple[float, float]:
    """Where fitted colours start and end: over pairs of different blocks, less the two per cent least alike.

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


def _coloured(
    values: np.ndarray, others: np.ndarray, fitted: tuple[float, float], measure: Measure, colours: Colours
) -> dict[str, Any]:
    """What a heatmap shows, and its colour bar; `others` are those of its values that ranks are counted in."""
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
    coloured = _coloured(matrix, pairs, colour_range(matrix, measure), measure, colours)
    last, strip, edge = len(matrix) - 2, 0.035 * len(matrix), 0.012 * len(matrix)
    rows, columns = np.repeat(blocks, len(blocks)), np.tile(blocks, len(blocks))
    traces: list[Any] = [
        go.Heatmap(x=blocks, y=blocks, hoverinfo="skip", **coloured),
        *_edge_marks(sorted(removed), last, strip, len(matrix)),
        go.Scattergl(
            x=columns,
            y=rows,
            mode="markers",
            marker=dict(size=max(5, round(480 / len(matrix))), symbol="square", opacity=0),
            selected=dict(marker=dict(opacity=0)),
            unselected=dict(marker=dict(opacity=0)),
            customdata=np.stack([similarities.mean.ravel(), similarities.angular.ravel()], axis=1).astype(np.float32),
            hovertemplate="outputs of %{y} and %{x}<br>cosine %{customdata[0]:.6~f}"
            "<br>angular distance %{customdata[1]:.6~f}<extra></extra>",
            showlegend=False,
        ),
    ]
    ticks = _ticks(len(matrix) - 1)
    axis: dict[str, Any] = dict(showgrid=False, zeroline=False, constrain="domain", ticks="", **ticks)
    return style.figure(
        height,
        *traces,
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


def _colour_bar(title: str) -> dict[str, Any]:
    return dict(title=dict(text=title, side="right"), thickness=14, outlinewidth=0, x=1.01, xpad=4, len=1.0, ypad=0)


def _ticks(num_blocks: int) -> dict[str, Any]:
    step = _tick_step(num_blocks)
    shown = [EMBEDDING, *range(0 if num_blocks <= 16 else step, num_blocks, step)]
    return dict(tickmode="array", tickvals=shown, ticktext=[label(block) for block in shown])


def _tick_step(num_blocks: int) -> int:
    return 1 if num_blocks <= 16 else 2 if num_blocks <= 34 else 5 if num_blocks <= 50 else 10


def _edge_marks(removed: Sequence[int], last: int, strip: float, points: int) -> list[Any]:
    """A triangle at the row and one at the column of every removed block."""
    if not removed:
        return []
    hover = [f"block {block} is removed by this run" for block in removed]
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
    frame = dict(type="rect", x0=column - half_side, x1=column + half_side, y0=row - half_side, y1=row + half_side)
    lines = [
        dict(type="line", x0=-1.5, x1=column - half_side, y0=row, y1=row),
        dict(type="line", x0=column, x1=column, y0=row + half_side, y1=points - 1.5),
    ]
    return [
        *(each | dict(line=dict(color=_PICKED, width=1, dash="dot")) for each in lines),
        frame | dict(line=dict(color=_HALO, width=5)),
        frame | dict(line=dict(color=_PICKED, width=2.5)),
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


def neighbours(similarities: TokenSimilarity, *, removed: Collection[int] = (), height: int = 400) -> go.Figure:
    """Metric1 of every block (paper, equation 3): how far each turns its own input. The least five are labelled."""
    metric1 = similarities.metric1
    blocks = np.arange(len(metric1))
    is_removed = np.isin(blocks, list(removed))
    axis, in_decades = _metric1_axis(metric1)
    heights = np.maximum(metric1, FLOOR) if in_decades else metric1
    traces: list[Any] = [
        go.Scatter(
            x=blocks, y=heights, mode="lines", line=dict(color=style.GREY, width=1), hoverinfo="skip", showlegend=False
        )
    ]
    kinds = ((~is_removed, "alive", style.BLUE, "circle"), (is_removed, "removed by this run", style.ORANGE, "x"))
    for chosen, words, colour, symbol in kinds:
        if chosen.any():
            traces.append(
                go.Scatter(
                    x=blocks[chosen],
                    y=heights[chosen],
                    customdata=metric1[chosen],
                    mode="markers",
                    name=words,
                    marker=dict(color=colour, symbol=symbol, size=9 if len(blocks) <= 40 else 7),
                    hovertemplate="block %{x}: Metric1 %{customdata:.4g}<extra>" + words + "</extra>",
                )
            )
    return style.figure(
        height,
        *traces,
        annotations=_least_labels(least(metric1), np.log10(heights) if in_decades else heights),
        showlegend=bool(is_removed.any()),
        hovermode="closest",
        xaxis=dict(title="Block", range=[-0.8, len(blocks) - 0.2], zeroline=False, showgrid=False),
        yaxis=dict(title="Metric1" + (", log scale" if in_decades else ""), zeroline=False, **axis),
    )


def least(metric1: np.ndarray, count: int = 5) -> list[int]:
    """The blocks that turn their input least, the very least first."""
    return [int(block) for block in np.argsort(metric1, kind="stable")[:count]]


def _least_labels(blocks: Sequence[int], heights: np.ndarray) -> list[dict[str, Any]]:
    """Labels below some blocks; those of near blocks hang lower and lower, each on its own line."""
    labels: list[dict[str, Any]] = []
    place, before = 0, -math.inf
    for block in sorted(blocks):
        place = place + 1 if block - before < 0.035 * len(heights) else 0
        before = block
        line = dict(ax=0, ay=20 + 17 * place, yanchor="top", arrowhead=0, arrowwidth=1, arrowcolor=style.GREY)
        labels.append(dict(x=block, y=float(heights[block]), text=f"<b>{block}</b>", standoff=5, **line))
    return labels


def _metric1_axis(metric1: np.ndarray) -> tuple[dict[str, Any], bool]:
    """The axis, with room for labels below the least; logarithmic where the values span more than a decade."""
    low, high = float(metric1.min()), float(metric1.max())
    if high < 10 * max(low, FLOOR):
        room = 0.05 * (high - min(low, 0.0)) + 1e-9
        unit = 10.0 ** math.floor(math.log10(max(high, 1e-9)))
        step = next(each for each in (0.2 * unit, 0.5 * unit, unit, 2 * unit) if high <= 6 * each)
        shown = [step * place for place in range(7) if step * place <= high + room]  # none below 0: labels hang there
        bounds = [min(low, 0.0) - 6 * room, high + room]
        return dict(range=bounds, tickvals=shown, ticktext=[f"{each:.4g}" for each in shown]), False
    first, last = math.log10(max(low, FLOOR)), math.log10(high)
    digits = (1, 2, 5) if last - first < 2.5 else (1,)
    bounds = [first - 0.38 * (last - first), last + 0.06 * (last - first)]
    lowest = max(bounds[0], math.log10(FLOOR) - 1e-9)
    ticks = [digit * 10.0**power for power in range(math.floor(first) - 2, math.ceil(last) + 1) for digit in digits]
    shown = [each for each in ticks if lowest <= math.log10(each) <= bounds[1]]
    words = [f"{each:g}" if each >= 1e-3 else f"10<sup>{math.log10(each):.0f}</sup>" for each in shown]
    if low < FLOOR:
        words[0] = "≤ " + words[0]
    return dict(type="log", range=bounds, tickvals=shown, ticktext=words), True


def neighbours_table(run: Run, similarities: TokenSimilarity) -> pd.DataFrame:
    """One row a block: its Metric1, its rank (1 turns its input least) and what became of it."""
    metric1 = similarities.metric1
    return pd.DataFrame(
        {
            "block": np.arange(len(metric1)),
            "metric1": metric1,
            "rank": pd.Series(metric1).rank(method="min").astype(int),
            "state": [state_of(run, block) for block in range(len(metric1))],
        }
    )


def chunks(
    similarities: TokenSimilarity, *, pick: Pick | None = None, colours: Colours = "fitted", height: int = 400
) -> go.Figure:
    """How far every contiguous chunk turns its input, by its start and its length; the best of each length marked.

    Its last trace is transparent and catches clicks.
    """
    distances = similarities.chunk_angular_distance
    count = len(distances)
    lengths = np.arange(1, count + 1)
    best, edge, step = best_chunks(distances), 0.012 * count, _tick_step(2 * count)
    # The whole stack and the first block have no like, and would take most of the scale.
    inner = distances[:, 1:][np.isfinite(distances[:, 1:])]
    low, high = (float(each) for each in np.quantile(inner, [0.0, 0.98])) if len(inner) > 1 else (0.0, 1.0)
    fitted = (low, high if high > low else low + 1e-3)
    coloured = _coloured(distances, distances[np.isfinite(distances)], fitted, "angular", colours)
    rows, starts = np.nonzero(np.isfinite(distances))
    shapes: list[dict[str, Any]] = []
    if pick is not None and pick[0] != pick[1]:
        start, length = min(pick) + 1, abs(pick[0] - pick[1])
        half_side = max(0.5, count / 90)
        frame = dict(
            type="rect", x0=start - half_side, x1=start + half_side, y0=length - half_side, y1=length + half_side
        )
        shapes = [frame | dict(line=dict(color=_HALO, width=5)), frame | dict(line=dict(color=_PICKED, width=2.5))]
    return style.figure(
        height,
        go.Heatmap(
            x=np.arange(count),
            y=lengths,
            **coloured,
            hoverinfo="skip",
            hoverongaps=False,
        ),
        go.Scatter(
            x=best,
            y=lengths,
            mode="markers",
            name="best chunk of its length",
            marker=dict(
                size=7 if count <= 40 else 4,
                color=style.ORANGE,
                line=dict(width=1 if count <= 40 else 0, color=_PICKED),
            ),
            hoverinfo="skip",
        ),
        go.Scattergl(
            x=starts,
            y=rows + 1,
            mode="markers",
            marker=dict(size=6, symbol="square", opacity=0),
            selected=dict(marker=dict(opacity=0)),
            unselected=dict(marker=dict(opacity=0)),
            customdata=np.stack([starts + rows, distances[rows, starts]], axis=1).astype(np.float32),
            text=np.where(best[rows] == starts, "<br>the best chunk of its length", ""),
            hovertemplate="blocks %{x} to %{customdata[0]:.0f}, %{y} of them"
            "<br>angular distance %{customdata[1]:.6~f}%{text}<extra></extra>",
            showlegend=False,
        ),
        showlegend=True,
        shapes=shapes,
        hovermode="closest",
        xaxis=dict(
            title="First block of the chunk",
            range=[-0.5 - edge, count - 0.5 + edge],
            tickvals=list(range(0, count, step)),
            showgrid=False,
            zeroline=False,
        ),
        yaxis=dict(
            title="Blocks in the chunk",
            range=[0.5 - edge, count + 0.5 + edge],
            tickvals=sorted({1, *range(step, count + 1, step)}),
            showgrid=False,
            zeroline=False,
        ),
    )


def chunks_table(similarities: TokenSimilarity) -> pd.DataFrame:
    """One row a chunk: blocks start to stop - 1; whether it turns its input least of all as long."""
    distances = similarities.chunk_angular_distance
    best = best_chunks(distances)
    rows, starts = np.nonzero(np.isfinite(distances))
    return pd.DataFrame(
        {
            "start": starts,
            "stop": starts + rows + 1,
            "length": rows + 1,
            "angular_distance": distances[rows, starts],
            "best_of_length": best[rows] == starts,
        }
    )
