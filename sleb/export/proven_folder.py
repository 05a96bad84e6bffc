"""The proof of an export: what the model answers before, and a fresh process that reloads and compares."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from sleb.errors import ExportError, model_without
from sleb.export import proof_process
from sleb.export.contents.model_folder import Contents
from sleb.export.destination import saving
from sleb.export.removal import Removal
from sleb.formats.list_formats import display_name
from sleb.model.block_stack import BlockStack
from sleb.model.streaming import streamed_blocks
from sleb.records import Proof, Run

log = logging.getLogger(__name__)

MOST_SAID = 20
"""Things left behind that a log names one by one."""
PROOF_SEQUENCES = 2
PROOF_LENGTH = 32  # tokens; longer where the model's attention window is short enough to be gone past
LONGEST_PROOF = 1088  # tokens
PROMPT_LENGTH = 16
GENERATED = 16
GENERATED_STREAMED = 4  # each token reads the whole model

PROOF_TEXT = (
    "A river rises in the hills, runs through the town and reaches the sea after sixty miles. In 1847 the "
    "first bridge was built; before that, people crossed by boat, and paid two pennies each. The mill below "
    "the bridge ground wheat for the whole valley until the railway came, and its wheel can still be seen. "
    "Today the old path beside the water is used by walkers, who follow it from the market square to the "
    "lighthouse in three days. "
)


@dataclass(frozen=True)
class Origin:
    """The model that loses blocks: its name, wherever it lies, and the hash of its weights."""

    model: str = ""
    weights_hash: str = ""

    @classmethod
    def of(cls, run: Run) -> Origin:
        """The model of a run."""
        return cls(display_name(run.spec.model), run.stack.weights_hash if run.stack else "")


@dataclass(frozen=True)
class Expectation:
    """What the intact model answers with the blocks skipped: what the exported one must answer."""

    ids: torch.Tensor  # (sequences, length)
    logits: torch.Tensor  # (sequences, positions, vocabulary), float32, of the last positions
    prompt: torch.Tensor  # (tokens,)
    generated: tuple[int, ...]
    parameters: int
    cache_works: bool
    """Whether the intact model generates the same with and without the KV cache; not every model does."""
    generation: dict[str, Any] | None
    """Its defaults for generating."""
    text: dict[str, Any] | None
    """What its tokenizer makes of text and of conversations; None where there is none."""
    origin: Origin


def expect(model: nn.Module, tokenizer: Any, removal: Removal, origin: Origin | None = None) -> Expectation:
    """Ask the intact model, with the blocks skipped."""
    stack = BlockStack(model.eval())
    ids = _proof_ids(model, tokenizer)
    prompt = ids[0, :PROMPT_LENGTH]
    skipped = set(range(removal.num_blocks)) - set(removal.kept)
    length = GENERATED if stack.streamed is None else GENERATED_STREAMED
    cache_works = _cache_works(model, prompt.to(stack.device), length)
    try:
        with torch.inference_mode(), stack.skipping(skipped):
            rows = [proof_process.last_logits(model, row[None].to(stack.device), PROOF_LENGTH) for row in ids]
            generated = proof_process.greedy(model, prompt.to(stack.device), length)
    except proof_process.FAILURES as error:
        raise ExportError(
            f"The model cannot run without blocks {sorted(skipped)} ({type(error).__name__}: {error}): other "
            "blocks need them; choose another removal list."
        ) from error
    logits = torch.cat([row.cpu() for row in rows])
    if not bool(torch.isfinite(logits).all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ExportError(
            f"{model_without(sorted(skipped))} gives predictions that are not numbers in {dtype}, in which it would be "
            "written. Convert the checkpoint to bfloat16 or float32 first, or choose another removal list."
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Expectation(
        ids,
        logits,
        prompt,
        generated,
        parameters,
        cache_works,
        proof_process.generation_of(model),
        None if tokenizer is None else proof_process.text_of(tokenizer, PROOF_TEXT),
        origin or Origin(),
    )


@torch.inference_mode()
def _cache_works(model: Any, prompt: torch.Tensor, length: int) -> bool:
    try:
        with_cache = proof_process.generate_with_cache(model, prompt, length)
    except proof_process.FAILURES:
        return False
    without = proof_process.greedy(model, prompt, length)
    logits = proof_process.last_logits(model, prompt[None], PROMPT_LENGTH)
    tolerance = proof_process.tolerance_of(str(model.dtype).removeprefix("torch."), logits)
    return proof_process.disagreement(model, prompt, without, with_cache, tolerance) is None


def write_expectation(
    folder: Path,
    removal: Removal,
    expectation: Expectation,
    parameters_after: int,
    dtype: str,
    gguf_file: str | None = None,
    contents: Contents | None = None,
) -> None:
    """What the proof of the model in `folder` compares with; `gguf_file` is its name there where it is a GGUF file.

    `contents` is what the folder was given beside the weights.
    """
    facts = {
        "path": removal.path,
        "blocks_before": removal.num_blocks,
        "kept_blocks": removal.kept,
        "parameters_before": expectation.parameters,
        "parameters_after": parameters_after,
        "dtype": dtype,
        "cache_works": expectation.cache_works,
        "gguf_file": gguf_file,
        "contents": None if contents is None else _facts(contents, expectation),
        "origin": asdict(expectation.origin),
    }
    tensors = {
        "ids": expectation.ids,
        "logits": expectation.logits,
        "prompt": expectation.prompt.clone(),
        "generated": torch.tensor(expectation.generated),
    }
    with saving():
        save_file(tensors, folder / proof_process.EXPECTED, metadata={"facts": json.dumps(facts)})


def _facts(contents: Contents, expectation: Expectation) -> dict[str, Any]:
    return {
        "files": contents.files,
        "tensors": contents.tensors,
        "config": json.loads(json.dumps(contents.config, default=str)),
        "generation": expectation.generation,
        "proof_text": PROOF_TEXT,
        "text": expectation.text,
        "left_behind": [each.model_dump() for each in contents.left_behind],
        "notes": contents.notes,
    }


def prove(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False, memory_budget: int | None = None
) -> Proof:
    """Reload the model in a fresh process, compare it with what `write_expectation` wrote, and remove that.

    What the folder does not have of its source is said in the log, which is the terminal's, too.
    """
    proof = run_proof(folder, device, trust_remote_code, memory_budget)
    for each in proof.left_behind[:MOST_SAID]:
        log.warning("Left behind: %s (%s).", each.name, each.why)
    if len(proof.left_behind) > MOST_SAID:
        more = len(proof.left_behind) - MOST_SAID
        log.warning("%d more are left behind; %s and the card name them.", more, proof_process.PROOF)
    for note in proof.notes:
        log.warning("%s", note)
    with saving():
        (folder / proof_process.EXPECTED).unlink()
    return proof


def run_proof(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False, memory_budget: int | None = None
) -> Proof:
    """Reload the model in a fresh process that knows plain transformers only; a failed proof raises."""
    # As a file and with -P: the process cannot find sleb through us, and sleb's modules hide nobody else's.
    command = [sys.executable, "-P", str(Path(proof_process.__file__)), str(folder), "--device", device]
    command += ["--parent", str(os.getpid())]
    command += ["--trust-remote-code"] if trust_remote_code else []
    command += ["--memory-budget", str(memory_budget)] if memory_budget is not None else []
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    try:
        proof = Proof.model_validate_json((folder / proof_process.PROOF).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ExportError(f"The exported model could not be reloaded and compared: {_why(done)}") from error
    if not proof.passed:
        raise ExportError(f"The exported model is not the one that was scored: {'; '.join(proof.reasons)}.")
    return proof


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended, in one line."""
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}, perhaps for want of memory."
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}."]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def _proof_ids(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    """Fixed token ids (sequences, length), of a text if the tokenizer knows it; longer than short windows."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    settings = config.to_dict()  # reading an attribute that differs from block to block would raise
    windows = [settings.get(name) for name in ("sliding_window", "attention_chunk_size")]
    longer = [window + PROOF_LENGTH for window in windows if isinstance(window, int)]
    length = max([PROOF_LENGTH, *(value for value in longer if value <= LONGEST_PROOF)])
    positions = settings.get("max_position_embeddings")
    if isinstance(positions, int):
        length = min(length, positions)
    wanted = PROOF_SEQUENCES * length
    if tokenizer is not None:
        ids = tokenizer(PROOF_TEXT, add_special_tokens=False)["input_ids"]
        if len(set(ids)) > PROMPT_LENGTH:  # not a toy that knows no words
            ids = (ids * (wanted // len(ids) + 1))[:wanted]
            return torch.tensor(ids).reshape(PROOF_SEQUENCES, length)
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    chosen = torch.randint(len(ordinary), (wanted,), generator=torch.Generator().manual_seed(0))
    return ordinary[chosen].reshape(PROOF_SEQUENCES, length)


def let_go(model: nn.Module) -> None:
    """Give the memory of the weights back, for the process that loads them again."""
    streamed = streamed_blocks(model)
    if streamed is not None:
        streamed.forget()
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
