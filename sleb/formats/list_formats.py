"""A removal list in the formats of other tools. Knows records and strings; imports no torch, writes no file.

Other tools count differently and say so unclearly ("21 to 29", with or without 29?), so every format that can
carry a remark names the removed blocks, the kept blocks and the half-open ranges of kept blocks, all 0-based.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from sleb.errors import OptionError, excerpt, quoted
from sleb.records import Run, Step, finite, is_gguf

MODELS = ("hf", "gguf")
"""The formats that `sleb.export` writes: a model instead of a text."""


def render(run: Run, format: str, steps: int | None = None, *, model_name: str | None = None) -> str:
    """The run's removal list after `steps` steps, as text in one of `FORMATS`; ends with a newline.

    `model_name` stands in for the name the run was started with, where the other tool needs another one. Raises
    `OptionError` where the other tool could not read the model.
    """
    if format not in _RENDERERS:
        raise OptionError(f"No format is called {quoted(format)}; choose one of {', '.join((*FORMATS, *MODELS))}.")
    taken = run.steps_until(steps)
    _require_readable(run, format)
    name = public_name(run.spec.model) if format in _RUN else display_name(run.spec.model)
    return _RENDERERS[format](run, taken, model_name or name)


def remarks(run: Run, format: str) -> tuple[str, ...]:
    """Remarks for those who give this run's list to another tool: a sentence each."""
    assert run.stack is not None
    sentences: list[str] = []
    lists = run.stack.per_block_lists
    if format == "mergekit" and lists:
        sentences.append(
            f"The model's config has an entry for each block in {', '.join(lists)}, on which mergekit 0.1.5 "
            "fails: use `sleb export --format hf` instead, which shortens them and proves the result."
        )
    elif format == "mergekit" and lists is None:
        sentences.append(
            "mergekit 0.1.5 fails where the model's config has a list with an entry for each block, such as the "
            "layer_types of Qwen2 and Qwen3: use `sleb export --format hf` then, which shortens it and proves that."
        )
    if format == "mergekit" and run.spec.model == "demo":
        sentences.append(
            "The search was on a 4-bit file of this model, dequantised; the hub's weights are not quite the same."
        )
    revision = _revision(run)
    if format == "llama-quantize" and revision is not None:
        sentences.append(f"The list is for revision {excerpt(revision, 60)} of the model: convert that to MODEL.gguf.")
    if format == "sleb":
        name = public_name(run.spec.model).lower()
        path = "model.decoder.layers" if "opt" in name else "model.layers" if "llama" in name else None
        if path is None:
            sentences.append(
                "The reference knows OPT and LLaMA models by their names only, and removes nothing from any other, "
                "without saying so: this name has neither opt nor llama in it."
            )
        elif path != run.stack.path:
            sentences.append(
                f"The reference knows models by their names only: by this one it looks for the blocks in {path}, and "
                f"they are in {run.stack.path}. Give it the model under another name."
            )
    return tuple(sentences)


def _require_readable(run: Run, format: str) -> None:
    """Require a tool that can read the model of the run as it was searched. Raises `OptionError`."""
    if format not in ("mergekit", "sleb"):
        return
    assert run.stack is not None
    tool = {"mergekit": "mergekit", "sleb": "the reference"}[format]
    model = run.spec.model
    if is_gguf(model):
        raise OptionError(
            f"{display_name(model)} is a GGUF file, which {tool} cannot read. Use `format=gguf`, or "
            "`format=llama-quantize` for llama.cpp's own tool; `format=hf` writes a folder without the blocks."
        )
    if format == "mergekit" and run.stack.quantisation is not None and model != "demo":
        raise OptionError(
            f"{display_name(model)} is quantised ({excerpt(run.stack.quantisation, 80)}), and mergekit reads plain "
            "weights only. Search the checkpoint that it was made from, and give mergekit that."
        )
    if format == "sleb" and run.spec.revision is not None and is_hub_id(model):
        raise OptionError(
            f"The run searched revision {excerpt(run.spec.revision, 60)} of {model}, and the reference takes no "
            "revision: it would load the newest one. Download that revision into a folder, and search the folder."
        )


def _revision(run: Run) -> str | None:
    """The revision of a model on the hub that was loaded, or else was to be; None for other models."""
    revision = (run.stack.revision if run.stack else None) or run.spec.revision
    return revision if is_hub_id(run.spec.model) else None


def public_name(model: str) -> str:
    """The name other tools know a model by: the demo's own, every other as it was given."""
    return "HuggingFaceTB/SmolLM2-135M-Instruct" if model == "demo" else model


def display_name(model: str) -> str:
    """A name for the screen, and for what travels: the last part of a folder or file, a hub name as it is."""
    return without_folder(public_name(model))


def without_folder(name: str) -> str:
    """The last part of a folder or file: where it lies is private. Other names stay as they are."""
    local = name.startswith(("/", "~")) or ":\\" in name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if local else name


def is_hub_id(model: str) -> bool:
    """Whether this can be a model's name on the hub, as the hub's own library has it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model != "demo" and not is_gguf(model) and model.isascii()


def kept_ranges(num_blocks: int, removal_list: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges [start, end) of the blocks that stay, in the order of the stack."""
    removed = set(removal_list)
    ranges: list[tuple[int, int]] = []
    for block in range(num_blocks):
        if block in removed:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def in_words(num_blocks: int, removal_list: Sequence[int], *, in_order: bool = True) -> str:
    """One sentence that leaves no doubt whether the last number is included; `in_order`: that of removal."""
    ranges = kept_ranges(num_blocks, removal_list)
    removed = ", ".join(map(str, removal_list)) or "none"
    spans = [f"{start} to {end - 1}" if end - start > 1 else str(start) for start, end in ranges]
    half_open = _and([f"[{start}, {end})" for start, end in ranges])
    count = sum(end - start for start, end in ranges)
    return (
        f"Removed (0-based{', in this order' if in_order else ''}): {removed}; kept: {count} of {num_blocks} blocks, "
        f"{_and(spans) or 'none'}, both ends included" + (f", i.e. {half_open}." if half_open else ".")
    )


