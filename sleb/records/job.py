"""A job of a run: its state, how far it is, and how this try of it is executed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sleb.records.base import Record
from sleb.records.spec import JobSpec


class Attempt(Record):
    """How one try was made; never part of what."""

    device: str
    batch_size: int | None
    threads: int
    host: str
    processes: int = 1
    memory_budget: int | None = None
    streamed: bool = False
    """Whether blocks were read from disk whenever they were needed."""
    peak_memory: int | None = None
    """Bytes."""
    versions: dict[str, str]

    @property
    def described(self) -> str:
        """In words, for one line."""
        words = [f"on {self.device}"]
        words += [f"{self.processes} processes"] if self.processes > 1 else []
        if self.device == "cpu":
            words += [f"{self.threads} thread{'s' if self.threads > 1 else ''}" + (" each" * (self.processes > 1))]
        if self.memory_budget is not None:
            each = " each" if self.processes > 1 else ""
            how = "blocks streamed from disk" if self.streamed else "all weights in memory"
            words += [f"{how}, within {self.memory_budget / 1e6:,.0f} MB{each}"]
        return ", ".join(words)


class JobState(StrEnum):
    """`interrupted` is derived, never written: running, but its process is gone."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"


class Progress(Record):
    """How far a job is; `fraction` counts work, not steps, so that the ETA is right."""

    phase: str
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    eta_seconds: float | None = None
    message: str = ""


class JobStatus(Record):
    """The state of a job, replaced atomically by the holder of the run's lock."""

    state: JobState = JobState.QUEUED
    pid: Annotated[int, Field(gt=0)] | None = None
    host: str | None = None
    process_started: float | None = None
    """Start time of the process, seconds since the epoch: a pid alone may be reused."""
    started: float | None = None
    heartbeat: float | None = None
    progress: Progress | None = None
    message: str = ""
    """Why it failed or stopped: one sentence."""


class Job(Record):
    """One try at something, in `jobs/<n>-<kind>/`."""

    name: str
    directory: Path
    spec: JobSpec
    status: JobStatus
    attempt: Attempt | None = None
