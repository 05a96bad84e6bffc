"""What removal lists cost and buy -> one figure of four panels. Knows lines; knows no Streamlit and reads no file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import plotly.graph_objects as go

from sleb.report.figures import style
from sleb.report.summaries.line_gates import proportional
from sleb.report.summaries.list_curves import Curves, Line, Point
from sleb.report.summaries.numbers import as_bytes, consecutive, rise

Panel = Literal["cost", "accuracy", "speed", "size"]
PASSES, LIMIT = "rgba(0,158,115,0.13)", style.GREEN
_COLOURS = (style.BLUE, style.GREEN, style.PINK, style.YELLOW, style.SKY, "#8C6BB1", style.ORANGE, "#7A7A7A")
_OWN = {  # lines that are always drawn the same: colour, dash, symbol, width
    "held-out": (style.SKY, "dot", "diamond", 2),
    "calibration": (style.GREY, "dot", "line-ew", 2),
    "mean": (style.ORANGE, "solid", "square", 4),
    "prompt": (style.BLUE, "solid", "circle", 2),
    "generation": (style.ORANGE, "solid", "square", 2),
    "whole": (style.ORANGE, "solid", "diamond", 2),
}
_TITLES: dict[Panel, str] = {"cost": "Perplexity", "accuracy": "Accuracy", "speed": "Speedup", "size": "Size"}
_HEIGHTS: dict[Panel, int] = {"cost": 180, "accuracy": 124, "speed": 120, "size": 84}
_EMPTY, _GAP, _LEGEND, _FOOT = 62, 16, 18, 44  # pixels
_IN_A_ROW = 4  # entries of a legend, in a chart that is not very wide
_SUPERSCRIPT = " ≈"


@dataclass(frozen=True)
class Limit:
    """A gate as a line across its panel."""

    panel: Panel
    value: float
    """The limit in the panel's unit."""
    name: str
    ratio: float | None = None
    """A limit of the perplexity over the baseline's; None in other panels."""


def panels(
    curves: Curves,
    *,
    admissible: Collection[int] = (),
    proposal: int | None = None,
    limits: Sequence[Limit] = (),
    missing: Mapping[str, str],
    over_baseline: bool = False,
) -> go.Figure:
    """Cost, accuracy, speed and size over the number of blocks removed, one above the other on one axis.

    `admissible` numbers of blocks are shaded, the `proposal` is marked; `limits` are the gates' own lines. `missing`
    says what to do for a panel (`accuracy`, `speed`, ...) in which nothing was measured. `over_baseline` divides
    each perplexity by its own baseline.
    """
    shown: dict[Panel, Sequence[Line]] = {
        "cost": _over_baseline(curves.cost) if over_baseline else curves.cost,
        "accuracy": curves.accuracy,
        "speed": curves.speed,
        "size": curves.size,
    }
    if over_baseline:
        limits = [each if each.ratio is None else replace(each, value=each.ratio) for each in limits]
    axes = {panel: "" if place == 1 else str(place) for place, panel in enumerate(shown, start=1)}
    most = max(curves.lists, default=0)
    layout, traces = _Layout(), []
    for panel, lines in shown.items():
        is_empty = not lines and panel != "speed"
        layout.add(panel, _EMPTY if is_empty else _HEIGHTS[panel], 0 if is_empty else len(lines) + (panel == "speed"))
        traces += [_trace(line, index, axes[panel], panel, over_baseline) for index, line in enumerate(lines)]
        if panel == "speed" and curves.num_blocks:
            traces.append(_proportional(curves, most, axes[panel]))
    figure = _empty_figure(layout, traces, most, len(shown))
    for panel, lines in shown.items():
        own_limits = [each.value for each in limits if each.panel == panel]
        title = "× baseline" if panel == "cost" and over_baseline else _TITLES[panel]
        _set_axis(figure, axes[panel], title, layout.domain(panel), _axis(panel, lines, curves, most, own_limits))
        if panel in missing:
            _say_what_is_missing(figure, axes[panel], lines, missing[panel], drawn=bool(lines) or panel == "speed")
        if not lines and panel != "speed":
            _draw_empty(figure, axes[panel])
    drawn = [axes[panel] for panel, lines in shown.items() if lines or panel == "speed"]
    _mark(figure, drawn, admissible, proposal)
    for each in limits:
        _limit(figure, each, axes[each.panel], each.panel == "cost")
    return figure


