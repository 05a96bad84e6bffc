"""Findings about a run's lists as lines over the number of blocks removed. Knows records; draws nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import pandas as pd

from sleb.formats.findings_tables import truncated_prompts, without_numbers
from sleb.records import (
    Finding,
    Quantization,
    RemovalList,
    Run,
    Step,
    TaskAccuracy,
    TextPerplexity,
    Timing,
    sorted_list,
)
from sleb.report.summaries.numbers import as_bytes, cut
from sleb.runtime.findings_folder import of_kind

Kind = Literal[
    "text", "held-out", "calibration", "task", "mean", "prompt", "generation", "weights", "quantized", "whole", "memory"
]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_METRICS = ("acc_norm", "acc", "exact_match", "f1")  # the first that a task has: what the paper's tables have
_LABEL = 15

F = TypeVar("F", bound=Finding)


@dataclass(frozen=True)
class Point:
    """One list on one line."""

    removed: int
    value: float
    """A perplexity, share of right answers, speedup or number of bytes, as the line's kind says."""
    low: float | None = None
    high: float | None = None
    """`low` and `high` are one standard error either way, or the quartiles of a timing."""
    change: float | None = None
    """The change from the baseline: nats per token for a text, share of right answers lost for a task."""
    change_error: float | None = None
    detail: str = ""
    """A remark for hover texts."""


@dataclass(frozen=True)
class Line:
    """One text, task, kind of timing or kind of bytes, over the number of blocks removed."""

    kind: Kind
    name: str
    """A short name that no other line of the panel has."""
    about: str
    points: tuple[Point, ...]
    """Points in ascending order of removed blocks."""
    is_estimate: bool = False
    """Whether it was measured on a part of the text, or of the task's examples."""

    def at(self, removed: int) -> Point | None:
        """The point at so many blocks removed; None where there is none."""
        return next((each for each in self.points if each.removed == removed), None)


@dataclass(frozen=True)
class Curves:
    """All lines of a run."""

    lists: Mapping[int, RemovalList]
    """Blocks removed -> the list: those of the search, or, where nothing was searched, those that were evaluated."""
    num_blocks: int
    cost: tuple[Line, ...]
    """Perplexities of texts, then of the search's own texts."""
    accuracy: tuple[Line, ...]
    """Tasks, and their mean where there are several."""
    speed: tuple[Line, ...]
    size: tuple[Line, ...]
    elsewhere: int
    """How many findings are about other lists."""
    notes: tuple[str, ...] = ()
    """Why numbers are missing, and which prompts were cut."""
    too_good: tuple[str, ...] = ()
    """Texts that overlap with the one on which the blocks were chosen, and in what."""

    @property
    def texts(self) -> tuple[Line, ...]:
        """Perplexities of texts on which no block was chosen: all but the calibration set's."""
        return tuple(each for each in self.cost if each.kind != "calibration")


def curves(run: Run, findings: Sequence[Finding]) -> Curves:
    """All findings about a run's lists as lines; the baseline is at 0 blocks removed."""
    lists = lists_of(run, findings)
    numbers = {each: count for count, each in lists.items()}
    own = [each for each in findings if each.removal_list in numbers]
    tasks = _tasks(own, numbers)
    return Curves(
        lists=lists,
        num_blocks=run.stack.num_blocks if run.stack else 0,
        cost=(*_texts(own, numbers), *_of_the_search(run)),
        accuracy=(*tasks, *_mean(tasks)),
        speed=_speeds(own, numbers),
        size=_sizes(run, own, lists, numbers),
        elsewhere=len(findings) - len(own),
        notes=(*truncated_prompts(of_kind(own, TaskAccuracy)), *without_numbers(own)),
        too_good=tuple(
            dict.fromkeys(
                f"{each.text.name}: {each.text.overlap}" for each in of_kind(own, TextPerplexity) if each.text.overlap
            )
        ),
    )


def lists_of(run: Run, findings: Sequence[Finding]) -> dict[int, RemovalList]:
    """Blocks removed -> the list: the search's after each removal, else the given one and the newest evaluated."""
    lists: dict[int, RemovalList] = {0: ()}
    if run.trace is not None:
        lists |= {len(step.removal_list): sorted_list(step.removal_list) for step in run.trace.by_length}
    if len(lists) == 1:
        if run.spec.given:
            lists[len(run.spec.given)] = sorted_list(run.spec.given)
        for each in reversed(findings):
            lists.setdefault(len(each.removal_list), each.removal_list)
    return dict(sorted(lists.items()))


