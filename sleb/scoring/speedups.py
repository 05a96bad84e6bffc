"""Optimizations of the blocks on this machine: which are worth trying, which gain, which are used. Knows the scorer.

What is faster depends on the machine, so each optimization is tried on one batch first, against the model as it
stands. Those that gain and give the same nats stay until the end of the `with` block; then the model is as it was.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal, Protocol

import numpy as np
import torch

from sleb.model.block_stack import BlockStack
from sleb.model.out_of_memory import is_out_of_memory
from sleb.runtime.processes.progress import duration
from sleb.scoring.causal_attention import PiecewiseAttention
from sleb.scoring.compiled_blocks import CompiledBlocks
from sleb.scoring.packed_linear import PackedWeights
from sleb.scoring.sweep import Scorer

log = logging.getLogger(__name__)


Compile = Literal["auto", "yes", "no"]

WORTH_TRYING = 150.0  # walks up the stack that must lie ahead: trying takes six for each way
LEAST_GAIN = 1.03  # what a way must gain to be used
COMPILE_SECONDS = 30.0  # on two cores, with nothing in the compiler's cache: 13 to 32 measured
COMPILE_GAIN = 1.1  # assumed before it is known
_ROUNDS = 2  # of timing, all blocks in each

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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
