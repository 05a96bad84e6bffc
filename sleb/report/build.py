"""A run as one HTML file to hand to a colleague: records -> text. Knows no Streamlit and no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from sleb.export.finished_exports import Export, read_exports
from sleb.formats.findings_tables import name_of, tables_of
from sleb.formats.list_formats import display_name, in_words, kept_ranges
from sleb.methods import step_evidence
from sleb.methods.statistics import Comparison
from sleb.records import (
    Baseline,
    ExportJob,
    Finding,
    Generation,
    Measured,
    Run,
    StackDescription,
    Step,
    Trace,
    sorted_list,
)
from sleb.report.figures import alignment, similarity, stack_strips, step_animation, style
from sleb.report.figures import steps as step_charts
from sleb.report.html_page import facts, page, plot, section, table
from sleb.report.summaries import step_comparison
from sleb.report.summaries.compared_lists import Listed
from sleb.report.summaries.exported_model import generation
from sleb.report.summaries.numbers import NONE, minus, number, perplexity, share_of_parameters
from sleb.runtime import findings_folder
from sleb.runtime.findings_folder import of_kind

PAPER = "https://arxiv.org/abs/2402.09025"


def of(run: Run, steps: int | None = None) -> str:
    """The report of a run folder, with its list after so many steps (None: all). Raises `RunError` without a list."""
    trace = run.require_trace()
    comparisons = [step_evidence.of(run, step) for step in trace.steps]
    return render(run, comparisons, read_exports(run), steps, findings_folder.findings(run.run_dir))


def render(
    run: Run,
    comparisons: Sequence[Comparison | None],
    exports: Sequence[Export] = (),
    steps: int | None = None,
    findings: Sequence[Finding] = (),
) -> str:
    """One self-contained HTML file. `comparisons` is one (or None) for each step; raises `RunError` without a list."""
    trace, stack = run.require_trace(), run.stack
    assert stack is not None  # require_trace() has looked
    count = len(trace.steps) if steps is None else max(1, min(steps, len(trace.steps)))
    step = trace.steps[count - 1]
    sections = [
        _at_a_glance(run, trace, stack, step),
        _the_list(run, trace, stack, count),
        _specification(run, stack),
        _baseline(trace),
        _all_steps(run, trace, comparisons, count),
        _analyses(run),
        _findings(findings, step),
        _exports(exports),
        _method(run, stack),
    ]
    title = f"{display_name(run.spec.model)} without {len(step.removal_list)} of its {stack.num_blocks} blocks"
    about = (
        f"Transformer blocks chosen by {style.method_name(run.spec)}; nothing was trained afterwards. "
        f"Run {run.run_id}, reported on {time.strftime('%Y-%m-%d')}."
    )
    return page(title, about, filter(None, sections))


def _at_a_glance(run: Run, trace: Trace, stack: StackDescription, step: Step) -> str:
    first = trace.baseline
    rise = _rise(first.held_out, step)
    unclear = sum(1 for each in trace.steps if each.tied)
    cards = [
        (f"{len(step.removal_list)} of {stack.num_blocks}", "blocks removed"),
        (
            f"−{share_of_parameters(stack, step.removal_list):.1%}",
            f"of {stack.total_parameters / 1e6:,.1f} M parameters",
        ),
        (
            f"{perplexity(first.held_out)} → {perplexity(step.held_out)}",
            "held-out perplexity" + (f", {rise} nats per token" if rise else ""),
        ),
        (f"{perplexity(first.calibration)} → {perplexity(step.calibration)}", "calibration perplexity"),
        (
            f"{unclear} of {len(trace.steps)}",
            f"steps with a block statistically tied with the removed one, at {run.spec.confidence:.0%} confidence",
        ),
    ]
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in cards)
    return f'<div class="cards">{shown}</div>'


def _the_list(run: Run, trace: Trace, stack: StackDescription, count: int) -> str:
    step = trace.steps[count - 1]
    ranges = "  ".join(f"[{start}, {end})" for start, end in kept_ranges(stack.num_blocks, step.removal_list))
    colour = style.METHOD_COLOURS[run.spec.method.value]
    row = Listed("", "", stack.num_blocks, tuple(each.removal_list for each in trace.steps[:count]), colour)
    note = "" if count == len(trace.steps) else f" after {count} of {len(trace.steps)} steps"
    return section(
        f"Removal list{note}",
        f"<p>{escape(in_words(stack.num_blocks, step.removal_list))}</p>",
        facts(
            [
                ("Removed, in this order", f"[{', '.join(map(str, step.removal_list))}]"),
                ("Kept, as half-open ranges", ranges or "none"),
            ],
            code=True,
        ),
        plot(
            stack_strips.strips([row]),
            "The stack of blocks; removed ones are hatched and numbered in the order of removal",
        ),
    )


def _specification(run: Run, stack: StackDescription) -> str:
    spec, text, check = run.spec, run.spec.calibration, stack.self_check
    target = (
        f"{spec.num_remove} blocks"
        if spec.num_remove
        else f"{spec.ratio:.0%} of the blocks, rounded up: {stack.num_remove}"
        if spec.ratio
        else f"up to {stack.num_remove} blocks"
    )
    if spec.until_perplexity is not None:
        target += f", while the held-out perplexity rises by at most {spec.until_perplexity:.0%}"
    scored = (
        "in one sweep over the stack; compared with a plain forward pass that skips the blocks, on "
        f"{check.candidates} candidates and {check.tokens} tokens" + _difference(check.max_difference)
        if check.scoring == "sweep"
        else f"by one forward pass a candidate. {check.reason or ''}"
    )
    searched = [
        ("Method", style.METHOD_NAMES[spec.method.value] + (", then swaps" if spec.refine == "swap" else "")),
        ("To remove", target),
        ("Calibration text", stack.text),
        (
            "Cut into",
            f"{stack.sequences} sequences of {stack.sequence_length} tokens, "
            f"{'drawn at random' if text.sampling == 'random' else 'the first ones'}, "
            f"{'with' if stack.bos else 'without'} BOS; {stack.held_out} more are held out",
        ),
        ("Protected", ", ".join(f"block {block}" for block in stack.protected) or "none"),
        ("Confidence, seed", f"{spec.confidence:.0%}, {spec.seed}"),
    ]
    model = [
        ("Model", display_name(spec.model)),
        ("Revision", stack.revision or spec.revision or "unknown"),
        ("Weights hash", stack.weights_hash),
        *([("Quantised", stack.quantisation)] if stack.quantisation is not None else []),
        ("Blocks", f"{stack.num_blocks} × {stack.block_class} in {stack.model_class}"),
        ("Parameters", f"{stack.total_parameters:,}, of which {sum(stack.block_parameters):,} in blocks"),
        ("Hidden size, vocabulary", f"{stack.hidden_size:,}, {stack.vocab_size:,} tokens"),
        ("Computed in", stack.dtype),
        ("Scored", scored),
    ]
    return section("Specification", f'<div class="two">{facts(searched)}{facts(model)}</div>')


def _difference(difference: float | None) -> str:
    if difference is None:
        return ""
    return ": exactly equal" if difference == 0 else f": they differ by at most {difference:.2g} nats per token"


def _baseline(trace: Trace) -> str:
    first = trace.baseline
    rows = [
        (name, perplexity(each), number(each.nats_per_token, 4), f"{each.token_count:,}")
        for name, each in (("Calibration", first.calibration), ("Held-out", first.held_out))
    ]
    warnings = "".join(f'<p class="warning">{escape(each)}</p>' for each in first.warnings)
    measured = table(("Text", "Perplexity", "Nats per token", "Predicted tokens"), rows)
    return section("The baseline", warnings, measured)


def _all_steps(run: Run, trace: Trace, comparisons: Sequence[Comparison | None], count: int) -> str:
    head = (
        "Step", "Removed", "Calibration perplexity", "Held-out perplexity", "Held-out rise, nats",
        f"Margin to the runner-up, {step_comparison.short_unit_of(run)}", "Statistically tied with", "Seconds",
    )  # fmt: skip
    end = f"The search ended: {trace.finished}." if trace.finished else "The search is not finished."
    return section(
        "Step by step",
        "<p>Each step scores the model without each candidate in turn, removes the block with the lowest score, and "
        "scores the others again. The margin is the runner-up's mean score above the lowest, ± its standard error over "
        "the calibration sequences in pairs; a block is statistically tied where the interval of that difference "
        "contains zero.</p>",
        "<p>After the last removal, swaps: one block back and another out, as long as that lowers the score beyond its "
        "error. They are compared with each other; of those that remove the same block the figure shows the best.</p>"
        if any(step.is_swap for step in trace.steps)
        else "",
        plot(
            step_animation.animated(run, comparisons),
            "What removing each block costs, step by step; press play",
            "play",
        ),
        table(
            head,
            [_baseline_row(trace.baseline), *(_step_row(trace.baseline, step) for step in trace.steps)],
            marked=count,
        ),
        f"<p>{escape(end)}</p>",
        plot(step_charts.perplexity(run), "Perplexity against the number of blocks removed, with its standard error"),
    )


def _baseline_row(first: Baseline) -> tuple[str, ...]:
    texts = perplexity(first.calibration), perplexity(first.held_out)
    return ("0", "none (baseline)", *texts, "", "", "", f"{first.seconds:,.1f}")


def _step_row(first: Baseline, step: Step) -> tuple[str, ...]:
    margin = "" if step.margin is None else f"{step.margin:.4f}"
    if step.margin is not None and step.margin_standard_error is not None:
        margin += f"\u00a0±\u00a0{step.margin_standard_error:.4f}"
    removed = ", ".join(map(str, step.removed))
    if step.restored:
        removed += f" (back: {', '.join(map(str, step.restored))})"
    tied = step_comparison.swaps_in_words(len(step.tied)) if step.is_swap else ", ".join(map(str, step.tied))
    return (
        str(step.number),
        removed,
        perplexity(step.calibration),
        perplexity(step.held_out),
        _rise(first.held_out, step),
        margin,
        tied or NONE,
        f"{step.seconds:,.1f}",
    )


def _rise(before: Measured, step: Step) -> str:
    """The held-out rise in nats per token, ± its standard error; empty where it is not known."""
    nats_more, error = step.held_out.rise_over(before), step.held_out_standard_error
    if nats_more is None:
        return ""
    return minus(f"{nats_more:+.3f}") + (f"\u00a0±\u00a0{error:.3f}" if error is not None else "")


def _analyses(run: Run) -> str:
    if run.analysis is None:
        why = run.analysis_unavailable
        return section("Similarity and prediction alignment", f"<p>{escape(why)}</p>") if why else ""
    made = run.analysis.description
    exits = run.analysis.alignment.calibration
    first = 1 - exits.skipped_share.get(1, 0.0)
    return section(
        "Similarity and prediction alignment",
        f"<p>On {made.token_count:,} tokens of the calibration text.</p>",
        '<div class="two"><div><h3>How alike the outputs of blocks are</h3>',
        plot(
            similarity.recorded_heatmap(run.analysis.similarity), "Mean cosine similarity between the outputs of blocks"
        ),
        "<p>Mean cosine similarity between the outputs of two blocks; “in” is the embedding. Blocks that change the "
        "hidden states little form bright squares (paper, Figure 6).</p></div>",
        "<div><h3>Where predictions are decided</h3>",
        plot(alignment.recorded_agreement(run.analysis.alignment), "Share of tokens that agree after a block"),
        "<p>Share of tokens whose most likely next token after a block is already the model's final one (paper, "
        f"Figure 5). An ideal early exit would still need {first:.0%} of the blocks.</p></div></div>",
    )


def _findings(findings: Sequence[Finding], step: Step) -> str:
    """Findings about the run's lists; the rows of the list that the report is about are marked."""
    own = name_of(sorted_list(step.removal_list))
    parts: list[str] = []
    for each in tables_of(findings):
        names = [name for row in each.rows for name in row[: len(each.columns)]]
        marked = None
        if own in names:
            marked = next(place for place, row in enumerate(each.rows) if own in row)
        parts += [f"<h3>{escape(each.title)}</h3>", table(each.columns, each.rows, marked=marked)]
        parts += [f"<p>{escape(note)}</p>" for note in each.notes]
    answers = [each for each in of_kind(findings, Generation) if each.removal_list == sorted_list(step.removal_list)]
    for answer in answers:
        parts += [
            f"<h3>To the prompt “{escape(answer.ask.prompt)}”</h3>",
            table(("Model", "Text"), [("baseline", answer.baseline_text), ("without these blocks", answer.text)]),
            f"<p>Without these blocks, {len(answer.flips)} of {answer.compared} predictions on the baseline's text, "
            "prompt included, are other tokens.</p>",
        ]
    if not parts:
        return ""
    return section(
        "What it costs and what it buys",
        "<p>Measured on text and tasks on which no block was chosen, unless they say so; ± is one standard error, of "
        "differences in pairs. Perplexities compare only on the same text and tokenizer.</p>",
        *parts,
    )


