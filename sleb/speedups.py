"""Faster ways through the same blocks: attention in pieces, packed weights, compiled code. Knows the block stack and
the scorer; knows nothing of searches and runs.

What is faster depends on the machine, so each way is tried on one batch first, against the model as it stands. Those
that gain and give the same nats stay until the end of the `with` block; then the model is as it was.
"""

from __future__ import annotations

import inspect
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from torch import nn

from .blocks import BlockStack
from .memory import is_out_of_memory
from .meter import duration
from .scoring import Scorer, cross_entropy, losses_by

log = logging.getLogger(__name__)

Compile = Literal["auto", "yes", "no"]

WORTH_TRYING = 150.0  # walks up the stack that must lie ahead: trying takes six for each way
LEAST_GAIN = 1.03  # what a way must gain to be used
COMPILE_SECONDS = 30.0  # on two cores, with nothing in the compiler's cache: 13 to 32 measured
COMPILE_GAIN = 1.1  # assumed before it is known
_ROUNDS = 2  # of timing, all blocks in each
_PACKED_SHARE = 0.25  # of the free memory, for packed copies of weights
# What transformers, torch's compiler, the C++ compiler it calls and missing operators raise.
_FAILURES = (
    RuntimeError,
    OSError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AssertionError,
)


class Way(Protocol):
    """Something that can be switched on and off again."""

    name: str

    def on(self) -> AbstractContextManager[None]:
        """The blocks run this way within it."""


