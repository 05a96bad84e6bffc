"""Reloads exported models in a process of its own and compares them with what the baselines predicted.

Runs as `python -m sleb.export.proof_process FOLDER...` and imports nothing of sleb, so that what it proves is what
anybody gets from plain transformers. Each folder holds a model and, in `EXPECTED`, what the baseline answered with the
blocks skipped; the verdict is written beside the model as `PROOF`, with the fields of `records.Proof`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

EXPECTED = "proof-expected.safetensors"
PROOF = "proof.json"
ERROR = "proof-error.txt"
"""The file that says in one line why the model could not be reloaded and compared; written in place of `PROOF`."""

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""Exceptions of a model that cannot do what it is asked."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generating that need `do_sample`."""

TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
"""Share of the largest logit by which two logits may differ, per dtype of the weights.

The same kernels give a difference of exactly 0. Another device or number of threads adds in another order: in
float32 the sum of many roundings (1e-5 is about a hundred epsilons), in the short types, where one rounding
is a visible share of a logit (epsilon is 8e-3 and 1e-3), about four of them. A wrong kind of block gives 3e-2
and more.
"""


def prove(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False, memory_budget: int | None = None
) -> dict[str, Any]:
    """Reload the model in `folder`, compare, write `PROOF` and return it. Within a budget, blocks stay on disk."""
    started = time.monotonic()
    with safe_open(folder / EXPECTED, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with tempfile.TemporaryDirectory(prefix=".offload.", dir=folder) as scratch:
        model, loading = reloaded(folder, facts, device, trust_remote_code, memory_budget, scratch)
        counts, reasons = counted(model, loading, facts)
        contents = facts["contents"]
        checked: list[str] = []
        if contents is not None:
            checked = contents_checked(folder, facts, model, trust_remote_code, reasons)
        logits, faults = logits_compared(model, expected, facts["dtype"], device)
        generated, others = generation_compared(model, expected, facts["cache_works"], logits["tolerance"], device)
        reasons += [*faults, *others]
        proof = {
            **facts["origin"],
            "passed": not reasons,
            "reasons": reasons,
            "blocks_before": facts["blocks_before"],
            "kept_blocks": facts["kept_blocks"],
            "parameters_before": facts["parameters_before"],
            **counts,
            "bytes_after": sum(
                file.stat().st_size for file in folder.glob(facts.get("gguf_file") or "model*.safetensors")
            ),
            "dtype": facts["dtype"],
            **logits,
            **generated,
            "seconds": time.monotonic() - started,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "checked": checked,
            "files": sorted(contents["files"]) if contents else [],
            "left_behind": contents["left_behind"] if contents else [],
            "notes": contents["notes"] if contents else [],
        }
    (folder / PROOF).write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    return proof


def reloaded(
    folder: Path,
    facts: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    memory_budget: int | None,
    scratch: str,
) -> tuple[Any, dict[str, Any]]:
    """The model as plain transformers load it, and their report on its weights; `scratch` is a folder for blocks."""
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if memory_budget is not None:
        where = device if device == "cpu" else torch.device(device).index or 0
        most = {where: memory_budget // 2} | ({} if device == "cpu" else {"cpu": 0})
        options |= {"device_map": "auto", "max_memory": most, "offload_folder": scratch}
    if facts.get("gguf_file"):
        options |= {"gguf_file": facts["gguf_file"], "dtype": getattr(torch, facts["dtype"])}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    model = loaded[0].eval()
    return model if memory_budget is not None else model.to(device), loaded[1]


def counted(model: Any, loading: dict[str, Any], facts: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Blocks and parameters of the reloaded model, and why it has others, or other weights, than were written."""
    contents = facts["contents"]
    copied = contents is not None and contents["tensors"] is not None
    # A copied checkpoint may hold what transformers does not load: the baseline's did.
    faults = ("missing_keys", "mismatched_keys") if copied else ("missing_keys", "unexpected_keys", "mismatched_keys")
    reasons = [
        f"{len(loading[kind])} weights are {kind.removesuffix('_keys')} when it is reloaded, such as "
        f"{min(map(str, loading[kind]))}"
        for kind in faults
        if loading.get(kind)
    ]
    blocks, parameters = len(model.get_submodule(facts["path"])), sum(p.numel() for p in model.parameters())
    promised = model.config.get_text_config().num_hidden_layers
    if not blocks == promised == len(facts["kept_blocks"]):
        reasons.append(
            f"the reloaded model has {blocks} blocks, its config says {promised}, and "
            f"{len(facts['kept_blocks'])} were kept"
        )
    if parameters != facts["parameters_after"]:
        reasons.append(f"the reloaded model has {parameters} parameters, and {facts['parameters_after']} were written")
    return {"blocks_after": blocks, "parameters_after": parameters}, reasons


def logits_compared(
    model: Any, expected: dict[str, torch.Tensor], dtype: str, device: str
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the proof about logits, and why they are not those of the baseline with the blocks skipped."""
    ids = expected["ids"]  # (sequences, length)
    logits = expected["logits"]  # (sequences, positions, vocabulary)
    positions = logits.shape[1]
    with torch.inference_mode():
        ours = torch.cat([last_logits(model, row[None].to(device), positions).cpu() for row in ids])
    tolerance = tolerance_of(dtype, logits)
    difference = float((ours - logits).abs().max()) if ours.shape == logits.shape else float("nan")
    fields = {
        "tokens": ids.shape[0] * positions,
        "max_logit_difference": sys.float_info.max if math.isnan(difference) else difference,  # JSON has no NaN
        "tolerance": tolerance,
    }
    if difference <= tolerance:  # not where either is not a number
        return fields, []
    return fields, [
        f"its logits differ by up to {difference:.3g} from those of the baseline with the blocks "
        f"skipped; {tolerance:.3g} is allowed in {dtype}"
    ]


def generation_compared(
    model: Any, expected: dict[str, torch.Tensor], cache_works: bool, tolerance: float, device: str
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the proof about greedy generation, and why it is not that of the baseline with the blocks skipped."""
    prompt, skipping = expected["prompt"].to(device), tuple(expected["generated"].tolist())
    without_cache, reasons = greedy(model, prompt, len(skipping)), []
    try:
        with_cache = generate_with_cache(model, prompt, len(skipping))
    except FAILURES as error:
        with_cache = ()
        if cache_works:
            reasons.append(f"it cannot generate with the KV cache ({type(error).__name__}: {error})")
    others = [("by the baseline with the blocks skipped", skipping)]
    if cache_works and with_cache:  # with some models transformers' cache is off before any removal
        others.append(("with the KV cache", with_cache))
    for origin, other in others:
        reason = disagreement(model, prompt, without_cache, other, tolerance)
        if reason is not None:
            reasons.append(f"greedy generation without the KV cache and {origin} differ {reason}")
    return {
        "generated_tokens": len(skipping),
        "generated_with_cache": with_cache,
        "generated_without_cache": without_cache,
        "generated_by_skipping": skipping,
    }, reasons


def contents_checked(
    folder: Path, facts: dict[str, Any], model: Any, trust_remote_code: bool, reasons: list[str]
) -> list[str]:
    """Compare the folder besides predictions: returns what was compared, and adds what differs to `reasons`."""
    contents = facts["contents"]
    wrong = [
        *wrong_files(folder, contents["files"]),
        *(wrong_tensors(folder, contents["tensors"]) if contents["tensors"] is not None else ()),
        *wrong_config(folder, contents["config"], model),
        *stale_settings(folder, facts["blocks_before"], len(facts["kept_blocks"])),
    ]
    checked = ["counts and lists in config.json that are named after layers or blocks follow the blocks"]
    if contents["tensors"] is not None:
        checked.append(f"{len(contents['tensors'])} tensors have the names, types and shapes of the source's")
    if contents["files"]:
        checked.append(f"{len(contents['files'])} files of the source's folder have the bytes that were written")
    if contents["generation"] is not None:
        ours, given = generation_of(model) or {}, contents["generation"]
        differ = sorted(name for name in {*ours, *given} if ours.get(name) != given.get(name))
        wrong += [f"its defaults for generating differ ({', '.join(differ)})"] if differ else []
        checked.append("the defaults for generating are equal")
    if contents["text"] is not None:
        options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        text = text_of(AutoTokenizer.from_pretrained(str(folder), **options), contents["proof_text"])
        wrong += [f"its tokenizer has other {name}" for name in text if text[name] != contents["text"][name]]
        talks = contents["text"]["chat templates"]
        same = "the tokenizer gives the same tokens"
        checked.append(f"{same}, and every conversation the same text" if talks else same)
    reasons += wrong
    return checked


def text_of(tokenizer: Any, text: str) -> dict[str, Any]:
    """All that the text of a conversation and its tokens depend on, as JSON."""
    settings = {
        "tokens": list(tokenizer(text)["input_ids"]),
        "chat templates": getattr(tokenizer, "chat_template", None),
        "special tokens": dict(tokenizer.special_tokens_map),
    }
    return dict(json.loads(json.dumps(settings, default=str)))


def generation_of(model: Any) -> dict[str, Any] | None:
    """The defaults for generating, as JSON; those of sampling only where it samples."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    idle = () if config.do_sample is True else SAMPLING
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    return {
        name: each
        for name, each in settings.items()
        if name not in ("transformers_version", "_from_model_config", *idle)
    }


def wrong_files(folder: Path, files: dict[str, str]) -> list[str]:
    """Files that are missing or not as they were carried over."""
    wrong = []
    for name, digest in files.items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
            continue
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                wrong.append(f"{name} is not as it was written")
    return wrong


def wrong_tensors(folder: Path, expected: dict[str, list[Any]]) -> list[str]:
    """Tensors whose names, types or shapes are not those of the source without the removed blocks."""
    written: dict[str, list[Any]] = {}
    listed: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                written[name], listed[name] = [part.get_dtype(), list(part.get_shape())], path.name
    index = folder / "model.safetensors.index.json"
    if index.is_file() and json.loads(index.read_bytes())["weight_map"] != listed:
        return ["its index names other tensors than its files hold"]
    differ = sorted(name for name in {*written, *expected} if written.get(name) != expected.get(name))
    if not differ:
        return []
    return [f"{len(differ)} tensors are not those of the source without the blocks, such as {differ[0]}"]


def wrong_config(folder: Path, expected: dict[str, Any], model: Any) -> list[str]:
    """Settings that are not what the removal makes of them."""
    settings = json.loads(json.dumps(model.config.get_text_config().to_dict(), default=str))
    return [
        f"its config says {name} = {settings.get(name)!r:.200}, and {value!r:.200} was to be written"
        for name, value in expected.items()
        if settings.get(name) != value
    ]


COUNTS = re.compile(r"(n|num)_?(hidden_|decoder_)?(layers?|blocks?)")
OF_BLOCKS = re.compile("layer|block|idx|indices")
OF_OTHERS = re.compile(
    "vision|visual|image|video|audio|speech|encoder|talker|project|quant|^rope|draft|mtp|token|label"
)
TEXT_PART = re.compile("text|language|llm|thinker|decoder")


def stale_settings(folder: Path, before: int, after: int) -> list[str]:
    """Settings in config.json that still describe the baseline.

    These are counts of its blocks, lists with an entry for each of them, and numbers of blocks that do not exist.
    """
    config = json.loads((folder / "config.json").read_bytes())
    further = max(
        [0, *(each for name, each, _ in walked(config) if re.search("nextn|mtp", name) and type(each) is int)]
    )
    wrong = []
    for name, value, own in walked(config):
        if COUNTS.fullmatch(name):
            wrong += [f"its config still says {name} = {before}"] if own and value == before != after else []
        elif OF_BLOCKS.search(name) and not OF_OTHERS.search(name) and isinstance(value, list | dict):
            numbers = [int(each) for each in value if type(each) is int or (type(each) is str and each.isdecimal())]
            if isinstance(value, list) and len(value) == before != after and not len(numbers) == len(set(numbers)) > 0:
                wrong.append(f"{name} in its config still has an entry for each of {before} blocks")
            elif len(numbers) == len(value) and any(after + further < each <= before for each in numbers):
                wrong.append(f"{name} in its config names a block that does not exist")
    return wrong


def walked(settings: Any, own: bool = True) -> Iterator[tuple[str, Any, bool]]:
    """Every setting and its name, nested ones too, and whether it stands where the stack's size does."""
    for name, value in settings.items():
        yield name, value, own
        if isinstance(value, dict) and not OF_OTHERS.search(name):
            yield from walked(value, own and TEXT_PART.search(name) is not None)


def tolerance_of(dtype: str, logits: torch.Tensor) -> float:
    """Largest difference of two logits that passes."""
    return TOLERANCES.get(dtype, TOLERANCES["float32"]) * float(logits.abs().max())


def last_logits(model: Any, ids: torch.Tensor, positions: int) -> torch.Tensor:
    """Float32 logits (1, positions, vocabulary) of the last positions of ids (1, length), without a cache."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = positions
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        options["output_router_logits"] = False
    return model(input_ids=ids, **options).logits[:, -positions:].float()


@torch.inference_mode()
def greedy(model: Any, prompt: torch.Tensor, length: int) -> tuple[int, ...]:
    """The most likely continuation of prompt (tokens,), by one whole forward pass per token."""
    ids = prompt[None]
    for _ in range(length):
        ids = torch.cat([ids, last_logits(model, ids, 1)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tuple(ids[0, prompt.numel() :].tolist())


def generate_with_cache(model: Any, prompt: torch.Tensor, length: int) -> tuple[int, ...]:
    """The most likely continuation by the model's own `generate`, with its cache."""
    # The model's own defaults may sample, penalise or stop: put aside, since the cache is what is tried.
    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=length, use_cache=True, pad_token_id=0)
    try:
        ids = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None])
    finally:
        model.generation_config = before
    return tuple(ids[0, prompt.numel() :].tolist())


def disagreement(
    model: Any, prompt: torch.Tensor, ours: tuple[int, ...], other: tuple[int, ...], tolerance: float
) -> str | None:
    """Say where two continuations part, unless both tokens are equally likely within the tolerance."""
    if ours == other:
        return None
    if len(ours) != len(other):
        return f"in length, {len(ours)} and {len(other)} tokens"
    at = next(index for index, (a, b) in enumerate(zip(ours, other, strict=True)) if a != b)
    so_far = torch.cat([prompt, torch.tensor(ours[:at], dtype=prompt.dtype, device=prompt.device)])
    with torch.inference_mode():
        logits = last_logits(model, so_far[None], 1)[0, -1]
    gap = float((logits[ours[at]] - logits[other[at]]).abs())
    if gap <= 2 * tolerance:  # each of the two may be off by one tolerance
        return None
    return f"from token {at + 1} on, {ours[at]} and {other[at]}, whose logits are {gap:.3g} apart"


def die_with(parent: int) -> None:
    """End this process when its parent ends, which alone waits for the proof."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Prove every folder; returns 0 where all passed, 1 where one did not."""
    parser = argparse.ArgumentParser(prog="python -m sleb.export.proof_process", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--memory-budget", type=int, metavar="BYTES")
    parser.add_argument("--parent", type=int, metavar="PID", help="End when this process does.")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with(options.parent)
    passed = True
    for folder in options.folders:
        try:
            passed &= prove(folder, options.device, options.trust_remote_code, options.memory_budget)["passed"]
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            (folder / ERROR).write_text(f"{type(error).__name__}: {lines[0]}", encoding="utf-8")
            raise
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