def main_metric(accuracy: TaskAccuracy) -> str | None:
    """The metric that stands for a task: its normalised accuracy, or the next in `_METRICS`; None where it has none."""
    shares = [
        name
        for name, value in accuracy.metrics.items()
        if accuracy.higher_is_better.get(name, True) and 0 <= value <= 1
    ]
    named = {name.partition(",")[0]: name for name in sorted(shares, reverse=True)}  # without the answers' filter
    return next((named[each] for each in (*_METRICS, *sorted(named)) if each in named), None)


def _best(findings: Iterable[F], same: Callable[[F], Hashable], ask: Callable[[F], Hashable]) -> list[list[F]]:
    """Groups of findings, one for each thing: those measured in one way, that with the most lists, then the newest.

    `same` names the thing, `ask` the way. Of several answers to one question the newest counts.
    """
    things: dict[Hashable, dict[Hashable, dict[RemovalList, F]]] = {}
    for each in findings:
        things.setdefault(same(each), {}).setdefault(ask(each), {})[each.removal_list] = each
    chosen = [
        max(ways.values(), key=lambda group: (len(group), max(each.finished for each in group.values())))
        for ways in things.values()
    ]
    return [list(group.values()) for group in chosen]


def _way(finding: Finding) -> Hashable:
    """The way in which it was measured: all fields of its question but the list."""
    return (finding.dtype, *(str(getattr(finding, name)) for name in finding.of))


def _texts(findings: Sequence[Finding], numbers: Mapping[RemovalList, int]) -> list[Line]:
    texts = of_kind(findings, TextPerplexity)
    groups = _best(
        texts,
        lambda each: (each.text.name, each.text.window, each.text.bos, each.text.of_windows, each.dtype),
        lambda each: (each.text.windows, each.text.tokens_hash),
    )
    groups.sort(key=lambda group: (not (of := group[0].text).is_whole, -of.windows * of.window, -len(group)))
    lines = []
    groups = [group for group in groups if all(each.removal_list or not each.measured.no_number for each in group)]
    for group in groups:
        text = group[0].text
        points = [_text_point(each, numbers[each.removal_list]) for each in group]
        about = f"{text.description}, {group[0].dtype}"
        lines.append(Line("text", text.name, about, _ordered(points), not text.is_whole))
    return _named(lines, [f"{group[0].text.window}" for group in groups])


def _text_point(answer: TextPerplexity, removed: int) -> Point:
    perplexity = answer.measured.perplexity
    value = math.inf if perplexity is None else perplexity
    if not removed:
        return Point(0, value, change=0.0, change_error=0.0)
    rise, error = answer.rise, answer.rise_standard_error
    return Point(removed, value, *_around(value, error), math.inf if rise is None else rise, error)


def _of_the_search(run: Run) -> list[Line]:
    """Perplexities that the search measured: held-out text, and the calibration set, on which blocks were chosen."""
    if run.trace is None or run.stack is None:
        return []
    first = run.trace.baseline
    steps: list[tuple[int, Step | None]] = [
        (0, None),
        *((len(step.removal_list), step) for step in run.trace.by_length),
    ]
    held_out, calibration = [], []
    for removed, step in steps:
        kept, chosen = (step or first).held_out, (step or first).calibration
        if kept.perplexity is not None:
            error = step.held_out_standard_error if step else 0.0
            value, rise = kept.perplexity, kept.rise_over(first.held_out)
            low, high = _around(value, error) if step else (None, None)
            held_out.append(Point(removed, value, low, high, math.inf if rise is None else rise, error))
        if chosen.perplexity is not None:
            calibration.append(Point(removed, chosen.perplexity))
    lines = []
    if held_out:
        about = f"the search's own held-out text, {run.stack.held_out} × {run.stack.sequence_length} tokens"
        lines.append(Line("held-out", "held-out", about, tuple(held_out)))
    if calibration:
        about = "the calibration set: the blocks were chosen on it, so its perplexity is too good"
        lines.append(Line("calibration", "calibration", about, tuple(calibration)))
    return lines


