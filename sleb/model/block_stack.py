"""The block stack of a model, run block by block. It and `stack_discovery` know how Hugging Face models are built."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sleb.model.stack_discovery import HIDDEN, call_model, device_of, find_stack, first, hidden_of, tuple_lengths
from sleb.model.streaming import StreamedBlocks, streamed_blocks

_LOGIT_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # of one chunk of logits in the model's own dtype


_ABSENT = object()


class _Enough(Exception):
    """Raised to end a forward pass after the last block; never leaves this file."""


@dataclass(frozen=True)
class Call:
    """The arguments that the model passed to one block; all but the hidden state are replayed for every stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: torch.Tensor, own: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for another hidden state; mutable ones are replaced by the stream's own copies."""
        args = tuple(own.get(id(value), value) for value in self.args)
        kwargs = {name: own.get(id(value), value) for name, value in self.kwargs.items()}
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, HIDDEN: hidden}


@dataclass
class Stream:
    """A hidden state on its way up the stack, shared by all skip sets that agree on the blocks seen so far."""

    hidden: torch.Tensor  # (batch, sequence, hidden)
    own: dict[int, Any] = field(default_factory=dict)
    """Shallow copies of mutable arguments, by the id of the captured original."""

    def fork(self) -> Stream:
        """The same state, going another way: what one writes into a shared container the other must not see."""
        return Stream(self.hidden, {key: copy.copy(value) for key, value in self.own.items()})


@dataclass(frozen=True)
class BlockInputs:
    """The input of one batch to the stack: the embedding output and the arguments of every block."""

    embeddings: torch.Tensor  # (batch, sequence, hidden)
    calls: tuple[Call, ...]

    def start(self) -> Stream:
        """A stream that has seen no block yet."""
        own: dict[int, Any] = {}
        for call in self.calls:
            for value in (*call.args, *call.kwargs.values()):
                if isinstance(value, MutableMapping | MutableSequence | MutableSet):
                    own.setdefault(id(value), copy.copy(value))
        return Stream(self.embeddings, own)


