"""The README.md of an exported model: where it comes from, what it costs. Knows records; never sees a model.

Whatever comes from outside (names, folders, descriptions of texts) is escaped for Markdown and YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sleb.formats.findings_tables import tables_of
from sleb.formats.list_formats import in_words, yaml_string
from sleb.records import Finding, Healing, Proof, RemovalList, Run, Step, sorted_list

PAPER = "https://arxiv.org/abs/2402.09025"


DEMO_ORIGIN = " (from its 4-bit GGUF file, Q4\\_1, dequantised)"


def model_card(
    run: Run, removal_list: Sequence[int], *, base_model: str | None = None, found: Sequence[Finding] = ()
) -> str:
    """Front matter and provenance of the run's model without these blocks; no licence, which the base model
    has.

    `base_model` is the model's name on the hub, where the run was started with another name. Of the findings `found`
    those of this list and of the baseline are told.
    """
    trace = run.require_trace()
    stack = run.stack
    assert stack is not None  # require_trace() has looked
    name = base_model or run.spec.model
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None
    # Where a folder lies is nobody else's business.
    shown = name if on_hub else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    last = max((step.number for step in trace.steps if set(step.removal_list) == set(removal_list)), default=None)
    steps = list(trace.steps[:last])
    refined = any(step.is_swap for step in steps)
    front = ["---", "library_name: transformers"]
    front += [f"base_model: {yaml_string(name)}"] if on_hub else []
    front += ["tags:", "  - sleb", "  - depth-pruning", "  - text-generation", "---"]
    calibration = run.spec.calibration
    baseline = trace.baseline
    lines = [
        *front,
        "",
        f"# {escaped(shown)} without {len(removal_list)} of its {stack.num_blocks} blocks",
        "",
        "Transformer blocks that the calibration text needs least were removed whole "
        f"([SLEB]({PAPER})); nothing was trained afterwards.",
        "",
        f"- **Base model:** {escaped(shown)}{DEMO_ORIGIN if run.spec.model == 'demo' else ''}, {_revision(run)}, "
        f"{escaped(stack.model_class)}, "
        f"weights hash {code(stack.weights_hash)}",
        f"- **Removal list:** {code(list(removal_list))}",
        f"- **Blocks:** {escaped(in_words(stack.num_blocks, removal_list))}",
        f"- **Method:** {run.spec.method.value}{', refined by swaps' if refined else ''}, seed {run.spec.seed}, blocks "
        f"{code(list(stack.protected))} protected",
        f"- **Calibration:** {escaped(_without_folder(calibration.source))} ({escaped(stack.text)}), {stack.sequences} "
        f"sequences of {stack.sequence_length} tokens, sampling {calibration.sampling}, "
        f"{'with' if stack.bos else 'without'} BOS, {stack.held_out} held-out sequences",
        f"- **Scored in:** {escaped(stack.dtype)}",
        f"- **Run:** {code(run.run_id)}",
        "",
        "| step | removed | perplexity | held-out perplexity | margin ± standard error (nats) | tied with |",
        "|---:|:---|---:|---:|---:|:---|",
        f"| baseline | | {_number(baseline.perplexity)} | {_number(baseline.held_out.perplexity)} | | |",
        *(_row(step) for step in steps),
        "",
        "Perplexity is of the calibration text, on which the blocks were chosen, and so too good; the "
        "held-out sequences took no part in any choice. The margin is the runner-up's mean score above the "
        "winner's; a block is tied when the two cannot be told apart on these sequences."
        + (" The steps that take a block back are swaps, compared with all other swaps." if refined else ""),
        "",
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'ids = tokenizer("The Earth is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))",
        "```",
        "",
    ]
    lines += _evaluation(found, sorted_list(removal_list))
    versions = _versions(run)
    if versions:
        lines += ["## Versions", "", *(f"- {escaped(what)} {escaped(which)}" for what, which in versions), ""]
    return "\n".join(lines)


def _evaluation(found: Sequence[Finding], removal_list: RemovalList) -> list[str]:
    """What was measured of this list, beside the unmodified model."""
    own = [each for each in found if each.removal_list in ((), removal_list) and not isinstance(each, Healing)]
    if not any(each.removal_list for each in own):
        return []
    lines = ["## Evaluation", ""]
    for table in tables_of(own):
        lines += [f"{escaped(table.title)}:", "", _cells(table.columns), _cells("---" for _ in table.columns)]
        lines += [_cells(map(escaped, row)) for row in table.rows]
        lines.append("")
    return lines


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_proof(card: str, proof: Proof) -> str:
    """The card with what the proof found."""
    saved = 1 - proof.parameters_after / proof.parameters_before
    lines = [
        "## Proof",
        "",
        "Reloaded in a fresh process with plain transformers "
        f"{escaped(proof.versions.get('transformers', ''))}: {proof.blocks_after} of {proof.blocks_before} "
        f"blocks, {proof.parameters_after:,} of {proof.parameters_before:,} parameters ({saved:.1%} fewer), "
        f"{proof.bytes_after:,} bytes of weights in {escaped(proof.dtype)}. Over {proof.tokens} positions "
        f"its logits differ by at most {proof.max_logit_difference:.3g} from those of the original with the "
        f"blocks skipped ({proof.tolerance:.3g} allowed). {_generation(proof)} The details are in "
        "`proof.json`.",
        "",
        *accounted_for(proof),
    ]
    return card.rstrip("\n") + "\n\n" + "\n".join(lines)


def accounted_for(proof: Proof) -> list[str]:
    """A section on the folder's other files: what was compared, and what of the source is not here."""
    if not proof.checked:
        return []
    lines = [
        "## What else was carried over",
        "",
        *(f"- {escaped(each)}" for each in (*proof.checked, *proof.notes)),
        "",
    ]
    if proof.left_behind:
        lines += ["Left behind, since:", ""]
        lines += [f"- {code(each.name)}: {escaped(each.why)}" for each in proof.left_behind]
        lines.append("")
    return lines


