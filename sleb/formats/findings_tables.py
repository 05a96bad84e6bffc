"""Findings as tables: for the terminal, the report and the model card alike. Knows records; draws nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sleb.errors import model_without, not_numbers
from sleb.records import (
    EvaluatedText,
    Finding,
    Healing,
    Quantization,
    RemovalList,
    TaskAccuracy,
    TextPerplexity,
    Timing,
)
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes.progress import duration

NO_NUMBER = "no number"
"""Shown in place of a number where predictions were not numbers."""


@dataclass(frozen=True)
class Table:
    """A title, columns, rows of text, and what must be known below them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """Folders that were written."""


def tables_of(findings: Iterable[Finding]) -> list[Table]:
    """One or more tables for each kind but generation, the baseline first, shorter lists before longer ones."""
    ordered = in_order(findings)
    return [
        *_perplexities(of_kind(ordered, TextPerplexity)),
        *_accuracies(of_kind(ordered, TaskAccuracy)),
        *_timings(of_kind(ordered, Timing)),
        *_quantizations(of_kind(ordered, Quantization)),
        *_healings(of_kind(ordered, Healing)),
    ]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The findings in order: the baseline, then shorter lists before longer ones."""
    return sorted(findings, key=lambda each: (len(each.removal_list), each.removal_list))


def without_numbers(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Why some findings have no number: whose predictions were not numbers, and in which type, each once."""
    sentences = []
    for each in in_order(findings):
        whose = model_without(each.removal_list)
        match each:
            case TextPerplexity() if each.measured.no_number:
                sentences.append(not_numbers(whose, each.dtype))
            case TaskAccuracy() if each.not_numbers:
                sentences.append(not_numbers(whose, each.dtype))
            case Quantization() if each.measured.no_number:
                own = whose if each.before.no_number else f"{whose}, quantised to {each.scheme},"
                sentences.append(not_numbers(own, each.dtype))
            case Healing() if each.after.no_number:
                sentences.append(not_numbers(f"{whose}, healed,", each.dtype))
    return tuple(dict.fromkeys(sentences))


def truncated_prompts(findings: Iterable[TaskAccuracy]) -> tuple[str, ...]:
    """How many examples of each task did not fit into the model: the same for every list."""
    return tuple(
        dict.fromkeys(
            f"{each.truncated:,} of {each.examples:,} examples of {each.task} are longer than the model: the beginning "
            "of their prompts was cut off."
            for each in findings
            if each.truncated
        )
    )


def decimal(value: float | None) -> str:
    """A perplexity for people to read."""
    if value is None:
        return NO_NUMBER
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _perplexities(findings: Sequence[TextPerplexity]) -> Iterator[Table]:
    texts = list(dict.fromkeys(each.text for each in findings))
    for text in texts:
        own = [each for each in findings if each.text == text]
        first = next((each.measured for each in own if not each.removal_list), None)
        rows = []
        for each in own:
            ratio = each.measured.ratio_to(first) if each.removal_list and first else None
            share = "" if ratio is None else f"{ratio - 1:+.1%}"
            nats = _nats(each.rise, each.rise_standard_error)
            rows.append((name_of(each.removal_list), decimal(each.measured.perplexity), share, nats))
        estimate = "" if text.is_whole else " (an estimate)"
        if sum(other.description == text.description for other in texts) > 1:  # two files of one name
            estimate += f" [{text.tokens_hash[:6]}]"
        title = f"Perplexity on {text.description}, {own[0].dtype}{estimate}"
        yield Table(title, ("removed", "perplexity", "rise", "nats per token"), tuple(rows), without_numbers(own))


def _nats(change: float | None, error: float | None) -> str:
    """A change in nats per token, with its standard error where there is one."""
    if change is None:
        return ""
    return f"{change:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _accuracies(findings: Sequence[TaskAccuracy]) -> Iterator[Table]:
    """A table for each way to put the examples, with a row a list under its task and metric; groups come last."""
    tables: dict[str, dict[str, list[TaskAccuracy]]] = {}
    for each in sorted(findings, key=lambda each: bool(each.subtasks)):
        shots = {0: "no examples", None: "differing numbers of examples"}.get(each.shots, f"{each.shots} examples")
        setting = f"{each.dtype}, {shots} in the prompt"
        alike = each.model_copy(update={"removal_list": ()}).question
        tables.setdefault(setting, {}).setdefault(alike, []).append(each)
    for setting, tasks in tables.items():
        rows = []
        for own in tasks.values():
            for metric in own[0].metrics:
                rows += [_accuracy(metric, each) for each in own if metric in each.metrics or each.not_numbers]
        every = [each for own in tasks.values() for each in own]
        columns = ("task", "metric", "removed", "value", "change", "examples")
        notes = (*truncated_prompts(every), *without_numbers(every))
        yield Table(f"Accuracy by lm-eval, {setting}", columns, tuple(_without_repeats(rows, 2)), notes)


def _accuracy(metric: str, finding: TaskAccuracy) -> tuple[str, ...]:
    change, error = finding.changes.get(metric), finding.change_standard_errors.get(metric)
    return (
        finding.task if not finding.subtasks else f"{finding.task} ({len(finding.subtasks)} tasks)",
        metric,
        name_of(finding.removal_list),
        NO_NUMBER if finding.not_numbers else _with_error(finding.metrics[metric], finding.standard_errors.get(metric)),
        "" if change is None else _with_error(change, error, "+"),
        f"{finding.examples:,}" if finding.limit is None else f"the first {finding.examples:,}",
    )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    """A share with four decimals; of large numbers, such as a perplexity, two are enough."""
    form = ".4f" if abs(value) < 100 else ",.2f"
    return f"{value:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")


