"""Writing a smaller model: what it must answer, its files, a fresh process that reloads and compares, the move.

Nothing appears under the name that was asked for until the proof has passed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from sleb.errors import ExportError, model_without
from sleb.export import proof_process
from sleb.export.contents.carried_files import CARD
from sleb.export.contents.model_folder import Contents
from sleb.export.destination import Destination, saving
from sleb.export.removal import Removal
from sleb.formats.list_formats import display_name
from sleb.formats.model_card import with_proof
from sleb.model.block_stack import BlockStack
from sleb.model.streaming import streamed_blocks
from sleb.records import Proof, Run

log = logging.getLogger(__name__)

MOST_LOGGED = 20
"""How many things left behind a log names one by one."""
PROOF_SEQUENCES = 2
PROOF_LENGTH = 32  # tokens; longer where the model's attention window is short enough to be passed
LONGEST_PROOF = 1088  # tokens
PROMPT_LENGTH = 16
GENERATED = 16
GENERATED_STREAMED = 4  # each token reads all weights

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
    """What the model with all its blocks answers while some are skipped: what the exported one must answer."""

    ids: torch.Tensor  # (sequences, length)
    logits: torch.Tensor  # (sequences, positions, vocabulary), float32, of the last positions
    prompt: torch.Tensor  # (tokens,)
    generated: tuple[int, ...]
    parameters: int
    cache_works: bool
    """Whether the model generates the same with and without the KV cache before any removal; not every model does."""
    generation: dict[str, Any] | None
    """Its defaults for generating."""
    text: dict[str, Any] | None
    """What its tokenizer makes of text and of conversations; None where there is none."""
    origin: Origin


@dataclass(frozen=True)
class Written:
    """A smaller model that lies in a folder and is not proven yet."""

    parameters: int
    """How many numbers its files hold, as a reload counts them."""
    dtype: str
    contents: Contents | None = None
    """What the folder was given beside the weights; None for a GGUF file."""
    gguf_file: str | None = None
    """The name of the GGUF file in the folder, where it holds one."""
    finished: tuple[nn.Module, ...] = ()
    """Models that are no longer needed: their memory is freed before the reload."""
    card: str | None = None
    """The model card, to which the proof is added."""
    corrections: dict[str, Any] = field(default_factory=dict)
    """Fields of the proof that a reload cannot count, such as the parameters of packed weights."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of further libraries that a reload needs."""


