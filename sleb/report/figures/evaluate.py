"""What removal lists cost and buy -> figures. Knows lines and records; knows no Streamlit and reads no file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sleb.formats.findings_tables import scheme_of
from sleb.records import EvaluatedText, Finding, Healing, Measured, Quantization, RemovalList, TextPerplexity
from sleb.report.figures import compare, style
from sleb.report.summaries.gates import Reading, as_bytes, in_words
from sleb.report.summaries.list_curves import Curves, Line, Point, proportional
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes.progress import duration

READABLE = 30
"""A perplexity so many times the baseline's leaves the chart at its upper edge."""
PASSES, LIMIT = "rgba(0,158,115,0.13)", style.GREEN
_COLOURS = (style.BLUE, style.GREEN, style.PINK, style.YELLOW, style.SKY, "#8C6BB1", style.ORANGE, "#7A7A7A")
_OWN = {  # what is always drawn the same: colour, dash, symbol, width of line
    "held-out": (style.SKY, "dot", "diamond", 2),
    "calibration": (style.GREY, "dot", "line-ew", 2),
    "mean": (style.ORANGE, "solid", "square", 4),
    "prompt": (style.BLUE, "solid", "circle", 2),
    "generation": (style.ORANGE, "solid", "square", 2),
    "whole": (style.ORANGE, "solid", "diamond", 2),
}
_HEIGHTS = {"cost": 180, "accuracy": 124, "speed": 120, "size": 84}
_EMPTY, _GAP, _LEGEND, _FOOT = 62, 16, 18, 44  # pixels
_IN_A_ROW = 4  # entries of a legend, in a chart that is not very wide
_SUPERSCRIPT = " ≈"


@dataclass(frozen=True)
class Limit:
    """A gate as a line across its panel."""

    panel: str
    """`cost`, `accuracy`, `speed` or `size`."""
    value: float
    """In the panel's unit."""
    name: str
    ratio: float | None = None
    """Of a perplexity: times the baseline's."""


