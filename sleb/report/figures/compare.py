"""Runs and published lists side by side -> figures and tables. Knows records; knows no Streamlit and reads no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from sleb.formats.list_formats import display_name, without_folder
from sleb.formats.published_lists import PublishedList, jaccard, shared
from sleb.records import Measured, Method, Run, StackDescription, Step
from sleb.report.figures import style

PALETTE = (style.ORANGE, style.BLUE, style.GREEN, style.PINK, style.YELLOW, style.SKY, "#8C6BB1", "#7A7A7A")
"""Of runs that are told apart by more than their method; published lists are grey."""
PUBLISHED = style.GREY
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_CELL: dict[str, Any] = dict(
    textposition="inside",
    insidetextanchor="middle",
    textangle=0,
    textfont=dict(size=12),
    constraintext="inside",
    hovertemplate="%{hovertext}<extra></extra>",
)
_LABEL = 44  # characters; longer ones would take the place of what they label
_KEPT, _EDGE, _GAP = "rgba(128,128,128,0.10)", "rgba(128,128,128,0.45)", "rgba(255,255,255,0.7)"
_VOTES = "Lists that remove it"


@dataclass(frozen=True)
class Listed:
    """One removal list in a comparison: a run's, or a published one."""

    letter: str
    name: str
    num_blocks: int
    prefixes: tuple[tuple[int, ...], ...]
    """The removal list after 1, 2, ... removals, swaps included: neither they nor best chunks are nested."""
    colour: str
    is_published: bool = False
    is_chunk: bool = False
    """Removed in one piece: its blocks have no order."""

    @property
    def label(self) -> str:
        """Its letter and name, fit for a Plotly label."""
        return f"{self.letter}  {style.plain(self.name)}".strip()

    @property
    def removal_list(self) -> tuple[int, ...]:
        """In the order of removal; empty where nothing was removed yet."""
        return self.prefixes[-1] if self.prefixes else ()


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run that says in what it differs from the others, all of them different."""
    facts = [_facts(run) for run in runs]
    found = [""] * len(runs)
    for kind in zip(*facts, strict=True):  # the most telling first, and no more than it takes
        if len(set(kind)) > 1 and len(set(found)) < len(found):
            found = [f"{name}, {each}" if name else each for name, each in zip(found, kind, strict=True)]
    found = [_cut(name or each[1]) for name, each in zip(found, facts, strict=True)]
    return [
        name if found.count(name) == 1 else f"{_cut(name, _LABEL - 20)} ({_end(run.run_id)})"
        for name, run in zip(found, runs, strict=True)
    ]


def _facts(run: Run) -> tuple[str, ...]:
    """What runs differ in, the most telling first: model, method, text, seed, type."""
    spec, text = run.spec, run.spec.calibration
    return (
        display_name(spec.model).split("/")[-1],
        style.method_name(spec),
        without_folder(text.source),
        f"{text.sequences} × {text.sequence_length}",
        f"seed {spec.seed}",
        run.stack.dtype if run.stack else "",
    )


def same_name_other_model(runs: Sequence[Run], rows: Sequence[Listed]) -> list[str]:
    """Which runs name one model and type, and were not of one: it has changed between them."""
    found = []
    first: dict[tuple[str, str], tuple[str, StackDescription]] = {}
    for run, row in zip(runs, rows, strict=False):
        if run.stack is None:
            continue
        letter, before = first.setdefault((run.spec.model, run.stack.dtype), (row.letter, run.stack))
        if not run.stack.is_of_same_model(before):
            parts = "weights" if run.stack.weights_hash != before.weights_hash else "config, tokenizer or code"
            found.append(f"{letter} and {row.letter} name the same model, with other {parts}")
    return found


def _end(run_id: str) -> str:
    return run_id if len(run_id) <= 18 else "…" + run_id[-17:]


def _cut(text: str, length: int = _LABEL) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(runs: Sequence[Run], published: Sequence[PublishedList] = ()) -> list[Listed]:
    """Runs, then published lists, each with its letter and its colour. Runs without a stack are left out."""
    methods = [run.spec.method.value for run in runs]
    free = [colour for colour in PALETTE if colour not in {style.METHOD_COLOURS[each] for each in methods}]
    colours = []
    for place, method in enumerate(methods):  # a method keeps its colour on all pages; a second run of it takes another
        own = style.METHOD_COLOURS[method]
        spare = free.pop(0) if own in colours and free else PALETTE[place % len(PALETTE)]
        colours.append(spare if own in colours else own)
    found = [
        Listed(
            "",
            name,
            run.stack.num_blocks,
            tuple(step.removal_list for step in run.trace.by_length) if run.trace else (),
            colour,
            is_chunk=run.spec.method is Method.BEST_CHUNK,
        )
        for run, name, colour in zip(runs, names_of(runs), colours, strict=True)
        if run.stack is not None
    ]
    for each in published:
        blocks = each.removal_list
        nested = tuple(blocks[: count + 1] for count in range(len(blocks)))
        found.append(Listed("", f"{each.model} (paper, Table 4)", each.num_blocks, nested, PUBLISHED, True))
    return [replace(each, letter=chr(ord("A") + index)) for index, each in enumerate(found)]


def strips(rows: Sequence[Listed], *, relative: bool = False) -> go.Figure:
    """One row a list, one cell a block: removed ones filled and hatched, with the order of removal (Figure 8).

    `relative` puts the blocks at their relative depth in per cent, so that stacks of different height line up.
    """
    labels = [each.label for each in rows]
    kept = go.Bar(marker=dict(color=_KEPT, line=dict(color=_EDGE, width=1)), **_cells(rows, relative, removed=False))
    traces = [kept]
    for each in rows:
        hatching = dict(
            fillmode="overlay", shape="\\" if each.is_published else "/", size=8, solidity=0.12, fgcolor="#ffffff"
        )
        marker = dict(color=each.colour, line=dict(color=_GAP, width=1), pattern=hatching)
        cells = _cells([each], relative, removed=True)
        traces.append(go.Bar(marker=marker, insidetextfont=dict(color=_on(each.colour)), **cells))
    if len(rows) > 2 and len({each.num_blocks for each in rows}) == 1:
        traces.append(_votes(rows, relative))
        labels.append(_VOTES)
    most = max((each.num_blocks for each in rows), default=1)
    figure = style.figure(
        58 + 33 * len(labels),
        *traces,
        barmode="overlay",
        bargap=0.24,
        showlegend=False,
        margin=dict(t=8, b=46),
        uniformtext=dict(minsize=9, mode="hide"),
        yaxis=dict(categoryorder="array", categoryarray=labels[::-1], showgrid=False, ticklabelstandoff=10),
        xaxis=dict(
            title=dict(text="Block", standoff=10),
            range=[-0.5, most - 0.5],
            showgrid=False,
            zeroline=False,
            **_block_ticks(most),
        ),
    )
    if relative:
        axis = dict(title_text="Depth in the stack", range=[-0.2, 100.2], ticksuffix=" %", dtick=10, tick0=0)
        figure.update_xaxes(**axis, tickvals=None, tickmode="linear")
        figure.update_layout(margin=dict(r=28))  # half of the last label
    return figure


def _block_ticks(num_blocks: int) -> dict[str, Any]:
    step = 1 if num_blocks <= 16 else 2 if num_blocks <= 40 else 5
    return dict(tickmode="array", tickvals=list(range(0, num_blocks, step)))


def _cells(rows: Sequence[Listed], relative: bool, *, removed: bool) -> dict[str, Any]:
    """Base, width, label, text and hover text of the cells that are removed, or of those that stay."""
    base: list[float] = []
    width: list[float] = []
    label, text, hover = [], [], []
    for each in rows:
        order = {block: place for place, block in enumerate(each.removal_list, 1)}
        for block in range(each.num_blocks):
            if (block in order) is not removed:
                continue
            unit = 100 / each.num_blocks if relative else 1.0
            base.append(block * unit - (0 if relative else 0.5))
            width.append(unit)
            label.append(each.label)
            text.append("" if each.is_chunk else str(order.get(block, "")))
            what = f"removed as number {order[block]} of {len(order)}" if removed else "stays"
            what = "removed with its chunk" if removed and each.is_chunk else what
            depth = (block + 0.5) / each.num_blocks
            hover.append(f"{style.plain(each.name)}<br>block {block} of {each.num_blocks} ({depth:.0%} deep): {what}")
    return dict(orientation="h", base=base, x=width, y=label, text=text, hovertext=hover, **_CELL)


def _votes(rows: Sequence[Listed], relative: bool) -> go.Bar:
    """How many of the lists remove each block: the more, the lighter."""
    num_blocks = rows[0].num_blocks
    counts = [sum(block in each.removal_list for each in rows) for block in range(num_blocks)]
    hit = [block for block in range(num_blocks) if counts[block]]
    unit = 100 / num_blocks if relative else 1.0
    colours = sample_colorscale(style.SCALE, [counts[block] / len(rows) for block in hit])
    return go.Bar(
        orientation="h",
        base=[block * unit - (0 if relative else 0.5) for block in hit],
        x=[unit for _ in hit],
        y=[_VOTES for _ in hit],
        text=[str(counts[block]) for block in hit],
        marker=dict(color=colours, line=dict(color=_GAP, width=1)),
        hovertext=[f"block {block}: removed by {counts[block]} of {len(rows)} lists" for block in hit],
        **_CELL,
    )


def strips_table(rows: Sequence[Listed]) -> pd.DataFrame:
    """One row a removed block: list, order of removal, block, its relative depth."""
    return pd.DataFrame(
        [
            (each.letter, each.name, each.num_blocks, place, block, round((block + 0.5) / each.num_blocks, 4))
            for each in rows
            for place, block in enumerate(each.removal_list, 1)
        ],
        columns=["letter", "list", "blocks", "order", "block", "relative_depth"],
    )


def curve_table(runs: Sequence[Run], rows: Sequence[Listed]) -> pd.DataFrame:
    """Perplexities after every removal, 0 being the baseline; the error is of the held-out rise, nats per token.

    Of several lists of the same length, which swaps leave, the last one counts.
    """
    found = []
    for run, row in zip(runs, rows, strict=False):
        if run.trace is None or run.stack is None:
            continue
        first = run.trace.baseline
        points: list[tuple[int, Measured, Measured, float | None]] = [(0, first.calibration, first.held_out, None)]
        points += [_point(step) for step in run.trace.by_length]
        for removed, calibration, held_out, error in points:
            found.append(
                (
                    row.letter,
                    row.name,
                    removed,
                    removed / run.stack.num_blocks,
                    calibration.perplexity,
                    held_out.perplexity,
                    held_out.nats_per_token,
                    error,
                )
            )
    columns = ["letter", "list", "removed", "removed_share", "calibration", "held_out", "held_out_nats", "error_nats"]
    return pd.DataFrame(found, columns=columns)


def _point(step: Step) -> tuple[int, Measured, Measured, float | None]:
    return len(step.removal_list), step.calibration, step.held_out, step.held_out_standard_error


def perplexity(
    points: pd.DataFrame,
    rows: Sequence[Listed],
    *,
    held_out: bool = True,
    log: bool = True,
    over_baseline: bool = False,
    relative: bool = False,
    cut: float | None = None,
    texts: Sequence[str] = (),
) -> go.Figure:
    """Perplexity against blocks removed, one line a run, as in Figures 4 and 7; `points` is `curve_table`.

    Held-out lines carry a band of one standard error of their rise over the baseline. `over_baseline` divides each line
    by its own baseline; `cut` ends the axis at so many times the lowest value, and lines go on above it; `texts` names
    the text of each row, and another text gets another dash.
    """
    column = "held_out" if held_out else "calibration"
    kinds = list(dict.fromkeys(texts))
    traces: list[go.Scatter] = []
    lowest, highest = math.inf, 0.0
    for index, row in enumerate(rows):
        own = points[points["letter"] == row.letter]
        if own.empty:
            continue
        across = own["removed_share"] * 100 if relative else own["removed"]
        values = own[column].astype(float).to_numpy()
        scale = 1 / values[0] if over_baseline and len(values) and values[0] else 1.0
        values = values * scale
        if held_out:
            traces += _band(row, across, own, scale)
        dash = DASHES[kinds.index(texts[index]) % len(DASHES)] if texts else "solid"
        finite = values[np.isfinite(values)]
        if len(finite):
            lowest, highest = min(lowest, finite.min()), max(highest, finite.max())
        traces.append(
            go.Scatter(
                x=across.tolist(),
                y=values.tolist(),
                mode="lines+markers",
                name=row.label,
                legendgroup=row.letter,
                line=dict(color=row.colour, width=2, dash=dash),
                marker=dict(symbol=SYMBOLS[index % len(SYMBOLS)], size=7),
                customdata=np.stack([own["removed"], [_error(each) for each in own["error_nats"]]], axis=-1),
                hovertemplate=f"{row.label}<br>%{{customdata[0]}} blocks removed: %{{y:,.4~g}}"
                + ("%{customdata[1]}" if held_out else "")
                + "<extra></extra>",
            )
        )
    what = "held-out text" if held_out else "calibration text"
    title = f"Times the baseline's perplexity, {what}" if over_baseline else f"Perplexity, {what}"
    legend_lines = 1 + sum(50 + 7 * len(row.label) for row in rows) // 480
    figure = style.figure(
        400 + 20 * legend_lines,
        *traces,
        hovermode="closest",
        margin=dict(t=8, b=58 + 20 * legend_lines),
        legend=dict(orientation="h", yref="container", yanchor="bottom", y=0.0, x=0),
        xaxis=dict(
            title="Share of blocks removed" if relative else "Blocks removed", rangemode="tozero", zeroline=False
        ),
        yaxis=dict(title=title, zeroline=False),
    )
    figure.update_xaxes(ticksuffix=" %" if relative else "", **({} if relative else _whole(points["removed"])))
    if cut is not None and highest > cut * lowest:
        highest = cut * lowest
        figure.update_yaxes(range=[0, highest])
    if log and highest > 0:
        figure.update_yaxes(type="log", **log_ticks(lowest, highest))
    return figure


def _band(row: Listed, across: pd.Series, own: pd.DataFrame, scale: float) -> list[go.Scatter]:
    """One standard error up and down, where it was measured: exp(nats plus or minus it)."""
    nats, error = own["held_out_nats"].astype(float), own["error_nats"].astype(float)
    known = (error.notna() & nats.notna() & (nats < 700)).to_numpy(copy=True)
    if known.sum() == 0:
        return []
    known[0] = True  # the baseline, of whose rise over itself there is no doubt
    nats, error, x = nats[known], error[known].fillna(0.0), across[known]
    upper, lower = np.exp(nats + error) * scale, np.exp(nats - error) * scale
    return [
        go.Scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([upper, lower[::-1]]),
            fill="toself",
            fillcolor=_faint(row.colour),
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


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _on(colour: str) -> str:
    """Black or white, whichever is read better on a colour (WCAG 2 contrast)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _whole(removed: pd.Series) -> dict[str, Any]:
    """Ticks at whole numbers of blocks only."""
    most = int(removed.max()) if len(removed) else 1
    return dict(tick0=0, dtick=1 if most <= 20 else 2 if most <= 40 else 5, range=[-0.02 * max(most, 1), most * 1.02])


