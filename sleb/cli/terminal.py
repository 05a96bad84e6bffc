"""What the command line shows: progress on stderr, results on stdout. Knows records; computes nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from sleb.cli.output import with_flags
from sleb.errors import printable
from sleb.formats.findings_tables import decimal
from sleb.records import Attempt, Baseline, Candidate, Job, JobState, Run, StackDescription, Step
from sleb.records import Progress as Done
from sleb.runtime import run_folder
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import Watcher, duration
from sleb.runtime.run_index import Outline

_TIED_SHOWN = 6
MOST_SHOWN = 500
"""Runs that are listed on a screen. More are not read there, and laying them out takes longer than finding them."""


class _Patient(Console):
    """A console that may have lost its reader: what it cannot print is lost, and the work goes on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)
        self.soft_wrap = not self.is_terminal  # a file has no edge to wrap at

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:  # such as a full disk behind stdout
            self.quiet = True


def shown(text: str) -> str:
    """A name from anywhere as text: no markup, no control characters."""
    return escape(printable(text))


def _on_one_line(text: str) -> str:
    """A name from anywhere on one line, for where no markup is read."""
    return printable(text).replace("\n", " ")


class Screen:
    """Live progress of one job: a bar on stderr, and each step on stdout as it is decided (unless `--json`)."""

    def __init__(self, as_json: bool) -> None:
        self.errors = _Patient(stderr=True)
        self.results = _Patient(file=sys.stderr if as_json else None)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[share]}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self.errors,
            transient=True,
            disable=not self.errors.is_terminal,
        )
        self.task = self.bar.add_task("Starting", total=None, share="", left="")
        self._phase = ""

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def watcher(self) -> Watcher:
        """A watcher that draws what the worker reports."""
        screen = self

        class Drawing(Watcher):
            def progress(self, progress: Done) -> None:
                screen.draw(progress)

            def described(self, stack: StackDescription) -> None:
                screen.print(describe(stack))

            def attempt(self, attempt: Attempt) -> None:
                screen.note(_labelled("how", shown(attempt.described)))

            def baseline(self, baseline: Baseline) -> None:
                screen.print(describe_baseline(baseline))

            def step(self, step: Step, baseline: Baseline) -> None:
                screen.print(describe_step(step, baseline))

        return Drawing()

    def begin(self, run: Run) -> None:
        """Say where the run is."""
        self.note(_labelled("run", f"[dim]{shown(str(run.run_dir))}[/]"))

    def end(self, run: Run) -> None:
        """Print the analyses, the removal list, and what to do with it."""
        if run.analysis and run.trace:
            self.print(_describe_analysis(run))
        self.print(describe_end(run))

    def print(self, text: str) -> None:
        """Print a result on stdout, or beside the one object of `--json`."""
        self.bar.stop()
        self.results.print(text)
        self.bar.start()

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        self.errors.print(text)

    def draw(self, progress: Done) -> None:
        """Draw how far the job is, with the time left."""
        text = progress.phase
        if progress.steps and progress.step:
            text = f"Step {progress.step} of {progress.steps}"
        if not self.errors.is_terminal and text != self._phase:  # a log file gets a line a phase, not a bar
            self.errors.print(shown(text))
        self._phase = text
        if progress.message:
            text = f"{text}: {progress.message}"
        known = progress.fraction > 0
        self.bar.update(
            self.task,
            description=shown(text),
            total=1.0 if known else None,
            completed=progress.fraction,
            share=f"{progress.fraction:.0%}" if known else "",
            left="" if progress.eta_seconds is None else f"{duration(progress.eta_seconds)} left",
        )


def describe(stack: StackDescription) -> str:
    """The model, the text and the self-check, one labelled line each."""
    check = stack.self_check
    model = (
        f"{shown(stack.model_class)}: {stack.num_blocks} blocks of {shown(stack.block_class)} "
        f"({shown(stack.path)}), {stack.total_parameters / 1e6:,.0f} M parameters, {shown(stack.dtype)}"
    )
    if stack.quantisation is not None:
        model += f"\n[yellow]quantised: {shown(stack.quantisation)}[/]"
    bos = "BOS at the head of each" if stack.bos else "no BOS added"
    use = f"to choose by, {stack.held_out} held out" if stack.num_remove else "of it"
    text = f"{shown(stack.text)}\n{stack.sequences} sequences {use}; {bos}"
    if check.scoring == "plain":
        trust = f"[bold yellow]scored the plain way[/]: {shown(check.reason or '')}"
    elif check.max_difference is None:
        trust = "nothing to compare the sweep with: the predictions are not numbers"
    elif check.max_difference:
        trust = f"the sweep differs from plain forward passes by at most {check.max_difference:.1g} nats per token"
    else:
        trust = f"the sweep equals plain forward passes, for all {check.candidates} candidates"
    lines = [_labelled("model", model), *([_labelled("text", text)] if stack.sequences else [])]
    lines.append(_labelled("check", trust))
    for block, reason in check.protected.items():
        lines.append(_labelled("", f"[yellow]block {block} is protected: {shown(reason)}[/]"))
    return "\n".join(lines)