class BlockStack:
    """A causal language model seen as embedding, blocks, LM head. Leaves the model as it found it.

    Raises `ModelError` where no single stack of blocks can be found, where a block is used more than once or out of
    order, or where the model is not causal (an encoder), each with its reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.path, self.blocks = find_stack(model)
        self.streamed: StreamedBlocks | None = streamed_blocks(model)
        """The blocks as files, where their weights do not stay in memory."""
        self._tuple_lengths = tuple_lengths(model, self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The config of the text part."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, where token ids go in."""
        return device_of(self.model)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, sequence, vocabulary) of the model as it stands, skips included."""
        return call_model(self.model, ids).logits

    def parameters_of(self, block: int) -> int:
        """Number of parameters in one block."""
        return sum(parameter.numel() for parameter in self.blocks[block].parameters())

    @contextmanager
    def resident(self, block: int, then: int | None = None) -> Iterator[None]:
        """A context with the weights of a block in memory; where streamed, those of block `then` are read meanwhile."""
        with self.streamed.resident(block, then) if self.streamed is not None else contextlib.nullcontext():
            yield

    @contextmanager
    def skipping(self, skipped: set[int] | frozenset[int] | tuple[int, ...]) -> Iterator[None]:
        """A context in which the blocks of `skipped` return their input; the reference implementation of the sweep."""
        with self._replacing({block: self._passing_through(block) for block in skipped}):
            yield

    def capture(self, ids: torch.Tensor) -> BlockInputs:
        """The arguments of each block for a batch of token ids (batch, sequence); runs no block."""
        calls: dict[int, Call] = {}
        embeddings: list[torch.Tensor] = []

        def recorder(block: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = hidden_of(args, kwargs)
                if block == 0:
                    embeddings.append(hidden)
                calls[block] = Call(args, kwargs)
                if block == len(self) - 1:
                    raise _Enough
                return self._as_output(block, hidden)

            return forward

        with self._replacing({block: recorder(block) for block in range(len(self))}):
            self._run_to_the_last_block(ids)
        return BlockInputs(embeddings[0], tuple(calls[block] for block in range(len(self))))

    def advance(self, block: int, inputs: BlockInputs, stream: Stream) -> None:
        """Take a stream through one block: one block evaluation for every sequence of the batch."""
        args, kwargs = inputs.calls[block].with_hidden(stream.hidden, stream.own)
        output = self.blocks[block](*args, **kwargs)
        stream.hidden = first(output)

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states (batch, sequence, hidden) that come out of the last block.

        The model's own forward runs on `ids`, which only lend their shape (batch, sequence).
        """
        last = len(self) - 1
        replaced = {block: self._passing_through(block) for block in range(last)}
        replaced[last] = lambda *args, **kwargs: self._as_output(last, hidden)
        with self._replacing(replaced):
            return self.forward(ids)

    def logit_chunks(
        self, hidden: torch.Tensor, ids: torch.Tensor, chunk_bytes: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The final norm and LM head on hidden states (tokens, H) from anywhere in the stack: logits (chunk, V) each.

        Each token goes through as a sequence of its own, so that no chunk is longer than the model's positions.
        """
        limit = chunk_bytes or _LOGIT_BYTES.get(hidden.device.type, _LOGIT_BYTES["cuda"])
        chunk = max(1, limit // (self.config.vocab_size * hidden.element_size()))
        for start in range(0, len(hidden), chunk):
            piece = ids[start : start + chunk, None]
            yield self.logits(hidden[start : start + chunk, None], piece)[:, 0]

    def outputs(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Embedding output and every block's output for a batch, N+1 tensors (batch, sequence, hidden), from hooks.

        `output_hidden_states=True` would give the last one after the final norm.
        """
        outputs: list[torch.Tensor] = []

        def embedding(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs.append(hidden_of(args, kwargs))

        def output(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
            outputs.append(first(result))
            if len(outputs) == len(self) + 1:
                raise _Enough

        handles = [self.blocks[0].register_forward_pre_hook(embedding, with_kwargs=True)]
        handles += [block.register_forward_hook(output) for block in self.blocks]
        try:
            self._run_to_the_last_block(ids)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def last_output(self, ids: torch.Tensor, undone: torch.Tensor) -> torch.Tensor:
        """The last block's output, (batch, sequence, hidden), of a forward pass in which blocks are undone row by row.

        `undone` is bool (blocks, batch): there a block's output is put back to its input.
        """
        last: list[torch.Tensor] = []

        def put_back(block: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                rows = undone[block].to(first(output).device)[:, None, None]
                restored = torch.where(rows, hidden_of(args, kwargs), first(output))
                if block == len(self) - 1:
                    last.append(restored)
                    raise _Enough
                return restored if self._tuple_lengths[block] is None else type(output)((restored, *output[1:]))

            return hook

        handles = [
            block.register_forward_hook(put_back(index), with_kwargs=True) for index, block in enumerate(self.blocks)
        ]
        try:
            self._run_to_the_last_block(ids)
        finally:
            for handle in handles:
                handle.remove()
        return last[0]

    def _run_to_the_last_block(self, ids: torch.Tensor) -> None:
        """A forward pass without the LM head: the last block's replacement or hook ends it with `_Enough`.

        Asking for fewer logits (`logits_to_keep`) will not do: some models pass their blocks other arguments then.
        """
        with contextlib.suppress(_Enough):
            call_model(self.model, ids)

    def _as_output(self, block: int, hidden: torch.Tensor) -> Any:
        length = self._tuple_lengths[block]
        return hidden if length is None else (hidden, *([None] * (length - 1)))

    def _passing_through(self, block: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(block, hidden_of(args, kwargs))

        return forward

    @contextmanager
    def _replacing(self, forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
        # The previous attribute is put back rather than deleted: accelerate keeps its device hooks in the same slot.
        previous = {block: self.blocks[block].__dict__.get("forward", _ABSENT) for block in forwards}
        try:
            for block, forward in forwards.items():
                self.blocks[block].forward = forward
            yield
        finally:
            for block, before in previous.items():
                if before is _ABSENT:
                    self.blocks[block].__dict__.pop("forward", None)
                else:
                    self.blocks[block].forward = before
