"""What all charts share: colours, scales, layout. Text from anywhere goes through `plain`."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from sleb.records import RunSpec

# Okabe and Ito's colours (jfly.uni-koeln.de/color): told apart by colour-blind readers too. Categories always keep
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
SCALE = "Cividis"
"""Of everything that is a quantity."""

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    "toImageButtonOptions": {"format": "svg", "filename": "sleb"},
}
"""Of every chart on a page; the camera in its corner saves an SVG."""


def method_name(spec: RunSpec) -> str:
    """How a search chooses, swaps after it included."""
    return METHOD_NAMES[spec.method.value] + (", refined" if spec.refine != "none" else "")


def plain(text: object) -> str:
    """Text from anywhere for a label or a hover text: Plotly would read tags in it."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def figure(height: int, *traces: Any, **layout: Any) -> go.Figure:
    """A figure with the margins, fonts and hover labels that all charts have; the page's theme gives the colours."""
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