def _empty_figure(layout: _Layout, traces: Sequence[go.Scatter], most: int, panel_count: int) -> go.Figure:
    """The figure with its axis of blocks; the panels' own axes follow."""
    return style.figure(
        layout.height,
        *traces,
        margin=dict(t=layout.head, b=_FOOT, l=8, r=14),
        hovermode="x unified",
        hoversubplots="axis",
        hoverlabel=dict(font=dict(size=12)),
        xaxis=dict(
            title=dict(text="Blocks removed", standoff=8),
            range=[-0.5, most + 0.5],
            dtick=style.block_step(most),
            tick0=0,
            zeroline=False,
            showgrid=False,
            anchor=f"y{panel_count}",
            unifiedhovertitle=dict(text="%{x} blocks removed"),
        ),
    )


def _set_axis(figure: go.Figure, axis: str, title: str, domain: tuple[float, float], own: dict[str, Any]) -> None:
    """The axis of a panel, and its legend above it."""
    low, high = domain
    name = dict(text=title, standoff=10)
    figure.update_layout(
        {
            f"yaxis{axis}": dict(domain=[low, high], anchor="x", title=name, automargin=True, zeroline=False, **own),
            f"legend{axis}": dict(
                orientation="h", x=0, xanchor="left", y=high, yanchor="bottom", yref="paper", font=dict(size=11),
                indentation=-3, bgcolor="rgba(0,0,0,0)",
            ),
        }
    )  # fmt: skip


def _say_what_is_missing(figure: go.Figure, axis: str, lines: Sequence[Line], text: str, *, drawn: bool) -> None:
    """What to do for a panel in which nothing was measured: in a corner where something is `drawn` all the same."""
    if any(each.kind not in ("held-out", "calibration") for each in lines):
        return
    figure.add_annotation(
        text=text, xref="paper", yref=f"y{axis} domain", x=0.985 if drawn else 0.5,
        y=0.02 if drawn else 0.5, xanchor="right" if drawn else "center",
        yanchor="bottom" if drawn else "middle", showarrow=False, font=dict(size=12), opacity=0.8,
    )  # fmt: skip


def _draw_empty(figure: go.Figure, axis: str) -> None:
    """An axis of its own for a panel without lines, or Plotly would not draw it."""
    figure.add_trace(go.Scatter(x=[None], y=[None], yaxis=f"y{axis}", showlegend=False, hoverinfo="skip"))
    figure.update_layout({f"yaxis{axis}": dict(showticklabels=False, showgrid=False, range=[0, 1])})


class _Layout:
    """Panels from the top, in pixels, each with room for its legend above it."""

    def __init__(self) -> None:
        self._panels: dict[Panel, tuple[int, int, int]] = {}  # legend, top, bottom
        self._end = 0

    def add(self, panel: Panel, height: int, entries: int) -> None:
        """Put a panel of this height below the others, under a legend of so many entries."""
        rows = math.ceil(entries / _IN_A_ROW) + (entries > _IN_A_ROW)  # one more for a narrow screen
        start = self._end + (_GAP if self._panels else 4) + _LEGEND * rows + (5 if rows else 0)
        self._panels[panel] = (self._end, start, start + height)
        self._end = start + height

    @property
    def head(self) -> int:
        """Height of the first panel's legend in pixels, which is the figure's upper margin."""
        return next(iter(self._panels.values()))[1]

    @property
    def height(self) -> int:
        """Height of the figure in pixels."""
        return self._end + _FOOT

    def domain(self, panel: Panel) -> tuple[float, float]:
        """Lower and upper end of a panel as Plotly counts: as a share of the plot area, from below."""
        _, top, bottom = self._panels[panel]
        inside = self._end - self.head
        return (self._end - bottom) / inside, (self._end - top) / inside


