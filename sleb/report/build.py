"""A run as one HTML file to hand to a colleague: records -> text. Knows no Streamlit and no network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from sleb.export.finished_exports import Export, read_exports
from sleb.formats.findings_tables import NO_NUMBER, name_of, tables_of
from sleb.formats.list_formats import display_name, in_words, kept_ranges
from sleb.methods import step_evidence
from sleb.methods.statistics import Comparison
from sleb.records import (
    Alignment,
    ExportJob,
    Finding,
    Generation,
    Measured,
    Proof,
    Run,
    Similarity,
    StackDescription,
    Step,
    Trace,
    sorted_list,
)
from sleb.report.figures import compare, style
from sleb.report.figures import steps as step_charts
from sleb.report.html_page import facts, page, plot, section, table
from sleb.report.summaries import step_comparison
from sleb.runtime import findings_folder
from sleb.runtime.findings_folder import of_kind

PAPER = "https://arxiv.org/abs/2402.09025"


def of(run: Run, steps: int | None = None) -> str:
    """The report of a run folder, with the removal list after so many steps (all). Raises `RunError` without one."""
    trace = run.require_trace()
    comparisons = [step_evidence.of(run, step) for step in trace.steps]
    return render(run, comparisons, read_exports(run), steps, findings_folder.findings(run.run_dir))


def render(
    run: Run,
    comparisons: Sequence[Comparison | None],
    exports: Sequence[Export] = (),
    steps: int | None = None,
    found: Sequence[Finding] = (),
) -> str:
    """One self-contained HTML file. `comparisons` is one (or None) for each step; raises `RunError` without a list."""
    trace, stack = run.require_trace(), run.stack
    assert stack is not None  # require_trace() has looked
    count = len(trace.steps) if steps is None else max(1, min(steps, len(trace.steps)))
    step = trace.steps[count - 1]
    sections = [
        _at_a_glance(run, trace, stack, step),
        _the_list(run, trace, stack, count),
        _asked(run, stack),
        _baseline(trace),
        _all_steps(run, trace, comparisons, count),
        _analyses(run),
        _findings(found, step),
        _exports(exports),
        _how(run, stack),
    ]
    title = f"{display_name(run.spec.model)} without {len(step.removal_list)} of its {stack.num_blocks} blocks"
    about = (
        f"Transformer blocks that the text needs least, found by {style.method_name(run.spec)}; "
        f"nothing was trained afterwards. Run {run.run_id}, reported on {time.strftime('%Y-%m-%d')}."
    )
    return page(title, about, filter(None, sections))


def snippet(out: Path) -> str:
    """How the exported model is loaded, as Python."""
    is_file = out.suffix.lower() == ".gguf"
    arguments = f"folder, gguf_file={out.name!r}" if is_file else "folder"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {str(out.parent if is_file else out)!r}\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        'ids = tokenizer("The Earth is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))\n"
    )


def generation(proof: Proof) -> str:
    """What the exported model and the original wrote, compared, in one sentence."""
    if proof.generated_with_cache == proof.generated_without_cache == proof.generated_by_skipping:
        return (
            f"{proof.generated_tokens} greedily generated tokens are equal with the KV cache, without it, and from the "
            "original with the blocks skipped"
        )
    return (
        f"Of {proof.generated_tokens} greedily generated tokens some differ, where two were as likely as each other or "
        "where the base model too answers otherwise with the KV cache than without"
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _at_a_glance(run: Run, trace: Trace, stack: StackDescription, step: Step) -> str:
    first = trace.baseline
    gone = sum(stack.block_parameters[block] for block in step.removal_list)
    rise = _rise(first.held_out, step)
    unclear = sum(1 for each in trace.steps if each.tied)
    cards = [
        (f"{len(step.removal_list)} of {stack.num_blocks}", "blocks removed"),
        (f"−{gone / stack.total_parameters:.1%}", f"of {stack.total_parameters / 1e6:,.1f} M parameters"),
        (
            f"{_perplexity(first.held_out)} → {_perplexity(step.held_out)}",
            "held-out perplexity" + (f", {rise} nats per token" if rise else ""),
        ),
        (f"{_perplexity(first.calibration)} → {_perplexity(step.calibration)}", "calibration perplexity"),
        (
            f"{unclear} of {len(trace.steps)}",
            f"steps in which the removed block could not be told from another at {run.spec.confidence:.0%} confidence",
        ),
    ]
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in cards)
    return f'<div class="cards">{shown}</div>'


def _the_list(run: Run, trace: Trace, stack: StackDescription, count: int) -> str:
    step = trace.steps[count - 1]
    ranges = "  ".join(f"[{start}, {end})" for start, end in kept_ranges(stack.num_blocks, step.removal_list))
    colour = style.METHOD_COLOURS[run.spec.method.value]
    row = compare.Listed("", "", stack.num_blocks, tuple(each.removal_list for each in trace.steps[:count]), colour)
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
            compare.strips([row]), "The stack of blocks; removed ones are hatched and numbered in the order of removal"
        ),
    )


def _asked(run: Run, stack: StackDescription) -> str:
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
        "in one sweep over the stack; compared with skipping the blocks in a plain forward pass on "
        f"{check.candidates} candidates and {check.tokens} tokens" + _apart(check.max_difference)
        if check.scoring == "sweep"
        else f"one forward pass a candidate. {check.reason or ''}"
    )
    asked = [
        ("Method", style.METHOD_NAMES[spec.method.value] + (", then swaps" if spec.refine == "swap" else "")),
        ("To remove", target),
        ("Calibration text", stack.text),
        (
            "Cut into",
            f"{stack.sequences} sequences of {stack.sequence_length} tokens, "
            f"{'drawn at random' if text.sampling == 'random' else 'the first ones'}, "
            f"{'with' if stack.bos else 'without'} BOS; {stack.held_out} more are held out",
        ),
        ("Never candidates", ", ".join(f"block {block}" for block in stack.protected) or "none"),
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
    return section("What was asked", f'<div class="two">{facts(asked)}{facts(model)}</div>')


def _apart(difference: float | None) -> str:
    if difference is None:
        return ""
    return ": exactly equal" if difference == 0 else f": at most {difference:.2g} nats per token apart"


def _baseline(trace: Trace) -> str:
    first = trace.baseline
    rows = [
        (name, _perplexity(each), _nats(each, 4), f"{each.token_count:,}")
        for name, each in (("Calibration", first.calibration), ("Held-out", first.held_out))
    ]
    warnings = "".join(f'<p class="warning">{escape(each)}</p>' for each in first.warnings)
    measured = table(("Text", "Perplexity", "Nats per token", "Predicted tokens"), rows)
    return section("The unmodified model", warnings, measured)


def _all_steps(run: Run, trace: Trace, comparisons: Sequence[Comparison | None], count: int) -> str:
    first = trace.baseline
    unit = step_comparison.unit_of(run).removesuffix(" per token")
    rows: list[tuple[object, ...]] = [
        (
            "0",
            "unmodified",
            _perplexity(first.calibration),
            _perplexity(first.held_out),
            "",
            "",
            "",
            f"{first.seconds:,.1f}",
        )
    ]
    for step in trace.steps:
        margin = "" if step.margin is None else f"{step.margin:.4f}"
        if step.margin is not None and step.margin_standard_error is not None:
            margin += f"\u00a0±\u00a0{step.margin_standard_error:.4f}"
        removed = ", ".join(map(str, step.removed))
        if step.restored:
            removed += f" (back: {', '.join(map(str, step.restored))})"
        rows.append(
            (
                str(step.number),
                removed,
                _perplexity(step.calibration),
                _perplexity(step.held_out),
                _rise(first.held_out, step),
                margin,
                (step_comparison.swaps_in_words(len(step.tied)) if step.is_swap else ", ".join(map(str, step.tied)))
                or "–",
                f"{step.seconds:,.1f}",
            )
        )
    head = (
        "Step", "Removed", "Calibration perplexity", "Held-out perplexity", "Held-out rise, nats",
        f"Margin to the runner-up, {unit}", "Tied with", "Seconds",
    )  # fmt: skip
    end = (
        f"<p>The search ended: {escape(trace.finished)}.</p>"
        if trace.finished
        else "<p>The search is not finished.</p>"
    )
    return section(
        "Step by step",
        "<p>In every step each candidate is scored without it; the lowest score is removed, and all others are scored "
        "again. The margin is the runner-up's mean score above the winner's, ± its standard error over the calibration "
        "sequences in pairs; a block is tied where the interval of that difference contains zero.</p>",
        "<p>After the last removal, swaps: one block back and another out, as long as that lowers the score beyond its "
        "error. They are compared with each other; of those that remove the same block the figure shows the best.</p>"
        if any(step.is_swap for step in trace.steps)
        else "",
        plot(
            step_charts.animated(run, comparisons), "What removing each block costs, step by step; press play", "play"
        ),
        table(head, rows, marked=count),
        end,
        plot(step_charts.perplexity(run), "Perplexity against the number of blocks removed, with its standard error"),
    )


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
        plot(_heatmap(run.analysis.similarity), "Mean cosine similarity between the outputs of blocks"),
        "<p>Mean cosine similarity between the outputs of two blocks; “in” is the embedding. Blocks that barely change "
        "what flows along the stack form light squares (paper, Figure 6).</p></div>",
        "<div><h3>Where predictions are decided</h3>",
        plot(_alignment(run.analysis.alignment), "Share of tokens whose prediction after a block is the final one"),
        "<p>Share of tokens whose most likely next token after a block is already the model's final one (paper, "
        f"Figure 5). An ideal early exit would still need {first:.0%} of the blocks.</p></div></div>",
    )


def _findings(found: Sequence[Finding], step: Step) -> str:
    """What was measured of any of the run's lists; the rows of the one that the report is about are marked."""
    own = name_of(sorted_list(step.removal_list))
    parts: list[str] = []
    for each in tables_of(found):
        names = [name for row in each.rows for name in row[: len(each.columns)]]
        marked = None
        if own in names:
            marked = next(place for place, row in enumerate(each.rows) if own in row)
        parts += [f"<h3>{escape(each.title)}</h3>", table(each.columns, each.rows, marked=marked)]
        parts += [f"<p>{escape(note)}</p>" for note in each.notes]
    said = [each for each in of_kind(found, Generation) if each.removal_list == sorted_list(step.removal_list)]
    for answer in said:
        parts += [
            f"<h3>To the prompt “{escape(answer.ask.prompt)}”</h3>",
            table(("Model", "Says"), [("unmodified", answer.baseline_text), ("without these blocks", answer.text)]),
            f"<p>{len(answer.flips)} of {answer.compared} predictions on the unmodified model's text, prompt included, "
            "are other tokens without these blocks.</p>",
        ]
    if not parts:
        return ""
    return section(
        "What it costs and what it buys",
        "<p>Measured on text and tasks that took no part in the search, unless they say so; ± is one standard error, "
        "of differences in pairs. Perplexities compare only on the same text and tokenizer.</p>",
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
        "<p>Each was reloaded in a fresh process with plain transformers, and compared with the original model "
        "skipping the same blocks.</p>",
        table(head, rows),
        f"<p>Newest: {escape(generation(exports[-1].proof))}.</p>",
    )


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items())) or "unknown"


