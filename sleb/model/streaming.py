"""Blocks whose weights stay on disk, each loaded while it is used, the next one read ahead. Knows modules and files.

accelerate dispatches the model and knows where each weight lies. Its own hooks would read every weight again for every
forward pass of every submodule, so they are set aside: a block is loaded whole, once, for as long as somebody computes
with it, and meanwhile a thread reads the next one. That thread is only ever sent for a block when there is room for it:
how many are in memory at once does not depend on who is faster.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sleb.errors import OptionError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OWN_PAGES = 64 * 1024  # bytes from which on memory is the system's again as soon as it is free
_OWNER = "streamed_blocks"  # where a model keeps its `StreamedBlocks`
_BLOCKS = 2  # in memory at once: in use, and read ahead
_HELD = _BLOCKS + 1  # what the budget has room for: a weight that must change its type is there twice for a moment
_WIDE = {"F64": 8, "F32": 4}  # bytes of a number in a file; all other floating types have two or less
_WORKSPACE = 0.2  # share of the budget for what blocks and logits need while they are computed


@dataclass(frozen=True)
class Place:
    """The place of a weight in a file, and the type it becomes."""

    file: str
    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Weight:
    """A parameter of a block, by the module that has it."""

    module: nn.Module
    name: str
    path: str
    """Its full name in the model."""
    place: Place
    shape: torch.Size


@dataclass
class _Coming:
    """A block that is being read. The reader puts its tensors here; taking them leaves nothing behind."""

    block: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    done: Future[tuple[int, float]] = field(default_factory=Future)
    """Bytes read, and the seconds that took."""


class StreamedBlocks:
    """The blocks of one dispatched model, of which no more are in memory than are in use, and the next one.

    `budget` is in bytes, for weights, hidden states and the work on them; Python and its libraries come on top. Raises
    `OptionError` if it is too small. `seconds_read` is what reading took, `seconds_waited` how long it held up others;
    like `bytes_read` they know of a block once somebody has it, not while it is being read ahead.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        weights: list[list[_Weight]],
        device: torch.device,
        budget: int,
        scratch: TemporaryDirectory[str],
    ) -> None:
        self.device, self.budget = device, budget
        self.places = {weight.path: weight.place for own in weights for weight in own}
        """Places of the weights by their full names in the model."""
        self.seconds_read = self.seconds_waited = 0.0
        self.bytes_read = 0
        self._scratch = scratch  # as long as this lives
        self._blocks, self._weights = blocks, weights
        self._users = [0] * len(self._blocks)
        self._coming: _Coming | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sleb-reader")  # starts with its first task
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._freed: torch.cuda.Event | None = None
        resident = {id(each): each.nbytes for each in (*model.parameters(), *model.buffers()) if not each.is_meta}
        self.resident_bytes = sum(resident.values())
        self.spare_bytes = self._spare()
        """Bytes left for hidden states."""
        self._forwards = [self._streamed(index, block.forward) for index, block in enumerate(self._blocks)]

    def attach(self, model: nn.Module) -> None:
        """Have the model's blocks read their weights when they run, and `streamed_blocks` return this."""
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.forward = forward
        vars(model)[_OWNER] = self

    def block_bytes(self, block: int) -> int:
        """Bytes that the weights of a block take in memory."""
        return sum(weight.shape.numel() * weight.place.dtype.itemsize for weight in self._weights[block])

    @contextmanager
    def resident(self, block: int, then: int | None = None) -> Iterator[None]:
        """A context with the weights of a block in memory; those of block `then` are read meanwhile, if there is room.

        In the context one further block can be entered, and no third one.
        """
        if not self._users[block]:
            self._make_room(block)
            self._put(block, self._fetch(block))
        self._users[block] += 1
        try:
            if then is not None and self._coming is None and not self._users[then] and self._in_use < _BLOCKS:
                self._coming = self._send_for(then)
            yield
        finally:
            self._users[block] -= 1
            if not self._users[block]:
                self._put(block, None)
                if self._copies is not None:  # the GPU may still be computing with it
                    self._freed = torch.cuda.Event()
                    self._freed.record(torch.cuda.current_stream(self.device))

    def tensor(self, name: str) -> torch.Tensor:
        """A weight by its full name in the model, on the CPU. Raises `KeyError`."""
        place = self.places[name]
        with safe_open(place.file, framework="pt", backend="pread") as file:
            return _as(file.get_tensor(place.key), place.dtype)

    def forget(self) -> None:
        """Let go of a block that was read ahead and not used."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        wait([coming.done])
        coming.tensors.clear()
        if coming.done.exception() is None:  # what was not used need not exist
            self._count(coming)

    def budget_for(self, hidden_bytes: int) -> int:
        """The least budget that leaves so much for hidden states."""
        return math.ceil(self.budget + (hidden_bytes - self.spare_bytes) / (1 - _WORKSPACE))

    def _spare(self) -> int:
        largest = max(self._widest(), *(self.block_bytes(block) for block in range(len(self._blocks))))
        fixed = self.resident_bytes + _HELD * largest
        spare = int(self.budget * (1 - _WORKSPACE)) - fixed
        if spare <= 0:
            least = fixed / (1 - _WORKSPACE) * 1.1
            dtype = str(self._weights[0][0].place.dtype).removeprefix("torch.")
            raise OptionError(
                f"A memory budget of {size(self.budget)} is too small for this model in {dtype}: "
                f"{size(self.resident_bytes)} stay in memory, and three blocks of {size(largest)} each. "
                f"Use `memory_budget={size(least)}` or more."
            )
        return spare

    def _widest(self) -> int:
        """Bytes of the largest weight in its file, where that is in a wider type than most."""
        places = {weight.place: weight.shape.numel() for weights in self._weights for weight in weights}
        widest = 0
        for name in {place.file for place in places}:
            with safe_open(name, framework="pt", backend="pread") as file:
                for place, numbers in places.items():
                    if place.file == name:
                        widest = max(widest, numbers * _WIDE.get(file.get_slice(place.key).get_dtype(), 0))
        return widest

    def _streamed(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass outside the sweep loads its blocks as well, one after the other."""

        def run(*args: Any, **kwargs: Any) -> Any:
            # The caller that has the block already knows which one is next.
            then = None if self._users[block] else self._following(block)
            with self.resident(block, then):
                return forward(*args, **kwargs)

        return run

    def _following(self, block: int) -> int | None:
        """The block that a forward pass asks for next, the first one after the last: not those that are skipped now."""
        count = len(self._blocks)
        others = ((block + ahead) % count for ahead in range(1, count))
        return next((each for each in others if vars(self._blocks[each])["forward"] is self._forwards[each]), None)

    @property
    def _in_use(self) -> int:
        return sum(users > 0 for users in self._users)

    def _make_room(self, block: int) -> None:
        """Let go of another block that was read ahead. Raises `RuntimeError` where too many are in use."""
        if self._coming is not None and self._coming.block != block:
            self.forget()
        if self._in_use >= _BLOCKS:
            raise RuntimeError(f"Block {block} would be one more than the {_BLOCKS} that may be in memory at once.")

    def _send_for(self, block: int) -> _Coming:
        coming = _Coming(block)
        coming.done = self._reader.submit(self._read, block, coming.tensors, self._freed)
        return coming

    def _fetch(self, block: int) -> list[torch.Tensor]:
        start = time.perf_counter()
        coming, self._coming = self._coming or self._send_for(block), None
        coming.done.result()
        self._count(coming)
        # The reader's thread may not have come back from its call yet: it must not be what keeps them alive.
        tensors = coming.tensors.copy()
        coming.tensors.clear()
        if self._copies is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            for tensor in tensors:  # its memory may be used again once this stream is done with it
                tensor.record_stream(current)
        self.seconds_waited += time.perf_counter() - start
        return tensors

    def _count(self, coming: _Coming) -> None:
        number, seconds = coming.done.result()
        self.bytes_read += number
        self.seconds_read += seconds

    def _read(self, block: int, into: list[torch.Tensor], freed: torch.cuda.Event | None) -> tuple[int, float]:
        """Runs in the reader's thread: from files to the device, once the GPU is done with the block before."""
        start, number = time.perf_counter(), 0
        weights = self._weights[block]
        tensors: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(weight.place.file for weight in weights):
            with safe_open(name, framework="pt", backend="pread") as file:  # mapped pages would stay in memory
                for index, weight in enumerate(weights):
                    if weight.place.file == name:
                        stored = file.get_tensor(weight.place.key)
                        number += stored.nbytes
                        if freed is not None:
                            freed.synchronize()
                        tensors[index] = self._to_device(_as(stored, weight.place.dtype))
                        del stored  # before the next one is read
        into += [tensors[index] for index in range(len(weights))]
        return number, time.perf_counter() - start

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return tensor
        with torch.cuda.stream(self._copies):
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def _put(self, block: int, tensors: list[torch.Tensor] | None) -> None:
        """Give the block its weights, or take them away."""
        for index, weight in enumerate(self._weights[block]):
            nothing = torch.empty(weight.shape, dtype=weight.place.dtype, device="meta")
            value = nothing if tensors is None else tensors[index]
            weight.module._parameters[weight.name] = nn.Parameter(value, requires_grad=False)


