"""A job of a run: what it is asked, its state, how far it is, and how this try of it is executed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sleb.records.base import FORMAT_VERSION, MOST, Record
from sleb.records.options import EXECUTION, Option
from sleb.records.requests import Ask
from sleb.records.spec import RunSpec

JobKind = Literal["search", "analyze", "export", "evaluate", "benchmark", "quantize", "heal", "generate"]


class JobSpec(Record):
    """What one process is asked to do with a run. What it may is for `Permissions` to say."""

    format_version: int = FORMAT_VERSION
    kind: JobKind
    device: Annotated[str, Option("Device", "auto, cpu, cuda:0 …, or all: spread over all GPUs.", EXECUTION)] = "auto"
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=MOST, strict=True)] | None,
        Option(
            "Batch size",
            "Sequences at once; halved when memory runs out.",
            EXECUTION,
            otherwise="chosen for the device",
        ),
    ] = None
    processes: Annotated[
        int,
        Field(ge=1, le=4096, strict=True),
        Option(
            "Processes",
            "Processes that share the sequences; one GPU each if there are any.",
            EXECUTION,
            in_form=False,
        ),
    ] = 1
    memory_budget: Annotated[
        Annotated[int, Field(ge=1, le=MOST, strict=True)] | None,
        Option(
            "Memory budget",
            "Memory for weights and hidden states; blocks that do not fit are read from disk when they are needed.",
            EXECUTION,
            details="Of each process: of its GPU's memory, or of RAM without a GPU.",
            metavar="24GB",
            unit="bytes",
            in_form=False,
        ),
    ] = None
    speedups: Annotated[
        Literal["auto", "off"],
        Option(
            "Optimizations",
            "In long searches, try faster ways through the blocks first; they round a little differently.",
            EXECUTION,
            on_off=("auto", "off"),
            flag=True,
            search_only=True,
            in_form=False,
        ),
    ] = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    steps: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Export: the removal list after this many steps; None is all of them."""
    out: str | None = None
    """Export: the folder to write, or the file."""
    format: Literal["hf", "gguf"] = "hf"
    """Export: a Hugging Face folder, or a GGUF file with the blocks of another one cut out."""
    gguf: str | None = None
    """Export: the GGUF file of the run's model to cut; None is the model itself, where it is one."""
    replace: Annotated[bool, Field(strict=True)] = False
    """Export: an earlier export there may be replaced."""
    ask: Ask | None = None
    """What is asked of a job that judges removal lists."""

    def is_own(self, spec: RunSpec) -> bool:
        """Whether the job's end is the run's: of a run that searches nothing, any job's."""
        return self.kind == spec.kind or spec.kind == "evaluate"

    @model_validator(mode="after")
    def _one_way(self) -> JobSpec:
        if (self.ask.kind if self.ask else self.kind) != self.kind:
            raise ValueError(f"a job that is to {self.kind} is asked something else")
        if self.processes > 1 and self.device.startswith("cuda:"):
            raise ValueError(f"--device {self.device} names one device; with several processes use auto or cpu")
        if self.device == "all" and (self.processes > 1 or self.memory_budget is not None):
            raise ValueError(
                "--device all keeps one whole model on all GPUs; leave it out, or --processes and --memory-budget"
            )
        return self


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
