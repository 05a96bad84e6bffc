"""The README.md of an exported model: where it comes from, what it costs. Knows records; never sees a model.

`card` builds every card out of the same parts; those of healed and quantised models are in `changed_weights_cards`.
Whatever comes from outside (names, folders, descriptions of texts) is escaped for Markdown and YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from sleb.formats.findings_tables import NO_NUMBER, tables_of
from sleb.formats.list_formats import display_name, in_words, is_hub_id, public_name, without_folder, yaml_string
from sleb.records import Finding, Healing, Measured, Proof, RemovalList, Run, Step, Trace, sorted_list

PAPER = "https://arxiv.org/abs/2402.09025"
DEMO_ORIGIN = " (from its 4-bit GGUF file, Q4\\_1, dequantised)"

Relation = Literal["finetune", "quantized", "adapter"]
"""How a model follows from its base, as the hub has it; a model with fewer blocks counts as a finetune there."""

LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
"""The lines of Python that load an exported folder."""

_GENERATING = """
ids = tokenizer("The Earth is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"""
_LICENCE = ("license", "license_name", "license_link")


def card(
    run: Run,
    num_blocks: int,
    removal_list: Sequence[int],
    story: str,
    paragraphs: Iterable[str],
    *,
    licence: Mapping[str, str],
    relation: Relation = "finetune",
    tags: Sequence[str] = (),
    library: str = "transformers",
    title: str = "",
    facts: Iterable[str] = (),
    in_order: bool = False,
) -> str:
    """A card: front matter, title, what was done (`story`), provenance, and further `paragraphs` of Markdown.

    `licence` are the fields of a card that say the base model's, `title` ends the first heading, `facts` are further
    lines of provenance, and `in_order` says that the removal list is in the order of removal.
    """
    shown = f"{escaped(display_name(run.spec.model))} without {len(removal_list)} of its {num_blocks} blocks{title}"
    provenance = [
        _base_model(run),
        _licence_line(licence),
        f"- **Removal list:** {code(list(removal_list))}",
        f"- **Blocks:** {escaped(in_words(num_blocks, removal_list, in_order=in_order))}",
        *facts,
        f"- **Run:** {code(run.run_id)}",
    ]
    front = front_matter(run.spec.model, relation, licence, *tags, library=library)
    parts = ["\n".join(front), f"# {shown}", story, "\n".join(provenance), *paragraphs]
    return "\n\n".join(parts) + "\n"


def heading(title: str) -> str:
    """The heading of a section of a card."""
    return f"## {title}"


def fenced(language: str, lines: str) -> str:
    """Code as a paragraph of its own."""
    return f"```{language}\n{lines.strip()}\n```"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the caller escapes the text of its cells."""
    return "\n".join(map(_cells, (columns, ["---"] * len(columns), *rows)))


def perplexity(measured: Measured) -> str:
    """A perplexity in a cell; nothing where nothing was measured."""
    return NO_NUMBER if measured.no_number else number(measured.perplexity)


def number(value: float | None) -> str:
    """A number in a cell; nothing where there is none."""
    return "" if value is None else f"{value:.4g}"


def front_matter(
    model: str,
    relation: Relation,
    licence: Mapping[str, str],
    *tags: str,
    library: str = "transformers",
) -> list[str]:
    """The lines of a card that the hub reads, for what was made of `model`; `licence` are the model's own fields.

    The hub refuses a base model that is not one of its names: only the prose names such a model.
    """
    name = public_name(model)
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if is_hub_id(name):
        lines += [f"base_model: {yaml_string(name)}", f"base_model_relation: {relation}"]
    lines += [f"{field}: {yaml_string(licence[field])}" for field in _LICENCE if field in licence]
    return [*lines, "tags:", *(f"  - {tag}" for tag in ("sleb", "pruned", "depth-pruning", *tags)), "---"]


def _base_model(run: Run) -> str:
    """What the model was made of, as a line of prose: its name, never where it lies, and the hash of its weights."""
    stack, origin = run.stack, DEMO_ORIGIN if run.spec.model == "demo" else ""
    facts = [escaped(display_name(run.spec.model)) + origin]
    if not is_hub_id(public_name(run.spec.model)):
        facts.append("which is not on the Hugging Face hub")
    if stack is not None:
        facts += [_revision(run), escaped(stack.model_class)]
        if stack.quantisation is not None and not origin:
            facts.append(f"quantised: {escaped(stack.quantisation)}")
        facts.append(f"weights hash {code(stack.weights_hash)}")
    return f"- **Base model:** {', '.join(facts)}"


def _licence_line(licence: Mapping[str, str]) -> str:
    """Which licence the base model names, as a line of prose."""
    named = licence.get("license_name") or licence.get("license")
    where = f" ({escaped(licence['license_link'])})" if "license_link" in licence else ""
    return (
        f"- **Licence:** {escaped(named)}{where}, the base model's"
        if named
        else "- **Licence:** the base model names none"
    )


def model_card(
    run: Run,
    removal_list: Sequence[int],
    *,
    licence: Mapping[str, str] | None = None,
    findings: Sequence[Finding] = (),
) -> str:
    """The card of the run's model without these blocks, with the steps of the search.

    `licence` are the fields of a card that say the base model's. Of the `findings` those of this list and of the
    baseline are shown.
    """
    trace, stack = run.require_trace(), run.stack
    assert stack is not None  # require_trace() has looked
    last = max((step.number for step in trace.steps if set(step.removal_list) == set(removal_list)), default=None)
    steps = list(trace.steps[:last])
    refined = any(step.is_swap for step in steps)
    calibration = run.spec.calibration
    return card(
        run,
        stack.num_blocks,
        removal_list,
        "Transformer blocks that the calibration text needs least were removed whole "
        f"([SLEB]({PAPER})); nothing was trained afterwards.",
        [
            *_steps(trace, steps, refined),
            heading("How to load it"),
            fenced("python", f"{LOADING}{_GENERATING}"),
            *_evaluation(findings, sorted_list(removal_list)),
            *_versions(run),
        ],
        licence=licence or {},
        facts=[
            f"- **Method:** {run.spec.method.value}{', refined by swaps' if refined else ''}, seed {run.spec.seed}, "
            f"blocks {code(list(stack.protected))} protected",
            f"- **Calibration:** {escaped(without_folder(calibration.source))} ({escaped(stack.text)}), "
            f"{stack.sequences} sequences of {stack.sequence_length} tokens, sampling {calibration.sampling}, "
            f"{'with' if stack.bos else 'without'} BOS, {stack.held_out} held-out sequences",
            f"- **Scored in:** {escaped(stack.dtype)}",
        ],
        in_order=True,
    )


def _steps(trace: Trace, steps: Sequence[Step], refined: bool) -> Iterator[str]:
    """What each step removed and cost, and how to read it."""
    baseline = trace.baseline
    lines = [
        "| step | removed | perplexity | held-out perplexity | margin ± standard error (nats) | tied with |",
        "|---:|:---|---:|---:|---:|:---|",
        f"| baseline | | {perplexity(baseline.calibration)} | {perplexity(baseline.held_out)} | | |",
        *(_row(step) for step in steps),
    ]
    yield "\n".join(lines)
    yield (
        "Perplexity is of the calibration text, on which the blocks were chosen, and so too good; the held-out "
        "sequences took no part in any choice. The margin is the runner-up's mean score above the winner's; a block "
        "is statistically tied when the two are not significantly different on these sequences."
    ) + (" The steps that take a block back are swaps, compared with all other swaps." if refined else "")


def _evaluation(findings: Sequence[Finding], removal_list: RemovalList) -> Iterator[str]:
    """What was measured of this list, beside the baseline."""
    own = [each for each in findings if each.removal_list in ((), removal_list) and not isinstance(each, Healing)]
    if not any(each.removal_list for each in own):
        return
    yield heading("Evaluation")
    for each in tables_of(own):
        yield f"{escaped(each.title)}:"
        yield table(each.columns, (tuple(map(escaped, row)) for row in each.rows))
        yield from map(escaped, each.notes)


def _versions(run: Run) -> Iterator[str]:
    attempts = [job.attempt for job in run.jobs if job.attempt is not None]
    if attempts and attempts[-1].versions:
        yield heading("Versions")
        yield "\n".join(
            f"- {escaped(name)} {escaped(version)}" for name, version in sorted(attempts[-1].versions.items())
        )


def _cells(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def with_proof(text: str, proof: Proof, compared_with: str = "baseline") -> str:
    """The card with what the proof compared; `compared_with` is the model whose blocks were skipped."""
    saved = 1 - proof.parameters_after / proof.parameters_before
    paragraphs = [
        text.rstrip("\n"),
        heading("Proof"),
        "Reloaded in a fresh process with plain transformers "
        f"{escaped(proof.versions.get('transformers', ''))}: {proof.blocks_after} of {proof.blocks_before} "
        f"blocks, {proof.parameters_after:,} of {proof.parameters_before:,} parameters ({saved:.1%} fewer), "
        f"{proof.bytes_after:,} bytes of weights. Over {proof.tokens} positions its logits differ by at most "
        f"{proof.max_logit_difference:.3g} from those of the {compared_with} with the blocks skipped "
        f"({proof.tolerance:.3g} allowed in {escaped(proof.dtype)}). {_generation(proof)} The details are in "
        "`proof.json`.",
    ]
    if proof.checked:
        paragraphs.append(heading("What else was carried over"))
        paragraphs.append("\n".join(f"- {escaped(each)}" for each in (*proof.checked, *proof.notes)))
    if proof.checked and proof.left_behind:
        paragraphs.append("Left behind, since:")
        paragraphs.append("\n".join(f"- {code(each.name)}: {escaped(each.why)}" for each in proof.left_behind))
    return "\n\n".join(paragraphs) + "\n"


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
    margin = number(step.margin)
    if step.margin is not None and step.margin_standard_error is not None:
        margin += f" ± {number(step.margin_standard_error)}"
    removed = ", ".join(map(str, step.removed))
    if step.restored:
        removed += f" (back: {', '.join(map(str, step.restored))})"
    return _cells((step.number, removed, perplexity(step.calibration), perplexity(step.held_out), margin, _tied(step)))


def _tied(step: Step) -> str:
    if step.is_swap and step.tied:
        return f"{len(step.tied)} other swap{'s' if len(step.tied) > 1 else ''}"
    return ", ".join(map(str, step.tied))
