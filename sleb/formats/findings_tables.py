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
"""In the place of one, where predictions were not numbers."""


@dataclass(frozen=True)
class Table:
    """A title, columns, rows of text, and what must be said below them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """What was written."""


def tables_of(found: Iterable[Finding]) -> list[Table]:
    """One or more for each kind but generation, the baseline first, shorter lists before longer ones."""
    ordered = in_order(found)
    return [
        *_perplexities(of_kind(ordered, TextPerplexity)),
        *_accuracies(of_kind(ordered, TaskAccuracy)),
        *_timings(of_kind(ordered, Timing)),
        *_quantizations(of_kind(ordered, Quantization)),
        *_healings(of_kind(ordered, Healing)),
    ]


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """The baseline before the shorter lists before the longer ones."""
    return sorted(found, key=lambda each: (len(each.removal_list), each.removal_list))


def without_numbers(found: Iterable[Finding]) -> tuple[str, ...]:
    """Why some findings have no number: whose predictions were not numbers, and in which type. Each is said once."""
    said = []
    for each in in_order(found):
        whose = model_without(each.removal_list)
        match each:
            case TextPerplexity() if each.measured.no_number:
                said.append(not_numbers(whose, each.dtype))
            case TaskAccuracy() if each.not_numbers:
                said.append(not_numbers(whose, each.dtype))
            case Quantization() if each.measured.no_number:
                own = whose if each.before.no_number else f"{whose}, quantised to {each.scheme},"
                said.append(not_numbers(own, each.dtype))
            case Healing() if each.after.no_number:
                said.append(not_numbers(f"{whose}, healed,", each.dtype))
    return tuple(dict.fromkeys(said))


def truncated_prompts(found: Iterable[TaskAccuracy]) -> tuple[str, ...]:
    """How many examples of each task did not fit into the model: the same for every list."""
    return tuple(
        dict.fromkeys(
            f"{each.truncated:,} of {each.examples:,} examples of {each.task} are longer than the model: the beginning "
            "of their prompts was cut off."
            for each in found
            if each.truncated
        )
    )


def decimal(value: float | None) -> str:
    """A perplexity for people."""
    if value is None:
        return NO_NUMBER
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _perplexities(found: Sequence[TextPerplexity]) -> Iterator[Table]:
    texts = list(dict.fromkeys(each.text for each in found))
    for text in texts:
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
        if sum(other.description == text.description for other in texts) > 1:  # two files of one name
            estimate += f" [{text.tokens_hash[:6]}]"
        title = f"Perplexity on {text.description}, {own[0].dtype}{estimate}"
        yield Table(title, ("removed", "perplexity", "rise", "nats per token"), tuple(rows), without_numbers(own))


def _accuracies(found: Sequence[TaskAccuracy]) -> Iterator[Table]:
    """A row a list under its task and metric; groups come after all tasks."""
    tables: dict[str, dict[str, list[TaskAccuracy]]] = {}
    for each in sorted(found, key=lambda each: bool(each.subtasks)):
        shots = {0: "no examples", None: "differing numbers of examples"}.get(each.shots, f"{each.shots} examples")
        how = f"{each.dtype}, {shots} in the prompt"
        alike = each.model_copy(update={"removal_list": ()}).question
        tables.setdefault(how, {}).setdefault(alike, []).append(each)
    for how, tasks in tables.items():
        rows = []
        for own in tasks.values():
            for metric in own[0].metrics:
                rows += [_accuracy(metric, each) for each in own if metric in each.metrics or each.not_numbers]
        every = [each for own in tasks.values() for each in own]
        columns = ("task", "metric", "removed", "value", "change", "examples")
        notes = (*truncated_prompts(every), *without_numbers(every))
        yield Table(f"Accuracy by lm-eval, {how}", columns, tuple(_without_repeats(rows, 2)), notes)


def _accuracy(metric: str, found: TaskAccuracy) -> tuple[str, ...]:
    change, error = found.changes.get(metric), found.change_standard_errors.get(metric)
    return (
        found.task if not found.subtasks else f"{found.task} ({len(found.subtasks)} tasks)",
        metric,
        name_of(found.removal_list),
        NO_NUMBER if found.not_numbers else _with_error(found.metrics[metric], found.standard_errors.get(metric)),
        "" if change is None else _with_error(change, error, "+"),
        f"{found.examples:,}" if found.limit is None else f"the first {found.examples:,}",
    )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    """A share with four decimals; of large numbers, such as a perplexity, two are enough."""
    form = ".4f" if abs(value) < 100 else ",.2f"
    return f"{value:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")


def _without_repeats(rows: Sequence[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    """What the row above says in the first columns is not said again."""
    shown, before = [], ("",) * columns
    for row in rows:
        same = 0
        while same < columns and row[same] == before[same]:
            same += 1
        shown.append(("",) * same + row[same:])
        before = row[:columns]
    return shown


def _timings(found: Sequence[Timing]) -> Iterator[Table]:
    alike: dict[tuple[object, ...], list[Timing]] = {}
    for each in sorted(found, key=lambda each: each.shape != "prompt"):
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
    what = "Reading a prompt" if first.shape == "prompt" else "Generating"
    after = f" after prompts of {first.prompt_tokens}" if first.prompt_tokens else ""
    threads = "" if first.threads is None else f" ({first.threads} thread{'s' if first.threads > 1 else ''})"
    counts = sorted({len(each.times) for each in own})
    repetitions = " or ".join(map(str, counts)) + (" repetitions" if counts != [1] else " repetition")
    columns = ("removed", "time", "tokens/s", "speedup, by pairs (quartiles)", "by blocks", "parameters", "KV cache")
    return Table(
        f"{what}: {first.sequences} x {first.tokens} tokens{after} on {first.device}{threads}, {first.dtype}, "
        f"median of {repetitions}",
        columns + (("peak memory",) if has_peak else ()),
        tuple(rows),
        tuple(
            f"Without {name_of(each.removal_list)}: skipped, not gone, because the family's config cannot say "
            "that they are; memory is the unmodified model's."
            for each in own
            if not each.gone
        ),
    )


def _as_times(before: float, after: float) -> tuple[str, str]:
    """Seconds, or milliseconds where the first are less than one."""
    if before < 1:
        return f"{1000 * before:.1f}", f"{1000 * after:.1f} ms"
    return f"{before:.3f}", f"{after:.3f} s"


def _beside(found: Timing, before: str, after: str) -> str:
    """Unmodified and without the list; the unmodified model alone where there is no list."""
    return f"{before} → {after}" if found.removal_list else after


def scheme_of(found: Quantization) -> str:
    """The scheme, with the sizes of its groups as they were used: a group must divide its row."""
    asked = () if found.group_size is None else (found.group_size,)
    groups = " or ".join(map(str, found.group_sizes or asked))
    return f"{found.scheme}, groups of {groups}" if groups else found.scheme


def _quantizations(found: Sequence[Quantization]) -> Iterator[Table]:
    rows = []
    for each in found:
        change = "" if each.change is None else f"{each.change:+.4f}"
        if change and each.change_standard_error is not None:
            change += f" ± {each.change_standard_error:.4f}"
        rows.append(
            (
                name_of(each.removal_list),
                scheme_of(each),
                _of_text(each.text),
                decimal(each.before.perplexity),
                decimal(each.measured.perplexity),
                change,
                f"{each.weight_bytes_before / 1e6:,.1f} → {each.weight_bytes / 1e6:,.1f} MB",
            )
        )
    if rows:
        columns = ("removed", "scheme", "text", "before", "after", "nats over before", "all weights, packed")
        title = "Weight-only quantisation: linear weights of the blocks, rounded to nearest"
        yield Table(title, columns, tuple(rows), without_numbers(found), _folders(each.out for each in found))


def _folders(outs: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(out for out in dict.fromkeys(outs) if out is not None)


def healing_notes(found: Sequence[Healing]) -> list[str]:
    """What to know beside the numbers: why some are missing, how held-out text fared, and what was no test."""
    last, notes = found[-1], [*without_numbers(found)]
    if last.held_out_before is not None and last.held_out_after is not None:
        before, after = decimal(last.held_out_before.perplexity), decimal(last.held_out_after.perplexity)
        notes.append(f"On held-out sequences of the text it was healed on: {before} before, {after} after.")
    for each in found:
        if each.windows_healed_on:
            notes.append(
                f"{each.windows_healed_on} of {each.text.windows} windows of {each.text.name} repeat text that was "
                f"healed on ({each.ask.how}, {name_of(each.removal_list)}): no test of the healing."
            )
    return notes


def _healings(found: Sequence[Healing]) -> Iterator[Table]:
    rows = []
    for each in found:
        change = "" if each.change is None else f"{each.change:+.4f}"
        if change and each.change_standard_error is not None:
            change += f" ± {each.change_standard_error:.4f}"
        rows.append(
            (
                name_of(each.removal_list),
                each.ask.how,
                _of_text(each.text),
                decimal(each.baseline.perplexity),
                decimal(each.before.perplexity),
                decimal(each.after.perplexity),
                change,
                duration(each.seconds),
            )
        )
    if not rows:
        return
    notes = healing_notes(found)
    columns = ("removed", "how", "text", "baseline", "before", "after", "nats over before", "took")
    yield Table("Healing", columns, tuple(rows), tuple(notes), _folders(each.out for each in found))


def _of_text(text: EvaluatedText) -> str:
    """Which text, and how much of it."""
    return f"{text.name}, {text.windows} x {text.window}" + ("" if text.is_whole else " (an estimate)")


def name_of(removal_list: RemovalList) -> str:
    """A list in a cell: how many blocks, and which."""
    return f"{len(removal_list)}: {', '.join(map(str, removal_list))}" if removal_list else "none"
