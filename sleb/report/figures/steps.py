"""The steps of a search -> figures and tables. Knows records; knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.methods.statistics import Comparison
from sleb.records import Baseline, Method, Run, Step, finite, perplexity_of
from sleb.report.figures import style
from sleb.report.summaries.step_comparison import Bars, bars, unit_of


def reach_of_axis(values: np.ndarray, reaches: np.ndarray, contenders: Sequence[int], quantile: float) -> float:
    """How far an axis from 0 must go: over the contenders with their intervals and most others.

    One block is often so much worse than all others that they would be a flat line beside it: beyond twice what
    `quantile` of the candidates need, a bar is cut off (and says so).
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 1.0
    ends = [values[i] + (reaches[i] if math.isfinite(reaches[i]) else 0.0) for i in contenders]
    usual = float(np.quantile(finite, quantile))
    highest = float(finite.max())
    wanted = highest if highest <= 2.0 * usual else 1.5 * usual
    return max([wanted, *(end for end in ends if math.isfinite(end)), 1e-6])


def evidence_table(shown: Bars) -> pd.DataFrame:
    """Every candidate of a step, best first, as a table."""
    step = shown.step
    chosen, tied = shown.chosen, set(shown.tied)
    done = "swapped" if step.is_swap else "removed"
    verdicts = [
        done if i == chosen else "tied" if i in tied else "no score" if math.isnan(score) else "told apart"
        for i, score in enumerate(shown.scores)
    ]
    table = pd.DataFrame(
        {
            "rank": shown.order,
            "block": shown.names,
            "score": shown.scores,
            "perplexity": [math.nan if each.perplexity is None else each.perplexity for each in shown.candidates],
            "difference": shown.differences,
            "interval": shown.reaches,
            "sequences": [math.nan if each.sequences is None else each.sequences for each in shown.candidates],
            "verdict": verdicts,
        }
    )
    return table.sort_values(["rank", "difference"], na_position="last").reset_index(drop=True)


def curve_table(run: Run) -> pd.DataFrame:
    """Perplexity after every step; the held-out bounds are exp(nats ± one standard error of the rise)."""
    assert run.trace is not None
    rows = []
    measured: tuple[Baseline | Step, ...] = (run.trace.baseline, *run.trace.steps)
    for of in measured:
        step = of if isinstance(of, Step) else None
        held_out = of.held_out.nats_per_token
        error = step.held_out_standard_error if step else None
        low = high = None
        if held_out is not None and error is not None:
            low, high = perplexity_of(held_out - error), perplexity_of(held_out + error)
        rows.append(
            {
                "step": step.number if step else 0,
                "blocks_removed": len(step.removal_list) if step else 0,
                "removed": " ".join(map(str, step.removed)) if step else "",
                "restored": " ".join(map(str, step.restored)) if step else "",
                "calibration_perplexity": _number(of.calibration.perplexity),
                "held_out_perplexity": _number(of.held_out.perplexity),
                "held_out_low": _number(low),
                "held_out_high": _number(high),
            }
        )
    return pd.DataFrame(rows)


def _number(value: float | None) -> float:
    return math.nan if (number := finite(value)) is None else number


def perplexity(run: Run) -> go.Figure:
    """Perplexity against the number of blocks removed: calibration text, and held-out text with its error band."""
    table = curve_table(run)
    x = table["blocks_removed"]
    figure = style.figure(
        320,
        hovermode="x unified",
        xaxis=dict(title="Blocks removed", dtick=_tick(len(table)), rangemode="tozero"),
        yaxis=dict(title="Perplexity", type="log" if _spread(table) > 20 else "linear", **_LOG_TICKS),
    )
    if table["held_out_perplexity"].notna().any():
        figure.add_traces(_with_band(table, "held_out", "Held-out text", style.GREEN, "solid", "square"))
    figure.add_trace(
        go.Scatter(
            x=x,
            y=table["calibration_perplexity"],
            name="Calibration text (chosen on)",
            mode="lines+markers",
            line=dict(color=style.ORANGE, dash="dot"),
            customdata=[
                style.plain(f"{out}{f', back: {back}' if back else ''}" if out else "nothing yet")
                for out, back in zip(table["removed"], table["restored"], strict=True)
            ],
            hovertemplate="%{y:,.2f} (removed: %{customdata})",
        )
    )
    return figure


_LOG_TICKS = dict(exponentformat="power", minorloglabels="complete")


def _spread(table: pd.DataFrame) -> float:
    values = table[["calibration_perplexity", "held_out_perplexity"]].to_numpy()
    return float(np.nanmax(values) / np.nanmin(values)) if np.isfinite(values).any() else 1.0