def _without_repeats(rows: Sequence[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    """The rows without what the row above says in the first columns."""
    shown, before = [], ("",) * columns
    for row in rows:
        same = 0
        while same < columns and row[same] == before[same]:
            same += 1
        shown.append(("",) * same + row[same:])
        before = row[:columns]
    return shown


def _timings(findings: Sequence[Timing]) -> Iterator[Table]:
    alike: dict[tuple[object, ...], list[Timing]] = {}
    for each in sorted(findings, key=lambda each: each.shape != "prompt"):
        key = (each.shape, each.sequences, each.tokens, each.prompt_tokens, each.device, each.threads, each.dtype)
        alike.setdefault(key, []).append(each)
    for own in alike.values():
        yield _timings_of_shape(own)


def _timings_of_shape(own: Sequence[Timing]) -> Table:
    first = own[0]
    has_peak = any(each.peak_memory is not None for each in own)
    rows = []
    for each in own:
        seconds = statistics.median(each.baseline_times), statistics.median(each.times)
        tokens = each.sequences * each.tokens
        low, high = each.spread
        row = [
            name_of(each.removal_list),
            _beside(each, *_as_times(*seconds)),
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
    work = "Reading a prompt" if first.shape == "prompt" else "Generating"
    after = f" after prompts of {first.prompt_tokens}" if first.prompt_tokens else ""
    threads = "" if first.threads is None else f" ({first.threads} thread{'s' if first.threads > 1 else ''})"
    counts = sorted({len(each.times) for each in own})
    repetitions = " or ".join(map(str, counts)) + (" repetitions" if counts != [1] else " repetition")
    columns = ("removed", "time", "tokens/s", "speedup, by pairs (quartiles)", "by blocks", "parameters", "KV cache")
    return Table(
        f"{work}: {first.sequences} x {first.tokens} tokens{after} on {first.device}{threads}, {first.dtype}, "
        f"median of {repetitions}",
        columns + (("peak memory",) if has_peak else ()),
        tuple(rows),
        tuple(
            f"Without {name_of(each.removal_list)}: skipped, not removed, because the family's config cannot express "
            "the removal; memory is the baseline's."
            for each in own
            if not each.gone
        ),
    )


def _as_times(before: float, after: float) -> tuple[str, str]:
    """Seconds, or milliseconds where the first are less than one."""
    if before < 1:
        return f"{1000 * before:.1f}", f"{1000 * after:.1f} ms"
    return f"{before:.3f}", f"{after:.3f} s"


def _beside(finding: Timing, before: str, after: str) -> str:
    """The baseline beside the list; the baseline alone where the list is empty."""
    return f"{before} → {after}" if finding.removal_list else after


def scheme_of(finding: Quantization) -> str:
    """The scheme, with the sizes of its groups as they were used: a group must divide its row."""
    wanted = () if finding.group_size is None else (finding.group_size,)
    groups = " or ".join(map(str, finding.group_sizes or wanted))
    return f"{finding.scheme}, groups of {groups}" if groups else finding.scheme


def _quantizations(findings: Sequence[Quantization]) -> Iterator[Table]:
    rows = [
        (
            name_of(each.removal_list),
            scheme_of(each),
            _of_text(each.text),
            *(decimal(measured.perplexity) for measured in (each.before, each.measured)),
            _nats(each.change, each.change_standard_error),
            f"{each.weight_bytes_before / 1e6:,.1f} → {each.weight_bytes / 1e6:,.1f} MB",
        )
        for each in findings
    ]
    if rows:
        columns = ("removed", "scheme", "text", "before", "after", "change, nats per token", "all weights, packed")
        title = "Weight-only quantisation: linear weights of the blocks, rounded to nearest"
        yield Table(title, columns, tuple(rows), without_numbers(findings), _folders(each.out for each in findings))


def _folders(outs: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(out for out in dict.fromkeys(outs) if out is not None)


def healing_notes(findings: Sequence[Healing]) -> list[str]:
    """Notes on the numbers: why some are missing, perplexity of held-out text, and windows that do not count."""
    last, notes = findings[-1], [*without_numbers(findings)]
    if last.held_out_before is not None and last.held_out_after is not None:
        before, after = decimal(last.held_out_before.perplexity), decimal(last.held_out_after.perplexity)
        notes.append(f"On held-out sequences of the text it was healed on: {before} before, {after} after.")
    for each in findings:
        if each.windows_healed_on:
            notes.append(
                f"{each.windows_healed_on} of {each.text.windows} windows of {each.text.name} repeat text that was "
                f"healed on ({each.ask.how}, {name_of(each.removal_list)}): they do not test the healing."
            )
    return notes


def _healings(findings: Sequence[Healing]) -> Iterator[Table]:
    rows = [
        (
            name_of(each.removal_list),
            each.ask.how,
            _of_text(each.text),
            *(decimal(measured.perplexity) for measured in (each.baseline, each.before, each.after)),
            _nats(each.change, each.change_standard_error),
            duration(each.seconds),
        )
        for each in findings
    ]
    if not rows:
        return
    notes = healing_notes(findings)
    columns = ("removed", "how", "text", "baseline", "before", "after", "change, nats per token", "took")
    yield Table("Healing", columns, tuple(rows), tuple(notes), _folders(each.out for each in findings))


def _of_text(text: EvaluatedText) -> str:
    """The name of a text, and how much of it was evaluated."""
    return f"{text.name}, {text.windows} x {text.window}" + ("" if text.is_whole else " (an estimate)")


def name_of(removal_list: RemovalList) -> str:
    """A list in a cell: how many blocks, and which."""
    return f"{len(removal_list)}: {', '.join(map(str, removal_list))}" if removal_list else "none"
