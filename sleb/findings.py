"""What a removal list costs and buys: what the jobs that judge one are asked, and what they find.

A finding is of one removal list (in the order of the stack; empty is the baseline) on one model in one dtype. What
makes two of them the same question is its `question`: nothing that has been answered is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .record import Measured, Record

RemovalList = tuple[int, ...]
"""Original, 0-based block indices in ascending order: the order of removal is nothing to a model."""


PUBLISHED = ("wikitext2", "c4")
"""Texts with a protocol of their own, by name, whatever files of that name lie around."""


class _Lists(Record):
    """What a job judges: the baseline, and these lists beside it."""

    lists: tuple[RemovalList, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> _Lists:
        for each in self.lists:
            if list(each) != sorted(set(each)) or (each and each[0] < 0):
                raise ValueError(f"a removal list holds each block once, in ascending order; found {list(each)}")
        return self


class EvaluateSpec(_Lists):
    """Perplexity on texts, and accuracy on tasks."""

    kind: Literal["evaluate"] = "evaluate"
    texts: tuple[str, ...] = ("wikitext2",)
    """`wikitext2` and `c4` by the published protocols, or files: `.raw` as WikiText rows, others as one text."""
    tasks: tuple[str, ...] = ()
    """Of lm-eval, by name."""
    task_folder: str | None = None
    """With more tasks, in lm-eval's own YAML."""
    shots: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Examples in a task's prompt; None is the task's own number."""
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    """At most so many windows of a text, evenly spread, and examples of a task: an estimate."""
    window: Annotated[int, Field(ge=2, strict=True)] = 2048
    """Tokens; the published protocols have 2048."""
    bos: Literal["auto", "yes", "no"] = "no"
    """BOS at the head of every window; the published protocols have none."""


class BenchmarkSpec(_Lists):
    """Time of the baseline and of each list, in turn."""

    kind: Literal["benchmark"] = "benchmark"
    prompt: tuple[int, int] | None = (1, 2048)
    """Sequences and tokens each of prompt processing; None leaves it out."""
    generation: tuple[int, int] | None = (64, 128)
    """Sequences and generated tokens each; None leaves it out."""
    prompt_repetitions: Annotated[int, Field(ge=1, strict=True)] = 50
    generation_repetitions: Annotated[int, Field(ge=1, strict=True)] = 10


class QuantizeSpec(_Lists):
    """Perplexity of quantised weights, of the baseline and of each list; and one written, if `out` says so."""

    kind: Literal["quantize"] = "quantize"
    schemes: tuple[Literal["int8", "int4"], ...] = ("int8",)
    group_size: Annotated[int, Field(ge=16, strict=True)] = 128
    """Of int4: weights that share a scale."""
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, strict=True)] = 2048
    out: str | None = None
    """Folder for the last list in the last scheme."""
    replace: bool = False


class HealSpec(_Lists):
    """A short fine-tuning of low-rank adapters on the last of `lists`, or a remedy at its cuts without training."""

    kind: Literal["heal"] = "heal"
    how: Literal["lora", "bias", "linear"] = "lora"
    """`bias`: the mean of what a cut took away is added there; `linear`: a least-squares map. Neither is trained."""
    source: str = "wikitext2"
    """Text to train on, as for a search's calibration; conversations with `chat`."""
    chat: bool = False
    sequences: Annotated[int, Field(ge=1, strict=True)] = 1024
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 512
    epochs: Annotated[int, Field(ge=1, strict=True)] = 1
    rank: Annotated[int, Field(ge=1, strict=True)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_sequences: Annotated[int, Field(ge=1, strict=True)] = 8
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, strict=True)] = 2048
    out: str | None = None
    """Folder to write; None keeps only what was measured."""
    adapter: bool = False
    """The adapter alone, to load beside the streamlined model; else merged."""
    replace: bool = False


class GenerateSpec(_Lists):
    """What the baseline and each list say to a prompt."""

    kind: Literal["generate"] = "generate"
    prompt: str
    tokens: Annotated[int, Field(ge=1, le=4096, strict=True)] = 64
    chat: bool = False
    """The prompt is a user's turn in the chat template."""


Ask = Annotated[EvaluateSpec | BenchmarkSpec | QuantizeSpec | HealSpec | GenerateSpec, Field(discriminator="kind")]


