"""A job of a run: its kind and settings, its state, how far it is, and how this try of it is executed.

Each kind of job is a record of its own; `JobSpec` is one of them, told by `kind`. All kinds share their file format:
what earlier versions wrote, one record with the fields of every kind, is still read.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from sleb.errors import RunError
from sleb.records.base import FORMAT_VERSION, MOST, Record
from sleb.records.options import EXECUTION, Option
from sleb.records.requests import Ask, BenchmarkSpec, EvaluateSpec, GenerateSpec, HealSpec, QuantizeSpec
from sleb.records.spec import RunSpec

JobKind = Literal["search", "analyze", "export", "evaluate", "benchmark", "quantize", "heal", "generate"]

_OF_EVERY_KIND = {"steps": None, "out": None, "format": "hf", "gguf": None, "replace": False, "ask": None}
"""Fields that earlier versions wrote for every kind of job, with the values that they had where they meant nothing."""


class JobSettings(Record):
    """Settings that every kind of job has. What a job is permitted to do is for `Permissions` to say."""

    format_version: int = FORMAT_VERSION
    kind: JobKind
    device: Annotated[
        str,
        Option(
            "Device", "Where to compute: auto, cpu, cuda:0 …, or all, which spreads the model over all GPUs.", EXECUTION
        ),
    ] = "auto"
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=MOST, strict=True)] | None,
        Option(
            "Batch size",
            "How many sequences are computed at once; halved when memory runs out.",
            EXECUTION,
            otherwise="chosen for the device",
        ),
    ] = None
    processes: Annotated[
        int,
        Field(ge=1, le=4096, strict=True),
        Option(
            "Processes",
            "How many processes share the sequences; each has a GPU of its own where there are GPUs.",
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
            details="It is per process: memory of its GPU, or RAM where there is none.",
            metavar="24GB",
            unit="bytes",
            in_form=False,
        ),
    ] = None
    speedups: Annotated[
        Literal["auto", "off"],
        Option(
            "Optimizations",
            "In long searches, try optimizations of the blocks first, and use those that pay; they round a little "
            "differently.",
            EXECUTION,
            on_off=("auto", "off"),
            flag=True,
            search_only=True,
            in_form=False,
        ),
    ] = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_fields_of_other_kinds(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        idle = {name for name, value in _OF_EVERY_KIND.items() if name in data and data[name] == value}
        return {name: value for name, value in data.items() if name in cls.model_fields or name not in idle}

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.processes > 1 and self.device.startswith("cuda:"):
            raise ValueError(f"`device={self.device}` names one device; with several processes use auto or cpu")
        if self.device == "all" and (self.processes > 1 or self.memory_budget is not None):
            raise ValueError(
                "`device=all` keeps one complete model on all GPUs; leave it out, or `processes` and `memory_budget`"
            )
        return self


class SearchJob(JobSettings):
    """Search for the blocks to remove, or go on with the search, then analyze the model where the run wants it."""

    kind: Literal["search"] = "search"


class AnalyzeJob(JobSettings):
    """Measure similarity and prediction alignment."""

    kind: Literal["analyze"] = "analyze"


class ExportJob(JobSettings):
    """Write the smaller model, and prove it."""

    kind: Literal["export"] = "export"
    steps: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Number of steps after which the removal list is taken; None is all of them."""
    out: str | None = None
    """The folder to write, or the file."""
    format: Literal["hf", "gguf"] = "hf"
    """A Hugging Face folder, or a GGUF file with the blocks of another one cut out."""
    gguf: str | None = None
    """The GGUF file of the run's model to cut; None is the model itself, where it is one."""
    replace: Annotated[bool, Field(strict=True)] = False
    """Whether an earlier export at the destination can be replaced."""


class QuestionJob(JobSettings):
    """Answer a question about removal lists. Each kind of question is a kind of job."""

    ask: Ask


class EvaluateJob(QuestionJob):
    """Measure perplexity and accuracy."""

    kind: Literal["evaluate"] = "evaluate"
    ask: EvaluateSpec


class BenchmarkJob(QuestionJob):
    """Measure latency and throughput."""

    kind: Literal["benchmark"] = "benchmark"
    ask: BenchmarkSpec


class QuantizeJob(QuestionJob):
    """Measure, or write, quantised models."""

    kind: Literal["quantize"] = "quantize"
    ask: QuantizeSpec


class HealJob(QuestionJob):
    """Heal a model without blocks, by training or by a least-squares refit."""

    kind: Literal["heal"] = "heal"
    ask: HealSpec


class GenerateJob(QuestionJob):
    """Continue a prompt."""

    kind: Literal["generate"] = "generate"
    ask: GenerateSpec


class UnreadableJob(JobSettings):
    """Stands for a job whose `spec.json` cannot be read. It is never written and never executed.

    Its `kind` is the one in the name of the job's folder.
    """


JobSpec = Annotated[
    SearchJob | AnalyzeJob | ExportJob | EvaluateJob | BenchmarkJob | QuantizeJob | HealJob | GenerateJob,
    Field(discriminator="kind"),
]
"""What one process is to do with a run: the content of a job's `spec.json`."""
JOB_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)
"""Validates a job of any kind."""


class Attempt(Record):
    """How one try of a job was executed; no result depends on it."""

    device: str
    batch_size: int | None
    threads: int
    host: str
    processes: int = 1
    memory_budget: int | None = None
    streamed: bool = False
    """Whether blocks were read from disk whenever they were needed."""
    peak_memory: int | None = None
    """Peak memory in bytes."""
    versions: dict[str, str]

    @property
    def described(self) -> str:
        """The attempt in words, for one line."""
        words = [f"on {self.device}"]
        words += [f"{self.processes} processes"] if self.processes > 1 else []
        if self.device == "cpu":
            words += [f"{self.threads} thread{'s' if self.threads > 1 else ''}" + (" each" * (self.processes > 1))]
        if self.memory_budget is not None:
            each = " each" if self.processes > 1 else ""
            weights = "blocks streamed from disk" if self.streamed else "all weights in memory"
            words += [f"{weights}, within {self.memory_budget / 1e6:,.0f} MB{each}"]
        return ", ".join(words)


class JobState(StrEnum):
    """`interrupted` is derived, never written: the status says running, but its process has ended."""

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
    """One sentence that says why it failed or stopped."""


class Job(Record):
    """One job of a run, with its folder `jobs/<n>-<kind>/`."""

    name: str
    directory: Path
    spec: JobSpec | UnreadableJob
    status: JobStatus
    attempt: Attempt | None = None

    @property
    def ask(self) -> Ask | None:
        """The question about removal lists that the job answers, if it answers one."""
        return self.spec.ask if isinstance(self.spec, QuestionJob) else None

    def require_spec(self) -> JobSpec:
        """The spec of a job that can be executed. Raises `RunError` where its file cannot be read."""
        if isinstance(self.spec, UnreadableJob):
            raise RunError(f"The spec.json of job {self.name} cannot be read. Restore it, or delete the job's folder.")
        return self.spec

    def is_own(self, run: RunSpec) -> bool:
        """Whether the job's end is the run's: in a run that searches nothing, the end of any job."""
        return run.kind in (self.spec.kind, "evaluate")
