"""What is asked and what was found: frozen records, the same on disk, on the screen and in a notebook.

Block indices are the original, 0-based ones, everywhere. Sums are kept in nats beside their token counts; only
a property named `perplexity` divides.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .findings import Ask
from .record import MOST
from .record import Measured as Measured
from .record import Record as Record

FORMAT_VERSION = 1
"""Version of the run folder. A folder of another version is refused, never guessed at."""


RACE_SEQUENCES = 32
"""From so many calibration sequences on a race saves more than it may lose."""


class Method(StrEnum):
    """How blocks are chosen; the paper's Metric3 and what it is compared with (paper, 3.2 and Figures 4 and 7)."""

    METRIC3 = "metric3"
    METRIC2 = "metric2"
    METRIC1 = "metric1"
    EARLY_EXIT = "early-exit"
    BEST_CHUNK = "best-chunk"

    @property
    def protects_ends(self) -> bool:
        """Whether the first and last block are protected unless the user says otherwise."""
        return self not in (Method.EARLY_EXIT, Method.BEST_CHUNK)


class CalibrationSpec(Record):
    """Which text, cut how. `sequences` counts rows for `wikitext2-rows`, windows for every other source."""

    source: str = "wikitext2"
    sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 128
    sequence_length: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    sampling: Literal["random", "first"] = "random"
    bos: Literal["auto", "yes", "no"] = "auto"
    chat: bool = False


def default_held_out(sequences: int) -> int:
    """A quarter of the calibration set, at least one."""
    return max(1, round(sequences / 4))


class RunSpec(Record):
    """What was asked; immutable once written. Permissions and devices are no part of it: see `JobSpec`."""

    format_version: int = FORMAT_VERSION
    kind: Literal["search", "analyze", "evaluate"] = "search"
    """`evaluate`: nothing is searched; the removal list was given."""
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibration: CalibrationSpec = CalibrationSpec()
    held_out: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Held-out sequences; None is a quarter of the calibration set."""
    method: Method = Method.METRIC3
    num_remove: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the blocks to remove, rounded up. With neither, every block that may go is a candidate to the end."""
    protected: tuple[int, ...] | None = None
    """Blocks that are never candidates; None is the method's default."""
    until_perplexity: Annotated[float, Field(ge=0)] | None = None
    """Stop before the held-out perplexity rises by more than this share: 0.1 is ten per cent."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the interval by which two candidates are told apart, or called tied; and of a race, in each of its steps."""
    objective: Literal["nll", "kl"] = "nll"
    """What is lowest: the negative log-likelihood of the text (the paper), or the divergence from the unmodified
    model's own predictions (as in EvoPress, arXiv 2410.14649). Metric1 has a measure of its own."""
    search: Literal["auto", "full", "race"] = "auto"
    """Whether every candidate sees the whole calibration set, or leaves once it cannot win. See `races`."""
    refine: Literal["none", "swap"] = "none"
    """What follows Metric3's last removal: `swap` tries one block back and another out, while that lowers the score."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    analysis: bool = True
    given: tuple[int, ...] | None = None
    """Blocks removed in a run that searches nothing, in the order in which they were given."""

    @property
    def what(self) -> str:
        """One word for lists of runs: the method, or what else it is."""
        return {"analyze": "analysis", "evaluate": "evaluation"}.get(self.kind, self.method.value)

    @property
    def races(self) -> bool:
        """Whether candidates race: where a method chooses one of many, from 32 sequences on unless asked otherwise."""
        if self.method not in (Method.METRIC3, Method.BEST_CHUNK):
            return False
        return self.search == "race" or (self.search == "auto" and self.calibration.sequences >= RACE_SEQUENCES)

    @model_validator(mode="after")
    def _one_target(self) -> RunSpec:
        if self.num_remove is not None and self.ratio is not None:
            raise ValueError("give either the number of blocks to remove or the ratio, not both")
        if self.objective != "nll" and self.method is Method.METRIC1:
            raise ValueError("Metric1 compares hidden states; --objective is for the other methods")
        if self.refine != "none" and self.method is not Method.METRIC3:
            raise ValueError(
                f"--refine {self.refine} goes on from Metric3's list; leave it out with {self.method.value}"
            )
        return self


class SelfCheck(Record):
    """Every candidate, on one tiny batch: the sweep against a plain forward pass with the block skipped."""

    scoring: Literal["sweep", "plain"]
    reason: str | None = None
    """Why the run fell back to plain scoring."""
    candidates: int
    tokens: int
    max_difference: float | None
    """Largest difference of a sequence's nll_sum, divided by its tokens: nats per token. None: nothing to compare."""
    protected: dict[int, str] = Field(default={})
    """Blocks whose plain skip raises, with the reason."""


