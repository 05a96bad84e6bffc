"""Which optimizations of the blocks are tried on this machine, which gain, which are used. Knows the scorer.

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
from sleb.scoring.optimizations.causal_attention import PiecewiseAttention
from sleb.scoring.optimizations.compiled_blocks import CompiledBlocks
from sleb.scoring.optimizations.packed_linear import PackedWeights
from sleb.scoring.scorer import Scorer

log = logging.getLogger(__name__)

Compile = Literal["auto", "yes", "no"]

LEAST_WALKS = 150.0  # walks up the stack that must lie ahead: a trial takes six for each optimization
LEAST_GAIN = 1.03  # what an optimization must gain to be used
COMPILE_SECONDS = 30.0  # on two cores, with nothing in the compiler's cache: 13 to 32 measured
COMPILE_GAIN = 1.1  # assumed before it is measured
_ROUNDS = 2  # rounds of timing, all blocks in each

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


class Optimization(Protocol):
    """A faster way through the blocks that can be switched on, and off again."""

    name: str

    def on(self, scorer: Scorer) -> AbstractContextManager[None]:
        """A context in which the scorer's blocks, and its losses, are computed this way."""


@contextmanager
def optimized(
    scorer: Scorer, ahead: float, *, compile: Compile = "auto", known: Collection[str] | None = None
) -> Iterator[tuple[str, ...]]:
    """A context in which the scorer uses the optimizations that `choose` gives for its batches; yields their names.

    `ahead` and `compile` are those of `choose`. With `known` names nothing is timed: a resumed run, and every
    rank, computes as the first one did.
    """
    with ExitStack() as switched:
        if known is None:
            chosen = choose(scorer.stack, scorer.ids.numpy(), scorer.batch_size, ahead, compile=compile)
        else:
            chosen = _named(scorer, known)
        for each in chosen:
            switched.enter_context(each.on(scorer))
        yield tuple(each.name for each in chosen)


def choose(
    stack: BlockStack, ids: np.ndarray, batch_size: int, ahead: float, *, compile: Compile = "auto"
) -> list[Optimization]:
    """The optimizations that gain on this machine for batches like these, to be switched on in this order.

    `ids` is (sequences, length): the first batch is what they are tried on. `ahead` is the work to come in block
    evaluations (`Cost.units`); where it is little, nothing is tried. `compile` "auto" compiles where that is forecast
    to pay for itself; what the compiler needs, some seconds, is spent here. Nothing that fails here stops the caller:
    what does not work is left out, with a line in the log.
    """
    chosen: list[Optimization] = []
    if stack.streamed is not None:  # each walk would read all weights
        return []
    with _surviving("Trying optimizations"), ExitStack() as switched:
        trial = _Trial(stack, ids, batch_size)
        if ahead / trial.units < LEAST_WALKS and compile != "yes":
            return []
        for each in _candidates(stack, trial, ahead, compile):
            if trial.gains(each):
                switched.enter_context(each.on(trial.scorer))
                chosen.append(each)
    return chosen


def _named(scorer: Scorer, names: Collection[str]) -> list[Optimization]:
    available: list[Optimization] = []
    if names:
        with _surviving("Going on with optimizations"):
            trial = _Trial(scorer.stack, scorer.ids.numpy(), scorer.batch_size)
            compile: Compile = "yes" if CompiledBlocks.name in names else "no"
            with ExitStack() as switched:
                for each in _candidates(scorer.stack, trial, 0.0, compile):
                    if each.name in names and trial.runs(each):
                        switched.enter_context(each.on(trial.scorer))
                        available.append(each)
    missing = sorted({*names} - {each.name for each in available})
    if missing:
        log.warning("Not available here: %s. Scores round a little differently from here on.", ", ".join(missing))
    return available


def _candidates(stack: BlockStack, trial: _Trial, ahead: float, compile: Compile) -> Iterator[Optimization]:
    """The optimizations to try, in order: what is compiled is the blocks with those that were chosen before."""
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
    """One batch scored again and again: how long it takes, and which nats it gives."""

    def __init__(self, stack: BlockStack, ids: np.ndarray, batch_size: int) -> None:
        self.stack = stack
        self.scorer = Scorer(stack, ids[:batch_size], batch_size=batch_size)
        self.tolerance = 1e-5 if stack.model.dtype == torch.float32 else 0.02  # nats per token, as in the self-check
        self.sequences = np.arange(len(ids[:batch_size]))
        self.nats()  # the first pass allocates, and finds a batch that fits into memory

    @property
    def ids(self) -> torch.Tensor:
        """Token ids of the batch on which optimizations are tried."""
        return self.scorer.ids[: self.scorer.batch_size].to(self.stack.device)

    @property
    def units(self) -> float:
        """The work of one walk, in block evaluations."""
        return self.scorer.cost([()], len(self.sequences)).units(self.scorer.head_weight)

    def nats(self) -> np.ndarray:
        """Nats of each sequence under the baseline, float64 (sequences,)."""
        return self.scorer.score([()], self.sequences)[0]

    def seconds(self) -> float:
        """Seconds that one walk takes."""
        start = time.perf_counter()
        self.nats()
        return time.perf_counter() - start

    def runs(self, optimization: Optimization) -> bool:
        """Whether an optimization works here: the compiler of the run's beginning can be missing."""
        done = False
        with _surviving(f"Going on with {optimization.name}"), optimization.on(self.scorer):
            self.nats()
            done = True
        return done

    def gains(self, optimization: Optimization) -> bool:
        """Whether an optimization is faster than the model as it stands, with the same nats; says so in the log."""
        gain = 0.0
        with _surviving(f"Trying {optimization.name}"):
            before, start = self.nats(), time.perf_counter()
            with optimization.on(self.scorer):
                difference = float(np.abs(self.nats() - before).mean()) / max(self.scorer.ids.shape[1] - 1, 1)
            first = time.perf_counter() - start
            if difference <= self.tolerance:  # NaN is not
                gain = self._gain(optimization)
                used = "Using" if gain >= LEAST_GAIN else "Not using"
                log.info(
                    "%s %s: blocks %.2f times as fast, ready in %s.", used, optimization.name, gain, duration(first)
                )
            else:
                log.warning("Not using %s: it changes a token's nats by %.3g.", optimization.name, difference)
        return gain >= LEAST_GAIN

    @torch.inference_mode()
    def _gain(self, optimization: Optimization) -> float:
        """How many times as fast a block is: the median of many, each timed with and without in succession.

        In succession, because others use the machine as well; the second finds its weights in the cache, so the order
        alternates.
        """
        inputs = self.stack.capture(self.ids)
        ratios = []
        for number in range(_ROUNDS):
            stream = inputs.start()
            for block in range(len(self.stack)):
                with self.stack.resident(block):
                    fork, seconds = stream.fork(), [0.0, 0.0]
                    for switched in (False, True) if (block + number) % 2 else (True, False):
                        with optimization.on(self.scorer) if switched else nullcontext():
                            start = self._now()
                            self.stack.advance(block, inputs, fork if switched else stream)
                            seconds[switched] = self._now() - start
                ratios.append(seconds[False] / seconds[True])
        return statistics.median(ratios)

    def _now(self) -> float:
        if self.stack.device.type == "cuda":
            torch.cuda.synchronize(self.stack.device)
        return time.perf_counter()


@contextmanager
def _surviving(attempt: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            log.warning("%s: not enough memory for it.", attempt)
        else:
            log.warning("%s failed (%s: %s).", attempt, type(error).__name__, _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