def describe_baseline(baseline: Baseline) -> str:
    """The head of the table of steps, and the baseline as its first row."""
    head = f"step {'remove':>8}  {'score':>8}  {'margin':>17}  {'perplexity':>10}  {'held-out':>9}"
    return f"\n[dim]{head}[/]\n" + _row("", "none", "", "", baseline.perplexity, baseline, baseline)


def describe_step(step: Step, baseline: Baseline) -> str:
    """The decision of a step and its evidence, as a row under `describe_baseline`."""
    chosen = _chosen(step)
    margin = "others no number" if len(step.candidates) > 1 else "only candidate"
    if step.margin is not None:
        margin = f"{step.margin:.4f}"
        if step.margin_standard_error is not None:
            margin += f" ± {step.margin_standard_error:.4f}"
    removed = _name(chosen) + "".join(f", {block} back" for block in step.restored if step.is_swap)
    score = "-" if chosen.score is None else f"{chosen.score:.4f}"
    return _row(str(step.number), removed, score, margin, step.perplexity, step, baseline) + "  " + _verdict(step)


def _labelled(label: str, text: str) -> str:
    """A dim label and its text, further lines under the first."""
    return f"[dim]{label:<7}[/]" + text.replace("\n", "\n" + " " * 7)


def _row(
    number: str,
    removed: str,
    score: str,
    margin: str,
    perplexity: float | None,
    of: Step | Baseline,
    baseline: Baseline,
) -> str:
    held_out = decimal(of.held_out.perplexity) if of.held_out.token_count else "-"
    rise = _rise(of, baseline) if of is not baseline else ""
    left = max(18 - max(len(removed), 8), len(score) + 1)  # a swap takes some of the score's room
    return (
        f"{number:>4} [bold]{removed:>8}[/]{score:>{left}}  {margin:>17}  [bold]{decimal(perplexity):>10}[/]  "
        f"{held_out:>9} {rise:<14}"
    )


def _verdict(step: Step) -> str:
    if step.is_swap:
        return _verdict_on_swap(step)
    if step.margin is None:
        return ""
    if step.margin_standard_error is None:
        return "[dim]one sequence: no error[/]"
    if not step.tied:
        return "[green]significantly different[/]"
    more = f" and {len(step.tied) - _TIED_SHOWN} more" if len(step.tied) > _TIED_SHOWN else ""
    names = {candidate.block: _name(candidate) for candidate in step.candidates}
    return f"[yellow]tied with {', '.join(names[block] for block in step.tied[:_TIED_SHOWN])}{more}[/]"


def _verdict_on_swap(step: Step) -> str:
    better = "" if step.improvement is None else f"[green]better by {step.improvement:.4f}"
    if better and step.improvement_standard_error is not None:
        better += f" ± {step.improvement_standard_error:.4f}"
    better += "[/]" if better else ""
    count = len(step.tied)
    return better + (f", [yellow]tied with {count} other swap{'s' if count > 1 else ''}[/]" if count else "")


def _name(candidate: Candidate) -> str:
    """The block a candidate adds, or the chunk it is."""
    first, last = candidate.skipped[0], candidate.skipped[-1]
    is_chunk = candidate.block == first != last and candidate.skipped == tuple(range(first, last + 1))
    return f"{first}-{last}" if is_chunk else str(candidate.block)


def _chosen(step: Step) -> Candidate:
    """The winner: what was removed alone, or with everything before it."""
    return next(c for c in step.candidates if c.skipped in (step.removal_list, step.removed))


def describe_end(run: Run) -> str:
    """The removal list, the blocks kept, and what to do next."""
    if run.trace is None:
        return _describe_analysis(run)
    if not run.trace.steps:
        return f"Nothing was removed: {shown(run.trace.finished or 'not finished')}."
    assert run.stack is not None
    share = sum(run.stack.block_parameters[block] for block in run.removal_list) / run.stack.total_parameters
    finished = run.trace.finished or "not finished: resume it"
    name = shown(run_folder.reference(run))
    lines = [
        f"[bold]Removal list: {list(run.removal_list)}[/]",
        _labelled("kept", f"{_ranges(run.kept_blocks)}; {share:.1%} of the parameters removed; {shown(finished)}"),
        _labelled("next", f"sleb evaluate {name}\nsleb export {name} --format hf --out FOLDER{_budget(run)}"),
    ]
    return "\n" + "\n".join(lines)