class StackDescription(Record):
    """The model as loaded, and what the run settled on with it. Written once, by the first job."""

    format_version: int = FORMAT_VERSION
    model_class: str
    path: str
    block_class: str
    num_blocks: int
    block_parameters: tuple[int, ...]
    total_parameters: Annotated[int, Field(gt=0)]
    hidden_size: int
    vocab_size: int
    dtype: str
    revision: str | None = None
    weights_hash: str
    tokens_hash: str
    """Of the calibration and held-out token ids: a resumed run must see the same text."""
    sequences: int
    held_out: int
    sequence_length: int
    bos: bool
    text: str
    """Where the text came from and how much of it there was, in words."""
    num_remove: int
    protected: tuple[int, ...]
    self_check: SelfCheck

    @model_validator(mode="after")
    def _whole(self) -> StackDescription:
        if not 1 <= self.num_blocks == len(self.block_parameters) <= 100_000:
            raise ValueError("there are as many numbers of parameters as blocks, and at least one")
        return self


class Candidate(Record):
    """A set of blocks that was scored: `score_sum` is what was compared, lowest first.

    For the likelihood it equals `nll_sum`. For the divergence it is nats of Kullback-Leibler from the unmodified
    model's predictions, for Metric1 the sum over tokens of 1 - cosine; then `nll_sum` is None.
    """

    block: int
    """The block this candidate adds to the removal list; the first of the chunk for best chunk."""
    skipped: Annotated[tuple[int, ...], Field(min_length=1)]
    objective: Literal["nll", "kl", "metric1"] = "nll"
    score_sum: float | None
    nll_sum: float | None = None
    token_count: Annotated[int, Field(gt=0)]
    sequences: Annotated[int, Field(gt=0)] | None = None
    """On how many calibration sequences it was scored: fewer than all where it left a race. None in older runs."""

    @property
    def score(self) -> float | None:
        """Mean score per token, in nats for the likelihood; over other sequences than the winner's after a race."""
        return None if self.score_sum is None else self.score_sum / self.token_count

    @property
    def perplexity(self) -> float | None:
        """exp(nll_sum / token_count), where the likelihood was measured."""
        return Measured(nll_sum=self.nll_sum, token_count=self.token_count).perplexity