def _tick(points: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50) if points / step <= 21 or step == 50)


def _with_band(table: pd.DataFrame, text: str, name: str, colour: str, dash: str, symbol: str) -> list[go.Scatter]:
    """A curve, and under it the band of one standard error where steps carry one."""
    x = table["blocks_removed"]
    traces = []
    known = table[table["held_out_low"].notna()] if text == "held_out" else table.iloc[:0]
    if len(known):
        traces.append(
            go.Scatter(
                x=[*known["blocks_removed"], *known["blocks_removed"][::-1]],
                y=[*known["held_out_high"], *known["held_out_low"][::-1]],
                fill="toself",
                fillcolor=_rgba(colour, 0.2),
                line=dict(width=0),
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            )
        )
    traces.append(
        go.Scatter(
            x=x,
            y=table[f"{text}_perplexity"],
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line=dict(color=colour, dash=dash),
            marker=dict(symbol=symbol, size=7),
            hovertemplate="%{y:,.2f}",
        )
    )
    return traces


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def animated(run: Run, evidence: Sequence[Comparison | None]) -> go.Figure:
    """The bars of every step as frames with a slider and a play button; needs no server, so it serves the report.

    `evidence` is one comparison (or None) per step. Bars show what removing each block costs: its score above that
    of the model the step started from, so that all steps share one axis.
    """
    assert run.trace is not None
    assert run.stack is not None
    assert len(evidence) == len(run.trace.steps)
    all_bars = [bars(run, number, each).by_block for number, each in enumerate(evidence, start=1)]
    top = 1.08 * max(
        (reach_of_axis(each.rises, each.reaches, (each.chosen, *each.tied), 0.6) for each in all_bars), default=1.0
    )
    bottom = min([0.0, *(1.15 * float(np.nanmin(each.rises)) for each in all_bars)])
    of_swap = ", by the best swap after the last removal" if any(each.step.is_swap for each in all_bars) else ""
    blocks = list(range(run.stack.num_blocks))
    protected = list(run.stack.protected)
    guard = go.Bar(y=[top / 12] * len(protected))  # in every frame: Plotly takes away what a frame leaves out
    frames = [
        go.Frame(name=str(each.step.number), data=[*_frame(each, blocks, top), guard], traces=[0, 1, 2, 3, 4])
        for each in all_bars
    ]
    shown = _first_frame(blocks)
    for trace, last in zip(shown, frames[-1].data if frames else (), strict=False):
        trace.update(last)
    figure = style.figure(
        440,
        *shown,
        go.Bar(
            x=protected,
            y=guard.y,
            width=0.75,
            name="Protected",
            marker=dict(
                color=style.PROTECTED,
                pattern=_pattern(".", style.PROTECTED, "rgba(0,0,0,0)"),
                line=dict(color=style.PROTECTED, width=1),
            ),
            hovertemplate="block %{x}: protected, never a candidate<extra></extra>",
        ),
        barmode="overlay",
        bargap=0.25,
        xaxis=dict(title="Block index", range=[-0.7, len(blocks) - 0.3], dtick=_tick(len(blocks)), zeroline=False),
        yaxis=dict(title=f"Cost of removing it{of_swap} ({unit_of(run)})", range=[bottom, top]),
        margin=dict(b=110, t=40),
    )
    if frames:
        figure.frames = frames
        figure.update_layout(**_player([each.step for each in all_bars]))
    return figure


_KINDS = (
    # name, colour, pattern, what a hover text says of it
    ("Candidate", style.CANDIDATE, "", "told apart"),
    ("Tied with the removed one", style.TIED, "x", "tied: it might as well have been this one"),
    ("Removed in this step", style.CHOSEN, "", "removed"),
)


def _first_frame(blocks: list[int]) -> list[go.Bar]:
    """The looks of the four kinds of bars, in the order of `_frame`; a frame changes their data only."""
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
    gone = go.Bar(
        x=blocks,
        name="Removed before",
        marker=dict(color=style.REMOVED, pattern=_pattern("/", style.REMOVED, "rgba(0,0,0,0)")),
        hovertemplate="block %{x}: removed in step %{customdata}<extra></extra>",
    )
    return [*kinds, gone]