def _tasks(findings: Sequence[Finding], numbers: Mapping[RemovalList, int]) -> list[Line]:
    tasks = of_kind(findings, TaskAccuracy)
    parts = {name for each in tasks for name in each.subtasks if name != each.task}
    groups = _best(
        [each for each in tasks if each.task not in parts],  # a group stands for its parts
        lambda each: (each.task, each.shots, each.dtype),
        _way,
    )
    lines, shots = [], []
    for group in groups:
        metric = main_metric(group[0])
        group = [each for each in group if metric in each.metrics]
        if metric is None or not group:
            continue
        first = next((each for each in group if not each.removal_list), None)
        points = []
        for each in group:
            value, error = each.metrics[metric], each.standard_errors.get(metric)
            low, high = _within(value, error)
            points.append(Point(numbers[each.removal_list], value, low, high, *_lost(each, first, metric)))
        about = f"{metric}, {group[0].examples:,} examples"
        about += f", {group[0].shots} in the prompt" if group[0].shots else ""
        about += f", {group[0].truncated:,} of them cut" if group[0].truncated else ""
        lines.append(Line("task", group[0].task, about, _ordered(points), group[0].limit is not None))
        shots.append(f"{group[0].shots}-shot")
    return _named(lines, shots)


def _lost(answer: TaskAccuracy, first: TaskAccuracy | None, metric: str) -> tuple[float | None, float | None]:
    """Accuracy lost and its standard error: over pairs of examples, or, without pairs, that of two samples."""
    if not answer.removal_list:
        return 0.0, 0.0
    if metric in answer.changes:
        return -answer.changes[metric], answer.change_standard_errors.get(metric)
    if first is None:
        return None, None
    errors = [each.standard_errors.get(metric) for each in (answer, first)]
    known = [each for each in errors if each is not None]
    return first.metrics[metric] - answer.metrics[metric], math.hypot(*known) if len(known) == 2 else None


def _mean(tasks: Sequence[Line]) -> list[Line]:
    """The mean over all tasks, at the numbers of blocks where each was measured."""
    if len(tasks) < 2:
        return []
    points = []
    for removed in sorted({each.removed for each in tasks[0].points}):
        own = [line.at(removed) for line in tasks]
        there = [each for each in own if each is not None]
        if len(there) < len(tasks):
            continue
        value = statistics.fmean(each.value for each in there)
        errors = [each.high - each.value for each in there if each.high is not None]
        lost = [each.change for each in there if each.change is not None]
        spreads = [each.change_error for each in there if each.change_error is not None]
        error = math.hypot(*errors) / len(there) if len(errors) == len(there) else None
        low, high = _within(value, error)
        change = statistics.fmean(lost) if len(lost) == len(there) else None
        spread = math.hypot(*spreads) / len(there) if len(spreads) == len(there) else None
        points.append(Point(removed, value, low, high, change, spread))
    about = f"the mean of {len(tasks)} tasks"
    return [Line("mean", "mean", about, tuple(points), any(each.is_estimate for each in tasks))] if points else []


def _speeds(findings: Sequence[Finding], numbers: Mapping[RemovalList, int]) -> tuple[Line, ...]:
    lines = []
    for group in _timed(findings):
        first = group[0]
        points = [
            Point(numbers[each.removal_list], each.speedup, *each.spread, detail=_seconds(each))
            for each in group
            if each.removal_list
        ]
        threads = f"{first.threads} thread{'s' if first.threads and first.threads > 1 else ''}"
        where = f"{first.device}, {threads}" if first.threads else first.device
        after = f" after {first.prompt_tokens}" if first.prompt_tokens else ""
        about = f"{first.sequences} × {first.tokens} tokens{after} on {where}, {first.dtype}"
        lines.append(Line(first.shape, first.shape, about, _ordered([Point(0, 1.0), *points])))
    return tuple(lines)


def _timed(findings: Sequence[Finding]) -> list[list[Timing]]:
    groups = _best(
        of_kind(findings, Timing),
        lambda each: each.shape,
        _way,
    )
    return sorted(
        (group for group in groups if any(each.removal_list for each in group)),
        key=lambda group: group[0].shape != "prompt",
    )


def _seconds(timing: Timing) -> str:
    before, after = statistics.median(timing.baseline_times), statistics.median(timing.times)
    return f"{before:.3g} s → {after:.3g} s" + ("" if timing.gone else ", blocks skipped, not removed")


