"""What the command line shows: progress on stderr, results on stdout. Knows records; computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from . import jobs
from .errors import RunError
from .records import Baseline, Candidate, Run, StackDescription, Step
from .records import Progress as Done

if TYPE_CHECKING:
    from .worker import Watcher

_TIED_SHOWN = 6


class Screen:
    """Live progress of one job: a bar on stderr, and each step on stdout as it is decided (unless `--json`)."""

    def __init__(self, as_json: bool) -> None:
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self.results = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[share]}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self.errors,
            transient=True,
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
        """What the worker tells, drawn here. Imports torch: ask only when there is work to do."""
        from .worker import Watcher

        screen = self

        class Drawing(Watcher):
            def progress(self, progress: Done) -> None:
                screen.draw(progress)

            def described(self, stack: StackDescription) -> None:
                screen.print(describe(stack))

            def baseline(self, baseline: Baseline) -> None:
                screen.print(describe_baseline(baseline))
                for warning in baseline.warnings:
                    screen.note(f"[bold yellow]Warning:[/] {escape(warning)}")

            def step(self, step: Step, baseline: Baseline) -> None:
                screen.print(describe_step(step, baseline))

        return Drawing()

    def begin(self, run: Run) -> None:
        """Says where the run is."""
        self.note(f"[dim]Run {escape(run.run_id)} in {escape(str(run.run_dir))}[/]")

    def end(self, run: Run) -> None:
        """The list, and what to do with it."""
        self.print(describe_end(run))

    def print(self, text: str) -> None:
        """A result."""
        self.bar.stop()
        self.results.print(text)
        self.bar.start()

    def note(self, text: str) -> None:
        """Not a result."""
        self.errors.print(text)

    def draw(self, progress: Done) -> None:
        """How far it is, with the time left."""
        text = progress.phase
        if progress.steps and progress.step:
            text = f"Step {progress.step} of {progress.steps}"
        if not self.errors.is_terminal and text != self._phase:  # a log file gets a line a phase, not a bar
            self.errors.print(escape(text))
        self._phase = text
        if progress.message:
            text = f"{text}: {progress.message}"
        known = progress.fraction > 0
        self.bar.update(
            self.task,
            description=escape(text),
            total=1.0 if known else None,
            completed=progress.fraction,
            share=f"{progress.fraction:.0%}" if known else "",
            left="" if progress.eta_seconds is None else f"{duration(progress.eta_seconds)} left",
        )


def duration(seconds: float) -> str:
    """`90` -> `1 min 30 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None) -> str:
    """A perplexity for the screen."""
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def describe(stack: StackDescription) -> str:
    """The model and the text, in two lines."""
    check = stack.self_check
    difference = "none" if not check.max_difference else f"{check.max_difference:.1g} nats per token"
    how = f"sweep checked against plain forward passes ({check.candidates} candidates, largest difference {difference})"
    if check.scoring == "plain":
        how = f"[bold yellow]scored the plain way[/]: {escape(check.reason or '')}"
    lines = [
        f"[bold]{escape(stack.model_class)}[/]: {stack.num_blocks} blocks of {escape(stack.block_class)} at "
        f"{escape(stack.path)}, {stack.total_parameters / 1e6:,.0f} M parameters, {stack.dtype}; {how}",
        f"Text: {escape(stack.text)}; {stack.sequences} sequences choose, {stack.held_out} are held out; "
        f"BOS {'at the head of each' if stack.bos else 'not added'}",
    ]
    for block, reason in check.protected.items():
        lines.append(f"[yellow]Block {block} is protected: {escape(reason)}[/]")
    return "\n".join(lines)


def describe_baseline(baseline: Baseline) -> str:
    """The unmodified model."""
    held_out = baseline.held_out.perplexity
    return (
        f"Baseline: perplexity [bold]{number(baseline.perplexity)}[/] on the calibration text"
        + (f", {number(held_out)} on held-out text" if held_out is not None else "")
        + f" ({baseline.calibration.token_count:,} and {baseline.held_out.token_count:,} tokens)"
    )


def describe_step(step: Step, baseline: Baseline) -> str:
    """What was decided, on what evidence."""
    chosen = next(
        c
        for c in step.candidates
        if (set(c.skipped) <= set(step.removal_list) and c.block in step.removed) or c.skipped == step.removal_list
    )
    removed = ", ".join(map(str, step.removed))
    text = f"Step {step.number}: remove block{'s' if len(step.removed) > 1 else ''} [bold]{removed}[/]"
    if step.restored:
        text += f", restore {', '.join(map(str, step.restored))}"
    text += f" ({_score(chosen)}); perplexity [bold]{number(step.perplexity)}[/]"
    if step.held_out.token_count:
        text += f", held-out {number(step.held_out.perplexity)}{_rise(step, baseline)}"
    text += f"  [dim]{duration(step.seconds)}[/]\n    "
    if step.margin is None:
        return text + "[dim]the only candidate[/]"
    unit = "" if chosen.objective == "metric1" else " nats per token"
    if step.margin_standard_error is None:
        return text + f"[dim]margin to the runner-up {step.margin:.4f}{unit}; one sequence gives no standard error[/]"
    text += f"[dim]margin to the runner-up {step.margin:.4f} ± {step.margin_standard_error:.4f}{unit}[/]"
    if not step.tied:
        return text + ", [green]told apart from every other block[/]"
    shown = ", ".join(map(str, step.tied[:_TIED_SHOWN]))
    more = f" and {len(step.tied) - _TIED_SHOWN} more" if len(step.tied) > _TIED_SHOWN else ""
    return text + f", [yellow]tied with {shown}{more}[/]"


def describe_end(run: Run) -> str:
    """The removal list, the blocks kept, and what to do next."""
    if run.trace is None:
        return _describe_analysis(run)
    if not run.trace.steps:
        return f"Nothing was removed: {escape(run.trace.finished or 'not finished')}."
    assert run.stack is not None
    share = sum(run.stack.block_parameters[block] for block in run.removal_list) / run.stack.total_parameters
    lines = [
        f"Removal list: [bold]{list(run.removal_list)}[/]",
        f"[dim]Kept: {_ranges(run.kept_blocks)}; {share:.1%} of the parameters gone. "
        f"{escape((run.trace.finished or 'not finished: resume it').capitalize())}.[/]",
        f"[dim]Next: sleb show {escape(run.run_id)}; sleb export {escape(run.run_id)} --format hf --out FOLDER[/]",
    ]
    return "\n".join(lines)


def print_run(run: Run) -> None:
    """The whole run on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"Run [bold]{escape(run.run_id)}[/] ({jobs.state_of(run).value}): {escape(run.spec.model)}, "
        f"{run.spec.method.value if run.spec.kind == 'search' else 'analysis'}"
    )
    for job in jobs.watched(run).jobs:
        if job.status.message:
            console.print(f"  {job.name}: {job.status.state.value}: {escape(job.status.message)}")
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


def print_runs(found: list[Run | RunError]) -> None:
    """A line a run, newest first."""
    rows = []
    for run in found:
        if isinstance(run, RunError):
            continue
        first = run.trace.baseline.perplexity if run.trace else None
        last = run.trace.steps[-1].perplexity if run.trace and run.trace.steps else None
        rows.append(
            (
                run.run_id,
                jobs.state_of(run).value,
                run.spec.model,
                run.spec.method.value if run.spec.kind == "search" else "analysis",
                str(list(run.removal_list)) if run.removal_list else "-",
                f"{number(first)} → {number(last)}",
            )
        )
    if not rows:
        Console(stderr=True).print("There are no runs yet. Start one with: sleb search demo")
        return
    table("", ("run", "state", "model", "method", "removal list", "perplexity"), rows)


def table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout; cells are shown as they are, never as markup."""
    grid = Table(title=escape(title) or None, box=None, pad_edge=False, title_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)  # a file has no edge to wrap at
    console.print(grid)


def _describe_analysis(run: Run) -> str:
    if run.analysis is None:
        return f"No analysis: {escape(run.analysis_unavailable or 'not made yet')}"
    similarity, alignment = run.analysis.similarity, run.analysis.alignment
    order = sorted(range(len(similarity.metric1)), key=similarity.metric1.__getitem__)
    least = ", ".join(f"{block} ({similarity.metric1[block]:.3f})" for block in order[:5])
    exits = alignment.generated or alignment.calibration
    batches = [(size, exits.skipped_share[size]) for size in (1, 4, 16) if size in exits.skipped_share]
    shares = ", ".join(f"batch {size}: {share:.1%} ({exits.speedup(share):.2f}x)" for size, share in batches)
    return (
        f"Similarity over {similarity.token_count:,} tokens: the blocks that change their input least are "
        f"{least} (Metric1, 1 - cosine)\n"
        f"Alignment on {escape(exits.source)}: an ideal early exit would skip, at {shares} of the blocks"
    )


def _score(candidate: Candidate) -> str:
    if candidate.score is None:
        return "no score"
    return f"Metric1 {candidate.score:.4f}" if candidate.objective == "metric1" else f"score {candidate.score:.4f} nats"


def _rise(step: Step, baseline: Baseline) -> str:
    before, after = baseline.held_out.perplexity, step.held_out.perplexity
    if before is None or after is None or before == 0:
        return ""
    return f" ({after / before - 1:+.1%})"


def _ranges(blocks: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][1] + 1 == block:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)
