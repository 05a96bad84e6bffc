"""Parts of an HTML page that needs nothing else: sections, tables, Plotly figures, a policy. Knows strings and figures.

Whatever is text goes through `html.escape`, or into JSON that no parser of HTML can leave; the only scripts are Plotly
and the one written here, and the page's own policy allows these two, by their hash, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


def section(title: str, *parts: str) -> str:
    """A section with its headline; `title` is text, `parts` are HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def facts(rows: Iterable[tuple[str, object]], *, code: bool = False) -> str:
    """Names and values as a list of definitions; `code` sets the values as code."""
    tag = ("<code>", "</code>") if code else ("", "")
    shown = "".join(f"<dt>{escape(name)}</dt><dd>{tag[0]}{escape(str(value))}{tag[1]}</dd>" for name, value in rows)
    return f"<dl>{shown}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, marked: int | None = None) -> str:
    """A table of text; `marked` is the row (from 0) that stands out."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        ('<tr class="marked">' if place == marked else "<tr>")
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: go.Figure, alt: str, kind: str = "") -> str:
    """A figure as data, which a script of the page draws."""
    axis = dict(
        gridcolor="rgba(128,128,128,0.22)", linecolor="rgba(128,128,128,0.5)", zerolinecolor="rgba(128,128,128,0.4)"
    )
    figure = go.Figure(figure)
    figure.update_layout(
        template=go.layout.Template(
            layout=dict(
                xaxis=axis,
                yaxis=axis,
            )
        ),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="inherit"),
        modebar=dict(bgcolor="rgba(0,0,0,0)"),
        autosize=True,
    )
    height = figure.layout.height or 400
    data = str(figure.to_json()).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<figure class="plot {kind}" role="img" aria-label="{escape(alt)}" style="height:{height:.0f}px">'
        f'<script type="application/json">{data}</script></figure>'
    )


_STYLE = """
:root { color-scheme: light dark; --text: #1b2430; --soft: #5b6674; --page: #ffffff; --panel: #f3f5f8; --line: #d5dbe3;
  --accent: #0b6aa8; --warn: #8a4b00; }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e6ebf1; --soft: #a3afbd; --page: #10151c;
  --panel: #19212b; --line: #33404f; --accent: #6cc0f0; --warn: #f0b429; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 0.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 0.4rem 0; }
p { margin: 0.5rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.warning { color: var(--warn); border-left: 3px solid currentColor; padding-left: 0.8rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 0.8rem; margin: 1.6rem 0 0; }
.cards div { background: var(--panel); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.8rem 1rem; }
.cards b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: 0.86rem; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2.5rem; }
dl { display: grid; grid-template-columns: minmax(8.5rem, max-content) minmax(0, 1fr); gap: 0.35rem 1.2rem;
  margin: 0.6rem 0; align-content: start; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; white-space: pre-wrap;
  background: var(--panel); border-radius: 0.3rem; padding: 0.1rem 0.35rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: 0.38rem 0.7rem 0.38rem 0; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { padding-left: 0.5rem; }
tr.marked td { background: var(--panel); font-weight: 600; }
figure { margin: 0.8rem 0; }
.plot text:not(.bartext, .hoverlayer *) { fill: var(--text) !important; }
.plot .slider-rail-rect, .plot .updatemenu-item-rect, .plot .slider-grip-rect { fill: var(--panel) !important;
  stroke: var(--line) !important; }
@media (max-width: 760px) { .two { grid-template-columns: minmax(0, 1fr); } }
@media print { main { max-width: none; padding: 0; } .cards div, figure, tr, dl { break-inside: avoid; }
  h2 { margin-top: 1.6rem; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  .play .updatemenu-container, .play .slider-container { display: none; } * { print-color-adjust: exact; } }
"""

_SCRIPT = """
for (const place of document.querySelectorAll("figure.plot")) {
  const figure = JSON.parse(place.firstElementChild.textContent);
  place.replaceChildren();
  figure.config = { displaylogo: false, responsive: true, toImageButtonOptions: { format: "svg" },
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
  Plotly.newPlot(place, figure);
}
const fit = () => document.querySelectorAll("figure.plot").forEach((place) => Plotly.Plots.resize(place));
addEventListener("beforeprint", fit);
addEventListener("afterprint", fit);
"""


@lru_cache(maxsize=1)
def _plotly() -> str:
    """Plotly's own script, escaped so that it does not end the element around it."""
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def page(title: str, about: str, sections: Iterable[str]) -> str:
    """The whole file. `about` is one line of text under the title; sections are HTML."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (_plotly(), _SCRIPT)
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(about)}</p>{"".join(sections)}</main>'
        f"<script>{_plotly()}</script><script>{_SCRIPT}</script></body></html>\n"
    )
