"""Blocks whose weights stay on disk: loaded while they are computed with, the next one read ahead. Knows modules and
files; knows no search.

accelerate dispatches the model and knows where each weight lies. Its own hooks would read every weight anew for every
forward pass of every submodule, so they are set aside: a block is loaded whole, once, for as long as somebody computes
with it, and meanwhile a thread reads the next one.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sleb.errors import OptionError

_M_MMAP_THRESHOLD = -3  # malloc.h
_OWNER = "streamed_blocks"  # where a model keeps its `StreamedBlocks`
_HELD = 3  # blocks in memory at once: in use, read ahead, and the copy that is being made of one
_WORKSPACE = 0.2  # share of the budget for what blocks and read-outs need while they are computed


@dataclass(frozen=True)
class Place:
    """Where a weight lies, and what it becomes."""

    file: str
    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Weight:
    """A parameter of a block, by the module that has it."""

    module: nn.Module
    name: str
    place: Place
    shape: torch.Size


class StreamedBlocks:
    """The blocks of one dispatched model, of which no more are in memory than are in use, and the next one.

    `budget` is in bytes, for weights, hidden states and the work on them; Python and its libraries come on top. Raises
    `OptionError` if it is too small. `seconds_read` is what reading took, `seconds_waited` how long it held up others.
    """

    def __init__(
        self, model: nn.Module, path: str, device: torch.device, budget: int, scratch: TemporaryDirectory[str]
    ) -> None:
        self.device, self.budget = device, budget
        self.places: dict[str, Place] = {}
        """By a weight's full name in the model."""
        self.seconds_read = self.seconds_waited = 0.0
        self.bytes_read = 0
        self._scratch = scratch  # as long as this lives
        stack: Any = model.get_submodule(path)
        self._blocks: list[nn.Module] = list(stack)
        self._weights = [self._take_over(f"{path}.{index}.", block) for index, block in enumerate(self._blocks)]
        self._users = [0] * len(self._blocks)
        self._coming: tuple[int, Future[list[torch.Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sleb-reader")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        resident = {id(each): each.nbytes for each in (*model.parameters(), *model.buffers()) if not each.is_meta}
        self.resident_bytes = sum(resident.values())
        self.spare_bytes = self._spare()
        """Left for hidden states."""
        _give_memory_back()
        for index, block in enumerate(self._blocks):
            block.forward = self._streamed(index, block.forward)
        vars(model)[_OWNER] = self

    def block_bytes(self, block: int) -> int:
        """What the weights of a block take in memory."""
        return sum(weight.shape.numel() * weight.place.dtype.itemsize for weight in self._weights[block])

    @contextmanager
    def resident(self, block: int, then: int | None = None) -> Iterator[None]:
        """The weights of a block are there within it; those of block `then` are read meanwhile."""
        if not self._users[block]:
            self._put(block, self._fetch(block))
        self._users[block] += 1
        try:
            if then is not None and self._coming is None and not self._users[then]:
                self._coming = (then, self._reader.submit(self._read, then))
            yield
        finally:
            self._users[block] -= 1
            if not self._users[block]:
                self._put(block, None)

    def tensor(self, name: str) -> torch.Tensor:
        """A weight by its full name in the model, on the CPU. Raises `KeyError`."""
        place = self.places[name]
        with safe_open(place.file, framework="pt", backend="pread") as file:
            return _as(file.get_tensor(place.key), place.dtype)

    def forget(self) -> None:
        """Let go of a block that was read ahead and that nobody came for."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].result()

    def budget_for(self, hidden_bytes: int) -> int:
        """The least budget that leaves so much for hidden states."""
        return math.ceil(self.budget + (hidden_bytes - self.spare_bytes) / (1 - _WORKSPACE))

    def _spare(self) -> int:
        largest = max(self.block_bytes(block) for block in range(len(self._blocks)))
        fixed = self.resident_bytes + _HELD * largest
        spare = int(self.budget * (1 - _WORKSPACE)) - fixed
        if spare <= 0:
            least = fixed / (1 - _WORKSPACE) * 1.1
            dtype = str(self._weights[0][0].place.dtype).removeprefix("torch.")
            raise OptionError(
                f"A memory budget of {size(self.budget)} is too small for this model in {dtype}: "
                f"{size(self.resident_bytes)} stay in memory, and three blocks of {size(largest)} each. "
                f"Use --memory-budget {size(least)} or more."
            )
        return spare

    def _take_over(self, prefix: str, block: nn.Module) -> list[_Weight]:
        """Where accelerate's hooks would find the weights. They stay for `save_pretrained`, which asks them."""
        found = []
        for path, module in block.named_modules():
            hook = vars(module).get("_hf_hook")
            if hook is None:
                continue
            module.forward = vars(module).pop("_old_forward")
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                entry = hook.weights_map.dataset.index[full]
                place = Place(entry["safetensors_file"], entry["weight_name"], getattr(torch, entry["dtype"]))
                self.places[full] = place
                found.append(_Weight(module, name, place, parameter.shape))
        return found

    def _streamed(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass outside the sweep loads its blocks as well, one after the other."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.resident(block, then=(block + 1) % len(self._blocks)):
                return forward(*args, **kwargs)

        return run

    def _fetch(self, block: int) -> list[torch.Tensor]:
        start = time.perf_counter()
        if self._coming is None or self._coming[0] != block:
            self.forget()
            self._coming = (block, self._reader.submit(self._read, block))
        tensors = self._coming[1].result()
        self._coming = None
        if self._copies is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            for tensor in tensors:  # its memory may be used again once this stream is done with it
                tensor.record_stream(current)
        self.seconds_waited += time.perf_counter() - start
        return tensors

    def _read(self, block: int) -> list[torch.Tensor]:
        """Runs in the reader's thread: from files to the device."""
        start = time.perf_counter()
        weights = self._weights[block]
        tensors: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(weight.place.file for weight in weights):
            with safe_open(name, framework="pt", backend="pread") as file:  # mapped pages would stay in memory
                for index, weight in enumerate(weights):
                    if weight.place.file == name:
                        stored = file.get_tensor(weight.place.key)
                        self.bytes_read += stored.nbytes
                        tensors[index] = self._to_device(_as(stored, weight.place.dtype))
        self.seconds_read += time.perf_counter() - start
        return [tensors[index] for index in range(len(weights))]

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


def streamed_blocks(model: nn.Module) -> StreamedBlocks | None:
    """The streamed blocks of a model, if its weights do not stay in memory."""
    found: StreamedBlocks | None = vars(model).get(_OWNER)
    return found


def fits(total_bytes: int, budget: int) -> bool:
    """Whether a model can stay in memory, with room for hidden states."""
    return total_bytes <= 0.7 * budget


def _give_memory_back() -> None:
    """Have freed weights go back to the system at once: glibc keeps blocks of the size it has seen for later."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 1024)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def size(number: float) -> str:
    """Bytes as an option takes them, rounded up."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= each[0]), (1.0, "B"))
    return f"{math.ceil(number / unit * 100) / 100:g}{name}"
