"""Findings on a terminal: one table a kind. Knows records; computes nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .findings import Finding, Generation, Healing, Quantization, RemovalList, TaskAccuracy, TextPerplexity, Timing
from .meter import duration
from .results import of_kind
from .screen import decimal, shown, table


def print_findings(found: Sequence[Finding]) -> None:
    """All of them, the baseline before the shorter lists before the longer ones."""
    ordered = sorted(found, key=lambda each: (len(each.removal_list), each.removal_list))
    _perplexities(of_kind(ordered, TextPerplexity))
    _accuracies(of_kind(ordered, TaskAccuracy))
    _timings(of_kind(ordered, Timing))
    _quantizations(of_kind(ordered, Quantization))
    _healings(of_kind(ordered, Healing))
    for each in of_kind(ordered, Generation):
        _generation(each)


def _perplexities(found: Sequence[TextPerplexity]) -> None:
    for text in dict.fromkeys(each.text for each in found):
        own = [each for each in found if each.text == text]
        first = next((each.measured.perplexity for each in own if not each.removal_list), None)
        rows = []
        for each in own:
            share = ""
            if each.removal_list and first and each.measured.perplexity:
                share = f"{each.measured.perplexity / first - 1:+.1%}"
            nats = "" if each.rise is None else f"{each.rise:+.4f}"
            if nats and each.rise_standard_error is not None:
                nats += f" ± {each.rise_standard_error:.4f}"
            rows.append((name_of(each.removal_list), decimal(each.measured.perplexity), share, nats))
        estimate = "" if text.is_whole else " (an estimate)"
        table(
            f"\nPerplexity on {text.description}, {own[0].dtype}{estimate}", ("removed", "perplexity", "", "nats"), rows
        )


def _accuracies(found: Sequence[TaskAccuracy]) -> None:
    if not found:
        return
    rows = []
    for each in found:
        for name, value in each.metrics.items():
            error = each.standard_errors.get(name)
            spread = "" if error is None else f" ± {error:.4f}"
            of = f"{each.examples:,}" + (" (an estimate)" if each.limit is not None else "")
            rows.append((name_of(each.removal_list), each.task, name, f"{value:.4f}{spread}", of))
    _titled("Accuracy (lm-eval)", ("removed", "task", "metric", "value", "examples"), rows)


def _timings(found: Sequence[Timing]) -> None:
    for shape in ("prompt", "generation"):
        own = [each for each in found if each.shape == shape]
        rows = []
        for each in own:
            low, high = each.spread
            rows.append(
                (
                    name_of(each.removal_list),
                    f"{statistics.median(each.baseline_times):.4g} s",
                    f"{statistics.median(each.times):.4g} s",
                    f"{each.speedup:.2f}x ({low:.2f} to {high:.2f})",
                    f"{each.proportional:.2f}x",
                    f"{each.parameters / 1e6:,.0f} M",
                    f"{each.cache_bytes / 1e6:,.1f} MB",
                    "-" if each.peak_memory is None else f"{each.peak_memory / 1e9:.2f} GB",
                )
            )
        if own:
            what = "Reading a prompt" if shape == "prompt" else "Generating"
            _titled(
                f"{what}: {own[0].sequences} x {own[0].tokens} tokens on {own[0].device}, {own[0].dtype}",
                ("removed", "baseline", "without", "speedup", "by blocks", "parameters", "KV cache", "peak memory"),
                rows,
            )


def _quantizations(found: Sequence[Quantization]) -> None:
    rows = [
        (
            name_of(each.removal_list),
            each.scheme,
            each.text.name,
            decimal(each.before.perplexity),
            decimal(each.measured.perplexity),
            f"{each.weight_bytes_before / 1e6:,.0f} → {each.weight_bytes / 1e6:,.0f} MB",
        )
        for each in found
    ]
    if rows:
        _titled("Weight-only quantisation", ("removed", "scheme", "text", "before", "after", "weights"), rows)


def _healings(found: Sequence[Healing]) -> None:
    rows = []
    for each in found:
        change = "" if each.change is None else f"{each.change:+.4f}"
        if change and each.change_standard_error is not None:
            change += f" ± {each.change_standard_error:.4f}"
        rows.append(
            (
                name_of(each.removal_list),
                each.ask.how,
                each.text.name,
                decimal(each.baseline.perplexity),
                decimal(each.before.perplexity),
                decimal(each.after.perplexity),
                change,
                duration(each.seconds),
            )
        )
    if rows:
        columns = ("removed", "how", "text", "baseline", "before", "after", "nats", "took")
        _titled("Healing", columns, rows)


def _titled(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A title above the table may be longer than the table is wide."""
    print(f"\n{title}")
    table("", columns, rows)


def _generation(found: Generation) -> None:
    print(f"\nThe unmodified model ({found.baseline_seconds:.1f} s):\n{shown_text(found.baseline_text)}")
    print(f"\nWithout {name_of(found.removal_list)} ({found.list_seconds:.1f} s):\n{shown_text(found.text)}")
    print(f"\n{len(found.flips)} of {found.compared} predictions on the unmodified model's text are other tokens.")


def name_of(removal_list: RemovalList) -> str:
    """A list in a cell: how many blocks, and which."""
    return f"{len(removal_list)}: {', '.join(map(str, removal_list))}" if removal_list else "none"


def shown_text(text: str) -> str:
    """What a model says, without control characters."""
    return shown(text).replace("\\[", "[")
