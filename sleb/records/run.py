"""A run as it stands on disk: its spec, the model it was opened with, its trace, analyses and jobs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sleb.errors import OptionError, RunError
from sleb.records.analysis import Analysis
from sleb.records.base import FORMAT_VERSION, Record
from sleb.records.identity import ModelIdentity
from sleb.records.job import Job
from sleb.records.spec import RunSpec
from sleb.records.trace import Step, Trace

_DTYPE = r"^(float|bfloat)(16|32|64)$"


class SelfCheck(Record):
    """Comparison of the sweep with plain forward passes that skip a block, for every candidate on one tiny batch."""

    scoring: Literal["sweep", "plain"]
    reason: str | None = None
    """The reason why the run fell back to plain scoring, if it did."""
    candidates: int
    tokens: int
    max_difference: float | None
    """Largest difference of a sequence's loss in nats per token; None where there was nothing to compare."""
    protected: dict[int, str] = Field(default={})
    """Blocks whose plain skip raises, with the reason."""


class StackDescription(Record):
    """The model as loaded, and the choices that follow from it. Written once, by the first job."""

    format_version: int = FORMAT_VERSION
    model_class: str
    path: str
    block_class: str
    num_blocks: int
    block_parameters: tuple[int, ...]
    total_parameters: Annotated[int, Field(gt=0)]
    hidden_size: int
    vocab_size: int
    dtype: Annotated[str, Field(pattern=_DTYPE)]
    checkpoint_dtype: Annotated[str, Field(pattern=_DTYPE)] | None = None
    """The type of the stored weights; None where they are packed, and in runs that did not look."""
    quantisation: str | None = None
    """The quantisation of the checkpoint, in words."""
    per_block_lists: tuple[Annotated[str, Field(pattern=r"^\w{1,80}$")], ...] | None = None
    """Lists in the model's config with an entry for each block; None in runs that did not look."""
    revision: str | None = None
    weights_hash: str
    identity: ModelIdentity | None = None
    """The model besides its weights; None in files of versions that looked at weights alone."""
    scoring_version: int | None = None
    """`SCORING_VERSION` of the code that scores the run; None in files of versions that looked at weights alone."""
    tokens_hash: str
    """Hash of the calibration and held-out token ids: a resumed run must see the same text."""
    sequences: int
    held_out: int
    sequence_length: int
    bos: bool
    text: str
    """Origin and length of the text, in words."""
    drawing: int = 1
    """Version of the drawing of the text: a resumed run draws it in the same way."""
    num_remove: int
    protected: tuple[int, ...]
    self_check: SelfCheck

    @model_validator(mode="after")
    def _whole(self) -> StackDescription:
        if not 1 <= self.num_blocks == len(self.block_parameters) <= 100_000:
            raise ValueError("there are as many numbers of parameters as blocks, and at least one")
        return self

    @property
    def model_key(self) -> str | None:
        """Equal for models with the same weights, type, config, tokenizer, template and code; None where unknown."""
        if self.identity is None:
            return None
        return self.identity.key(self.weights_hash, self.dtype)

    def is_of_same_model(self, other: StackDescription) -> bool:
        """Whether both are of one model, as far as both say what it is."""
        keys = (self.model_key, other.model_key)
        return self.weights_hash == other.weights_hash and (None in keys or keys[0] == keys[1])

    def parameters_without(self, blocks: Iterable[int]) -> int:
        """Number of parameters of the model without these blocks."""
        return self.total_parameters - sum(self.block_parameters[block] for block in blocks)


class Forecast(Record):
    """Time and memory that a run will take, from a timing probe of a few seconds."""

    num_blocks: int
    num_remove: int
    block_evaluations: int
    """Number of blocks times sequences that are evaluated."""
    head_evaluations: int
    """Number of skip sets times sequences whose loss is computed."""
    head_weight: float
    """Cost of the LM head and the loss for one skip set, in block evaluations."""
    seconds_per_unit: float
    """Seconds for each block evaluation."""
    loading_seconds: float
    """Seconds for loading the model and for the check of the sweep against plain forward passes."""
    search_seconds: float
    analysis_seconds: float
    peak_memory: int
    """Peak memory in bytes, of the GPU where there is one, else of the process."""
    device: str
    dtype: str

    @property
    def seconds(self) -> float:
        """Seconds for all of it."""
        return self.loading_seconds + self.search_seconds + self.analysis_seconds


class Run(Record):
    """A run folder, read: what `run_folder.load` returns and pages draw."""

    run_id: str
    run_dir: Path
    spec: RunSpec
    stack: StackDescription | None = None
    trace: Trace | None = None
    analysis: Analysis | None = None
    analysis_unavailable: str | None = None
    """The reason why this model cannot be analysed, if it cannot."""
    jobs: tuple[Job, ...] = ()

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal so far."""
        return self.trace.removal_list if self.trace else self.spec.given or ()

    def require_trace(self) -> Trace:
        """The trace with at least one finished step. Raises `RunError` with the reason why there is none."""
        if self.spec.kind != "search":
            raise RunError(
                f"Run {self.run_id} is an {self.spec.method_or_kind} and chose no block; search {self.spec.model}."
            )
        if self.stack is None or self.trace is None or not self.trace.steps:
            raise RunError(
                f"Run {self.run_id} has no finished step and therefore no removal list yet; "
                f"continue it with `sleb resume {self.run_id}`."
            )
        return self.trace

    def steps_until(self, steps: int | None = None) -> tuple[Step, ...]:
        """The first `steps` steps; None is all of them. Raises `OptionError`, or `RunError` where there are none."""
        done = self.require_trace().steps
        if steps is None:
            return done
        if not 1 <= steps <= len(done):
            raise OptionError(
                f"`steps={steps}` is not among the finished steps of run {self.run_id}; give 1 to {len(done)}."
            )
        return done[:steps]

    def removal_list_after(self, steps: int | None = None) -> tuple[int, ...]:
        """Blocks in the order of removal after `steps` steps; None is all of them. Raises as `steps_until`."""
        return self.steps_until(steps)[-1].removal_list

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Blocks that stay, in the order of the stack; empty until the model has been opened."""
        if self.stack is None:
            return ()
        removed = set(self.removal_list)
        return tuple(block for block in range(self.stack.num_blocks) if block not in removed)