def _trace(line: Line, index: int, axis: str, panel: Panel, over_baseline: bool) -> go.Scatter:
    colour, dash, symbol, width = _OWN.get(
        line.kind, (_COLOURS[index % len(_COLOURS)], "solid", style.SYMBOLS[index % len(style.SYMBOLS)], 2)
    )
    symbol = symbol + ("-open" if line.is_estimate else "")
    points = [each for each in line.points if math.isfinite(each.value)]
    return go.Scatter(
        x=[each.removed for each in points],
        y=[each.value for each in points],
        yaxis=f"y{axis}",
        legend=f"legend{axis}",
        name=style.plain(line.name) + (_SUPERSCRIPT if line.is_estimate else ""),
        mode="lines+markers",
        line=dict(color=colour, dash=dash, width=width),
        marker=dict(symbol=symbol, size=7 if line.kind != "calibration" else 8, line=dict(width=1.5, color=colour)),
        opacity=0.85 if line.kind == "task" else 1.0,
        error_y=dict(
            type="data",
            symmetric=False,
            array=[_distance(each.high, each.value) for each in points],
            arrayminus=[_distance(each.value, each.low) for each in points],
            thickness=1.3,
            width=3,
        ),
        customdata=[_hover(line, each, panel, over_baseline) for each in points],
        hovertemplate="%{customdata}",
    )  # fmt: skip


def _proportional(curves: Curves, most: int, axis: str) -> go.Scatter:
    numbers = [each for each in range(most + 1) if each < curves.num_blocks]
    return go.Scatter(
        x=numbers,
        y=[proportional(curves.num_blocks, each) for each in numbers],
        yaxis=f"y{axis}",
        legend=f"legend{axis}",
        name="predicted",
        mode="lines",
        line=dict(color=style.GREY, dash="dash", width=2),
        customdata=[f"{proportional(curves.num_blocks, each):.2f}×, predicted" for each in numbers],
        hovertemplate="%{customdata}",
    )


def _hover(line: Line, point: Point, panel: Panel, over_baseline: bool) -> str:
    """The hover text of a point."""
    if panel == "cost":
        value = f"{point.value:,.4g}" + ("×" if over_baseline else "")
        if line.kind == "calibration":
            return f"{value} (too good: blocks were chosen on it)"
        if point.change is None or not point.removed or not math.isfinite(point.change):
            return value
        return value if over_baseline or point.change > 5 else f"{value} ({rise(point.change, point.change_error)})"
    if panel == "accuracy":
        error = f" ± {100 * (point.high - point.value):.1f}" if point.high is not None else ""
        return f"{100 * point.value:.1f}{error} %"
    if panel == "speed":
        if point.low is None or point.high is None:
            return f"{point.value:.2f}×"
        return f"{point.value:.2f}× ({point.low:.2f} to {point.high:.2f}), {point.detail}"
    return as_bytes(point.value) + (f", {point.detail}" if point.detail else "")


def _distance(high: float | None, low: float | None) -> float:
    """Length of an error bar; 0 where no error is known."""
    return 0.0 if high is None or low is None else max(0.0, high - low)


def _axis(panel: Panel, lines: Sequence[Line], curves: Curves, most: int, limits: Sequence[float]) -> dict[str, Any]:
    points = [each for line in lines for each in line.points if math.isfinite(each.value)]
    values = [each.value for each in points] + [each.low for each in points if each.low is not None]
    values += [each.high for each in points if each.high is not None and each.high < 1e6 * each.value]
    if panel == "cost" and values:
        highest = min(max(values), _readable(lines))
        inside = [each for each in limits if each <= highest * 1.5]
        return dict(type="log", **_log_ticks(min([*values, *inside]), max([highest, *inside])))
    if panel == "accuracy":
        return dict(tickformat=".0%", nticks=5)
    if panel == "speed":
        top = max(
            [*values, proportional(curves.num_blocks, min(most, curves.num_blocks - 1)) if curves.num_blocks else 1.0]
        )
        low = min([1.0, *values])
        room = 0.08 * (top - low) + 0.02
        return dict(
            ticksuffix="×", nticks=5, range=[low - room, max([top, *(x for x in limits if x < 2 * top)]) + room]
        )
    top = max(values, default=1.0)
    scale, unit = (1e9, "GB") if top >= 1e9 else (1e6, "MB") if top >= 1e6 else (1e3, "kB")
    ticks = _round_ticks(top / scale)
    inside = [each for each in limits if each < 1.6 * top]
    return dict(
        range=[0, 1.1 * max([top, *inside])], tickmode="array", tickvals=[each * scale for each in ticks],
        ticktext=[f"{each:g} {unit}" for each in ticks],
    )  # fmt: skip