def yaml_string(text: str) -> str:
    """The text as a double-quoted YAML scalar, whatever is in it."""
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(plain) + '"'


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _json(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    assert run.stack is not None
    assert run.trace is not None
    last, baseline = steps[-1], run.trace.baseline
    removed = set(last.removal_list)
    content: dict[str, Any] = {
        "model": model_name,
        "revision": run.stack.revision or run.spec.revision,
        "weights_hash": run.stack.weights_hash,
        "num_blocks": run.stack.num_blocks,
        "removal_list": list(last.removal_list),
        "kept_blocks": [block for block in range(run.stack.num_blocks) if block not in removed],
        "kept_ranges": [list(pair) for pair in kept_ranges(run.stack.num_blocks, last.removal_list)],
        "in_words": in_words(run.stack.num_blocks, last.removal_list),
        "method": run.spec.method.value,
        "refine": run.spec.refine,
        "calibration": run.spec.calibration.model_dump(mode="json")
        | {"source": without_folder(run.spec.calibration.source), "text": run.stack.text},
        "perplexity": {
            "baseline": finite(baseline.perplexity),
            "baseline_held_out": finite(baseline.held_out.perplexity),
            "streamlined": finite(last.perplexity),
            "streamlined_held_out": finite(last.held_out.perplexity),
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _csv(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    first = run.require_trace().baseline
    assert run.stack is not None
    model = [model_name, run.stack.revision or run.spec.revision, run.stack.weights_hash]
    writer.writerow([0, "[]", "[]", first.perplexity, first.held_out.perplexity, None, None, "[]", *model])
    for step in steps:  # lists are JSON; what was not measured is an empty cell
        writer.writerow(
            [
                step.number,
                json.dumps(step.removed),
                json.dumps(step.removal_list),
                step.perplexity,
                step.held_out.perplexity,
                step.margin,
                step.margin_standard_error,
                json.dumps(step.tied),
                *model,
            ]
        )
    return text.getvalue()


CSV_COLUMNS = (
    "number",
    "removed",
    "removal_list",
    "perplexity",
    "held_out_perplexity",
    "margin",
    "margin_standard_error",
    "tied",
    "model",
    "revision",
    "weights_hash",
)


def _list(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    return json.dumps(steps[-1].removal_list) + "\n"


def _sleb(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    """A command that has the reference evaluate the list (eval.py)."""
    command = ["python", "-m", "eval", "--model_name", model_name]
    return shlex.join([*command, "--removal_list", json.dumps(steps[-1].removal_list)]) + "\n"


_DTYPES = ("bfloat16", "float16", "float32")
"""Types that mergekit knows."""


def _mergekit(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    """A passthrough merge: `layer_range` is half-open, and names the blocks that stay.

    The type is that of the checkpoint, not of the search; without one mergekit keeps each tensor's own.
    """
    assert run.stack is not None
    removal_list = steps[-1].removal_list
    revision, model = _revision(run), yaml_string(model_name)
    if revision is not None or re.search("[@+]", model_name):  # both mean something where a name stands alone
        pinned = "" if revision is None else f", revision: {yaml_string(revision)}"
        model = f"{{model: {{path: {model}{pinned}}}}}"
    lines = [
        f"# {in_words(run.stack.num_blocks, removal_list)}",
        "# layer_range is half-open: [0, 14] keeps blocks 0 to 13.",
        *(f"# {each}" for each in remarks(run, "mergekit")),
        "slices:",
    ]
    for start, end in kept_ranges(run.stack.num_blocks, removal_list):
        lines += ["  - sources:", f"      - model: {model}", f"        layer_range: [{start}, {end}]"]
    lines.append("merge_method: passthrough")
    if run.stack.checkpoint_dtype in _DTYPES and run.spec.model != "demo":  # its file is not the hub's
        lines.append(f"dtype: {run.stack.checkpoint_dtype}")
    return "\n".join(lines) + "\n"


def _llama_quantize(run: Run, steps: tuple[Step, ...], model_name: str) -> str:
    """A command for llama.cpp: options, then input, output and type; the type COPY keeps every tensor as it is.

    Block numbers are llama.cpp's own, 0-based like ours; they are sorted, since their order means nothing
    there.
    """
    blocks = ",".join(map(str, sorted(steps[-1].removal_list)))
    if is_gguf(model_name):
        source, target = model_name, model_name[: -len(".gguf")] + "-streamlined.gguf"
    else:
        source, target = "MODEL.gguf", "MODEL-streamlined.gguf"
    return shlex.join(["llama-quantize", "--prune-layers", blocks, source, target, "COPY"]) + "\n"


_RENDERERS: dict[str, Callable[[Run, tuple[Step, ...], str], str]] = {
    "json": _json,
    "csv": _csv,
    "list": _list,
    "sleb": _sleb,
    "mergekit": _mergekit,
    "llama-quantize": _llama_quantize,
}

_RUN = ("sleb", "mergekit", "llama-quantize")
"""Formats that are run where the model lies; the others travel, and name it without its folder."""

FORMATS = tuple(_RENDERERS)
"""Names of the formats that are text."""
