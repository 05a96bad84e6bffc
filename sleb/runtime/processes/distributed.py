"""Several processes for one run: their ranks, and what they exchange. A process alone exchanges nothing, without torch.

Every process executes the same search on the same numbers: the sequences are split over the ranks inside `score`, and
their sums are added up, so that all decide alike. The first one writes; the others only compute.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import psutil

from sleb.errors import OptionError, RankLost, SlebError, Stopped
from sleb.records import Permissions
from sleb.runtime import job_folder
from sleb.runtime.processes import device_queue
from sleb.runtime.processes.job_processes import work_command

log = logging.getLogger(__name__)

Shared = TypeVar("Shared")

MEETING = timedelta(minutes=10)  # the longest time between the starts of two processes
PATIENCE = timedelta(hours=2)  # a rank that is silent for longer is lost: loading may take one of them that long
LEAVING_SECONDS = 10.0
_PARENT = "SLEB_PARENT"  # the process id of the first rank, where it started the others itself
_HERE, _FAILED, _LEFT = "sleb-here", "sleb-failed", "sleb-left"  # what ranks say of themselves


@dataclass(frozen=True)
class Rank:
    """The number of this process and of all processes, over all hosts and on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def rank_here() -> Rank:
    """The rank that torchrun, or the first rank, put into the environment. Raises `OptionError` for nonsense."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Rank()
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(name, "0")) for name in names)
    except ValueError as error:
        raise OptionError(f"RANK and WORLD_SIZE in the environment must be numbers ({error}).") from error
    if not 0 <= rank < size:
        raise OptionError(f"RANK is {rank} and WORLD_SIZE {size}; ranks count from 0.")
    return Rank(rank, size, local_rank, max(local_size, 1))


class Group:
    """The processes of one run; by default this one alone."""

    def __init__(self, rank: Rank | None = None, patient: Any = None, store: Any = None) -> None:
        self.place = rank or Rank()
        self._patient = patient  # a gloo group that waits while others load
        self._store = store
        self._peers: list[tuple[str, int, float]] = []

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """The slice of `count` things that belongs to this rank."""
        return slice(self.rank, count, self.size)

    def sum(self, own: np.ndarray) -> np.ndarray:
        """The sum over all ranks, float64, the same on each to the last bit. Raises `RankLost`."""
        if self.size == 1:
            return own
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(np.ascontiguousarray(own, dtype=np.float64))
        with self._together():
            if dist.get_backend() == "nccl":
                dist.monitored_barrier(self._patient)  # notices a lost rank; NCCL would wait in silence
                total = total.cuda(self.place.local_rank)
                dist.all_reduce(total)
            else:
                dist.all_reduce(total, group=self._patient)
        return np.asarray(total.cpu().numpy())

    def share(self, make: Callable[[], Shared]) -> Shared:
        """The result of `make()` on the first rank, shared with all. What it raises, the first one raises."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        box: list[Any] = [None]
        if self.first:
            box = [make()]  # should it raise, the others find that this process has ended
        with self._together():
            dist.broadcast_object_list(box, src=0, group=self._patient)
        return cast(Shared, box[0])

    def meet(self) -> None:
        """Learn the processes of all ranks, to find out later which have ended."""
        if self.size == 1:
            return
        import torch.distributed as dist

        process = psutil.Process()
        peers: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(peers, (socket.gethostname(), process.pid, process.create_time()), self._patient)
        self._peers = peers

    def lost_ranks(self) -> list[int]:
        """Ranks of this host whose process has ended, and did not say that it was told to stop."""
        here = socket.gethostname()
        return [
            rank
            for rank, (host, pid, started) in enumerate(self._peers)
            if host == here and not device_queue.alive(pid, started) and self._message(_LEFT, rank) is None
        ]

    def leave(self, reason: str | None) -> None:
        """Tell the others why this process ends before them: `None` if it was told to."""
        with suppress(RuntimeError, AttributeError):
            self._store.set(f"{_LEFT if reason is None else _FAILED}-{self.rank}", reason or "")

    def lost(self) -> RankLost:
        """The error for a group that has lost a rank."""
        for rank in range(self.size):
            reason = self._message(_FAILED, rank)
            if reason:
                return RankLost(f"Process {rank + 1} of {self.size} failed: {reason}")
        ranks = self.lost_ranks()
        which = f"Process {ranks[0] + 1} of {self.size}" if ranks else f"One of {self.size} processes"
        return RankLost(f"{which} was lost (killed, out of memory, or its machine lost); what was finished is kept.")

    def _message(self, topic: str, rank: int) -> str | None:
        name = f"{topic}-{rank}"
        with suppress(RuntimeError, AttributeError):
            if self._store.check([name]):
                return str(self._store.get(name).decode())
        return None

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # a closed connection, a timeout; torch has no narrower common class
            log.info("The processes lost each other: %s", error)
            raise self.lost() from error