class Step(Record):
    """One decision with all its evidence. Carries the whole removal list after it: best chunks are not nested.

    A swap takes one block back and removes another: its removal list is as long as the one before.
    """

    number: int
    removed: Annotated[tuple[int, ...], Field(min_length=1)]
    restored: tuple[int, ...] = ()
    removal_list: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    calibration: Measured
    """The calibration set under the model without `removal_list`."""
    held_out: Measured
    """Sequences that took no part in the choice."""
    held_out_standard_error: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Of the mean rise over the baseline on the held-out sequences, per token, in pairs; None below two of them."""
    margin: float | None
    """Mean paired difference of the runner-up's score to the winner's, per token; None without a runner-up."""
    margin_standard_error: float | None
    """None where one sequence gives no spread."""
    tied: tuple[int, ...]
    """Candidates (their `block`) whose paired difference to the winner cannot be told from zero."""
    tied_restored: tuple[int, ...] = ()
    """In a swap: the block that each of `tied` would have taken back. Empty elsewhere."""
    improvement: float | None = None
    """Of a swap: mean paired difference of the score before it to the score after it, per token. None elsewhere."""
    improvement_standard_error: float | None = None
    block_evaluations: int
    head_evaluations: int
    seconds: float

    @model_validator(mode="after")
    def _whole(self) -> Step:
        blocks = self.removal_list
        if not self.candidates or len(set(blocks)) != len(blocks) or min(blocks, default=-1) < 0:
            raise ValueError("a step has candidates, and removes blocks that exist, each once")
        if not any(candidate.skipped in (blocks, self.removed) for candidate in self.candidates):
            raise ValueError("what a step removes is one of its candidates")
        if len(self.tied_restored) != (len(self.tied) if self.is_swap else 0):
            raise ValueError("a swap names the block that each tied candidate takes back, and no other step does")
        return self

    @property
    def perplexity(self) -> float | None:
        """Of the calibration set after this step."""
        return self.calibration.perplexity

    @property
    def is_swap(self) -> bool:
        """Whether it took as many blocks back as it removed; another best chunk takes back fewer."""
        return len(self.removed) == len(self.restored)

    @property
    def before(self) -> frozenset[int]:
        """The blocks that were removed when this step began."""
        return frozenset({*self.removal_list, *self.restored} - {*self.removed})

    def restored_by(self, candidate: Candidate) -> tuple[int, ...]:
        """The block that a candidate of a swap takes back; nothing in other steps."""
        return tuple(sorted(self.before - set(candidate.skipped))) if self.is_swap else ()

    @property
    def tied_candidates(self) -> tuple[Candidate, ...]:
        """Those of `tied`: in a swap several candidates remove the same block."""
        if not self.is_swap:
            return tuple(each for each in self.candidates if each.block in self.tied)
        tied = set(zip(self.tied, self.tied_restored, strict=True))
        return tuple(each for each in self.candidates if (each.block, *self.restored_by(each)) in tied)


class Baseline(Record):
    """The unmodified model on the same text."""

    calibration: Measured
    held_out: Measured
    block_evaluations: int
    head_evaluations: int
    seconds: float
    warnings: tuple[str, ...] = ()
    speedups: tuple[str, ...] = ()
    """Faster ways through the blocks that are in use, here and in the steps: they round differently."""

    @property
    def perplexity(self) -> float | None:
        """Of the calibration set."""
        return self.calibration.perplexity


class Trace(Record):
    """The baseline and every finished step."""

    baseline: Baseline
    steps: tuple[Step, ...] = ()
    finished: str | None = None
    """Why the search ended, once it has."""

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal, after the last step."""
        return self.steps[-1].removal_list if self.steps else ()

    @property
    def by_length(self) -> tuple[Step, ...]:
        """The last step that leaves 1, 2, ... blocks removed: swaps do not change the number."""
        return tuple({len(step.removal_list): step for step in self.steps}.values())

    @property
    def removed_at(self) -> dict[int, int]:
        """Removed block -> the step since which it is gone: best chunks are not nested, and a swap restores."""
        since: dict[int, int] = {}
        for step in self.steps:
            since = {block: since.get(block, step.number) for block in step.removal_list}
        return since

    @property
    def block_evaluations(self) -> int:
        """Blocks times sequences, the baseline and held-out sequences included."""
        return self.baseline.block_evaluations + sum(step.block_evaluations for step in self.steps)

    @property
    def head_evaluations(self) -> int:
        """Skip sets times sequences, the baseline and held-out sequences included."""
        return self.baseline.head_evaluations + sum(step.head_evaluations for step in self.steps)


JobKind = Literal["search", "analyze", "export", "evaluate", "benchmark", "quantize", "heal", "generate"]


class JobSpec(Record):
    """What one process is to do with a run, and what it may: permissions live here, never in what is shared."""

    format_version: int = FORMAT_VERSION
    kind: JobKind
    device: str = "auto"
    batch_size: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    """Sequences per batch; None chooses for the device."""
    speedups: Literal["auto", "off"] = "auto"
    """Whether faster ways through the blocks are tried, where the work ahead is worth it."""
    processes: Annotated[int, Field(ge=1, le=4096, strict=True)] = 1
    """On this host, each with a share of the sequences; one GPU each where there are any."""
    memory_budget: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    """Bytes for weights and hidden states, of the GPU or else of the host; blocks are streamed where that is little."""
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


class ExitStatistics(Record):
    """Where predictions are already decided, over `token_count` tokens (paper, Figure 5, Tables 5 and 6)."""

    source: str
    """On which tokens: said in words."""
    token_count: int
    agreement: tuple[float, ...]
    """Per block: share of tokens whose top prediction after it equals the final one."""
    first_exit: tuple[int, ...]
    """Per block: tokens for which it is the first that agrees (the paper's ideal exit)."""
    settled_exit: tuple[int, ...]
    """Per block: tokens for which it is the one from which the prediction stays."""
    skipped_share: dict[int, float]
    """Batch size -> share of blocks an ideal first exit skips, where the batch waits for its slowest token."""
    settled_skipped_share: dict[int, float]

    @staticmethod
    def speedup(skipped_share: float) -> float:
        """1 / (1 - skipped share) (paper, B.1)."""
        return 1.0 / (1.0 - skipped_share)


