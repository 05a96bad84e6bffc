"""The cards of healed and of quantised models, by the builder of `model_card`. Knows records; never sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from sleb.formats.findings_tables import healing_notes
from sleb.formats.model_card import LOADING, PAPER, card, code, escaped, fenced, heading, perplexity, table
from sleb.records import Healing, HealSpec, Quantization, RemovalList, Run

REMOVED = f"Transformer blocks were removed whole ([SLEB]({PAPER}))"
_LOADING_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/the/streamlined/model")
model = PeftModel.from_pretrained(model, "path/to/this/folder")"""


@dataclass(frozen=True)
class Streamlined:
    """The facts about a streamlined model that every card states."""

    run: Run
    num_blocks: int
    removal_list: RemovalList
    licence: Mapping[str, str]
    """The fields of a card that say the base model's licence."""


def healed_card(model: Streamlined, measured: Sequence[Healing]) -> str:
    """The card of a model with healed weights, and what the healing gained on every text."""
    loading = [heading("How to load it"), fenced("python", LOADING)]
    return _healing_card(model, measured, loading, adapter=False)


def adapter_card(model: Streamlined, measured: Sequence[Healing], base: str, *, beside: bool) -> str:
    """The card of an adapter alone; `base` is the name of the folder that it belongs to.

    That folder lies `beside` the adapter's or else in it.
    """
    where = f"{code(base)}, which the same run exported" if beside else f"{code(base)} in this folder"
    loading = [
        heading("How to load it"),
        f"The adapter belongs to the streamlined model in {where}, and to no other: the base model itself has "
        "other blocks in these places. Distribute both together. `adapter_config.json` names it as "
        f"{code(f'./{base}')} (`base_model_name_or_path`), which is looked for in the folder that Python is "
        "started in: move it there, write into that field where it lies or what it is called on the "
        "hub, or load it by hand:",
        fenced("python", _LOADING_ADAPTER),
    ]
    return _healing_card(model, measured, loading, adapter=True)


def base_card(model: Streamlined) -> str:
    """The card of the streamlined model that an adapter belongs to."""
    return card(
        model.run,
        model.num_blocks,
        model.removal_list,
        f"{REMOVED}; nothing was trained. The adapter beside this folder heals it.",
        [heading("How to load it"), fenced("python", LOADING)],
        licence=model.licence,
    )


def quantized_card(model: Streamlined, measured: Sequence[Quantization], bits: int) -> str:
    """The card of a model with quantised weights of so many bits, and what that cost on every text."""
    first = measured[0]
    groups = " or ".join(map(str, first.group_sizes))
    scale = f"each group of {groups} weights" if groups else "each row"
    return card(
        model.run,
        model.num_blocks,
        model.removal_list,
        f"{REMOVED}, and the linear weights of the others rounded to the nearest of {2**bits} values ({bits} bits a "
        f"weight, a scale for {scale}, symmetric, {escaped(first.library)}). Embeddings, head and norms are as they "
        "were; nothing was trained.",
        [
            table(
                ("text", "perplexity without the blocks", "and quantised"),
                ((escaped(each.text.description), *map(perplexity, (each.before, each.measured))) for each in measured),
            ),
            heading("How to load it"),
            fenced("bash", f"pip install transformers compressed-tensors=={_version('compressed-tensors')}"),
            fenced("python", LOADING),
            "transformers unpacks the weights at the first forward pass and then takes the memory of unquantised ones; "
            "tools with kernels for packed weights may keep them packed.",
        ],
        licence=model.licence,
        relation="quantized",
        tags=["compressed-tensors"],
        title=f", in {first.scheme}",
        facts=[f"- **Weights:** {first.weight_bytes:,} bytes; {first.weight_bytes_before:,} before in {first.dtype}"],
    )


def _healing_card(model: Streamlined, measured: Sequence[Healing], loading: Sequence[str], *, adapter: bool) -> str:
    notes = healing_notes(measured)
    return card(
        model.run,
        model.num_blocks,
        model.removal_list,
        f"{REMOVED}; then {_healing(measured[0], adapter)}",
        [
            table(
                ("text", "perplexity of the base model", "without the blocks", "and healed"),
                (
                    (escaped(each.text.description), *map(perplexity, (each.baseline, each.before, each.after)))
                    for each in measured
                ),
            ),
            f"Measured in {measured[0].dtype}" + (", with the adapter merged." if adapter else "."),
            *(["\n".join(f"- {escaped(each)}" for each in notes)] if notes else []),
            *loading,
        ],
        licence=model.licence,
        relation="adapter" if adapter else "finetune",
        tags=["healed"],
        library="peft" if adapter else "transformers",
        title=", healed" + (": the adapter" if adapter else ""),
    )


def _healing(first: Healing, adapter: bool) -> str:
    """What was done to the weights, and on which text."""
    ask = first.ask
    refit = (
        "the last linear layer before each cut was refit by least squares, to give out what the removed blocks gave "
        "out in the base model"
    )
    trained = _training(ask) + ("" if adapter else ", and merged into the weights")
    done = {"lora": trained, "linear": refit, "both": f"{refit}; and {trained}"}[ask.how]
    text = f"{ask.sequences:,} sequences of {ask.sequence_length} tokens from {escaped(first.healing_text)}"
    return f"{done}. The text: {text}." + (" Nothing was trained." if ask.how == "linear" else "")


def _training(ask: HealSpec) -> str:
    return (
        f"low-rank adapters (LoRA, rank {ask.rank}, peft {_version('peft')}) were trained on every linear layer inside "
        f"the blocks for {ask.epochs} epoch{'s' if ask.epochs > 1 else ''}, learning rate {ask.learning_rate:g}, "
        f"{ask.batch_sequences} sequences an update, seed {ask.seed}"
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # it was there when the weights were made
        return "of an unknown version"