def _frame(shown: Bars, blocks: list[int], top: float) -> list[go.Bar]:
    """Data of the four kinds of bars of a step; a kind has no bar where a block is of another."""
    at = {block: i for i, block in enumerate(shown.blocks)}
    kinds = dict.fromkeys(shown.tied, 1) | {shown.chosen: 2}
    nothing = shown.base_name if shown.step.is_swap else "removing nothing"

    def data_of(kind: int) -> go.Bar:
        mine = [i if i is not None and kinds.get(i, 0) == kind else None for i in map(at.get, blocks)]
        return go.Bar(
            # Nothing is 0, not None: Plotly does not draw the error bar of a bar that a frame brings back.
            y=[0.0 if i is None else _short(shown.rises[i]) for i in mine],
            error_y=dict(array=[0.0 if i is None else _short(shown.reaches[i]) for i in mine]),
            customdata=[None if i is None else [shown.names[i], _difference(shown, i), nothing] for i in mine],
        )

    earlier = [shown.gone.get(block) if block not in at else None for block in blocks]
    gone = go.Bar(y=[0.0 if number is None else _short(top) for number in earlier], customdata=earlier)
    return [data_of(0), data_of(1), data_of(2), gone]


def _pattern(shape: str, foreground: str, background: str) -> dict[str, object]:
    return dict(shape=shape, fgcolor=foreground, bgcolor=background, size=6, solidity=0.25) if shape else {}


def _short(value: float) -> float:
    """Four digits: what a frame can show. A Python float, because Plotly packs arrays of numpy's."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _difference(shown: Bars, i: int) -> str:
    reach = f" ± {shown.reaches[i]:.4f}" if math.isfinite(shown.reaches[i]) else ""
    return "–" if math.isnan(shown.differences[i]) else f"{shown.differences[i]:.4f}{reach}"


def _player(steps: Sequence[Step]) -> dict[str, object]:
    """Slider and play button of `animated`. redraw=False keeps 60 frames a second."""
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


def _capped(figure: go.Figure, logarithmic: bool) -> list[float] | None:
    """A range of perplexity up to 30 times the unmodified model's: beyond it a model writes nonsense."""
    values = np.array([y for trace in figure.data if trace.mode for y in trace.y if y is not None], dtype=float)
    values = values[np.isfinite(values)]
    if not len(values) or values.max() <= 30 * values.min():
        return None
    low, high = 0.9 * values.min(), 30 * values.min()
    return [math.log10(low), math.log10(high)] if logarithmic else [0.0, float(high)]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten: of less than three decades all are labelled."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    return [each * 10.0**power for power in powers for each in (1, 2, 5) if low <= each * 10.0**power <= high]


def methods(runs: Sequence[Run], *, held_out: bool, logarithmic: bool, everything: bool = False) -> go.Figure:
    """Perplexity against the number of blocks removed, one curve a run, its colour its method's (paper, Figure 7).

    Curves leave the chart at 30 times the unmodified model's perplexity, unless `everything` is to be seen.
    """
    names = [style.method_name(run.spec) for run in runs]
    many = {name for name in names if names.count(name) > 1}
    text = "held_out" if held_out else "calibration"
    figure = style.figure(
        420,
        hovermode="x unified",
        xaxis=dict(title="Blocks removed", rangemode="tozero"),
        yaxis=dict(
            title=f"Perplexity of the {'held-out' if held_out else 'calibration'} text",
            type="log" if logarithmic else "linear",
            **_LOG_TICKS,
        ),
    )
    order = list(Method)
    seen: dict[Method, int] = {}
    for run in sorted(runs, key=lambda each: order.index(each.spec.method)):
        method = run.spec.method
        place = seen[method] = seen.get(method, -1) + 1
        name = style.method_name(run.spec)
        name += f", {style.plain(run.run_id)}" if name in many else ""
        dash = ("solid", "dash", "dot", "dashdot")[place % 4]
        symbol = ("circle", "square", "diamond", "cross", "triangle-up")[order.index(method)]
        table = curve_table(run).drop_duplicates("blocks_removed", keep="last")  # swaps leave several of a length
        figure.add_traces(_with_band(table, text, name, style.METHOD_COLOURS[method.value], dash, symbol))
    reach = None if everything else _capped(figure, logarithmic)
    if reach is not None:
        figure.update_yaxes(range=reach)
        if logarithmic:
            figure.update_yaxes(
                tickvals=_ticks(10 ** reach[0], 10 ** reach[1]), tickformat=",.3~r", minorloglabels=None
            )
    longest = max((len(run.removal_list) + 1 for run in runs), default=1)
    figure.update_xaxes(dtick=_tick(longest))
    return figure


def methods_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The curves of `methods`, one row a step of a run."""
    return pd.concat(
        [curve_table(run).assign(method=run.spec.method.value, run=run.run_id) for run in runs], ignore_index=True
    )