def _exports(exports: Sequence[Export]) -> str:
    if not exports:
        return ""
    rows = [
        (
            each.out.name,
            "passed" if each.proof.passed else "failed: " + "; ".join(each.proof.reasons),
            f"{each.proof.blocks_before} → {each.proof.blocks_after}",
            f"{each.proof.parameters_before:,} → {each.proof.parameters_after:,} "
            f"(−{1 - each.proof.parameters_after / each.proof.parameters_before:.1%})",
            f"{each.proof.bytes_after / 1e6:,.0f} MB, "
            + (
                "copied from the GGUF file"
                if isinstance(each.job.spec, ExportJob) and each.job.spec.format == "gguf"
                else each.proof.dtype
            ),
            f"{each.proof.max_logit_difference:.3g} ({each.proof.tolerance:.3g} allowed)",
        )
        for each in exports
    ]
    head = ("Folder", "Proof", "Blocks", "Parameters", "Weights", "Largest difference of logits")
    return section(
        "Smaller models written",
        "<p>Each was reloaded in a fresh process with plain transformers, and compared with the baseline that skips "
        "the same blocks.</p>",
        table(head, rows),
        f"<p>Newest: {escape(generation(exports[-1].proof))}.</p>",
    )


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "unknown"


def _method(run: Run, stack: StackDescription) -> str:
    attempts = [job.attempt for job in run.jobs if job.attempt is not None and job.is_own(run.spec)]
    made = [
        (
            "Perplexity",
            "exp(sum of negative log-likelihoods ÷ predicted tokens), sums in float64 over per-token float32",
        ),
        (
            "Calibration, held-out",
            "Blocks are chosen on the calibration text, so its perplexity is too good; no block is chosen on held-out "
            "sequences. Perplexities compare only on the same text and tokenizer",
        ),
        (
            "Rise, nats",
            "Mean held-out negative log-likelihood per token above the baseline's, ± one standard error over "
            "sequences, in pairs",
        ),
        ("Blocks", "Original, 0-based indices everywhere"),
        ("Device", ", ".join(dict.fromkeys(attempt.device for attempt in attempts)) or "unknown"),
        ("Versions", _versions(attempts[-1].versions if attempts else {})),
        ("Analyses computed with", _versions(run.analysis.description.versions if run.analysis else {})),
        ("Text hash", stack.tokens_hash),
        ("Model key", stack.model_key or "not recorded by the version that made this run"),
        ("Run", run.run_id),
    ]
    return section(
        "How the numbers are made",
        facts(made),
        f"<p>Method: Song et al. 2024, SLEB: Streamlining LLMs through Redundancy Verification and Elimination of "
        f"Transformer Blocks, {PAPER}</p>",
    )
