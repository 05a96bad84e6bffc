"""Low-rank adapters (LoRA, by peft) inside the blocks of a model, and their training. Knows token ids, and no run.

The model's own weights are never written to: the adapters are parameters of their own, and merging puts new weights in
the place of old ones. Adapters, moments and gradients are float32 whatever the model's type is.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sleb.errors import NotNumbers, OptionError, ScoringError
from sleb.model.block_stack import BlockStack
from sleb.model.out_of_memory import is_out_of_memory
from sleb.runtime.files import replace_file
from sleb.scoring.scorer import default_batch_size
from sleb.scoring.token_loss import cross_entropy

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
_WARM_UP = 0.05  # share of all updates
_LARGEST_GRADIENT = 1.0  # norm over all adapters
_ALPHA = 2  # times the rank: what an adapter adds is scaled by alpha / rank
_LOSSES = 200  # the most losses that are kept
_LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of one chunk of float32 logits; its gradients come on top
_FIRST, _SECOND = "exp_avg", "exp_avg_sq"  # AdamW's moments


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of LoRA training."""

    rank: int
    learning_rate: float
    epochs: int
    batch_sequences: int
    """Sequences per update."""
    seed: int


@dataclass
class Progress:
    """How far a training has come, so that it can be resumed."""

    updates: int = 0
    losses: list[float] = field(default_factory=list)
    """Loss of each update, nats per token."""
    seconds: float = 0.0


def require() -> None:
    """Require peft. Raises `OptionError` where it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise OptionError("Healing with `how=lora` needs peft: pip install 'sleb[heal]'.")


def adapt(model: nn.Module, rank: int, seed: int) -> Any:
    """A peft model around `model`, with an adapter that does nothing yet at every linear layer inside the blocks.

    Raises `OptionError` for a model that peft cannot adapt.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    stack = BlockStack(model)
    linear = [each for block in stack.blocks for each in block.named_modules() if is_linear(each[1])]
    layers = sorted({name for name, _ in linear})
    if not layers:
        raise OptionError(f"{type(model).__name__} has no linear layers inside its blocks for LoRA to adapt.")
    most = max(min(module.weight.shape) for _, module in linear)
    if rank > most:
        raise OptionError(f"`rank={rank}` is more than the model's layers have ({most} at most); choose a smaller one.")
    inside = "|".join(map(re.escape, layers))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=_ALPHA * rank,
        target_modules=rf"{re.escape(stack.path)}\.\d+\.({inside})",
    )
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).eval()
        except (ValueError, NotImplementedError) as error:
            reason = re.sub(r"^\[.*?\] ", "", " ".join(str(error).split())).split(". ")[0]
            raise OptionError(f"peft cannot adapt {type(model).__name__} ({reason[:300]}).") from error


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or the transposed one of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def weights(adapted: Any) -> dict[str, torch.Tensor]:
    """The adapters, float32, by name."""
    return {name: each.detach().cpu() for name, each in _trainable(adapted).items()}