def stream_blocks(
    model: nn.Module, path: str, device: torch.device, budget: int, scratch: TemporaryDirectory[str]
) -> StreamedBlocks:
    """Stream the blocks at `path` of a model that accelerate dispatched, in place of accelerate's own hooks.

    Raises `OptionError` where the budget in bytes is too small.
    """
    stack: Any = model.get_submodule(path)
    blocks: list[nn.Module] = list(stack)
    weights = [_take_over(f"{path}.{index}.", block) for index, block in enumerate(blocks)]
    streamed = StreamedBlocks(model, blocks, weights, device, budget, scratch)
    streamed.attach(model)
    return streamed


def _take_over(prefix: str, block: nn.Module) -> list[_Weight]:
    """The weights of a block where accelerate's hooks would find them; the hooks' own forward is taken away.

    The hooks stay for `save_pretrained`, which asks them.
    """
    weights = []
    for path, module in block.named_modules():
        hook = vars(module).get("_hf_hook")
        if hook is None:
            continue
        module.forward = vars(module).pop("_old_forward")
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            entry = hook.weights_map.dataset.index[full]
            place = Place(entry["safetensors_file"], entry["weight_name"], getattr(torch, entry["dtype"]))
            weights.append(_Weight(module, name, full, place, parameter.shape))
    return weights


def streamed_blocks(model: nn.Module) -> StreamedBlocks | None:
    """The streamed blocks of a model, if its weights do not stay in memory."""
    streamed: StreamedBlocks | None = vars(model).get(_OWNER)
    return streamed


def fits(total_bytes: int, budget: int) -> bool:
    """Whether a model can stay in memory, with room for hidden states."""
    return total_bytes <= 0.7 * budget


def give_memory_back() -> None:
    """Have freed weights and hidden states go back to the system at once, from now on.

    To be called before a model is built. glibc keeps memory of the sizes it has seen freed for later, in a heap that
    only shrinks from its end; what is put into its holes makes the process larger although little is in use. A model
    that is built without its weights leaves holes as large as all of them.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
        library.mallopt(_M_TRIM_THRESHOLD, _OWN_PAGES)
        library.malloc_trim(0)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def size(number: float) -> str:
    """Bytes as an option takes them, rounded up."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= each[0]), (1.0, "B"))
    return f"{math.ceil(number / unit * 100) / 100:g}{name}"
