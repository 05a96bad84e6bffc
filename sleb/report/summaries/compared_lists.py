"""Removal lists side by side: runs' and published ones, their names, colours and numbers. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from sleb.formats.list_formats import display_name, without_folder
from sleb.formats.published_lists import PublishedList
from sleb.records import Measured, Method, Run, StackDescription, Step
from sleb.report.figures import style
from sleb.report.summaries.numbers import cut, search_seconds

_LABEL = 44  # characters; longer ones would take the place of what they label


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
    """Whether its blocks were removed in one piece, and have no order."""

    @property
    def label(self) -> str:
        """Letter and name, as Plotly shows them."""
        return f"{self.letter}  {style.plain(self.name)}".strip()

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal; empty where nothing was removed yet."""
        return self.prefixes[-1] if self.prefixes else ()


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run that says how it differs from the others; no two are the same."""
    facts = [_facts(run) for run in runs]
    names = [""] * len(runs)
    for kind in zip(*facts, strict=True):  # the most telling first, and no more than it takes
        if len(set(kind)) > 1 and len(set(names)) < len(names):
            names = [f"{name}, {each}" if name else each for name, each in zip(names, kind, strict=True)]
    names = [cut(name or each[1], _LABEL) for name, each in zip(names, facts, strict=True)]
    return [
        name if names.count(name) == 1 else f"{cut(name, _LABEL - 20)} ({_end(run.run_id)})"
        for name, run in zip(names, runs, strict=True)
    ]


def _facts(run: Run) -> tuple[str, ...]:
    """What runs can differ in, the most important first: model, method, text, seed, type."""
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
    """Sentences about runs that name the same model and type although it changed between them."""
    changed = []
    first: dict[tuple[str, str], tuple[str, StackDescription]] = {}
    for run, row in zip(runs, rows, strict=False):
        if run.stack is None:
            continue
        letter, before = first.setdefault((run.spec.model, run.stack.dtype), (row.letter, run.stack))
        if not run.stack.is_of_same_model(before):
            parts = "weights" if run.stack.weights_hash != before.weights_hash else "config, tokenizer or code"
            changed.append(f"{letter} and {row.letter} name the same model, with other {parts}")
    return changed


def _end(run_id: str) -> str:
    return run_id if len(run_id) <= 18 else "…" + run_id[-17:]


def listed(runs: Sequence[Run], published: Sequence[PublishedList] = ()) -> list[Listed]:
    """Runs, then published lists, each with its letter and its colour. Runs without a stack are left out."""
    methods = [run.spec.method.value for run in runs]
    free = [colour for colour in style.PALETTE if colour not in {style.METHOD_COLOURS[each] for each in methods}]
    colours = []
    for place, method in enumerate(methods):  # a method keeps its colour on all pages; a second run of it takes another
        own = style.METHOD_COLOURS[method]
        spare = free.pop(0) if own in colours and free else style.PALETTE[place % len(style.PALETTE)]
        colours.append(spare if own in colours else own)
    rows = [
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
        rows.append(Listed("", f"{each.model} (paper, Table 4)", each.num_blocks, nested, style.GREY, True))
    return [replace(each, letter=chr(ord("A") + index)) for index, each in enumerate(rows)]


def curve_table(runs: Sequence[Run], rows: Sequence[Listed]) -> pd.DataFrame:
    """Perplexities after every removal, 0 being the baseline; `error_nats` is the standard error of the held-out rise.

    Of several lists of the same length, which swaps leave, the last one counts.
    """
    records = []
    for run, row in zip(runs, rows, strict=False):
        if run.trace is None or run.stack is None:
            continue
        first = run.trace.baseline
        points: list[tuple[int, Measured, Measured, float | None]] = [(0, first.calibration, first.held_out, None)]
        points += [_point(step) for step in run.trace.by_length]
        for removed, calibration, held_out, error in points:
            records.append(
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
    return pd.DataFrame(records, columns=columns)


def _point(step: Step) -> tuple[int, Measured, Measured, float | None]:
    return len(step.removal_list), step.calibration, step.held_out, step.held_out_standard_error


def letters_beyond(points: pd.DataFrame, column: str, times: float) -> list[str]:
    """Letters of the lists with a perplexity beyond so many times the lowest; `points` is `curve_table`."""
    return list(points[points[column] > times * points[column].min()]["letter"].unique())


PERPLEXITY_COLUMNS = ("Held-out before", "Held-out after", "Calibration before", "Calibration after")
"""Columns of `summary_table` that hold perplexities."""


def summary_table(runs: Sequence[Run], rows: Sequence[Listed]) -> pd.DataFrame:
    """One row a list: its settings, the removed blocks, and what they cost."""
    records = [_summary(run, row) for run, row in zip(runs, rows, strict=False)]
    records += [
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
    return pd.DataFrame(records)


def _summary(run: Run, row: Listed) -> dict[str, Any]:
    assert run.stack is not None
    first = run.trace.baseline if run.trace else None
    last = run.trace.steps[-1] if run.trace and run.trace.steps else None
    text = run.spec.calibration
    record: dict[str, Any] = {
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
            record["Rise, nats"] = f"{rise:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    if first and run.trace:
        record["Seconds"] = search_seconds(run.trace)
    return record