@contextmanager
def sped_up(
    stack: BlockStack,
    ids: np.ndarray,
    batch_size: int,
    ahead: float,
    *,
    compile: Compile = "auto",
    known: Collection[str] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Within it the blocks run in the ways that `choose` found; yields their names. Arguments as there.

    With `known` names nothing is tried: a run that is resumed, and every rank, computes as the first one did.
    """
    with ExitStack() as switched:
        if known is None:
            ways = choose(stack, ids, batch_size, ahead, compile=compile)
        else:
            ways = _named(stack, ids, batch_size, known)
        for way in ways:
            switched.enter_context(way.on())
        yield tuple(way.name for way in ways)


def choose(
    stack: BlockStack, ids: np.ndarray, batch_size: int, ahead: float, *, compile: Compile = "auto"
) -> list[Way]:
    """The ways that are faster on this machine for batches like these, to be switched on in this order.

    `ids` is (sequences, length): the first batch is what they are tried on. `ahead` is the work to come in block
    evaluations (`Cost.units`); where it is little, nothing is tried. `compile` "auto" compiles where that is forecast
    to pay for itself; what the compiler needs, some seconds, is spent here. Nothing that fails here stops the caller:
    what does not work is left out, with a line in the log.
    """
    chosen: list[Way] = []
    if stack.streamed is not None:  # each walk would read the whole model
        return []
    with _surviving("Trying faster ways"), ExitStack() as switched:
        trial = _Trial(stack, ids, batch_size)
        if ahead / trial.units < WORTH_TRYING and compile != "yes":
            return []
        for way in _ways(stack, trial, ahead, compile):
            if trial.gains(way):
                switched.enter_context(way.on())
                chosen.append(way)
    return chosen


def _named(stack: BlockStack, ids: np.ndarray, batch_size: int, names: Collection[str]) -> list[Way]:
    found: list[Way] = []
    if names:
        with _surviving("Going on with faster ways"):
            trial = _Trial(stack, ids, batch_size)
            compile: Compile = "yes" if CompiledBlocks.name in names else "no"
            with ExitStack() as switched:
                for way in _ways(stack, trial, 0.0, compile):
                    if way.name in names and trial.runs(way):
                        switched.enter_context(way.on())
                        found.append(way)
    missing = sorted({*names} - {way.name for way in found})
    if missing:
        log.warning("Not available here: %s. Scores round a little differently from here on.", ", ".join(missing))
    return found


def _ways(stack: BlockStack, trial: _Trial, ahead: float, compile: Compile) -> Iterator[Way]:
    """In this order: what is compiled is the blocks with the ways that were chosen before."""
    cpu, dtype = stack.device.type == "cpu", stack.model.dtype
    if cpu and dtype in (torch.bfloat16, torch.float16):  # in float32 torch's kernel is as fast
        yield PiecewiseAttention()
    if cpu and dtype == torch.bfloat16:
        with _surviving("Packing weights"):
            yield PackedWeights(stack, trial.ids.numel())
    if compile == "no":
        return
    seconds = ahead / trial.units * trial.seconds()
    if compile == "yes" or compiling_pays(seconds):
        with _surviving("Compiling"):
            yield CompiledBlocks(stack, trial.ids.shape[1])
    else:
        log.info("Not compiling: about %s of work ahead would not pay for it.", duration(seconds))


def compiling_pays(seconds: float) -> bool:
    """Whether compiling is forecast to save more than it takes, with so many seconds of work ahead."""
    return seconds * (1 - 1 / COMPILE_GAIN) > COMPILE_SECONDS


class _Trial:
    """One batch up the stack and read out, again and again: how long, and which nats."""

    def __init__(self, stack: BlockStack, ids: np.ndarray, batch_size: int) -> None:
        self.stack = stack
        self.scorer = Scorer(stack, ids[:batch_size], batch_size=batch_size)
        self.tolerance = 1e-5 if stack.model.dtype == torch.float32 else 0.02  # nats per token, as in the self-check
        self.sequences = np.arange(len(ids[:batch_size]))
        self.nats()  # the first pass allocates, and finds a batch that fits into memory

    @property
    def ids(self) -> torch.Tensor:
        """The batch."""
        return self.scorer.ids[: self.scorer.batch_size].to(self.stack.device)

    @property
    def units(self) -> float:
        """What one walk takes, in block evaluations."""
        return self.scorer.cost([()], len(self.sequences)).units(self.scorer.head_weight)

    def nats(self) -> np.ndarray:
        """Of each sequence, under the unmodified model."""
        return self.scorer.score([()], self.sequences)[0]

    def seconds(self) -> float:
        """What one walk takes."""
        start = time.perf_counter()
        self.nats()
        return time.perf_counter() - start

    def runs(self, way: Way) -> bool:
        """Whether it works here: a compiler can be missing that was there when the run began."""
        done = False
        with _surviving(f"Going on with {way.name}"), way.on():
            self.nats()
            done = True
        return done

    def gains(self, way: Way) -> bool:
        """Whether it is faster than the model as it stands, with the same nats; says so in the log."""
        gain = 0.0
        with _surviving(f"Trying {way.name}"):
            before, start = self.nats(), time.perf_counter()
            with way.on():
                difference = float(np.abs(self.nats() - before).mean()) / max(self.scorer.ids.shape[1] - 1, 1)
            first = time.perf_counter() - start
            if difference <= self.tolerance:  # NaN is not
                gain = self._gain(way)
                used = "Using" if gain >= LEAST_GAIN else "Not using"
                log.info("%s %s: blocks %.2f times as fast, ready in %s.", used, way.name, gain, duration(first))
            else:
                log.warning("Not using %s: it changes a token's nats by %.3g.", way.name, difference)
        return gain >= LEAST_GAIN

    @torch.inference_mode()
    def _gain(self, way: Way) -> float:
        """How many times as fast a block is: the middle of many, each timed both ways in turn.

        Neighbours in time, because others use the machine as well; whichever comes second finds its weights in the
        cache, so they take turns in that, too.
        """
        inputs = self.stack.capture(self.ids)
        ratios = []
        for number in range(_ROUNDS):
            stream = inputs.start()
            for block in range(len(self.stack)):
                with self.stack.resident(block):
                    twin, seconds = stream.fork(), [0.0, 0.0]
                    for switched in (False, True) if (block + number) % 2 else (True, False):
                        with way.on() if switched else nullcontext():
                            start = self._now()
                            self.stack.advance(block, inputs, twin if switched else stream)
                            seconds[switched] = self._now() - start
                ratios.append(seconds[False] / seconds[True])
        return statistics.median(ratios)

    def _now(self) -> float:
        if self.stack.device.type == "cuda":
            torch.cuda.synchronize(self.stack.device)
        return time.perf_counter()


@contextmanager
def _surviving(what: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            log.warning("%s: not enough memory for it.", what)
        else:
            log.warning("%s failed (%s: %s).", what, type(error).__name__, _first_line(error))


class PiecewiseAttention:
    """Causal attention over whole sequences by matrix products, some rows at a time, in place of torch's CPU kernel.

    For models whose attention is transformers' `sdpa`. Masked attention and whatever else it does stays as it was.
    """

    name = "attention in pieces"

    def __init__(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.functions = ALL_ATTENTION_FUNCTIONS
        self.before = self.functions["sdpa"]
        self.attend = _piecewise(self.before)  # one object: compiled code is made anew for another

    @contextmanager
    def on(self) -> Iterator[None]:
        """transformers looks its attention up in one table, at each call."""
        self.functions["sdpa"] = self.attend
        try:
            yield
        finally:
            del self.functions["sdpa"]  # an entry of the table's own goes before the library's
            if self.functions["sdpa"] is not self.before:
                self.functions["sdpa"] = self.before


def _piecewise(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    understood = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
    special = set(inspect.signature(sdpa).parameters) - understood | {"softcap"}

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        plain = attention_mask is None and causal and not dropout
        same = query.shape[2] == key.shape[2] > 1 and query.shape[1] % key.shape[1] == 0
        known = query.device.type == "cpu" and all(kwargs.get(name) is None for name in special)
        if plain and same and known:
            return causal_attention(query, key, value, scaling), None
        found: tuple[torch.Tensor, Any] = sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return found

    return attend


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Each token attends to itself and those before it: (batch, sequence, heads, size), as transformers wants it.

    `query` is (batch, heads, sequence, size); `key` and `value` may have fewer heads, shared by groups of queries.
    Only the scores of some rows exist at a time, and none of tokens to come but within those rows.
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    group = heads // shared
    rows = 64 if length <= 512 else 128  # measured: scores stay in the cache, products are large enough
    query = (query * (size**-0.5 if scaling is None else scaling)).view(batch, shared, group, length, size)
    key, value = key.reshape(batch * shared, length, size), value.reshape(batch * shared, length, -1)
    future = torch.full((rows, rows), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    pieces = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        some = query[:, :, :, start:stop].reshape(batch * shared, -1, size)
        scores = torch.bmm(some, key[:, :stop].transpose(1, 2))  # (batch x shared, group x rows, stop)
        scores.view(batch * shared, group, stop - start, stop)[..., start:] += future[: stop - start, : stop - start]
        found = torch.bmm(scores.softmax(dim=-1), value[:, :stop])
        pieces.append(found.view(batch, shared, group, stop - start, -1))
    return torch.cat(pieces, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


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
    def on(self) -> Iterator[None]:
        """The blocks' `forward` and the loss are others within it."""
        import torch._inductor.config as inductor

        # Without processes of its own: a worker that is stopped must not leave any behind.
        with inductor.patch(compile_threads=1), losses_by(self.loss), ExitStack() as restored:
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


def _compiled_loss() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    compiled = torch.compile(cross_entropy)

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for each in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return compiled(logits, targets)

    return loss


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