@contextmanager
def joined(job_dir: Path, processes: int, device: str, permissions: Permissions) -> Iterator[Group]:
    """The processes of a job, once they have met. The first rank starts the others, unless torchrun did.

    Raises `RankLost` where one of them is lost, `OptionError` for a device that they cannot share.
    """
    rank = rank_here()
    if rank.size == 1 and processes == 1:
        yield Group()
        return
    if device not in ("auto", "cuda", "cpu"):
        raise OptionError(f"`device={device}` names one device; with several processes use auto or cpu.")
    if rank.size == 1:
        rank = Rank(0, processes, 0, processes)
    with (
        _share_of_machine(rank, device) as backend,
        _meeting(rank, backend, job_dir, permissions) as group,
        _departure_announced(group),
    ):
        yield group


@contextmanager
def _share_of_machine(rank: Rank, device: str) -> Iterator[str]:
    """Give this process a GPU of its own, or its share of the CPU's threads; the backend by which it talks."""
    import torch

    threads = torch.get_num_threads()
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        if rank.local_size > torch.cuda.device_count():
            raise OptionError(
                f"`processes={rank.local_size}` needs as many CUDA devices; this machine has "
                f"{torch.cuda.device_count()}."
            )
        torch.cuda.set_device(rank.local_rank)
    else:
        torch.set_num_threads(max(1, _cores() // rank.local_size))
    try:
        yield "nccl" if on_gpus else "gloo"
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    """Processor cores that this process may use; macOS does not say which, and so all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _meeting(rank: Rank, backend: str, job_dir: Path, permissions: Permissions) -> Iterator[Group]:
    """The group of all processes; those that this one started end when it is left. Raises `RankLost`."""
    import torch.distributed as dist

    helpers: list[subprocess.Popen[bytes]] = []
    try:
        try:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                dist.init_process_group(backend, timeout=MEETING)
                store = dist.distributed_c10d._get_default_store()
            else:
                store, helpers = _store(rank, job_dir, permissions)
                _await(store, helpers)
                dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.size, timeout=MEETING)
            group = Group(rank, dist.new_group(backend="gloo", timeout=PATIENCE), store)
            group.meet()
        except RuntimeError as error:
            raise RankLost(f"The {rank.size} processes could not meet ({str(error).splitlines()[0]}).") from error
        yield group
    except BaseException:
        _end(helpers, patience=0.0)
        raise
    else:
        _end(helpers, patience=LEAVING_SECONDS)
    finally:
        with suppress(RuntimeError, AssertionError, ValueError):
            dist.destroy_process_group()


@contextmanager
def _departure_announced(group: Group) -> Iterator[None]:
    """Tell the others why this process leaves before them. Raises `RankLost` where another one was lost first."""
    try:
        yield
    except Stopped as stopped:
        if group.lost_ranks():  # what started us ends the rest when one dies
            raise group.lost() from stopped
        group.leave(None)
        raise
    except SlebError as error:
        if not isinstance(error, RankLost):
            group.leave(str(error))
        raise


def device_of(group: Group, device: str) -> str:
    """The device of this rank."""
    if group.size == 1 or device == "cpu":
        return device
    import torch

    return f"cuda:{group.place.local_rank}" if torch.cuda.is_available() else device


def die_with_the_first() -> None:
    """End a process that the first rank started when that one ends, whatever it is doing."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _store(rank: Rank, job_dir: Path, permissions: Permissions) -> tuple[Any, list[subprocess.Popen[bytes]]]:
    """The store by which the processes of one host find each other; the first one opens it, and starts the others."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank.rank:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, rank.size, is_master=False, timeout=MEETING)
        store.set(f"{_HERE}-{rank.rank}", "")
        return store, []
    store = TCPStore("127.0.0.1", 0, rank.size, is_master=True, timeout=MEETING, wait_for_workers=False)
    helpers = []
    for other in range(1, rank.size):
        environment = {
            "RANK": other,
            "WORLD_SIZE": rank.size,
            "LOCAL_RANK": other,
            "LOCAL_WORLD_SIZE": rank.size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            _PARENT: os.getpid(),
        }
        with job_folder.open_log(job_dir) as output:
            helpers.append(
                subprocess.Popen(
                    work_command(job_dir, permissions),
                    env=os.environ | {name: str(value) for name, value in environment.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C is for the first one, which ends the others
                )
            )
    return store, helpers


def _await(store: Any, helpers: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all helpers are there. Raises `RankLost` for one that ended as it started."""
    for number, helper in enumerate(helpers, start=1):
        while not store.check([f"{_HERE}-{number}"]):
            if helper.poll() is not None:
                raise RankLost(
                    f"Process {number + 1} of {len(helpers) + 1} ended as it started (exit code {helper.returncode}); "
                    "the job's log says why."
                )
            time.sleep(0.05)


def _end(helpers: list[subprocess.Popen[bytes]], patience: float) -> None:
    limit = time.monotonic() + patience
    for helper in helpers:
        with suppress(subprocess.TimeoutExpired):
            helper.wait(max(0.0, limit - time.monotonic()))
    for helper in helpers:
        if helper.poll() is None:
            helper.terminate()
    limit = time.monotonic() + 5.0
    for helper in helpers:
        with suppress(subprocess.TimeoutExpired):
            helper.wait(max(0.1, limit - time.monotonic()))
        if helper.poll() is None:
            helper.kill()
            helper.wait()