def _log_ticks(lowest: float, highest: float) -> dict[str, Any]:
    """Ticks as `style.log_ticks`; three less round ones where no round number lies in so short a range."""
    ticks = style.log_ticks(lowest, highest)
    if len(ticks["tickvals"]) < 2:
        step = (max(highest, 1.001 * lowest) / lowest) ** 0.5
        shown = [float(f"{lowest * step**each:.3g}") for each in range(3)]
        ticks |= dict(tickvals=shown, ticktext=[f"{each:g}" for each in shown])
    return ticks


def beyond(lines: Sequence[Line]) -> list[str]:
    """Names of the perplexities that leave the chart at its upper edge."""
    top = _readable(lines)
    return [line.name for line in lines if any(each.value > top and each.change != math.inf for each in line.points)]


def _readable(lines: Sequence[Line]) -> float:
    """The highest perplexity that is drawn."""
    first = [line.points[0].value for line in lines if line.points and math.isfinite(line.points[0].value)]
    return style.READABLE * max(first, default=1.0)


def _round_ticks(top: float) -> list[float]:
    """Zero and two or three round numbers up to the top."""
    step = 10 ** math.floor(math.log10(max(top, 1e-9)))
    step = next((each for each in (0.2 * step, 0.5 * step, step, 2 * step, 5 * step) if top / each <= 3.2), 5 * step)
    return [round(count * step, 9) for count in range(int(top / step) + 1)]


def _over_baseline(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Each perplexity divided by its baseline; a line without one is left out."""
    divided = []
    for line in lines:
        first = line.at(0)
        if first is None or not 0 < first.value < math.inf:
            continue
        points = tuple(
            Point(
                each.removed,
                each.value / first.value,
                None if each.low is None else each.low / first.value,
                None if each.high is None else each.high / first.value,
                each.change,
                each.change_error,
            )
            for each in line.points
        )
        divided.append(Line(line.kind, line.name, line.about, points, line.is_estimate))
    return tuple(divided)


def _mark(figure: go.Figure, axes: Sequence[str], admissible: Collection[int], proposal: int | None) -> None:
    """Shade the numbers of blocks that pass, and frame the proposal, in the panels of these axes."""
    for axis in axes:
        own: dict[str, Any] = dict(type="rect", yref=f"y{axis} domain", y0=0, y1=1, layer="below")
        for low, high in consecutive(sorted(admissible)):
            figure.add_shape(x0=low - 0.5, x1=high + 0.5, fillcolor=PASSES, line=dict(width=0), **own)
        if proposal is not None:
            frame = dict(color=LIMIT, width=1.5, dash="dash")
            figure.add_shape(x0=proposal - 0.5, x1=proposal + 0.5, line=frame, fillcolor="rgba(0,0,0,0)", **own)


def _limit(figure: go.Figure, limit: Limit, axis: str, log: bool) -> None:
    figure.add_shape(
        type="line", xref="paper", yref=f"y{axis}", x0=0, x1=1, y0=limit.value, y1=limit.value,
        line=dict(color=LIMIT, width=1.5, dash="dashdot"), layer="below",
    )  # fmt: skip
    figure.add_annotation(
        text=style.plain(limit.name), xref="paper", yref=f"y{axis}", x=1, xanchor="right",
        y=math.log10(limit.value) if log else limit.value, yanchor="bottom", showarrow=False,
        font=dict(size=11, color=LIMIT),
    )  # fmt: skip