def _generation(proof: Proof) -> str:
    if proof.generated_with_cache == proof.generated_without_cache == proof.generated_by_skipping:
        return f"{proof.generated_tokens} greedily generated tokens agree with and without the KV cache."
    return (
        f"Of {proof.generated_tokens} greedily generated tokens some differ, where two were as likely as "
        "each other or where the base model too answers otherwise with the KV cache than without."
    )


def escaped(text: object) -> str:
    """The text as Markdown that shows it as it is, on one line and inside a table."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$^])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """The text as inline code, whatever ticks are in it."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _without_folder(source: str) -> str:
    """Where a file lies is nobody else's business."""
    return re.split(r"[\\/]", source)[-1] if source.startswith("/") or ":\\" in source else source


def _revision(run: Run) -> str:
    revision = (run.stack.revision if run.stack else None) or run.spec.revision
    return f"revision {code(revision)}" if revision else "revision unknown"


def _row(step: Step) -> str:
    margin = _number(step.margin)
    if step.margin is not None and step.margin_standard_error is not None:
        margin += f" ± {_number(step.margin_standard_error)}"
    removed = ", ".join(map(str, step.removed))
    if step.restored:
        removed += f" (back: {', '.join(map(str, step.restored))})"
    cells = [
        step.number,
        removed,
        _number(step.perplexity),
        _number(step.held_out.perplexity),
        margin,
        _tied(step),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _tied(step: Step) -> str:
    if step.is_swap and step.tied:
        return f"{len(step.tied)} other swap{'s' if len(step.tied) > 1 else ''}"
    return ", ".join(map(str, step.tied))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _versions(run: Run) -> list[tuple[str, str]]:
    attempts = [job.attempt for job in run.jobs if job.attempt is not None]
    return sorted(attempts[-1].versions.items()) if attempts else []
