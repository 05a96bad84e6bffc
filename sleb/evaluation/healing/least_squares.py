"""Mending a model at its cuts without training. Knows models and token ids; knows no run.

A cut is a maximal run of removed blocks. The last linear layer of the block before it is fitted anew, so that the
hidden state comes out of that block as it came out of the run in the unmodified model. That is a least-squares problem
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

from sleb.errors import NotNumbers, OptionError
from sleb.evaluation.healing.lora import is_linear
from sleb.model.block_stack import BlockInputs, BlockStack, Stream
from sleb.scoring.scorer import default_batch_size

log = logging.getLogger(__name__)

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""How strongly a weight is held to what it was, as shares of the mean square of what goes in."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Mended:
    """One layer, fitted anew."""

    name: str
    """Of its weight in the smaller model."""
    weight: torch.Tensor
    ridge: float
    error_before: float
    """On held-out text: the squared difference from the unmodified model's hidden state, relative to that state."""
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

    Before a cut at the very beginning there is no block: it is left out.
    """
    kept = [-1, *(block for block in range(num_blocks) if block not in set(removal_list)), num_blocks]
    found = itertools.pairwise(kept)
    return [(before, behind) for before, behind in found if before >= 0 and behind - before > 1]


@torch.no_grad()
def mend(
    original: BlockStack,
    smaller: BlockStack,
    removal_list: Sequence[int],
    ids: np.ndarray,
    held_out: int,
    tell: Callable[[float, str], None] = lambda fraction, message: None,
) -> list[Mended]:
    """Fit one layer before each cut of `smaller`, which shares its weights with `original` and is given its own there.

    `ids` is (sequences, length) int64, of which the last `held_out` choose the ridge. Cut follows cut: each is fitted
    to what comes out of the mended model before it. Tokens weigh by one over the square of their hidden state, because
    that is how the norm behind them sees a difference, and because the first token of many models has one that is a
    hundred times longer than all others.

    Raises `OptionError` where no cut can be mended, `NotNumbers` where there is nothing to fit to.
    """
    count, length = ids.shape
    where = cuts(removal_list, len(original))
    if not where:
        raise OptionError("The only cut is before the first block; there is nothing in front of it to mend.")
    kept = [block for block in range(len(original)) if block not in set(removal_list)]
    size = default_batch_size(original.device, length)
    fitting = count - held_out
    parts = [
        torch.from_numpy(ids[start:stop])
        for first, last in ((0, fitting), (fitting, count))
        for start, stop in ((at, min(at + size, last)) for at in range(first, last, size))
    ]
    batches = [part.to(original.device) for part in parts]
    is_held_out = [start >= fitting for start in np.cumsum([0, *(len(part) for part in parts)])[:-1]]
    goals: dict[int, list[torch.Tensor]] = {behind: [] for _, behind in where}
    for done, batch in enumerate(batches):
        outputs = original.outputs(batch)
        for behind, found in goals.items():
            found.append(outputs[behind])
            _require_numbers(found[-1], "The unmodified model")
        tell(0.4 * (done + 1) / len(batches), "what the cuts took away")
    inputs = [smaller.capture(batch) for batch in batches]
    streams = [each.start() for each in inputs]
    mended: list[Mended] = []
    behind_of = dict(where)
    for position, block in enumerate(kept):
        if block in behind_of:
            goal = goals.pop(behind_of[block])
            fitted = _fit(smaller, position, inputs, streams, goal, is_held_out)
            if fitted is not None:
                mended.append(fitted)
        if not goals:
            break  # what is behind the last cut stays as it is
        for each, stream in zip(inputs, streams, strict=True):
            smaller.advance(position, each, stream)
        tell(0.4 + 0.6 * (position + 1) / len(kept), f"block {block}")
    if not mended:
        raise OptionError(
            f"{type(original.model).__name__} adds no linear layer's output to its hidden state before a cut; "
            "use --how lora."
        )
    return mended


def put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give layers new weights of their own; whoever shared the old ones keeps them. By name in `model`."""
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
) -> Mended | None:
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
    log.info("%s fitted anew (ridge %g): error %.4f, was %.4f", layer.name, ridge, after, before)
    return Mended(layer.name, layer.module.weight.detach(), ridge, before, after)


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
        """Of no tokens yet, for a weight of this shape: (inputs, outputs)."""
        return _Normal(weight.new_zeros(len(weight), len(weight)), torch.zeros_like(weight), 0.0, 0)

    def add(self, entering: torch.Tensor, wanted: torch.Tensor, goal: torch.Tensor) -> None:
        """More tokens: (tokens, inputs), (tokens, outputs), and the hidden state by which they weigh."""
        weight = 1.0 / goal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        entering, wanted = entering * weight, wanted * weight
        self.gram += (entering.T @ entering).double()
        self.cross += (entering.T @ wanted).double()
        self.square += float(wanted.double().square().sum())
        self.tokens += len(entering)

    def error(self, weight: torch.Tensor) -> float:
        """Mean squared difference over tokens."""
        fitted = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum()
        return (self.square + float(fitted)) / self.tokens

    def solve(self, old: torch.Tensor, judge: _Normal) -> tuple[torch.Tensor, float]:
        """The weight, held to the old one by the ridge that does best on other tokens; and that ridge."""
        unit = self.gram.diagonal().mean()
        found = []
        for ridge in RIDGES:
            left = self.gram.clone()
            left.diagonal().add_(ridge * unit)
            weight = torch.linalg.solve(left, self.cross + ridge * unit * old)
            found.append((judge.error(weight), ridge, weight))
        error, ridge, weight = min(found, key=lambda each: each[0])
        return (weight, ridge) if error < judge.error(old) else (old, float("inf"))


def _run(
    stack: BlockStack, position: int, module: Any, inputs: BlockInputs, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What goes into the layer, what comes out of it, and what comes out of the block."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    try:
        stack.advance(position, inputs, stream)
    finally:
        handle.remove()
    return seen[0][0], seen[0][1], stream.hidden


def _last_layer(stack: BlockStack, position: int, inputs: BlockInputs, stream: Stream) -> _Layer | None:
    """Found out by trying: what is added to the layer's output comes out of the block, times a constant.

    A norm behind it, or another layer that reads it, would change that.
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
    """By what the block's output moves when the layer's does; None where it does not just follow."""
    moved: list[torch.Tensor] = []

    def push(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[-1] != plain.shape[-1] or output.numel() != plain.numel():
            return None  # OPT's come without the dimension of the batch
        draw = torch.Generator().manual_seed(0)
        length = plain.float().norm(dim=-1, keepdim=True) / plain.shape[-1] ** 0.5  # of one number, per token
        noise = torch.randn(output.shape, generator=draw).to(output.device) * length.view(*output.shape[:-1], 1)
        pushed = output + noise.to(output.dtype)
        moved.append(pushed.float() - output.float())  # as it was rounded
        return pushed

    handle = module.register_forward_hook(push)
    twin = stream.fork()
    try:
        stack.advance(position, inputs, twin)
    finally:
        handle.remove()
    if not moved:
        return None
    difference, push_by = twin.hidden.float() - plain.float(), moved[0].view_as(plain)
    scale = float((difference * push_by).sum() / push_by.square().sum())
    scale = 1.0 if abs(scale - 1.0) < 1e-2 else scale  # what it is nearly always, but for rounding
    left = float((difference - scale * push_by).norm() / push_by.norm())
    return scale if abs(scale) > 1e-3 and left < _TOLERANCE.get(plain.dtype, 1e-4) * max(1.0, abs(scale)) else None