def log_ticks(lowest: float, highest: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, fewer over many decades, and finer within one."""
    low, high = math.log10(lowest), math.log10(max(highest, lowest * 1.05))
    digits = (1,) if high - low > 5 else (1, 3) if high - low > 2.5 else (1, 2, 5)
    if high - low < 0.9:
        digits = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # type: ignore[assignment]
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
    found = []
    for place, one in enumerate(rows):
        for other in rows[place + 1 :]:
            if one.num_blocks == other.num_blocks:
                mine, theirs = one.prefixes[removals - 1], other.prefixes[removals - 1]
                both = shared(mine, theirs)
                found.append(
                    (one.name, other.name, removals, len(both), jaccard(mine, theirs), " ".join(map(str, both)))
                )
    return pd.DataFrame(found, columns=["one", "other", "removals", "shared", "jaccard", "shared_blocks"])


def summary_table(runs: Sequence[Run], rows: Sequence[Listed]) -> pd.DataFrame:
    """One row a list: what was asked, what was removed and what it costs."""
    found = [_summary(run, row) for run, row in zip(runs, rows, strict=False)]
    found += [
        {
            "": row.letter,
            "Model": row.name,
            "Method": "Metric3 (paper)",
            "Blocks": row.num_blocks,
            "Removed": len(row.removal_list),
            "Removal list": ", ".join(map(str, row.removal_list)),
        }
        for row in rows[len(runs) :]
    ]
    return pd.DataFrame(found)


def _summary(run: Run, row: Listed) -> dict[str, Any]:
    assert run.stack is not None
    first = run.trace.baseline if run.trace else None
    last = run.trace.steps[-1] if run.trace and run.trace.steps else None
    text = run.spec.calibration
    found: dict[str, Any] = {
        "": row.letter,
        "Model": display_name(run.spec.model),
        "Method": style.method_name(run.spec),
        "Blocks": row.num_blocks,
        "Removed": len(row.removal_list),
        "Held-out before": first.held_out.perplexity if first else None,
        "Held-out after": last.held_out.perplexity if last else None,
        "Rise, nats": None,
        "Calibration before": first.perplexity if first else None,
        "Calibration after": last.perplexity if last else None,
        "Seconds": None,
        "Text": f"{without_folder(text.source)}, {run.stack.sequences} × {run.stack.sequence_length}",
        "Removal list": ", ".join(map(str, row.removal_list)),
        "Run": run.run_id,
    }
    if first and last:
        rise = last.held_out.rise_over(first.held_out)
        if rise is not None:
            error = last.held_out_standard_error
            found["Rise, nats"] = f"{rise:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    if first and run.trace:
        found["Seconds"] = first.seconds + sum(step.seconds for step in run.trace.steps)
    return found
