"""The steps of a search -> one figure that plays them; needs no server. Knows records; knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from sleb.methods.statistics import Comparison
from sleb.records import Run, Step
from sleb.report.figures import style
from sleb.report.summaries.step_comparison import Bars, bars, unit_of


def extent_of_axis(values: np.ndarray, half_widths: np.ndarray, contenders: Sequence[int], quantile: float) -> float:
    """The upper end of an axis from 0 that shows the contenders with their intervals, and most others.

    One block is often so much worse than all others that they would be a flat line beside it: beyond twice what
    `quantile` of the candidates need, a bar is cut off (and says so).
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 1.0
    ends = [values[i] + (half_widths[i] if math.isfinite(half_widths[i]) else 0.0) for i in contenders]
    usual = float(np.quantile(finite, quantile))
    highest = float(finite.max())
    wanted = highest if highest <= 2.0 * usual else 1.5 * usual
    return max([wanted, *(end for end in ends if math.isfinite(end)), 1e-6])


def animated(run: Run, evidence: Sequence[Comparison | None]) -> go.Figure:
    """The bars of every step as frames, with a slider and a play button.

    `evidence` is one comparison (or None) per step. Bars show what removing each block costs: its score above that
    of the model the step started from, so that all steps share one axis.
    """
    assert run.trace is not None
    assert run.stack is not None
    assert len(evidence) == len(run.trace.steps)
    all_bars = [bars(run, number, each).by_block for number, each in enumerate(evidence, start=1)]
    top = 1.08 * max(
        (extent_of_axis(each.rises, each.half_widths, (each.chosen, *each.tied), 0.6) for each in all_bars), default=1.0
    )
    bottom = min([0.0, *(1.15 * float(np.nanmin(each.rises)) for each in all_bars)])
    of_swap = ", by the best swap after the last removal" if any(each.step.is_swap for each in all_bars) else ""
    blocks = list(range(run.stack.num_blocks))
    guard = _protected_bars(run.stack.protected, top)
    frames = [
        go.Frame(
            name=str(each.step.number),
            data=[*_frame(each, blocks, top), go.Bar(y=guard.y)],  # Plotly takes away what a frame leaves out
            traces=[0, 1, 2, 3, 4],
        )
        for each in all_bars
    ]
    shown = _first_frame(blocks)
    for trace, last in zip(shown, frames[-1].data if frames else (), strict=False):
        trace.update(last)
    ticks = style.step_of_ticks(len(blocks))
    figure = style.figure(
        440,
        *shown,
        guard,
        barmode="overlay",
        bargap=0.25,
        xaxis=dict(title="Block index", range=[-0.7, len(blocks) - 0.3], dtick=ticks, zeroline=False),
        yaxis=dict(title=f"Cost of removing it{of_swap} ({unit_of(run)})", range=[bottom, top]),
        margin=dict(b=110, t=40),
    )
    if frames:
        figure.frames = frames
        figure.update_layout(**_player([each.step for each in all_bars]))
    return figure


def _protected_bars(protected: Sequence[int], top: float) -> go.Bar:
    colour = style.PROTECTED
    return go.Bar(
        x=list(protected),
        y=[top / 12] * len(protected),
        width=0.75,
        name="Protected",
        marker=dict(color=colour, pattern=_pattern(".", colour, "rgba(0,0,0,0)"), line=dict(color=colour, width=1)),
        hovertemplate="block %{x}: protected, never a candidate<extra></extra>",
    )


_KINDS = (
    # name, colour, pattern, verdict in a hover text
    ("Significantly different", style.CANDIDATE, "", style.DIFFERENT),
    ("Statistically tied", style.TIED, "x", style.TIED_VERDICT),
    ("Removed in this step", style.CHOSEN, "", "removed"),
)