@dataclass(frozen=True)
class Exporter:
    """A model with all its blocks, and how a smaller one is written that answers as it does with blocks skipped."""

    model: nn.Module
    tokenizer: Any
    removal: Removal
    name: str = "baseline"
    """What the model is, as progress and the card call it."""
    origin: Origin = field(default_factory=Origin)
    trust_remote_code: bool = False
    memory_budget: int | None = None
    progress: Callable[[str], None] = lambda message: None

    def export(self, destination: Destination, write: Callable[[Path], Written]) -> Proof:
        """Have `write` fill a folder, prove what it wrote, and move it to the destination.

        Where anything fails the destination is as it was. Raises `OptionError` where it is taken, `ExportError` where
        the model cannot run without the blocks or the proof fails, `StorageError` where the disk is full.
        """
        destination.require_free()
        expectation = self._expectation()
        with destination.writing() as folder:
            return self._fill(folder, expectation, write)

    def fill(self, folder: Path, write: Callable[[Path], Written]) -> Proof:
        """Have `write` fill an existing folder, and prove what it wrote there. Raises `ExportError`, `StorageError`."""
        return self._fill(folder, self._expectation(), write)

    def _expectation(self) -> Expectation:
        self.progress(f"Recording what the {self.name} answers with the blocks skipped")
        return expect(self.model, self.tokenizer, self.removal, self.origin)

    def _fill(self, folder: Path, expectation: Expectation, write: Callable[[Path], Written]) -> Proof:
        device = str(BlockStack(self.model).device)
        self.progress(f"Writing {len(self.removal.kept)} of {self.removal.num_blocks} blocks")
        written = write(folder)
        write_expectation(folder, self.removal, expectation, written)
        for model in written.finished:
            let_go(model)
        self.progress("Reloading it in a new process, to compare")
        proof = prove(folder, device, self.trust_remote_code, self.memory_budget)
        if written.corrections or written.versions:
            versions = proof.versions | written.versions
            proof = proof.model_copy(update={**written.corrections, "versions": versions})
            with saving():
                (folder / proof_process.PROOF).write_text(proof.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if written.card is not None:
            with saving():
                (folder / CARD).write_text(with_proof(written.card, proof, self.name), encoding="utf-8")
        return proof


def expect(model: nn.Module, tokenizer: Any, removal: Removal, origin: Origin | None = None) -> Expectation:
    """Record what the model, which still has all its blocks, answers with the removed ones skipped.

    Raises `ExportError` where it cannot run without them or predicts no numbers.
    """
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
            f"{model_without(sorted(skipped))} gives predictions that are not numbers in {dtype_of(model)}, in which "
            "it would be written. Convert the checkpoint to bfloat16 or float32 first, or choose another removal list."
        )
    return Expectation(
        ids,
        logits,
        prompt,
        generated,
        count_parameters(model),
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
    tolerance = proof_process.tolerance_of(dtype_of(model), logits)
    return proof_process.disagreement(model, prompt, without, with_cache, tolerance) is None


def write_expectation(folder: Path, removal: Removal, expectation: Expectation, written: Written) -> None:
    """Write what the proof of the model in `folder` compares with."""
    facts = {
        "path": removal.path,
        "blocks_before": removal.num_blocks,
        "kept_blocks": removal.kept,
        "parameters_before": expectation.parameters,
        "parameters_after": written.parameters,
        "dtype": written.dtype,
        "cache_works": expectation.cache_works,
        "gguf_file": written.gguf_file,
        "contents": None if written.contents is None else _facts(written.contents, expectation),
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

    The log, which is the terminal's, too, names what the folder does not have of its source.
    """
    proof = run_proof(folder, device, trust_remote_code, memory_budget)
    for each in proof.left_behind[:MOST_LOGGED]:
        log.warning("Left behind: %s (%s).", each.name, each.why)
    if len(proof.left_behind) > MOST_LOGGED:
        more = len(proof.left_behind) - MOST_LOGGED
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
        log.info("%s", done.stderr)
        reason = _why(done.returncode, folder)
        raise ExportError(f"The exported model could not be reloaded and compared: {reason}") from error
    if not proof.passed:
        raise ExportError(f"The exported model is not the one that was scored: {'; '.join(proof.reasons)}.")
    return proof


def _why(exit_code: int, folder: Path) -> str:
    """Why the proof of a folder ended without a verdict, in one line."""
    if exit_code < 0:
        return f"the process was killed by signal {-exit_code}, perhaps because memory ran out."
    try:
        return (folder / proof_process.ERROR).read_text(encoding="utf-8")
    except OSError:
        return f"the process ended with exit code {exit_code}."


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
        if len(set(ids)) > PROMPT_LENGTH:  # not a test's tokenizer without words
            ids = (ids * (wanted // len(ids) + 1))[:wanted]
            return torch.tensor(ids).reshape(PROOF_SEQUENCES, length)
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special])
    chosen = torch.randint(len(ordinary), (wanted,), generator=torch.Generator().manual_seed(0))
    return ordinary[chosen].reshape(PROOF_SEQUENCES, length)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the weights of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def dtype_of(model: Any) -> str:
    """The type of a model's weights, without the name of the library."""
    return str(model.dtype).removeprefix("torch.")


def let_go(model: nn.Module) -> None:
    """Free the memory of the weights, for the process that loads them again."""
    streamed = streamed_blocks(model)
    if streamed is not None:
        streamed.forget()
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
