"""The README.md of an exported model: where it comes from, what it costs. Knows records; never sees a model.

Whatever comes from outside (names, folders, descriptions of texts) is escaped for Markdown and YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from sleb.formats.findings_tables import NO_NUMBER, tables_of
from sleb.formats.list_formats import display_name, in_words, is_hub_id, public_name, without_folder, yaml_string
from sleb.records import Finding, Healing, Measured, Proof, RemovalList, Run, Step, sorted_list

PAPER = "https://arxiv.org/abs/2402.09025"


DEMO_ORIGIN = " (from its 4-bit GGUF file, Q4\\_1, dequantised)"

Relation = Literal["finetune", "quantized", "adapter"]
"""How a model follows from its base, as the hub has it; a model with fewer blocks counts as a finetune there."""


def front_matter(
    model: str,
    relation: Relation,
    licence: Mapping[str, str],
    *tags: str,
    library: str = "transformers",
) -> list[str]:
    """The lines of a card that the hub reads, for what was made of `model`; `licence` are its own fields.

    The hub refuses a base model that is not one of its names; such a one is in the prose alone.
    """
    name = public_name(model)
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if is_hub_id(name):
        lines += [f"base_model: {yaml_string(name)}", f"base_model_relation: {relation}"]
    lines += [f"{field}: {yaml_string(licence[field])}" for field in _LICENCE if field in licence]
    return [*lines, "tags:", *(f"  - {tag}" for tag in ("sleb", "pruned", "depth-pruning", *tags)), "---"]


def base_model(run: Run, *, origin: str = "") -> str:
    """What the model was made of, as a line of prose: its name, never where it lies, and the hash of its weights."""
    stack = run.stack
    facts = [escaped(display_name(run.spec.model)) + origin]
    if not is_hub_id(public_name(run.spec.model)):
        facts.append("which is not on the Hugging Face hub")
    if stack is not None:
        facts += [_revision(run), escaped(stack.model_class)]
        if stack.quantisation is not None and not origin:
            facts.append(f"quantised: {escaped(stack.quantisation)}")
        facts.append(f"weights hash {code(stack.weights_hash)}")
    return f"- **Base model:** {', '.join(facts)}"


def licence_line(licence: Mapping[str, str]) -> str:
    """Which licence the base model names, as a line of prose."""
    named = licence.get("license_name") or licence.get("license")
    where = f" ({escaped(licence['license_link'])})" if "license_link" in licence else ""
    return (
        f"- **Licence:** {escaped(named)}{where}, the base model's"
        if named
        else "- **Licence:** the base model names none"
    )


_LICENCE = ("license", "license_name", "license_link")


def model_card(
    run: Run, removal_list: Sequence[int], *, licence: Mapping[str, str] | None = None, found: Sequence[Finding] = ()
) -> str:
    """Front matter and provenance of the run's model without these blocks.

    `licence` are the fields of a card that say the base model's. Of the findings `found` those of this list and of the
    baseline are told.
    """
    trace = run.require_trace()
    stack = run.stack
    assert stack is not None  # require_trace() has looked
    shown = display_name(run.spec.model)
    last = max((step.number for step in trace.steps if set(step.removal_list) == set(removal_list)), default=None)
    steps = list(trace.steps[:last])
    refined = any(step.is_swap for step in steps)
    calibration = run.spec.calibration
    baseline = trace.baseline
    lines = [
        *front_matter(run.spec.model, "finetune", licence or {}),
        "",
        f"# {escaped(shown)} without {len(removal_list)} of its {stack.num_blocks} blocks",
        "",
        "Transformer blocks that the calibration text needs least were removed whole "
        f"([SLEB]({PAPER})); nothing was trained afterwards.",
        "",
        base_model(run, origin=DEMO_ORIGIN if run.spec.model == "demo" else ""),
        licence_line(licence or {}),
        f"- **Removal list:** {code(list(removal_list))}",
        f"- **Blocks:** {escaped(in_words(stack.num_blocks, removal_list))}",
        f"- **Method:** {run.spec.method.value}{', refined by swaps' if refined else ''}, seed {run.spec.seed}, blocks "
        f"{code(list(stack.protected))} protected",
        f"- **Calibration:** {escaped(without_folder(calibration.source))} ({escaped(stack.text)}), {stack.sequences} "
        f"sequences of {stack.sequence_length} tokens, sampling {calibration.sampling}, "
        f"{'with' if stack.bos else 'without'} BOS, {stack.held_out} held-out sequences",
        f"- **Scored in:** {escaped(stack.dtype)}",
        f"- **Run:** {code(run.run_id)}",
        "",
        "| step | removed | perplexity | held-out perplexity | margin ± standard error (nats) | tied with |",
        "|---:|:---|---:|---:|---:|:---|",
        f"| baseline | | {_perplexity(baseline.calibration)} | {_perplexity(baseline.held_out)} | | |",
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
        lines += ["", *(line for note in table.notes for line in (escaped(note), ""))]
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
        _perplexity(step.calibration),
        _perplexity(step.held_out),
        margin,
        _tied(step),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _tied(step: Step) -> str:
    if step.is_swap and step.tied:
        return f"{len(step.tied)} other swap{'s' if len(step.tied) > 1 else ''}"
    return ", ".join(map(str, step.tied))


def _perplexity(measured: Measured) -> str:
    return NO_NUMBER if measured.no_number else _number(measured.perplexity)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _versions(run: Run) -> list[tuple[str, str]]:
    attempts = [job.attempt for job in run.jobs if job.attempt is not None]
    return sorted(attempts[-1].versions.items()) if attempts else []
