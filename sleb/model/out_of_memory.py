"""Work in batches that halve when memory runs out. Knows no model; imports torch only when memory ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sleb.errors import ScoringError

log = logging.getLogger(__name__)


def in_batches(count: int, batch_size: int, work: Callable[[int, int], None]) -> int:
    """Call `work(start, stop)` over `count` sequences; out of memory halves the batch, and goes on.

    Returns the batch size that fitted. Raises `ScoringError` when a single sequence does not.
    """
    start = 0
    while start < count:
        stop = min(start + batch_size, count)
        try:
            work(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise ScoringError(
                    "Out of memory with one sequence; lower `sequence_length`, or choose a smaller `dtype`."
                ) from error
            batch_size = (stop - start) // 2
            log.warning("Out of memory: going on with batches of %d.", batch_size)
        else:
            start = stop
            continue
        _clear()  # here, where the exception no longer holds its frames
    return batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch would help."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def _clear() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