class Finding(Record):
    """Something found about one removal list."""

    of: ClassVar[tuple[str, ...]] = ()
    """Fields that make the question, besides list, model and dtype."""
    kind: str
    removal_list: RemovalList
    dtype: str
    device: str
    """As torch names it, or the GPU's name where time was measured."""
    seconds: float
    """That it took to find."""
    finished: float
    """When: seconds since the epoch."""

    @property
    def question(self) -> str:
        """Equal for findings that answer the same question: the name of its file."""
        asked = self.model_dump(mode="json", include={"removal_list", "dtype", *self.of})
        text = json.dumps(asked, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


class EvaluatedText(Record):
    """Which text, cut how."""

    name: str
    """`wikitext2`, `c4`, or the file's name."""
    description: str
    """In words."""
    tokens_hash: str
    """Of the token ids evaluated."""
    windows: Annotated[int, Field(ge=1)]
    of_windows: Annotated[int, Field(ge=1)]
    """That the whole text gives: more than `windows` where it is an estimate."""
    window: int
    """Tokens each."""
    bos: bool

    @property
    def is_whole(self) -> bool:
        """Whether every window was evaluated."""
        return self.windows == self.of_windows


class TextPerplexity(Finding):
    """Perplexity of one list on one text."""

    of = ("text",)
    kind: Literal["perplexity"] = "perplexity"
    text: EvaluatedText
    measured: Measured
    rise: float | None = None
    """Mean paired difference to the baseline, nats per token; None for the baseline."""
    rise_standard_error: float | None = None
    """Over windows, in pairs; None below two of them."""


class TaskAccuracy(Finding):
    """Metrics of one list on one task, as lm-eval gives them."""

    of = ("task", "shots", "limit", "version", "examples_hash")
    kind: Literal["accuracy"] = "accuracy"
    task: str
    metrics: dict[str, float]
    """`acc`, `acc_norm`, ...: shares, or whatever the task measures."""
    standard_errors: dict[str, float]
    """Of those metrics that have one."""
    higher_is_better: dict[str, bool]
    examples: int
    shots: int | None
    limit: int | None
    version: str
    """Of the task, in lm-eval's words; and of lm-eval."""
    examples_hash: str = ""
    """Of a local task's files, where there are any."""


class Timing(Finding):
    """Seconds of one list and of the baseline, taken in turn on the same input."""

    of = ("shape", "sequences", "tokens", "device", "threads", "host")
    kind: Literal["timing"] = "timing"
    shape: Literal["prompt", "generation"]
    sequences: int
    tokens: int
    """Each: read in a prompt, or generated."""
    baseline_times: tuple[float, ...]
    """Seconds of each repetition after the warm-up."""
    times: tuple[float, ...]
    threads: int | None
    """Of a CPU."""
    host: str
    baseline_peak_memory: int | None = None
    """Bytes of the GPU; None on a CPU, where it cannot be told apart."""
    peak_memory: int | None = None
    baseline_cache_bytes: int
    """Of the KV cache at the end."""
    cache_bytes: int
    baseline_parameters: int
    parameters: int
    proportional: float
    """What the speedup would be were time proportional to blocks."""

    @property
    def speedup(self) -> float:
        """Median time of the baseline over the median of the list."""
        return statistics.median(self.baseline_times) / statistics.median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio over pairs of neighbouring repetitions."""
        ratios = [before / after for before, after in zip(self.baseline_times, self.times, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


class Quantization(Finding):
    """Perplexity of one list with quantised weights."""

    of = ("scheme", "group_size", "text")
    kind: Literal["quantization"] = "quantization"
    scheme: str
    group_size: int | None
    text: EvaluatedText
    before: Measured
    measured: Measured
    weight_bytes_before: int
    weight_bytes: int
    library: str
    out: str | None = None


class Healing(Finding):
    """Perplexity of one list before and after it was healed."""

    of = ("ask", "text")
    kind: Literal["healing"] = "healing"
    ask: HealSpec
    text: EvaluatedText
    baseline: Measured
    before: Measured
    after: Measured
    change: float | None = None
    """Mean paired difference after - before, nats per token."""
    change_standard_error: float | None = None
    trained_parameters: int = 0
    trained_tokens: int = 0
    losses: tuple[float, ...] = ()
    """Of training, over its course."""
    out: str | None = None


class Flip(Record):
    """A place where the most likely next token is another one."""

    position: int
    """In the baseline's text: prompt and continuation."""
    before: str
    after: str
    before_probability: float
    after_probability: float
    """Each model's own of its own token."""


class Generation(Finding):
    """A continuation by the baseline and by one list, and where their predictions part on the baseline's text."""

    of = ("ask",)
    kind: Literal["generation"] = "generation"
    ask: GenerateSpec
    prompt_tokens: tuple[str, ...]
    baseline_tokens: tuple[str, ...]
    tokens: tuple[str, ...]
    baseline_text: str
    text: str
    flips: tuple[Flip, ...]
    compared: int
    """Predictions on the baseline's text that were compared."""
    baseline_seconds: float
    list_seconds: float


AnyFinding = Annotated[
    TextPerplexity | TaskAccuracy | Timing | Quantization | Healing | Generation, Field(discriminator="kind")
]


def sorted_list(blocks: Any) -> RemovalList:
    """A removal list in the order of the stack."""
    return tuple(sorted(blocks))
