"""Perplexity curves and shared blocks of runs and published lists -> figures. Knows records; reads no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.formats.published_lists import jaccard, shared
from sleb.report.figures import style
from sleb.report.summaries.compared_lists import Listed


@dataclass(frozen=True)
class CurveView:
    """What a chart of perplexity curves shows of its data."""

    held_out: bool = True
    """Whether held-out text is shown, or the calibration text."""
    log: bool = True
    over_baseline: bool = False
    """Whether each line is divided by its own baseline."""
    relative: bool = False
    """Whether blocks are counted in per cent of the stack."""
    cut: float | None = None
    """The axis ends at so many times the lowest value, and lines go on above it; None shows all."""

    @property
    def column(self) -> str:
        """The column of `curve_table` that is shown."""
        return "held_out" if self.held_out else "calibration"


def perplexity(
    points: pd.DataFrame, rows: Sequence[Listed], view: CurveView, *, texts: Sequence[str] = ()
) -> go.Figure:
    """Perplexity against blocks removed, one line a run, as in Figures 4 and 7; `points` is `curve_table`.

    Held-out lines carry a band of one standard error of their rise over the baseline. `texts` names the text of each
    row; each text has a dash of its own.
    """
    kinds = list(dict.fromkeys(texts))
    traces: list[go.Scatter] = []
    shown: list[float] = []
    for index, row in enumerate(rows):
        own = points[points["letter"] == row.letter]
        if own.empty:
            continue
        dash = style.DASHES[kinds.index(texts[index]) % len(style.DASHES)] if texts else "solid"
        line, values = _line(row, own, view, style.SYMBOLS[index % len(style.SYMBOLS)], dash)
        traces += line
        shown += values
    text = "held-out text" if view.held_out else "calibration text"
    title = f"Perplexity relative to the baseline, {text}" if view.over_baseline else f"Perplexity, {text}"
    legend_lines = 1 + sum(50 + 7 * len(row.label) for row in rows) // 480
    figure = style.figure(
        400 + 20 * legend_lines,
        *traces,
        hovermode="closest",
        margin=dict(t=8, b=58 + 20 * legend_lines),
        legend=dict(orientation="h", yref="container", yanchor="bottom", y=0.0, x=0),
        xaxis=dict(
            title="Share of blocks removed" if view.relative else "Blocks removed",
            rangemode="tozero",
            zeroline=False,
            **(dict(ticksuffix=" %") if view.relative else _whole(points["removed"])),
        ),
        yaxis=dict(title=title, zeroline=False),
    )
    _set_range(figure, shown, view)
    return figure


def _line(
    row: Listed, own: pd.DataFrame, view: CurveView, symbol: str, dash: str
) -> tuple[list[go.Scatter], list[float]]:
    """The traces of one run, and its values that are numbers."""
    across = own["removed_share"] * 100 if view.relative else own["removed"]
    values = own[view.column].astype(float).to_numpy()
    scale = 1 / values[0] if view.over_baseline and len(values) and values[0] else 1.0
    values = values * scale
    line = go.Scatter(
        x=across.tolist(),
        y=values.tolist(),
        mode="lines+markers",
        name=row.label,
        legendgroup=row.letter,
        line=dict(color=row.colour, width=2, dash=dash),
        marker=dict(symbol=symbol, size=7),
        customdata=np.stack([own["removed"], [_error(each) for each in own["error_nats"]]], axis=-1),
        hovertemplate=f"{row.label}<br>%{{customdata[0]}} blocks removed: %{{y:,.4~g}}"
        + ("%{customdata[1]}" if view.held_out else "")
        + "<extra></extra>",
    )
    band = _band(row, across, own, scale) if view.held_out else []
    return [*band, line], values[np.isfinite(values)].tolist()


def _set_range(figure: go.Figure, values: Sequence[float], view: CurveView) -> None:
    lowest, highest = min(values, default=math.inf), max(values, default=0.0)
    if view.cut is not None and highest > view.cut * lowest:
        highest = view.cut * lowest
        figure.update_yaxes(range=[0, highest])
    if view.log and highest > 0:
        figure.update_yaxes(type="log", **style.log_ticks(lowest, highest))


def _band(row: Listed, across: pd.Series, own: pd.DataFrame, scale: float) -> list[go.Scatter]:
    """One standard error up and down, where it was measured: exp(nats plus or minus it)."""
    nats, error = own["held_out_nats"].astype(float), own["error_nats"].astype(float)
    known = (error.notna() & nats.notna() & (nats < 700)).to_numpy(copy=True)
    if known.sum() == 0:
        return []
    known[0] = True  # the baseline, whose rise over itself is 0
    nats, error, x = nats[known], error[known].fillna(0.0), across[known]
    upper, lower = np.exp(nats + error) * scale, np.exp(nats - error) * scale
    return [
        go.Scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([upper, lower[::-1]]),
            fill="toself",
            fillcolor=style.faint(row.colour),
            line=dict(width=0),
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=row.letter,
            name=f"{row.letter} ± standard error",
        )
    ]


def _error(nats: float | None) -> str:
    return "" if nats is None or not math.isfinite(nats) else f"<br>± {math.expm1(nats):.1%} (one standard error)"


def _whole(removed: pd.Series) -> dict[str, Any]:
    """An axis with ticks at whole numbers of blocks only."""
    most = int(removed.max()) if len(removed) else 1
    return dict(tick0=0, dtick=style.block_step(most), range=[-0.02 * max(most, 1), most * 1.02])


def agreement(rows: Sequence[Listed], removals: int) -> go.Figure:
    """Which share of their blocks two lists have in common after the same number of removals, for every pair."""
    size = len(rows)
    share: list[list[float | None]] = [[None] * size for _ in rows]
    text = [["" for _ in rows] for _ in rows]
    hover = [["" for _ in rows] for _ in rows]
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if i == j:
                continue
            pair = f"{one.label} and<br>{other.label}<br>"
            if one.num_blocks != other.num_blocks:
                text[i][j], hover[i][j] = "–", pair + "have different numbers of blocks"
                continue
            mine, theirs = one.prefixes[removals - 1], other.prefixes[removals - 1]
            both = shared(mine, theirs)
            share[i][j] = len(both) / removals
            text[i][j] = str(len(both))
            hover[i][j] = (
                f"{pair}share {', '.join(map(str, both)) or 'no block'}<br>{len(both)} of {removals} blocks; "
                f"Jaccard index {jaccard(mine, theirs):.2f}"
            )
    letters = [each.letter for each in rows]
    return style.figure(
        50 + 42 * size,
        go.Heatmap(
            z=share,
            x=letters,
            y=[each.label for each in rows],
            zmin=0,
            zmax=1,
            colorscale=style.SCALE,
            text=text,
            texttemplate="%{text}",
            textfont=dict(size=14),
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            showscale=False,
        ),
        margin=dict(t=8),
        xaxis=dict(side="top", ticks="", showgrid=False, zeroline=False, fixedrange=True),
        yaxis=dict(
            autorange="reversed", ticks="", showgrid=False, zeroline=False, ticklabelstandoff=10, fixedrange=True
        ),
    )


def agreement_table(rows: Sequence[Listed], removals: int) -> pd.DataFrame:
    """One row a pair of lists over stacks of the same height."""
    pairs = []
    for place, one in enumerate(rows):
        for other in rows[place + 1 :]:
            if one.num_blocks == other.num_blocks:
                mine, theirs = one.prefixes[removals - 1], other.prefixes[removals - 1]
                both = shared(mine, theirs)
                pairs.append(
                    (one.name, other.name, removals, len(both), jaccard(mine, theirs), " ".join(map(str, both)))
                )
    return pd.DataFrame(pairs, columns=["one", "other", "removals", "shared", "jaccard", "shared_blocks"])
