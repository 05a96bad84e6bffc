"""Least-squares refits of a model at its cuts, without training. Knows models and token ids; knows no run.

A cut is a maximal run of removed blocks. The last linear layer of the block before it is refit, so that the hidden
state comes out of that block as it comes out of the removed blocks in the baseline. That is a least-squares problem
with one answer, and the answer is a weight of the shape that was there: nothing is added to the model, and every
architecture that adds a linear layer's output to its hidden state can carry it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sleb.errors import NotNumbers, OptionError, model_without
from sleb.evaluation.healing.lora import is_linear
from sleb.model.block_stack import BlockInputs, BlockStack, Stream
from sleb.scoring.scorer import default_batch_size

log = logging.getLogger(__name__)

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""How strongly a weight is held to what it was, as shares of the mean square of the layer's inputs."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Refit:
    """A linear layer whose weight was refit by least squares."""

    name: str
    """The name of its weight in the smaller model."""
    weight: torch.Tensor
    ridge: float
    error_before: float
    """On held-out text: the squared difference from the baseline's hidden state, relative to that state."""
    error_after: float


@dataclass(frozen=True)
class _Layer:
    """A linear layer whose output, times `scale`, is added to what its block gives out."""

    module: Any
    name: str
    scale: float

    @property
    def is_transposed(self) -> bool:
        """GPT-2's have their weight the other way round: (inputs, outputs)."""
        return not isinstance(self.module, nn.Linear)


def cuts(removal_list: Sequence[int], num_blocks: int) -> list[tuple[int, int]]:
    """Each cut as (the block before it, the first block behind it or `num_blocks`), in the order of the stack.

    A cut at the very beginning has no block before it and is left out.
    """
    kept = [-1, *(block for block in range(num_blocks) if block not in set(removal_list)), num_blocks]
    return [(before, behind) for before, behind in itertools.pairwise(kept) if before >= 0 and behind - before > 1]


@torch.no_grad()
def refit(
    original: BlockStack,
    smaller: BlockStack,
    removal_list: Sequence[int],
    ids: np.ndarray,
    held_out: int,
    tell: Callable[[float, str], None] = lambda fraction, message: None,
) -> list[Refit]:
    """Refit one layer before each cut of `smaller`, which shares its weights with `original` and gets new ones there.

    `ids` is (sequences, length) int64, of which the last `held_out` choose the ridge. Cut follows cut: each is fitted
    to what comes out of the refit model before it. Tokens weigh by one over the square of their hidden state, because
    that is how the norm behind them sees a difference, and because the first token of many models has one that is a
    hundred times longer than all others.

    Raises `OptionError` where no cut can be refit, `NotNumbers` where the baseline or the smaller model gives none.
    """
    behind_of = dict(cuts(removal_list, len(original)))
    if not behind_of:
        raise OptionError("The only cut is before the first block, and no block in front of it could be refit.")
    batches, is_held_out = _batches(original, ids, held_out)
    goals = _goals(original, batches, list(behind_of.values()), tell)
    kept = [block for block in range(len(original)) if block not in set(removal_list)]
    inputs = [smaller.capture(batch) for batch in batches]
    streams = [each.start() for each in inputs]
    refits: list[Refit] = []
    for position, block in enumerate(kept):
        if block in behind_of:
            fitted = _fit(smaller, position, inputs, streams, goals.pop(behind_of[block]), is_held_out)
            if fitted is not None:
                refits.append(fitted)
        if not goals:
            break  # what is behind the last cut stays as it is
        for each, stream in zip(inputs, streams, strict=True):
            smaller.advance(position, each, stream)
        tell(0.4 + 0.6 * (position + 1) / len(kept), f"block {block}")
    if not refits:
        raise OptionError(
            f"{type(original.model).__name__} adds no linear layer's output to its hidden state before a cut; "
            "use `how=lora`."
        )
    return refits


