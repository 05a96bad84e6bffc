"""Reloads exported models in a process of its own and compares them with what their originals predicted.

Runs as `python -m sleb.export.proof_process FOLDER...` and imports nothing of sleb, so that what it proves is what
anybody gets from plain transformers. Each folder holds a model and, in `EXPECTED`, what the intact original answered
with the blocks skipped; the verdict is written beside the model as `PROOF`, with the fields of
`records.Proof`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

EXPECTED = "proof-expected.safetensors"
PROOF = "proof.json"

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model raises that cannot do what it is asked."""

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
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    scratch = tempfile.TemporaryDirectory(prefix=".offload.", dir=folder)
    if memory_budget is not None:
        where = device if device == "cpu" else torch.device(device).index or 0
        most = {where: memory_budget // 2} | ({} if device == "cpu" else {"cpu": 0})
        options |= {"device_map": "auto", "max_memory": most, "offload_folder": scratch.name}
    gguf = facts.get("gguf_file")
    if gguf:
        options |= {"gguf_file": gguf, "dtype": getattr(torch, facts["dtype"])}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    model, loading = loaded[0].eval(), loaded[1]
    if memory_budget is None:
        model.to(device)

    reasons = [
        f"{len(loading[kind])} weights are {kind.removesuffix('_keys')} when it is reloaded, such as "
        f"{min(map(str, loading[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
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

    ids = expected["ids"]  # (sequences, length)
    logits = expected["logits"]  # (sequences, positions, vocabulary)
    positions = logits.shape[1]
    with torch.inference_mode():
        found = torch.cat([last_logits(model, row[None].to(device), positions).cpu() for row in ids])
    dtype = facts["dtype"]
    tolerance = tolerance_of(dtype, logits)
    difference = float((found - logits).abs().max()) if found.shape == logits.shape else float("nan")
    if not difference <= tolerance:  # also where either is not a number
        reasons.append(
            f"its logits differ by up to {difference:.3g} from those of the original with the blocks "
            f"skipped; {tolerance:.3g} is allowed in {dtype}"
        )

    prompt, skipping = expected["prompt"].to(device), tuple(expected["generated"].tolist())
    without_cache = greedy(model, prompt, len(skipping))
    try:
        with_cache = generate_with_cache(model, prompt, len(skipping))
    except FAILURES as error:
        with_cache = ()
        if facts["cache_works"]:
            reasons.append(f"it cannot generate with the KV cache ({type(error).__name__}: {error})")
    others = [("by the original with the blocks skipped", skipping)]
    if facts["cache_works"] and with_cache:  # with some models transformers' cache is off before any removal
        others.append(("with the KV cache", with_cache))
    for what, other in others:
        reason = disagreement(model, prompt, without_cache, other, tolerance)
        if reason is not None:
            reasons.append(f"greedy generation without the KV cache and {what} differ {reason}")

    proof = {
        "passed": not reasons,
        "reasons": reasons,
        "blocks_before": facts["blocks_before"],
        "blocks_after": blocks,
        "kept_blocks": facts["kept_blocks"],
        "parameters_before": facts["parameters_before"],
        "parameters_after": parameters,
        "bytes_after": sum(file.stat().st_size for file in folder.glob(gguf or "model*.safetensors")),
        "dtype": dtype,
        "tokens": ids.shape[0] * positions,
        "max_logit_difference": sys.float_info.max if math.isnan(difference) else difference,  # JSON has no NaN
        "tolerance": tolerance,
        "generated_tokens": len(skipping),
        "generated_with_cache": with_cache,
        "generated_without_cache": without_cache,
        "generated_by_skipping": skipping,
        "seconds": time.monotonic() - started,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    scratch.cleanup()
    (folder / PROOF).write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    return proof


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
    """The same by `generate`, the way everybody does it."""
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
    """Where two continuations part, unless both tokens are equally likely within the tolerance."""
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
    """End when the process does that started this one: what is being proved is then nobody's any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Prove every folder; 0 where all passed, 1 where one did not."""
    parser = argparse.ArgumentParser(prog="python -m sleb.export.proof_process", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--memory-budget", type=int, metavar="BYTES")
    parser.add_argument("--parent", type=int, metavar="PID", help="End when this process does.")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with(options.parent)
    proofs = [
        prove(folder, options.device, options.trust_remote_code, options.memory_budget) for folder in options.folders
    ]
    return 0 if all(proof["passed"] for proof in proofs) else 1


if __name__ == "__main__":
    sys.exit(main())