def _first_frame(blocks: list[int]) -> list[go.Bar]:
    """The four kinds of bars without data, in the order of `_frame`, which changes their data only."""
    kinds = [
        go.Bar(
            x=blocks,
            error_y=dict(type="data", thickness=1.5, width=0, color=style.GREY),
            name=name,
            marker=dict(
                color=colour, pattern=dict(shape=pattern, fillmode="overlay", fgcolor="rgba(0,0,0,0.55)", size=5)
            ),
            hovertemplate=(
                "<b>%{customdata[0]}</b>: %{y:.4f} above %{customdata[2]}<br>"
                "%{customdata[1]} above the removed one<br>" + word + "<extra></extra>"
            ),
        )
        for name, colour, pattern, word in _KINDS
    ]
    earlier = go.Bar(
        x=blocks,
        name="Removed before",
        marker=dict(color=style.REMOVED, pattern=_pattern("/", style.REMOVED, "rgba(0,0,0,0)")),
        hovertemplate="block %{x}: removed in step %{customdata}<extra></extra>",
    )
    return [*kinds, earlier]


def _frame(shown: Bars, blocks: list[int], top: float) -> list[go.Bar]:
    """Data of the four kinds of bars of a step; a block has a bar of one kind only."""
    at = {block: i for i, block in enumerate(shown.blocks)}
    kinds = dict.fromkeys(shown.tied, 1) | {shown.chosen: 2}
    nothing = shown.base_name if shown.step.is_swap else "removing nothing"

    def data_of(kind: int) -> go.Bar:
        mine = [i if i is not None and kinds.get(i, 0) == kind else None for i in map(at.get, blocks)]
        return go.Bar(
            # Nothing is 0, not None: Plotly does not draw the error bar of a bar that a frame brings back.
            y=[0.0 if i is None else _short(shown.rises[i]) for i in mine],
            error_y=dict(array=[0.0 if i is None else _short(shown.half_widths[i]) for i in mine]),
            customdata=[None if i is None else [shown.names[i], _difference(shown, i), nothing] for i in mine],
        )

    earlier = [shown.removed_at.get(block) if block not in at else None for block in blocks]
    before = go.Bar(y=[0.0 if number is None else _short(top) for number in earlier], customdata=earlier)
    return [data_of(0), data_of(1), data_of(2), before]


def _pattern(shape: str, foreground: str, background: str) -> dict[str, object]:
    return dict(shape=shape, fgcolor=foreground, bgcolor=background, size=6, solidity=0.25) if shape else {}


def _short(value: float) -> float:
    """A number with four digits, as many as a frame shows; a Python float, since Plotly packs arrays of numpy's."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _difference(shown: Bars, i: int) -> str:
    half_width = f" ± {shown.half_widths[i]:.4f}" if math.isfinite(shown.half_widths[i]) else ""
    return "–" if math.isnan(shown.differences[i]) else f"{shown.differences[i]:.4f}{half_width}"


def _player(steps: Sequence[Step]) -> dict[str, object]:
    """Slider and play button of `animated`; `redraw=False` keeps 60 frames a second."""
    timing = dict(mode="immediate", frame=dict(duration=900, redraw=False), transition=dict(duration=0))
    jump = dict(mode="immediate", frame=dict(duration=0, redraw=False), transition=dict(duration=0))
    stop = dict(mode="immediate", frame=dict(duration=0, redraw=False), transition=dict(duration=0))
    slider = dict(
        active=len(steps) - 1,
        x=0.12,
        len=0.88,
        y=0,
        pad=dict(t=52, b=0),
        currentvalue=dict(prefix="Step ", xanchor="left", font=dict(size=13)),
        steps=[dict(method="animate", label=str(step.number), args=[[str(step.number)], jump]) for step in steps],
    )
    buttons = [
        dict(label="▶", method="animate", args=[None, {**timing, "fromcurrent": False}]),
        dict(label="❚❚", method="animate", args=[[None], stop]),
    ]
    menu = dict(
        type="buttons",
        direction="left",
        x=0,
        y=0,
        xanchor="left",
        yanchor="top",
        pad=dict(t=62, r=8),
        showactive=False,
        buttons=buttons,
    )
    return dict(sliders=[slider], updatemenus=[menu])