def _batches(stack: BlockStack, ids: np.ndarray, held_out: int) -> tuple[list[torch.Tensor], list[bool]]:
    """The sequences in batches that the device takes, and whether each batch is held out."""
    fitting = len(ids) - held_out
    size = default_batch_size(stack.device, ids.shape[1])
    parts = [
        (torch.from_numpy(ids[start : min(start + size, last)]).to(stack.device), first == fitting)
        for first, last in ((0, fitting), (fitting, len(ids)))
        for start in range(first, last, size)
    ]
    return [batch for batch, _ in parts], [is_held_out for _, is_held_out in parts]


def _goals(
    original: BlockStack,
    batches: Sequence[torch.Tensor],
    blocks: Sequence[int],
    tell: Callable[[float, str], None],
) -> dict[int, list[torch.Tensor]]:
    """The baseline's hidden state of every batch in front of each of these blocks. Raises `NotNumbers`."""
    goals: dict[int, list[torch.Tensor]] = {behind: [] for behind in blocks}
    for done, batch in enumerate(batches):
        outputs = original.outputs(batch)
        for behind, hidden in goals.items():
            hidden.append(outputs[behind])
            _require_numbers(hidden[-1], model_without(()))
        tell(0.4 * (done + 1) / len(batches), "what the cuts took away")
    return goals


