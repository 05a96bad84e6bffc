"""Linear layers whose weights are arranged once for oneDNN: bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import psutil
import torch
from torch import nn

from sleb.model.block_stack import BlockStack

_PACKED_SHARE = 0.25  # of the free memory, for packed copies of weights

# oneDNN arranges a weight anew for each product. Packed once, it need not: what torch's compiler does with frozen
# weights. The operator looks the packed copy up by where the weight lies, so that compiled code can serve all blocks.
_PACKED: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # address of a weight -> weight (kept alive), packed

_library = torch.library.Library("sleb", "FRAGMENT")
_library.define("packed_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of a weight (out, in), arranged for products with about so many rows; only `product` understands it.

    Raises `RuntimeError` or `AttributeError` where this torch or processor cannot.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def product(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` with a packed weight."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, packed, bias, "none", [], "")
    return found


def _packed_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product(input, _PACKED[weight.data_ptr()][1], bias)


_library.impl("packed_linear", _packed_linear, "CPU")


@torch.library.register_fake("sleb::packed_linear")
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.sleb.packed_linear(input, self.weight, self.bias)
    return found


class PackedWeights:
    """Linear layers of the blocks and of the read-out with their weights arranged once for oneDNN: bfloat16 on a CPU.

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
    def on(self) -> Iterator[None]:
        """The layers' `forward` is another within it."""
        _PACKED.update(self.packed)
        try:
            for layer, forward in self.layers:
                layer.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for layer, _ in self.layers:
                vars(layer).pop("forward", None)
            for address in self.packed:
                _PACKED.pop(address, None)


def _is_plain(weight: torch.Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.device.type == "cpu"
    return plain and weight.dtype == torch.bfloat16