def panels(
    found: Curves,
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
    shown = {
        "cost": _over_baseline(found.cost) if over_baseline else found.cost,
        "accuracy": found.accuracy,
        "speed": found.speed,
        "size": found.size,
    }
    if over_baseline:
        limits = [each if each.ratio is None else replace(each, value=each.ratio) for each in limits]
    most = max(found.lists, default=0)
    layout, traces = _Layout(), []
    for place, (panel, lines) in enumerate(shown.items(), start=1):
        is_empty = not lines and panel != "speed"
        layout.add(panel, _EMPTY if is_empty else _HEIGHTS[panel], 0 if is_empty else len(lines) + (panel == "speed"))
        axis = "" if place == 1 else str(place)
        for index, line in enumerate(lines):
            traces.append(_trace(line, index, axis, panel, over_baseline))
        if panel == "speed" and found.num_blocks:
            traces.append(_proportional(found, most, axis))
    figure = style.figure(
        layout.height,
        *traces,
        margin=dict(t=layout.head, b=_FOOT, l=8, r=14),
        hovermode="x unified",
        hoversubplots="axis",
        hoverlabel=dict(font=dict(size=12)),
        xaxis=dict(
            title=dict(text="Blocks removed", standoff=8),
            range=[-0.5, most + 0.5],
            dtick=1 if most <= 20 else 2 if most <= 40 else 5,
            tick0=0,
            zeroline=False,
            showgrid=False,
            anchor=f"y{len(shown)}",
            unifiedhovertitle=dict(text="%{x} blocks removed"),
        ),
    )
    titles = dict(
        cost="× baseline" if over_baseline else "Perplexity", accuracy="Accuracy", speed="Speedup", size="Size"
    )
    for place, (panel, lines) in enumerate(shown.items(), start=1):
        axis = "" if place == 1 else str(place)
        low, high = layout.domain(panel)
        own = _axis(panel, lines, found, most, [each.value for each in limits if each.panel == panel])
        title = dict(text=titles[panel], standoff=10)
        figure.update_layout(
            {
                f"yaxis{axis}": dict(
                    domain=[low, high], anchor="x", title=title, automargin=True, zeroline=False, **own
                ),
                f"legend{axis}": dict(
                    orientation="h", x=0, xanchor="left", y=high, yanchor="bottom", yref="paper", font=dict(size=11),
                    indentation=-3,
                    bgcolor="rgba(0,0,0,0)",
                ),
            }
        )  # fmt: skip
        if panel in missing:
            is_empty = not any(each.kind not in ("held-out", "calibration") for each in lines)
            beside = bool(lines) or panel == "speed"  # something is drawn there all the same
            if is_empty:
                figure.add_annotation(
                    text=missing[panel], xref="paper", yref=f"y{axis} domain", x=0.985 if beside else 0.5,
                    y=0.02 if beside else 0.5, xanchor="right" if beside else "center",
                    yanchor="bottom" if beside else "middle", showarrow=False, font=dict(size=12), opacity=0.8,
                )  # fmt: skip
        if not lines and panel != "speed":  # an axis of its own, or Plotly would not draw the panel
            figure.add_trace(go.Scatter(x=[None], y=[None], yaxis=f"y{axis}", showlegend=False, hoverinfo="skip"))
            figure.update_layout({f"yaxis{axis}": dict(showticklabels=False, showgrid=False, range=[0, 1])})
    drawn = [place for place, (panel, lines) in enumerate(shown.items(), start=1) if lines or panel == "speed"]
    _mark(figure, drawn, admissible, proposal)
    for each in limits:
        place = list(shown).index(each.panel) + 1
        _limit(figure, each, "" if place == 1 else str(place), each.panel == "cost")
    return figure


class _Layout:
    """Panels from the top, in pixels, each with room for its legend above it."""

    def __init__(self) -> None:
        self._panels: dict[str, tuple[int, int, int]] = {}  # legend, top, bottom
        self._end = 0

    def add(self, panel: str, height: int, entries: int) -> None:
        rows = math.ceil(entries / _IN_A_ROW) + (entries > _IN_A_ROW)  # and one more on a narrow screen
        start = self._end + (_GAP if self._panels else 4) + _LEGEND * rows + (5 if rows else 0)
        self._panels[panel] = (self._end, start, start + height)
        self._end = start + height

    @property
    def head(self) -> int:
        """The first panel's legend, which is the figure's upper margin."""
        return next(iter(self._panels.values()))[1]

    @property
    def height(self) -> int:
        return self._end + _FOOT

    def domain(self, panel: str) -> tuple[float, float]:
        """As Plotly counts: a share of the plot area, from below."""
        _, top, bottom = self._panels[panel]
        inside = self._end - self.head
        return (self._end - bottom) / inside, (self._end - top) / inside


def _trace(line: Line, index: int, axis: str, panel: str, over_baseline: bool) -> go.Scatter:
    colour, dash, symbol, width = _OWN.get(
        line.kind, (_COLOURS[index % len(_COLOURS)], "solid", compare.SYMBOLS[index % len(compare.SYMBOLS)], 2)
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
            array=[_apart(each.high, each.value) for each in points],
            arrayminus=[_apart(each.value, each.low) for each in points],
            thickness=1.3,
            width=3,
        ),
        customdata=[_told(line, each, panel, over_baseline) for each in points],
        hovertemplate="%{customdata}",
    )  # fmt: skip


def _proportional(found: Curves, most: int, axis: str) -> go.Scatter:
    numbers = [each for each in range(most + 1) if each < found.num_blocks]
    return go.Scatter(
        x=numbers,
        y=[proportional(found.num_blocks, each) for each in numbers],
        yaxis=f"y{axis}",
        legend=f"legend{axis}",
        name="by blocks",
        mode="lines",
        line=dict(color=style.GREY, dash="dash", width=2),
        customdata=[f"{proportional(found.num_blocks, each):.2f}×, predicted" for each in numbers],
        hovertemplate="%{customdata}",
    )


def _told(line: Line, point: Point, panel: str, over_baseline: bool) -> str:
    """A point in the hover text."""
    if panel == "cost":
        value = f"{point.value:,.4g}" + ("×" if over_baseline else "")
        if line.kind == "calibration":
            return f"{value} (chosen on it: too good)"
        if point.change is None or not point.removed or not math.isfinite(point.change):
            return value
        error = f" ± {math.exp(point.change) * point.change_error:.1%}" if point.change_error else ""
        return value if over_baseline or point.change > 5 else f"{value} ({math.expm1(point.change):+.1%}{error})"
    if panel == "accuracy":
        error = f" ± {100 * (point.high - point.value):.1f}" if point.high is not None else ""
        return f"{100 * point.value:.1f}{error} %"
    if panel == "speed":
        if point.low is None or point.high is None:
            return f"{point.value:.2f}×"
        return f"{point.value:.2f}× ({point.low:.2f} to {point.high:.2f}), {point.told}"
    return as_bytes(point.value) + (f", {point.told}" if point.told else "")