def _budget(run: Run) -> str:
    """The budget of the search: what did not fit into memory then does not when it is written either."""
    budgets = [job.spec.memory_budget for job in run.jobs if job.spec.kind == "search"]
    return f" --memory-budget {math.ceil(budgets[-1] / 1e6)}MB" if budgets and budgets[-1] is not None else ""


def print_run(run: Run, console: Console | None = None) -> None:
    """Print the whole run on stdout, or on another console."""
    console = console or _Patient()
    kind = run.spec.method_or_kind
    console.print(_labelled("run", f"[bold]{shown(run.run_id)}[/] ({job_processes.state_of(run).value})"))
    refined = ", refined by swaps" if run.spec.refine == "swap" else ""
    console.print(_labelled("what", f"{kind} of {shown(run.spec.model)}{refined}"))
    last: dict[str, Job] = {job.spec.kind: job for job in job_processes.watched(run).jobs}  # earlier tries are history
    for job in last.values():
        if job.status.message or not (job.status.state is JobState.FINISHED or job_processes.is_active(job)):
            last_word = shown(with_flags(job_processes.last_word(job)))
            console.print(_labelled("", f"{job.name} {job.status.state.value}: {last_word}"))
    own = job_processes.own_job(run)
    attempt = own.attempt if own else None
    if attempt is not None:
        console.print(_labelled("how", shown(attempt.described)))
    if run.stack:
        console.print(describe(run.stack))
    if run.trace:
        console.print(describe_baseline(run.trace.baseline))
        for step in run.trace.steps:
            console.print(describe_step(step, run.trace.baseline))
    if run.analysis:
        console.print(_describe_analysis(run))
    if run.trace:
        console.print(describe_end(run))


def print_runs(runs: Sequence[Outline], every: bool) -> None:
    """Print a line for each run, newest first; on a screen the newest only, unless all are asked for."""
    shown_runs = runs if every or not Console().is_terminal else runs[:MOST_SHOWN]
    rows = []
    for run in shown_runs:
        rows.append(
            (
                run.run_id,
                run.state.value,
                run.spec.model,
                run.spec.method_or_kind,
                str(list(run.removal_list)) if run.removal_list else "-",
                " → ".join("-" if each is None else decimal(each.perplexity) for each in (run.baseline, run.last)),
            )
        )
    if not rows:
        Console(stderr=True).print("No runs yet. Start one with: sleb search demo")
        return
    table("", ("run", "state", "model", "method", "removal list", "perplexity"), rows)
    if len(rows) < len(runs):
        remark = f"The newest {len(rows):,} of {len(runs):,} runs. All of them: sleb runs --all"
        Console(stderr=True, highlight=False).print(remark)


def table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table on stdout; cells are shown as they are, never as markup."""
    console = Console(highlight=False)
    if not console.is_terminal or len(rows) > MOST_SHOWN:  # a file has no edge to wrap at
        _print_lines(console, title, columns, rows)
        return
    grid = Table(title=shown(title) or None, box=None, pad_edge=False, title_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(shown(cell) for cell in row))
    console.print(grid)


def _print_lines(console: Console, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table as plain lines that never wrap: Rich takes a millisecond for each row."""
    cells = [tuple(_on_one_line(cell) for cell in row) for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = [_on_one_line(title)] if title else []
    for row in cells:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    console.out("\n".join(lines))


def _describe_analysis(run: Run) -> str:
    if run.analysis is None:
        return "\n" + _labelled("none", f"No analysis: {shown(run.analysis_unavailable or 'not made yet')}")
    similarity, alignment = run.analysis.similarity, run.analysis.alignment
    order = sorted(range(len(similarity.metric1)), key=similarity.metric1.__getitem__)
    least = ", ".join(f"{block} ({similarity.metric1[block]:.3f})" for block in order[:5])
    exits = alignment.generated or alignment.calibration
    shares = [(size, exits.skipped_share[size]) for size in (1, 4, 16) if size in exits.skipped_share]
    batches = ", ".join(f"{share:.1%} at batch {size} ({exits.speedup(share):.2f}x)" for size, share in shares)
    similar = f"that change their input least, by Metric1 over {similarity.token_count:,} tokens: {least}"
    early = f"an ideal early exit skips {batches}\n[dim]on {shown(exits.source)}[/]"
    return "\n" + _labelled("blocks", similar) + "\n" + _labelled("exits", early)


def _rise(of: Step | Baseline, baseline: Baseline) -> str:
    ratio = of.held_out.ratio_to(baseline.held_out)
    if ratio is None:
        return ""
    text = f"{ratio - 1:+.1%}"
    if isinstance(of, Step) and of.held_out_standard_error is not None:
        text += f" ± {ratio * of.held_out_standard_error:.1%}"  # exp() of a rise in nats
    return text


def _ranges(blocks: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][1] + 1 == block:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)
