"""Linear layers whose weights are arranged once for oneDNN: bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType

import psutil
import torch
from torch import nn

from sleb.model.block_stack import BlockStack
from sleb.scoring.scorer import Scorer

_PACKED_SHARE = 0.25  # share of the free memory for packed copies of weights


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of a weight (out, in), arranged for products with about so many rows; only `product` understands it.

    Raises `RuntimeError` or `AttributeError` where this torch or processor cannot.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def product(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` with a packed weight."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, packed, bias, "none", [], "")
    return output


class _PackedLinear:
    """A linear layer as an operator of torch that looks the packed copy up by where the weight lies.

    oneDNN arranges a weight again for each product. Packed once, it need not: what torch's compiler does with frozen
    weights. An operator, because compiled code calls it without looking inside, and so can serve all blocks.
    """

    def __init__(self) -> None:
        self.packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Weights, which keeps them alive, and their packed copies, by the address of the weight."""
        self._library = torch.library.Library("sleb", "FRAGMENT")  # registered as long as this lives
        self._library.define("packed_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
        self._library.impl("packed_linear", self._multiply, "CPU")
        torch.library.register_fake("sleb::packed_linear", _shape_of_product, lib=self._library)

    def _multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(input, self.packed[weight.data_ptr()][1], bias)


@cache
def _operator() -> _PackedLinear:
    """The one operator of this process: torch knows an operator by its name."""
    return _PackedLinear()


def _shape_of_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.ops.sleb.packed_linear(input, self.weight, self.bias)
    return output


class PackedWeights:
    """Linear layers of the blocks and the LM head with their weights arranged once for oneDNN: bfloat16 on a CPU.

    The copies take as much memory as the weights; as many are made as fit into a quarter of what is free. Raises
    `RuntimeError` or `AttributeError` where this torch cannot.
    """

    name = "packed weights"

    def __init__(self, stack: BlockStack, tokens: int) -> None:
        head = stack.model.get_output_embeddings()
        modules = [module for block in stack.blocks for module in block.modules()] + [head]
        free = psutil.virtual_memory().available * _PACKED_SHARE
        self.layers: list[tuple[nn.Linear, MethodType]] = []
        self.packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in modules:
            if type(module) is not nn.Linear or "forward" in vars(module) or not _is_plain(module.weight):
                continue
            weight = module.weight.detach()
            free -= weight.nbytes
            if free < 0:
                break
            self.packed[weight.data_ptr()] = (weight, pack(weight, tokens))
            self.layers.append((module, MethodType(_linear_forward, module)))

    @contextmanager
    def on(self, scorer: Scorer) -> Iterator[None]:
        """A context in which the layers have a `forward` that uses the packed weights."""
        packed = _operator().packed
        packed.update(self.packed)
        try:
            for layer, forward in self.layers:
                layer.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for layer, _ in self.layers:
                vars(layer).pop("forward", None)
            for address in self.packed:
                packed.pop(address, None)


def _is_plain(weight: torch.Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.device.type == "cpu"
    return plain and weight.dtype == torch.bfloat16