def _how(run: Run, stack: StackDescription) -> str:
    attempts = [job.attempt for job in run.jobs if job.attempt is not None and job.is_own(run.spec)]
    made = [
        (
            "Perplexity",
            "exp(sum of negative log-likelihoods ÷ predicted tokens), sums in float64 over per-token float32",
        ),
        (
            "Calibration, held-out",
            "Blocks are chosen on the calibration text, so the perplexity there is too good; held-out sequences took "
            "no part in any choice. Perplexities compare only on the same text and tokenizer",
        ),
        (
            "Rise, nats",
            "Mean held-out negative log-likelihood per token above the unmodified model's, ± one standard error over "
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


# --- figures of its own -----------------------------------------------------------------------------------------------


def _heatmap(similarity: Similarity) -> go.Figure:
    count = len(similarity.mean)
    names = ["in", *map(str, range(count - 1))]
    every = max(1, math.ceil(count / 16))
    ticks = dict(tickvals=list(range(0, count, every)), ticktext=names[::every], showgrid=False, zeroline=False)
    return style.figure(
        460,
        go.Heatmap(
            z=[[round(value, 4) for value in row] for row in similarity.mean],
            customdata=[[(row, column) for column in names] for row in names],
            colorscale=style.SCALE,
            colorbar=dict(thickness=12, outlinewidth=0),
            hovertemplate="%{customdata[0]} and %{customdata[1]}: %{z:.3f}<extra></extra>",
        ),
        xaxis=dict(title="Output of block", constrain="domain", **ticks),
        yaxis=dict(title="Output of block", scaleanchor="x", constrain="domain", autorange="reversed", **ticks),
    )


def _alignment(alignment: Alignment) -> go.Figure:
    def line(shares: Iterable[float], name: str, colour: str, dash: str) -> go.Scatter:
        return go.Scatter(
            y=[round(100 * value, 3) for value in shares],
            name=name,
            mode="lines+markers",
            line=dict(color=colour, width=2, dash=dash),
            marker=dict(size=5),
            hovertemplate="after block %{x}: %{y:.1f} %<extra></extra>",
        )

    traces = [line(alignment.calibration.agreement, "Calibration text", style.BLUE, "solid")]
    if alignment.generated is not None:
        traces.append(line(alignment.generated.agreement, "Generated by the model", style.ORANGE, "dash"))
    return style.figure(
        460,
        *traces,
        xaxis=dict(title="After block", zeroline=False),
        yaxis=dict(title="Prediction is the final one", ticksuffix=" %", range=[0, 102]),
        showlegend=len(traces) > 1,
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


def _rise(before: Measured, step: Step) -> str:
    if (
        before.nll_sum is None
        or step.held_out.nll_sum is None
        or not before.token_count
        or not step.held_out.token_count
    ):
        return ""
    rise = step.held_out.nll_sum / step.held_out.token_count - before.nll_sum / before.token_count
    error = step.held_out_standard_error
    return f"{rise:+.3f}".replace("-", "−") + (f"\u00a0±\u00a0{error:.3f}" if error is not None else "")


def _nats(measured: Measured, digits: int) -> str:
    return (
        "–"
        if measured.nll_sum is None or not measured.token_count
        else f"{measured.nll_sum / measured.token_count:.{digits}f}"
    )


def _perplexity(measured: Measured) -> str:
    return NO_NUMBER if measured.no_number else _number(measured.perplexity)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.2f}" if abs(value) < 1e5 else f"{value:.2e}"