def put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give layers, by name in `model`, new weights of their own; a model that shared the old ones keeps them."""
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(weight.to(old.device, old.dtype), requires_grad=False))


def _fit(
    stack: BlockStack,
    position: int,
    inputs: Sequence[BlockInputs],
    streams: Sequence[Stream],
    goals: Sequence[torch.Tensor],
    is_held_out: Sequence[bool],
) -> Refit | None:
    """The last linear layer of a block, fitted so that the block gives out `goals`; None where it has none."""
    layer = _last_layer(stack, position, inputs[0], streams[0])
    if layer is None:
        log.warning("Block at position %d has no last linear layer; the cut behind it is left as it is.", position)
        return None
    weight = layer.module.weight.detach()
    old = (weight if layer.is_transposed else weight.T).double()  # (inputs, outputs)
    normal = {held: _Normal.empty(old) for held in (False, True)}
    for each, stream, goal, held in zip(inputs, streams, goals, is_held_out, strict=True):
        entering, leaving, output = _run(stack, position, layer.module, each, stream.fork())
        _require_numbers(output, "The model without its removed blocks")
        rest = output.float() - layer.scale * leaving.float().view_as(output)
        bias = 0.0 if layer.module.bias is None else layer.module.bias.float()
        wanted = (goal.to(rest.device).float() - rest) / layer.scale - bias
        normal[held].add(entering.flatten(0, -2).float(), wanted.flatten(0, -2), goal.flatten(0, -2).float())
    best, ridge = normal[False].solve(old, normal[True])
    put(stack.model, {layer.name: best if layer.is_transposed else best.T})
    before, after = (normal[True].error(each) * layer.scale**2 for each in (old, best))
    log.info("%s refit (ridge %g): error %.4f, was %.4f", layer.name, ridge, after, before)
    return Refit(layer.name, layer.module.weight.detach(), ridge, before, after)


def _require_numbers(hidden: torch.Tensor, whose: str) -> None:
    if not hidden.isfinite().all():
        raise NotNumbers(whose, str(hidden.dtype).removeprefix("torch."), "hidden states")


@dataclass
class _Normal:
    """The normal equations of a weighted least-squares problem with many right-hand sides, float64."""

    gram: torch.Tensor  # (inputs, inputs)
    cross: torch.Tensor  # (inputs, outputs)
    square: float
    tokens: int

    @staticmethod
    def empty(weight: torch.Tensor) -> _Normal:
        """The equations before any token, for a weight of this shape: (inputs, outputs)."""
        return _Normal(weight.new_zeros(len(weight), len(weight)), torch.zeros_like(weight), 0.0, 0)

    def add(self, entering: torch.Tensor, wanted: torch.Tensor, goal: torch.Tensor) -> None:
        """Add tokens: (tokens, inputs), (tokens, outputs), and the hidden state by which they weigh."""
        weight = 1.0 / goal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        entering, wanted = entering * weight, wanted * weight
        self.gram += (entering.T @ entering).double()
        self.cross += (entering.T @ wanted).double()
        self.square += float(wanted.double().square().sum())
        self.tokens += len(entering)

    def error(self, weight: torch.Tensor) -> float:
        """Weighted mean squared difference over tokens that a weight leaves."""
        fitted = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum()
        return (self.square + float(fitted)) / self.tokens

    def solve(self, old: torch.Tensor, judge: _Normal) -> tuple[torch.Tensor, float]:
        """The weight, held to the old one by the ridge that does best on other tokens; and that ridge."""
        unit = self.gram.diagonal().mean()
        tried = []
        for ridge in RIDGES:
            left = self.gram.clone()
            left.diagonal().add_(ridge * unit)
            weight = torch.linalg.solve(left, self.cross + ridge * unit * old)
            tried.append((judge.error(weight), ridge, weight))
        error, ridge, weight = min(tried, key=lambda each: each[0])
        return (weight, ridge) if error < judge.error(old) else (old, float("inf"))


def _run(
    stack: BlockStack, position: int, module: Any, inputs: BlockInputs, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer's inputs, its outputs, and the block's outputs."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    try:
        stack.advance(position, inputs, stream)
    finally:
        handle.remove()
    return seen[0][0], seen[0][1], stream.hidden


def _last_layer(stack: BlockStack, position: int, inputs: BlockInputs, stream: Stream) -> _Layer | None:
    """The linear layer, if any, whose output reaches the block's output as it is, or times a constant.

    That is tried: a norm behind the layer, or another layer that reads it, would change it.
    """
    block = stack.blocks[position]
    called: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda each, _args, _output, name=name: called.append((name, each)))
        for name, module in block.named_modules()
        if is_linear(module)
    ]
    plain = stream.fork()
    try:
        stack.advance(position, inputs, plain)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in called]
    for name, module in reversed(called):
        if names.count(name) != 1:
            continue
        scale = _scale(stack, position, module, inputs, stream, plain.hidden)
        if scale is not None:
            return _Layer(module, f"{stack.path}.{position}.{name}.weight", scale)
    return None


def _scale(
    stack: BlockStack, position: int, module: Any, inputs: BlockInputs, stream: Stream, plain: torch.Tensor
) -> float | None:
    """How far the block's output moves when the layer's moves by one; None where the two are not proportional."""
    pushes: list[torch.Tensor] = []

    def push(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[-1] != plain.shape[-1] or output.numel() != plain.numel():
            return None  # OPT's come without the dimension of the batch
        draw = torch.Generator().manual_seed(0)
        length = plain.float().norm(dim=-1, keepdim=True) / plain.shape[-1] ** 0.5  # of one number, per token
        noise = torch.randn(output.shape, generator=draw).to(output.device) * length.view(*output.shape[:-1], 1)
        pushed = output + noise.to(output.dtype)
        pushes.append(pushed.float() - output.float())  # as it was rounded
        return pushed

    handle = module.register_forward_hook(push)
    moved = stream.fork()
    try:
        stack.advance(position, inputs, moved)
    finally:
        handle.remove()
    if not pushes:
        return None
    difference, push_by = moved.hidden.float() - plain.float(), pushes[0].view_as(plain)
    scale = float((difference * push_by).sum() / push_by.square().sum())
    scale = 1.0 if abs(scale - 1.0) < 1e-2 else scale  # what it is nearly always, but for rounding
    left = float((difference - scale * push_by).norm() / push_by.norm())
    return scale if abs(scale) > 1e-3 and left < _TOLERANCE.get(plain.dtype, 1e-4) * max(1.0, abs(scale)) else None
