"""How far blocks and chunks of blocks turn their input -> figures and tables. Knows records; knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.analysis.similarity import TokenSimilarity, best_chunks
from sleb.records import Run
from sleb.report.figures import style
from sleb.report.figures.similarity import PICKED, Colours, click_catcher, coloured, frame_around, tick_step
from sleb.report.summaries.block_pair import FLOOR, Pick, state_of


def neighbours(similarities: TokenSimilarity, *, removed: Collection[int] = (), height: int = 400) -> go.Figure:
    """Metric1 of every block (paper, equation 3): how far each turns its own input. The lowest five are labelled."""
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
    kinds = ((~is_removed, "kept", style.BLUE, "circle"), (is_removed, "removed by this run", style.ORANGE, "x"))
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
    """The blocks that turn their input least, in that order."""
    return [int(block) for block in np.argsort(metric1, kind="stable")[:count]]


def _least_labels(blocks: Sequence[int], heights: np.ndarray) -> list[dict[str, Any]]:
    """Labels below some blocks; those of neighbours hang at different heights."""
    labels: list[dict[str, Any]] = []
    place, before = 0, -math.inf
    for block in sorted(blocks):
        place = place + 1 if block - before < 0.035 * len(heights) else 0
        before = block
        line = dict(ax=0, ay=20 + 17 * place, yanchor="top", arrowhead=0, arrowwidth=1, arrowcolor=style.GREY)
        labels.append(dict(x=block, y=float(heights[block]), text=f"<b>{block}</b>", standoff=5, **line))
    return labels


def _metric1_axis(metric1: np.ndarray) -> tuple[dict[str, Any], bool]:
    """The axis with room for labels below the lowest, and whether it is logarithmic: over more than a decade."""
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
    """One row a block: its Metric1, its rank (1 turns its input least), and whether it was removed."""
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
    """Angular distance of every contiguous chunk by its first block and its length; the best of each length has a dot.

    Its last trace is transparent and catches clicks.
    """
    distances = similarities.chunk_angular_distance
    count = len(distances)
    lengths = np.arange(1, count + 1)
    best, edge, step = best_chunks(distances), 0.012 * count, tick_step(2 * count)
    shown = coloured(distances, distances[np.isfinite(distances)], _range_of_chunks(distances), "angular", colours)
    rows, starts = np.nonzero(np.isfinite(distances))
    frame = []
    if pick is not None and pick[0] != pick[1]:
        frame = frame_around(min(pick) + 1, abs(pick[0] - pick[1]), max(0.5, count / 90))
    return style.figure(
        height,
        go.Heatmap(x=np.arange(count), y=lengths, hoverinfo="skip", hoverongaps=False, **shown),
        go.Scatter(
            x=best,
            y=lengths,
            mode="markers",
            name="best chunk of its length",
            marker=dict(
                size=7 if count <= 40 else 4, color=style.ORANGE, line=dict(width=1 if count <= 40 else 0, color=PICKED)
            ),
            hoverinfo="skip",
        ),
        click_catcher(
            x=starts,
            y=rows + 1,
            size=6,
            customdata=np.stack([starts + rows, distances[rows, starts]], axis=1).astype(np.float32),
            text=np.where(best[rows] == starts, "<br>the best chunk of its length", ""),
            hovertemplate="blocks %{x} to %{customdata[0]:.0f}, %{y} of them"
            "<br>angular distance %{customdata[1]:.6~f}%{text}<extra></extra>",
        ),
        showlegend=True,
        shapes=frame,
        hovermode="closest",
        xaxis=_chunk_axis("First block of the chunk", -0.5 - edge, count - 0.5 + edge, range(0, count, step)),
        yaxis=_chunk_axis("Blocks in the chunk", 0.5 - edge, count + 0.5 + edge, {1, *range(step, count + 1, step)}),
    )


def _chunk_axis(title: str, low: float, high: float, ticks: Collection[int]) -> dict[str, Any]:
    return dict(title=title, range=[low, high], tickvals=sorted(ticks), showgrid=False, zeroline=False)


def _range_of_chunks(distances: np.ndarray) -> tuple[float, float]:
    """The ends of fitted colours, without the first block and the whole stack, which would take most of the scale."""
    inner = distances[:, 1:][np.isfinite(distances[:, 1:])]
    low, high = (float(each) for each in np.quantile(inner, [0.0, 0.98])) if len(inner) > 1 else (0.0, 1.0)
    return low, high if high > low else low + 1e-3


def chunks_table(similarities: TokenSimilarity) -> pd.DataFrame:
    """One row a chunk: blocks start to stop - 1; whether it turns its input least among those of its length."""
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