def _apart(high: float | None, low: float | None) -> float:
    """Of an error bar; nothing where nothing is known."""
    return 0.0 if high is None or low is None else max(0.0, high - low)


def _axis(panel: str, lines: Sequence[Line], found: Curves, most: int, limits: Sequence[float]) -> dict[str, Any]:
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
            [*values, proportional(found.num_blocks, min(most, found.num_blocks - 1)) if found.num_blocks else 1.0]
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
    """As elsewhere; where no round number lies in so short a range, three that are less round."""
    ticks = compare.log_ticks(lowest, highest)
    if len(ticks["tickvals"]) < 2:
        step = (max(highest, 1.001 * lowest) / lowest) ** 0.5
        shown = [float(f"{lowest * step**each:.3g}") for each in range(3)]
        ticks |= dict(tickvals=shown, ticktext=[f"{each:g}" for each in shown])
    return ticks


def beyond(lines: Sequence[Line]) -> list[str]:
    """Perplexities that leave the chart at its upper edge, by name."""
    top = _readable(lines)
    return [line.name for line in lines if any(each.value > top and each.change != math.inf for each in line.points)]


def _readable(lines: Sequence[Line]) -> float:
    """The highest perplexity that is drawn."""
    first = [line.points[0].value for line in lines if line.points and math.isfinite(line.points[0].value)]
    return READABLE * max(first, default=1.0)


def _round_ticks(top: float) -> list[float]:
    """Zero and two or three round numbers up to the top."""
    step = 10 ** math.floor(math.log10(max(top, 1e-9)))
    step = next((each for each in (0.2 * step, 0.5 * step, step, 2 * step, 5 * step) if top / each <= 3.2), 5 * step)
    return [round(count * step, 9) for count in range(int(top / step) + 1)]


