"""The device on which a model is computed, and its type there. Knows this machine; knows no model's files."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from sleb.errors import OptionError


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none; `all` begins on the first GPU."""
    if device == "all":
        if not torch.cuda.is_available():
            raise OptionError("`device=all` spreads a model over all GPUs; this machine has none. Use cpu or auto.")
        return torch.device("cuda", 0)
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise OptionError(f"The device {device!r} is unknown; use auto, cpu, cuda:0 and so on, or all (GPUs).")
    if device == "cpu":
        return torch.device("cpu")
    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise OptionError(
            f"Device {device} was requested; this machine has {count} CUDA devices. Use `device=cpu` or `device=auto`."
        )
    return torch.device("cuda", index)


def fast_dtype(stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type that `dtype="auto"` chooses: 16 bits where the device multiplies them faster, else float32.

    A GPU keeps a 16-bit checkpoint's own type. A CPU is asked: bfloat16 runs three times faster than float32 where
    it has instructions for it, and slower where it has not.
    """
    if device.type == "cuda":
        if stored in (torch.float16, torch.bfloat16):
            return stored
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_is_faster_in(torch.bfloat16) else torch.float32


def _cpu_is_faster_in(dtype: torch.dtype) -> bool:
    """Whether matrix products are faster in this type: the best of twenty each, alternating, on one thread.

    On a busy machine, times of several threads are not reliable.
    """
    pairs = [(torch.ones(256, 512, dtype=kind), torch.ones(512, 1024, dtype=kind)) for kind in (dtype, torch.float32)]
    best = [float("inf"), float("inf")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(20):
            for index, (left, right) in enumerate(pairs):
                start = time.perf_counter()
                torch.mm(left, right)
                best[index] = min(best[index], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0] * 1.3 < best[1]


def chosen_dtype(requested: str, config: Any, stored_as: str | None, device: torch.device) -> torch.dtype:
    """The type that `requested` means: "auto", "checkpoint", or a type by its name.

    `stored_as` is the type of the stored weights. It is believed before the config, which names another type in some
    checkpoints, or none.
    """
    stored = stored_as or getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if requested == "checkpoint":
        return stored or torch.float32
    return fast_dtype(stored, device) if requested == "auto" else getattr(torch, requested)
