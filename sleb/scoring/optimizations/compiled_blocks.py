"""Blocks and loss as `torch.compile` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sleb.model.block_stack import BlockStack
from sleb.scoring.scorer import Scorer
from sleb.scoring.token_loss import Loss, cross_entropy


class CompiledBlocks:
    """Blocks and loss as `torch.compile` makes them: the code of one block serves all of its class.

    For sequences of one length in batches of any size; others run as before. Raises `RuntimeError` where blocks have a
    `forward` of their own, which compiled code would pass by.
    """

    name = "compiled blocks"

    def __init__(self, stack: BlockStack, length: int) -> None:
        if any("forward" in vars(block) for block in stack.blocks):
            raise RuntimeError("blocks have hooks in the place of their forward")
        compiled = {kind: torch.compile(kind.forward) for kind in {type(block) for block in stack.blocks}}
        self.forwards = [(block, _at_length(length, block, compiled[type(block)])) for block in stack.blocks]
        self.loss = _compiled_loss()

    @contextmanager
    def on(self, scorer: Scorer) -> Iterator[None]:
        """A context in which the blocks have a compiled `forward`, and the scorer a compiled loss."""
        import torch._inductor.config as inductor

        # Without processes of its own: a worker that is stopped must not leave any behind.
        with inductor.patch(compile_threads=1), scorer.losses_by(self.loss), ExitStack() as restored:
            for block, forward in self.forwards:
                block.forward = forward
                restored.callback(vars(block).pop, "forward", None)
            yield


def _at_length(length: int, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    eager = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or hidden.shape[1] != length:
            return eager(*args, **kwargs)
        torch._dynamo.maybe_mark_dynamic(hidden, 0)  # no new code for the last batch
        return compiled(block, *args, **kwargs)

    return forward


def _compiled_loss() -> Loss:
    compiled = torch.compile(cross_entropy)

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for each in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return compiled(logits, targets)

    return loss