def _sizes(
    run: Run, findings: Sequence[Finding], lists: Mapping[int, RemovalList], numbers: Mapping[RemovalList, int]
) -> tuple[Line, ...]:
    """Bytes of the weights in the run's dtype, of quantised weights, with the KV cache, and peaks of a GPU."""
    if run.stack is None:
        return ()
    lines = []
    each_has = BYTES.get(run.stack.dtype)
    if each_has is not None:
        parameters = {removed: run.stack.parameters_without(blocks) for removed, blocks in lists.items()}
        points = [
            Point(removed, float(count * each_has), detail=f"{count / 1e6:,.1f} M parameters")
            for removed, count in parameters.items()
        ]
        lines.append(Line("weights", "weights", f"all weights in {run.stack.dtype}", tuple(points)))
    for quantized in _best(of_kind(findings, Quantization), lambda each: each.scheme, lambda each: each.group_size):
        scheme = quantized[0].scheme
        points = [Point(numbers[each.removal_list], float(each.weight_bytes)) for each in quantized]
        lines.append(Line("quantized", scheme, f"all weights, quantised to {scheme}", _ordered(points)))
    for group in _timed(findings):
        first = group[0]
        shape = f"{first.sequences} × {first.tokens} tokens"
        if first.shape == "generation" and each_has is not None:
            caches = {0: first.baseline_cache_bytes} | {numbers[each.removal_list]: each.cache_bytes for each in group}
            about = f"all weights in {run.stack.dtype}, and the KV cache of {shape}"
            lines.append(Line("whole", "with KV cache", about, _with_cache(lines[0], caches, run.stack.num_blocks)))
        measured = [each for each in group if each.peak_memory is not None and each.removal_list]
        if measured:
            points = [Point(numbers[each.removal_list], float(each.peak_memory or 0)) for each in measured]
            before = measured[0].baseline_peak_memory
            points += [] if before is None else [Point(0, float(before))]
            about = f"peak memory of {first.device}, {first.shape} of {shape}"
            lines.append(Line("memory", f"peak, {first.shape}"[:_LABEL], about, _ordered(points)))
    return tuple(lines)


def _with_cache(weights: Line, caches: Mapping[int, int], num_blocks: int) -> tuple[Point, ...]:
    """Weights and cache; where no cache was measured, as much for each kept block as in the baseline."""
    points = []
    for each in weights.points:
        cache = caches.get(each.removed, caches[0] * (num_blocks - each.removed) / num_blocks)
        detail = f"{as_bytes(cache)} of KV cache" + ("" if each.removed in caches else ", predicted from blocks")
        points.append(Point(each.removed, each.value + cache, detail=detail))
    return tuple(points)


def table(curves: Curves) -> pd.DataFrame:
    """One row a point of a line."""
    panels = {"perplexity": curves.cost, "accuracy": curves.accuracy, "speedup": curves.speed, "bytes": curves.size}
    rows = [
        (
            quantity, line.name, line.about, line.is_estimate, each.removed,
            " ".join(map(str, curves.lists[each.removed])),
            each.value, each.low, each.high, each.change, each.change_error,
        )
        for quantity, lines in panels.items()
        for line in lines
        for each in line.points
    ]  # fmt: skip
    columns = ["what", "of", "about", "estimate", "removed", "removal_list", "value", "low", "high", "change", "error"]
    return pd.DataFrame(rows, columns=columns)


def _ordered(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda each: each.removed))


def _named(lines: Sequence[Line], further: Sequence[str]) -> list[Line]:
    """Lines with short names, all different: two of the same name get something of `further`, then a number."""
    names = [line.name for line in lines]
    named: list[Line] = []
    for line, more in zip(lines, further, strict=True):
        alone = names.count(line.name) == 1
        name = cut(line.name, _LABEL) if alone else f"{cut(line.name, _LABEL - len(more) - 1)} {more}"
        taken = {each.name for each in named}
        count = 2
        while name in taken:
            name = f"{cut(line.name, _LABEL - 4)} ({count})"
            count += 1
        named.append(replace(line, name=name))
    return named


def _around(value: float, error: float | None) -> tuple[float | None, float | None]:
    """Bounds of a perplexity one standard error of its nats below and above."""
    if error is None or not math.isfinite(value):
        return None, None
    return value * math.exp(-error), value * math.exp(error)


def _within(value: float, error: float | None) -> tuple[float | None, float | None]:
    return (None, None) if error is None else (value - error, value + error)