def _over_baseline(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Each perplexity over its own at 0 blocks removed; a line without one is left out."""
    found = []
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
        found.append(Line(line.kind, line.name, line.about, points, line.is_estimate))
    return tuple(found)


def _mark(figure: go.Figure, panels: Sequence[int], admissible: Collection[int], proposal: int | None) -> None:
    """Shade what passes, in one piece where numbers follow each other, and frame the proposal."""
    runs: list[list[int]] = []
    for each in sorted(admissible):
        if runs and runs[-1][1] == each - 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    for place in panels:
        own: dict[str, Any] = dict(
            type="rect", yref=f"y{'' if place == 1 else place} domain", y0=0, y1=1, layer="below"
        )
        for low, high in runs:
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


@dataclass(frozen=True)
class Side:
    """One of two searches on different texts."""

    text: str
    """What its blocks were chosen on, in words."""
    source: str
    removal_list: RemovalList
    """In the order of the stack."""
    findings: Sequence[Finding]


def texts_of(sides: Sequence[Side]) -> list[EvaluatedText]:
    """Texts on which a list of either was measured."""
    found = [
        each.text
        for side in sides
        for each in of_kind(side.findings, TextPerplexity)
        if each.removal_list == side.removal_list
    ]
    return list(dict.fromkeys(found))


def rivals_table(sides: Sequence[Side], texts: Sequence[EvaluatedText], plain: Callable[[object], str]) -> pd.DataFrame:
    """Lists against texts, as Markdown: perplexity, its rise with the standard error, the better one bold.

    `plain` escapes names from outside.
    """
    known = [
        {each.text: each for each in of_kind(side.findings, TextPerplexity) if each.removal_list == side.removal_list}
        for side in sides
    ]
    first = {
        each.text: each for side in sides for each in of_kind(side.findings, TextPerplexity) if not each.removal_list
    }
    columns: dict[str, list[str]] = {"Blocks chosen on": ["unmodified", *(plain(side.text) for side in sides)]}
    columns["Removed"] = ["–", *(", ".join(map(str, side.removal_list)) for side in sides)]
    for text in texts:
        own = [each.get(text) for each in known]
        better = _better(own)
        cells = [_cell(first.get(text), False, False)]
        cells += [_cell(each, each is better, _is_own(side, text)) for each, side in zip(own, sides, strict=True)]
        name = plain(text.name) + ("" if text.is_whole else f" ≈ {text.windows} of {text.of_windows}")
        while name in columns:  # the same file, cut otherwise
            name += f", {text.window} tokens" if text.window != 2048 else "\N{ZERO WIDTH SPACE}"
        columns[name] = cells
    return pd.DataFrame(columns).set_index("Blocks chosen on")


def _better(pair: Sequence[TextPerplexity | None]) -> TextPerplexity | None:
    """That with the lower rise, where they are further apart than both errors together."""
    if len(pair) != 2 or any(each is None or each.rise is None for each in pair):
        return None
    low, high = sorted((each for each in pair if each is not None), key=lambda each: each.rise or 0.0)
    apart = (high.rise or 0.0) - (low.rise or 0.0)
    return low if apart > math.hypot(low.rise_standard_error or 0.0, high.rise_standard_error or 0.0) else None


def _cell(found: TextPerplexity | None, better: bool, own: bool) -> str:
    if found is None:
        return "not measured"
    value = found.measured.perplexity
    told = "no number" if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"
    told = f"**{told}**" if better else told
    if found.rise is not None:
        error = found.rise_standard_error
        low, high = (None, None) if error is None else (found.rise - error, found.rise + error)
        told += f" ({in_words('rise', Reading(found.rise, low, high))})"
    return told + (", *its own text*" if own else "")


def _is_own(side: Side, text: EvaluatedText) -> bool:
    """Whether the blocks were chosen on the same kind of text."""
    return re.split(r"[\\/]", side.source)[-1].removesuffix("-rows") == text.name


def quantization_table(found: Sequence[Quantization]) -> pd.DataFrame:
    """One row a scheme, list and text, the newest answers last."""
    return pd.DataFrame(
        [
            {
                "Removed": len(each.removal_list),
                "Scheme": scheme_of(each),
                "Text": each.text.name + ("" if each.text.is_whole else " ≈"),
                "Before": each.before.perplexity,
                "Quantised": each.measured.perplexity,
                "Rise": _rise(each),
                "Weights": f"{as_bytes(each.weight_bytes_before)} → {as_bytes(each.weight_bytes)}",
                "Blocks removed": ", ".join(map(str, each.removal_list)) or "none",
                "By": each.library,
            }
            for each in sorted(found, key=lambda each: (len(each.removal_list), each.scheme, each.text.name))
        ]
    )


def healing_table(found: Sequence[Healing]) -> pd.DataFrame:
    """One row a healing and text: perplexity of the unmodified model, without the list, and healed."""
    names = {"lora": "LoRA", "linear": "least squares", "both": "least squares, LoRA"}
    return pd.DataFrame(
        [
            {
                "Removed": len(each.removal_list),
                "How": names.get(each.ask.how, each.ask.how)
                + (f", rank {each.ask.rank}" if each.ask.how != "linear" else ""),
                "Text": each.text.name + ("" if each.text.is_whole else " ≈"),
                "Unmodified": each.baseline.perplexity,
                "Before": each.before.perplexity,
                "Healed": each.after.perplexity,
                "Change, nats": ""
                if each.change is None
                else f"{each.change:+.4f}".replace("-", "−")
                + ("" if each.change_standard_error is None else f" ± {each.change_standard_error:.4f}"),
                "Loss": list(each.losses) or None,
                "Trained on": f"{each.trained_tokens:,} tokens of {re.split(r'[/]', each.ask.source)[-1]}",
                "Took": duration(each.seconds),
                "Blocks removed": ", ".join(map(str, each.removal_list)),
            }
            for each in sorted(found, key=lambda each: (len(each.removal_list), each.finished))
        ]
    )


def _rise(found: Quantization) -> str:
    """In per cent, with its standard error where there is one."""
    if found.change is None:
        return _share(found.before, found.measured)
    error = found.change_standard_error
    low, high = (None, None) if error is None else (found.change - error, found.change + error)
    return in_words("rise", Reading(found.change, low, high))


def _share(before: Measured, after: Measured) -> str:
    ratio = after.ratio_to(before)
    return "" if ratio is None else f"{ratio - 1:+.1%}".replace("-", "−")
