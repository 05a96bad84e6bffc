"""Perplexity after each step of a search, and its candidates -> figures and tables. Knows no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sleb.records import Baseline, Method, Run, Step, finite, perplexity_of
from sleb.report.figures import style
from sleb.report.summaries.step_comparison import Bars


def evidence_table(shown: Bars) -> pd.DataFrame:
    """Every candidate of a step, best first, as a table."""
    verdicts = ["no score" if math.isnan(score) else style.DIFFERENT for score in shown.scores]
    for index in shown.tied:
        verdicts[index] = style.TIED_VERDICT
    verdicts[shown.chosen] = "swapped" if shown.step.is_swap else "removed"
    table = pd.DataFrame(
        {
            "rank": shown.order,
            "block": shown.names,
            "score": shown.scores,
            "perplexity": [math.nan if each.perplexity is None else each.perplexity for each in shown.candidates],
            "difference": shown.differences,
            "interval": shown.half_widths,
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
        xaxis=dict(title="Blocks removed", dtick=style.step_of_ticks(len(table)), rangemode="tozero"),
        yaxis=dict(title="Perplexity", type="log" if _spread(table) > 20 else "linear", **_LOG_TICKS),
    )
    if table["held_out_perplexity"].notna().any():
        figure.add_traces(_with_band(table, "held_out", "Held-out text", style.GREEN, "solid", "square"))
    figure.add_trace(
        go.Scatter(
            x=x,
            y=table["calibration_perplexity"],
            name="Calibration text (blocks chosen on it)",
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
                fillcolor=style.faint(colour, 0.2),
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


def _capped(figure: go.Figure, logarithmic: bool) -> list[float] | None:
    """A range of perplexity up to `READABLE` times the lowest; None where all values lie in it."""
    values = np.array([y for trace in figure.data if trace.mode for y in trace.y if y is not None], dtype=float)
    values = values[np.isfinite(values)]
    if not len(values) or values.max() <= style.READABLE * values.min():
        return None
    low, high = 0.9 * values.min(), style.READABLE * values.min()
    return [math.log10(low), math.log10(high)] if logarithmic else [0.0, float(high)]


def _ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times the powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    return [each * 10.0**power for power in powers for each in (1, 2, 5) if low <= each * 10.0**power <= high]


def methods(runs: Sequence[Run], *, held_out: bool, logarithmic: bool, everything: bool = False) -> go.Figure:
    """Perplexity against the number of blocks removed, one curve a run in its method's colour (paper, Figure 7).

    Curves leave the chart at `READABLE` times the lowest perplexity, unless `everything` is shown.
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
        dash = style.DASHES[place % 4]
        symbol = ("circle", "square", "diamond", "cross", "triangle-up")[order.index(method)]
        table = curve_table(run).drop_duplicates("blocks_removed", keep="last")  # swaps leave several of a length
        figure.add_traces(_with_band(table, text, name, style.METHOD_COLOURS[method.value], dash, symbol))
    extent = None if everything else _capped(figure, logarithmic)
    if extent is not None:
        figure.update_yaxes(range=extent)
        if logarithmic:
            figure.update_yaxes(
                tickvals=_ticks(10 ** extent[0], 10 ** extent[1]), tickformat=",.3~r", minorloglabels=None
            )
    longest = max((len(run.removal_list) + 1 for run in runs), default=1)
    figure.update_xaxes(dtick=style.step_of_ticks(longest))
    return figure


def methods_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The curves of `methods`, one row a step of a run."""
    return pd.concat(
        [curve_table(run).assign(method=run.spec.method.value, run=run.run_id) for run in runs], ignore_index=True
    )