@torch.no_grad()
def put(adapted: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give the adapters these weights. Raises `KeyError`, `RuntimeError` where they belong to something else."""
    for name, parameter in _trainable(adapted).items():
        parameter.copy_(tensors[name])


def train(
    adapted: Any,
    ids: np.ndarray,
    settings: Settings,
    checkpoint: Path,
    tell: Callable[[int, int, str], None] = lambda done, updates, message: None,
    *,
    in_pieces: bool = True,
) -> Progress:
    """Train the adapters on `ids`, (sequences, length) int64; goes on from `checkpoint` where there is one.

    One update every `batch_sequences`, by AdamW: the mean over predicted tokens of the cross-entropy, gradients clipped
    to norm 1, a learning rate that rises over the first updates and falls to nothing. Nothing is dropped out. `tell`
    is called with the updates done and their total. Without `in_pieces` the logits of a whole sequence exist at once.

    Raises `NotNumbers` where the model predicts no numbers before anything is trained, `ScoringError` when the loss or
    its gradients are not numbers, or a single sequence does not fit into memory.
    """
    stack = BlockStack(adapted.get_base_model())
    parameters = _trainable(adapted)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    progress = _resume(checkpoint, parameters, optimizer)
    batches = _batches(len(ids), settings)
    piece = min(settings.batch_sequences, default_batch_size(stack.device, ids.shape[1]))
    if progress.updates:
        log.info("Training goes on after %d of %d updates.", progress.updates, len(batches))
    written = started = time.perf_counter()
    before = progress.seconds
    for number in range(progress.updates, len(batches)):
        rows = torch.from_numpy(ids[batches[number]]).to(stack.device)
        loss, piece = _gradients(stack, parameters, rows, piece, in_pieces)
        if not np.isfinite(loss) and not number:  # an adapter does nothing yet
            raise NotNumbers("The model without its removed blocks", _dtype(stack))
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), _LARGEST_GRADIENT)
        if not (np.isfinite(loss) and norm.isfinite()):
            raise diverged(f"the loss is not a number at update {number + 1} of {len(batches)}", _dtype(stack))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(number, len(batches))
        optimizer.step()
        progress.updates = number + 1
        progress.losses.append(loss)
        now = time.perf_counter()
        progress.seconds = before + now - started
        tell(number + 1, len(batches), f"update {number + 1} of {len(batches)}, {loss:.4f} nats per token")
        if now - written >= CHECKPOINT_SECONDS and progress.updates < len(batches):
            _write(checkpoint, parameters, optimizer, progress)
            written = now
    return progress


def diverged(symptom: str, dtype: str) -> ScoringError:
    """The error of a training whose numbers are not finite: the symptom, and what to do."""
    wider = {"float16": "`dtype=bfloat16` or `dtype=float32`", "bfloat16": "`dtype=float32`"}.get(dtype)
    return ScoringError(
        f"The training diverged in {dtype}: {symptom}. Nothing was kept. Lower `learning_rate`"
        + (f", or use {wider}." if wider else ".")
    )


def _dtype(stack: BlockStack) -> str:
    return str(stack.model.dtype).removeprefix("torch.")


def course(losses: Sequence[float]) -> tuple[float, ...]:
    """The losses, or where there are many of them, means over neighbouring ones."""
    if len(losses) <= _LOSSES:
        return tuple(losses)
    return tuple(float(part.mean()) for part in np.array_split(np.asarray(losses), _LOSSES))


def merge(adapted: Any) -> Any:
    """The model with its adapters added into weights of its own; a model that shared the old ones keeps them.

    The adapted model is used up.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = {each.get_base_layer() for each in adapted.modules() if isinstance(each, BaseTunerLayer)}
    for module in inner:  # linear layers, and experts whose weights peft adapts as such
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    with _quiet():
        return adapted.merge_and_unload().eval()


def _trainable(adapted: Any) -> dict[str, nn.Parameter]:
    return {name: each for name, each in adapted.named_parameters() if each.requires_grad}


def _batches(count: int, settings: Settings) -> list[np.ndarray]:
    """Which sequences each update sees: all of them in each epoch, in an order of its own."""
    orders = [np.random.default_rng((settings.seed, epoch)).permutation(count) for epoch in range(settings.epochs)]
    size = settings.batch_sequences
    return [order[start : start + size] for order in orders for start in range(0, count, size)]


def _rate(number: int, updates: int) -> float:
    """Share of the learning rate at an update, from 0."""
    rising = max(1, round(_WARM_UP * updates))
    return min((number + 1) / rising, (updates - number) / max(1, updates - rising + 1))


def _gradients(
    stack: BlockStack, parameters: dict[str, nn.Parameter], rows: torch.Tensor, piece: int, in_pieces: bool
) -> tuple[float, int]:
    """Compute gradients of the mean over the tokens of `rows`, (sequences, length), which go up `piece` at a time.

    Returns that mean, nats, and how many sequences at a time fitted.
    """
    tokens = len(rows) * (rows.shape[1] - 1)
    while True:
        for parameter in parameters.values():
            parameter.grad = None
        try:
            total = sum(_backward(stack, part, in_pieces) for part in rows.split(piece))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if piece == 1:
                raise ScoringError(
                    "Out of memory while training on one sequence; lower `sequence_length` or `rank`."
                ) from error
            piece //= 2
            log.warning("Out of memory: going on with %d sequences at a time.", piece)
            continue
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad /= tokens
        return float(total) / tokens, piece


def _backward(stack: BlockStack, ids: torch.Tensor, in_pieces: bool) -> torch.Tensor:
    """Add the gradients of the sum over tokens; returns that sum, float64.

    The sum rather than the mean: its gradients are neither too small nor too large for float16. Behind the last block
    nothing is trained, so that logits exist for a few tokens at a time: their gradients are asked of the hidden state.
    """
    batch, length = ids.shape
    hidden = stack.outputs(ids)[-1]
    limit = _LOGIT_BYTES["cuda" if ids.device.type == "cuda" else "cpu"]
    size = max(1, limit // (4 * batch * stack.config.vocab_size)) if in_pieces else length
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)  # nothing follows the last token
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradients: list[torch.Tensor] = []
    for start in range(0, length, size):
        part = slice(start, start + size)
        leaf = hidden[:, part].detach().requires_grad_()
        logits = stack.logits(leaf, ids[:, part])
        loss = cross_entropy(logits.flatten(0, 1), targets[:, part].flatten().to(logits.device)).sum()
        gradients += torch.autograd.grad(loss, leaf)
        total += loss.detach().double().to(total.device)
    hidden.backward(torch.cat(gradients, dim=1))
    return total


def _write(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    tensors = {f"weight.{name}": each.detach() for name, each in parameters.items()}
    for moment in (_FIRST, _SECOND):  # of a layer that no token went through there are none
        moved = {name: optimizer.state[each] for name, each in parameters.items() if each in optimizer.state}
        tensors |= {f"{moment}.{name}": state[moment] for name, state in moved.items()}
    tensors = {name: each.cpu().contiguous() for name, each in tensors.items()}
    facts = {"updates": progress.updates, "losses": progress.losses, "seconds": progress.seconds}
    replace_file(path, save(tensors, {"progress": json.dumps(facts)}))


@torch.no_grad()
def _resume(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put back what a checkpoint holds; where it cannot be read, the training begins again."""
    if not path.is_file():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {
            name: [
                stored[f"{kind}.{name}"].to(each.device)
                for kind in ("weight", _FIRST, _SECOND)
                if kind == "weight" or f"{kind}.{name}" in stored
            ]
            for name, each in parameters.items()
        }
        if any(each.shape != parameters[name].shape for name, own in state.items() for each in own):
            raise ValueError("it is of other adapters")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read, and training begins again: %s", path, error)
        return Progress()
    for name, (weight, *moments) in state.items():
        parameters[name].copy_(weight)
        if moments:
            step = torch.tensor(float(progress.updates))
            optimizer.state[parameters[name]] = {"step": step, _FIRST: moments[0], _SECOND: moments[1]}
    return progress


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence peft's warnings of what it handles by itself (transposed layers of GPT-2, tied embeddings)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
