"""What all charts share: colours, names of methods, axes, layout. Text from anywhere goes through `plain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from sleb.records import RunSpec

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which colour-blind readers distinguish too. Categories always keep
# the same one, in light and in dark.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, GREY = "#E69F00", "#56B4E9", "#8A929C"

CHOSEN, TIED, CANDIDATE, REMOVED, PROTECTED = ORANGE, YELLOW, BLUE, GREY, GREY
METHOD_COLOURS = {"metric3": ORANGE, "metric2": BLUE, "metric1": GREEN, "early-exit": PINK, "best-chunk": YELLOW}
METHOD_NAMES = {
    "metric3": "Metric3 (SLEB)",
    "metric2": "Metric2",
    "metric1": "Metric1",
    "early-exit": "Early exit",
    "best-chunk": "Best chunk",
}
PALETTE = (ORANGE, BLUE, GREEN, PINK, YELLOW, SKY, "#8C6BB1", "#7A7A7A")
"""Colours of lines that have none of their own."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SCALE = "Cividis"
"""The colour scale of every quantity."""
READABLE = 30
"""Perplexities leave a chart at so many times the lowest or the baseline's: beyond it, a model writes nonsense."""

DIFFERENT, TIED_VERDICT = "significantly different", "statistically tied"
"""What legends and hover texts say about a candidate."""

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    "toImageButtonOptions": {"format": "svg", "filename": "sleb"},
}
"""Plotly's settings of every chart on a page; the camera in its corner saves an SVG."""


def method_name(spec: RunSpec) -> str:
    """The name of a search method, and whether swaps follow it."""
    return METHOD_NAMES[spec.method.value] + (", refined" if spec.refine != "none" else "")


def plain(text: object) -> str:
    """Text from anywhere for a label or a hover text, with the tags escaped that Plotly would read in it."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def figure(height: int, *traces: Any, **layout: Any) -> go.Figure:
    """A figure with the margins, fonts and hover labels of all charts; the page's theme gives the colours."""
    settings: dict[str, Any] = dict(
        height=height,
        margin=dict(l=8, r=8, t=28, b=8),
        font=dict(size=13),
        hoverlabel=dict(font=dict(size=13)),
        legend=dict(orientation="h", yanchor="bottom", y=1.0, xanchor="left", x=0),
        xaxis=dict(automargin=True),
        yaxis=dict(automargin=True),
    )
    for name, value in layout.items():
        old = settings.get(name)
        settings[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return go.Figure(data=list(traces), layout=settings)


def faint(colour: str, opacity: float = 0.18) -> str:
    """A colour such as `#0072B2`, translucent."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour such as `#0072B2` (WCAG 2 contrast)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def block_step(most: int) -> int:
    """Distance of the ticks on an axis of numbers of blocks removed."""
    return 1 if most <= 20 else 2 if most <= 40 else 5


def log_ticks(lowest: float, highest: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, fewer over many decades, and finer within one."""
    low, high = math.log10(lowest), math.log10(max(highest, lowest * 1.05))
    digits: Sequence[float] = (1,) if high - low > 5 else (1, 3) if high - low > 2.5 else (1, 2, 5)
    if high - low < 0.9:
        digits = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [digit * 10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for digit in digits]
    margin = 0.04 * (high - low) + 0.01
    shown = [each for each in ticks if low - margin <= math.log10(each) <= high + margin]
    return dict(
        tickmode="array", tickvals=shown, ticktext=[_tick(each) for each in shown], range=[low - margin, high + margin]
    )


def _tick(value: float) -> str:
    if value < 1e5:
        return f"{value:,.0f}" if value >= 10 else f"{value:g}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def step_of_ticks(points: int) -> int:
    """Distance of ticks that leaves at most 21 of them for so many whole numbers."""
    return next(step for step in (1, 2, 5, 10, 20, 50) if points / step <= 21 or step == 50)