class Alignment(Record):
    """Prediction alignment on the calibration tokens and on the model's own generated ones."""

    calibration: ExitStatistics
    generated: ExitStatistics | None
    generated_reason: str | None = None
    """Why there are no generated tokens, if so."""


class Similarity(Record):
    """Cosine similarity between block outputs; index 0 is the embedding output, index i + 1 is block i."""

    token_count: int
    mean: tuple[tuple[float, ...], ...]
    """(N+1) x (N+1), mean over the sampled calibration tokens."""
    mean_without_first: tuple[tuple[float, ...], ...]
    """The same without each sequence's first token, whose huge norm hides the rest."""
    random_token: tuple[tuple[float, ...], ...]
    """The paper's own: one random token fed alone (3.1, Figure 6)."""
    random_token_id: int
    metric1: tuple[float, ...]
    """Per block, 1 - mean cosine of its input and output (paper, equation 3; elsewhere called Block Influence)."""
    chunk_angular_distance: tuple[tuple[float | None, ...], ...]
    """[length - 1][start]: mean angular distance, in [0, 1], between the input and the output of a chunk."""


class PassageToken(Record):
    """One token of the passage and what each block would have predicted after it."""

    token: str
    top: tuple[tuple[tuple[str, float], ...], ...]
    """Per block: the five most likely next tokens and their probabilities."""
    first_exit: int
    settled_exit: int


class Passage(Record):
    """A short piece of the calibration text for the token view."""

    tokens: tuple[PassageToken, ...]


class AnalysisDescription(Record):
    """Which cache entry the analyses came from, and what they were made of."""

    cache_key: str
    sequences: int
    sequence_length: int
    token_count: int
    seconds: float
    cached: bool


class Analysis(Record):
    """Both analyses of a run, as pages draw them."""

    description: AnalysisDescription
    similarity: Similarity
    alignment: Alignment
    passage: Passage


class Forecast(Record):
    """What a run will take, from a look of a few seconds at the model."""

    num_blocks: int
    num_remove: int
    block_evaluations: int
    """Blocks times sequences."""
    head_evaluations: int
    """Skip sets times sequences."""
    head_weight: float
    """What reading out one skip set costs, in block evaluations."""
    seconds_per_unit: float
    """A unit is a block evaluation."""
    loading_seconds: float
    """The model, and the check of the sweep against plain forward passes."""
    search_seconds: float
    analysis_seconds: float
    peak_memory: int
    """Bytes: of the GPU where there is one, else of the process."""
    device: str
    dtype: str

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.loading_seconds + self.search_seconds + self.analysis_seconds


class Proof(Record):
    """An exported model, reloaded in a fresh process with plain transformers and compared with the skipped original."""

    passed: bool
    reasons: tuple[str, ...] = ()
    """Why it did not pass, one sentence each."""
    blocks_before: int
    blocks_after: int
    kept_blocks: tuple[int, ...]
    parameters_before: Annotated[int, Field(gt=0)]
    parameters_after: int
    bytes_before: int | None = None
    """Of the GGUF file the blocks were cut out of; None for a folder, which may be of another type than its origin."""
    bytes_after: int
    """Of the weight files."""
    dtype: str
    tokens: int
    """Positions whose logits were compared."""
    max_logit_difference: float
    tolerance: float
    """Largest difference that passes."""
    generated_tokens: int
    generated_with_cache: tuple[int, ...]
    generated_without_cache: tuple[int, ...]
    generated_by_skipping: tuple[int, ...]
    """By the original model with the blocks skipped, without a cache."""
    seconds: float
    versions: dict[str, str]


class Run(Record):
    """A run folder, read: what `store.load` returns and pages draw."""

    run_id: str
    run_dir: Path
    spec: RunSpec
    stack: StackDescription | None = None
    trace: Trace | None = None
    analysis: Analysis | None = None
    analysis_unavailable: str | None = None
    """Why this model cannot be analysed, if so."""
    jobs: tuple[Job, ...] = ()

    @property
    def removal_list(self) -> tuple[int, ...]:
        """Blocks in the order of removal so far."""
        return self.trace.removal_list if self.trace else self.spec.given or ()

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Blocks that stay, in the order of the stack; empty until the model has been opened."""
        if self.stack is None:
            return ()
        removed = set(self.removal_list)
        return tuple(block for block in range(self.stack.num_blocks) if block not in removed)
