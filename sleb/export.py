"""A streamlined model on disk, proven. Removes the blocks, writes what loads anywhere, has it reloaded to
compare.

Nothing appears under the name that was asked for until the proof has passed: everything is written into a
folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from . import proof as proof_process
from .blocks import BlockStack
from .card import model_card, with_proof
from .configs import check_removal_list
from .errors import ExportError, OptionError, StorageError
from .loading import forget_quantisation
from .records import Proof
from .streaming import streamed_blocks
from .surgery import Removal, carry_out, plan_removal, remove_blocks

__all__ = [
    "expect",
    "export_checkpoint",
    "let_go",
    "mend_generation_config",
    "model_card",
    "move",
    "remove_blocks",
    "run_proof",
    "workspace",
    "write_checkpoint",
    "write_expectation",
]

PROOF_SEQUENCES = 2
PROOF_LENGTH = 32  # tokens; longer where the model's attention window is short enough to be gone past
LONGEST_PROOF = 1088  # tokens
PROMPT_LENGTH = 16
GENERATED = 16
GENERATED_STREAMED = 4  # each token reads the whole model
SPARE_BYTES = 64 * 1024**2  # tokenizer, card and what the file system takes
PROOF_TEXT = (
    "A river rises in the hills, runs through the town and reaches the sea after sixty miles. In 1847 the "
    "first bridge was built; before that, people crossed by boat, and paid two pennies each. The mill below "
    "the bridge ground wheat for the whole valley until the railway came, and its wheel can still be seen. "
    "Today the old path beside the water is used by walkers, who follow it from the market square to the "
    "lighthouse in three days. "
)


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


def export_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    removal_list: Sequence[int],
    out: Path,
    card: str,
    allow_existing: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    *,
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
) -> Proof:
    """Write the model without these blocks to `out`, and prove that it reloads and answers as the original
    does.

    The model is used up: its blocks are removed in place and its weights are let go before they are loaded
    again. `allow_existing` lets an earlier export at `out` be replaced, and nothing else. Raises
    `ExportError` where the result cannot be expressed or its proof fails; then nothing is left at `out`.
    """
    stack = BlockStack(model)
    check_removal_list(removal_list, len(stack))
    out = Path(os.path.abspath(out))
    require_free(out, allow_existing)
    removal = plan_removal(model, removal_list)
    _require_space(model, stack, removal, out.parent)

    progress("Recording what the model answers with the blocks skipped")
    expectation = expect(model, tokenizer, removal)
    with workspace(out) as folder:
        progress(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks")
        write_checkpoint(model, tokenizer, removal, expectation, folder, card)
        device = str(stack.device)
        let_go(model)
        progress("Reloading it in a new process, to compare")
        proof = run_proof(folder, device, trust_remote_code, memory_budget)
        (folder / proof_process.EXPECTED).unlink()
        (folder / "README.md").write_text(with_proof(card, proof), encoding="utf-8")
        move(folder, out, allow_existing)
    return proof


def expect(model: nn.Module, tokenizer: Any, removal: Removal) -> Expectation:
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
        raise ExportError(
            f"Without blocks {sorted(skipped)} the model's predictions are not numbers; load it in another "
            "dtype (bfloat16 or float32), or choose another removal list."
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Expectation(ids, logits, prompt, generated, parameters, cache_works)


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


def write_checkpoint(
    model: Any, tokenizer: Any, removal: Removal, expectation: Expectation, folder: Path, card: str
) -> None:
    """Remove the blocks and write the model, with what its proof needs, into an existing folder."""
    carry_out(model, removal)
    forget_quantisation(model)
    try:
        mend_generation_config(model, folder)
        streamed = streamed_blocks(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, **({} if streamed is None else {"max_shard_size": streamed.budget // 3}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The model could not be written ({error}); free some disk space.") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_expectation(folder, removal, expectation, parameters, str(model.dtype).removeprefix("torch."))


def write_expectation(
    folder: Path,
    removal: Removal,
    expectation: Expectation,
    parameters_after: int,
    dtype: str,
    gguf_file: str | None = None,
) -> None:
    """What the proof of the model in `folder` compares with; `gguf_file` is its name there where it is a GGUF file."""
    facts = {
        "path": removal.path,
        "blocks_before": removal.num_blocks,
        "kept_blocks": removal.kept,
        "parameters_before": expectation.parameters,
        "parameters_after": parameters_after,
        "dtype": dtype,
        "cache_works": expectation.cache_works,
        "gguf_file": gguf_file,
    }
    tensors = {
        "ids": expectation.ids,
        "logits": expectation.logits,
        "prompt": expectation.prompt.clone(),
        "generated": torch.tensor(expectation.generated),
    }
    try:
        save_file(tensors, folder / proof_process.EXPECTED, metadata={"facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The model could not be written ({error}); free some disk space.") from error


def run_proof(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False, memory_budget: int | None = None
) -> Proof:
    """Reload the model in a fresh process that knows plain transformers only; a failed proof raises."""
    # As a file and with -P: the process cannot find sleb through us, and sleb's modules hide nobody else's.
    command = [sys.executable, "-P", str(Path(proof_process.__file__)), str(folder), "--device", device]
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


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def mend_generation_config(model: Any, folder: Path) -> None:
    """Some published defaults set a temperature without sampling; saving refuses what generating ignores."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError:
        if config.do_sample is not True:
            for name in _SAMPLING:
                setattr(config, name, None)


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


def require_free(out: Path, allow_existing: bool) -> None:
    """Nothing that somebody else put at `out` is ever lost: it is free, or an earlier export that may go."""
    if out.is_symlink():
        raise OptionError(f"{out} is a link; name the folder itself.")
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"{out} is a file; name a folder that does not exist yet.")
    if not any(out.iterdir()):
        return
    if not allow_existing:
        raise OptionError(
            f"The folder {out} is not empty; name another one, or replace an earlier export with --replace."
        )
    if not (out / proof_process.PROOF).is_file():
        raise OptionError(f"The folder {out} holds something other than an earlier export; name another one.")


def _require_space(model: nn.Module, stack: BlockStack, removal: Removal, where: Path) -> None:
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    removed = sum(
        parameter.numel() * parameter.element_size()
        for block in range(removal.num_blocks)
        if block not in removal.kept
        for parameter in stack.blocks[block].parameters()
    )
    needed = whole - removed + SPARE_BYTES
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"The model takes {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left; "
            "free some, or name another folder."
        )


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on its file system; gone afterwards, whatever happens, unless it was moved."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise StorageError(f"{out.parent} cannot be written ({error}); name another folder.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, out: Path, allow_existing: bool) -> None:
    """Give a finished folder the name that was asked for."""
    require_free(out, allow_existing)  # again: the proof took its time
    mask = os.umask(0)
    os.umask(mask)
    try:
        folder.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone, and so are some libraries' files
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    except OSError as error:
        raise StorageError(f"The exported model could not be moved to {out} ({error.strerror}).") from error
