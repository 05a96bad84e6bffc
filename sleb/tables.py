"""Findings on a terminal: one table a kind. Knows records; computes nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from .findings import Finding, Generation, Healing, Quantization, RemovalList, TaskAccuracy, TextPerplexity, Timing
from .meter import duration
from .results import of_kind
from .screen import decimal, shown, table

_FLIPS_SHOWN = 12
_CONTEXT = 6  # tokens before one that flipped


def print_findings(found: Sequence[Finding]) -> None:
    """All of them, the baseline before the shorter lists before the longer ones."""
    ordered = sorted(found, key=lambda each: (len(each.removal_list), each.removal_list))
    _perplexities(of_kind(ordered, TextPerplexity))
    _accuracies(of_kind(ordered, TaskAccuracy))
    _timings(of_kind(ordered, Timing))
    _quantizations(of_kind(ordered, Quantization))
    _healings(of_kind(ordered, Healing))
    _generations(of_kind(ordered, Generation))


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
        title = f"Perplexity on {text.description}, {own[0].dtype}{estimate}"
        _titled(title, ("removed", "perplexity", "rise", "nats per token"), rows)


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
    alike: dict[tuple[object, ...], list[Timing]] = {}
    for each in sorted(found, key=lambda each: each.shape != "prompt"):
        key = (each.shape, each.sequences, each.tokens, each.prompt_tokens, each.device, each.threads, each.dtype)
        alike.setdefault(key, []).append(each)
    for own in alike.values():
        _timings_of_shape(own)


def _timings_of_shape(own: Sequence[Timing]) -> None:
    first = own[0]
    has_peak = any(each.peak_memory is not None for each in own)
    rows = []
    for each in own:
        seconds = statistics.median(each.baseline_times), statistics.median(each.times)
        tokens = each.sequences * each.tokens
        low, high = each.spread
        row = [
            name_of(each.removal_list),
            _beside(each, *(f"{value:.4g}" for value in seconds)),
            _beside(each, *(f"{tokens / value:,.0f}" for value in seconds)),
            f"{each.speedup:.2f}x ({low:.2f} to {high:.2f})" if each.removal_list else "",
            f"{each.proportional:.2f}x" if each.removal_list else "",
            _beside(each, f"{each.baseline_parameters / 1e6:,.0f}", f"{each.parameters / 1e6:,.0f} M"),
            _beside(each, f"{each.baseline_cache_bytes / 1e6:,.1f}", f"{each.cache_bytes / 1e6:,.1f} MB"),
        ]
        if has_peak:
            peaks = [
                "-" if peak is None else f"{peak / 1e9:.2f}" for peak in (each.baseline_peak_memory, each.peak_memory)
            ]
            row.append(_beside(each, peaks[0], f"{peaks[1]} GB"))
        rows.append(tuple(row))
    what = "Reading a prompt" if first.shape == "prompt" else "Generating"
    after = f" after prompts of {first.prompt_tokens}" if first.prompt_tokens else ""
    threads = "" if first.threads is None else f" ({first.threads} thread{'s' if first.threads > 1 else ''})"
    counts = sorted({len(each.times) for each in own})
    repetitions = " or ".join(map(str, counts)) + (" repetitions" if counts != [1] else " repetition")
    _titled(
        f"{what}: {first.sequences} x {first.tokens} tokens{after} on {first.device}{threads}, {first.dtype}, "
        f"median of {repetitions}",
        ("removed", "seconds", "tokens/s", "speedup (quartiles)", "by blocks", "parameters", "KV cache")
        + (("peak memory",) if has_peak else ()),
        rows,
    )
    for each in own:
        if not each.gone:
            print(
                f"Without {name_of(each.removal_list)}: skipped, not gone, because the family's config cannot say "
                "that they are; memory is the unmodified model's."
            )


def _beside(found: Timing, before: str, after: str) -> str:
    """Unmodified and without the list; the unmodified model alone where there is no list."""
    return f"{before} → {after}" if found.removal_list else after


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


def _generations(found: Sequence[Generation]) -> None:
    """What the unmodified model says stands once above what the lists say to the same prompt."""
    for ask in dict.fromkeys(each.ask for each in found):
        own = [each for each in found if each.ask == ask]
        first = own[0]
        print(
            f"\nThe unmodified model ({_spoken(len(first.baseline_tokens), first.baseline_seconds)}):\n"
            f"{shown_text(first.baseline_text)}"
        )
        for each in own:
            if each.removal_list:
                _generation(each)


def _generation(found: Generation) -> None:
    without = ", ".join(map(str, found.removal_list))
    print(
        f"\nWithout {without} ({_spoken(len(found.tokens), found.list_seconds)}, {_parting(found)}):\n"
        f"{shown_text(found.text)}"
    )
    share = f" ({len(found.flips) / found.compared:.0%})" if found.compared else ""
    title = (
        f"{len(found.flips)} of {found.compared} predictions{share} on the unmodified model's text, prompt included, "
        "are other tokens without these blocks"
    )
    text = [*found.prompt_tokens, *found.baseline_tokens]
    rows = [
        (
            str(each.position),
            _quoted("".join(text[max(0, each.position - _CONTEXT) : each.position])),
            f"{_quoted(each.before)} {each.before_probability:.0%}",
            f"{_quoted(each.after)} {each.after_probability:.0%}",
        )
        for each in found.flips[:_FLIPS_SHOWN]
    ]
    if not rows:
        print(f"\n{title}.")
        return
    _titled(title, ("at", "after", "unmodified", "without"), rows)
    if len(found.flips) > len(rows):
        print(f"and {len(found.flips) - len(rows)} more; --json has all of them")


def _parting(found: Generation) -> str:
    """How long both say the same."""
    pairs = zip(found.baseline_tokens, found.tokens, strict=False)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if same is None:
        return "the same text" if found.tokens == found.baseline_tokens else "the same as far as it goes"
    return f"another text from token {same + 1} on"


def _spoken(tokens: int, seconds: float) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'} in {seconds:.1f} s"


def _quoted(text: str) -> str:
    """A piece of text in a cell, its spaces and line ends to be seen."""
    return json.dumps(text, ensure_ascii=False)


def name_of(removal_list: RemovalList) -> str:
    """A list in a cell: how many blocks, and which."""
    return f"{len(removal_list)}: {', '.join(map(str, removal_list))}" if removal_list else "none"


def shown_text(text: str) -> str:
    """What a model says, without control characters."""
    return shown(text).replace("\\[", "[")
