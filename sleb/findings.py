"""What a removal list costs and buys: what the jobs that judge one are asked, and what they find.

A finding is of one removal list (in the order of the stack; empty is the baseline) on one model in one dtype. What
makes two of them the same question is its `question`: nothing that has been answered is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .record import MOST, Measured, Record

RemovalList = tuple[int, ...]
"""Original, 0-based block indices in ascending order: the order of removal is nothing to a model."""


NAMED_TEXTS = ("wikitext2", "c4", "demo")
"""Texts by name, whatever files of that name lie around: two with a published protocol, and the one that is there."""


class _Lists(Record):
    """What a job judges: the baseline, and these lists beside it."""

    lists: tuple[RemovalList, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> _Lists:
        for each in self.lists:
            if list(each) != sorted(set(each)) or (each and not 0 <= each[0] <= each[-1] < MOST):
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
    shots: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Examples in a task's prompt; None is the task's own number."""
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    """At most so many windows of a text, evenly spread, and the first so many examples of a task: an estimate."""
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    """Tokens; the published protocols have 2048."""
    bos: Literal["auto", "yes", "no"] = "no"
    """BOS at the head of every window; the published protocols have none."""


Shape = tuple[Annotated[int, Field(ge=1, le=MOST, strict=True)], Annotated[int, Field(ge=1, le=MOST, strict=True)]]
"""Sequences, and tokens each."""


class BenchmarkSpec(_Lists):
    """Time of the baseline and of each list, in turn."""

    kind: Literal["benchmark"] = "benchmark"
    prompt: Shape | None = (1, 2048)
    """Sequences and tokens each of prompt processing; None leaves it out."""
    generation: Shape | None = (64, 128)
    """Sequences and generated tokens each; None leaves it out."""
    generation_prompt: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 64
    """Tokens that generation begins from, each; 64 in the reference (latency_utils.py)."""
    prompt_repetitions: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 50
    generation_repetitions: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 10


class QuantizeSpec(_Lists):
    """Perplexity of quantised weights, of the baseline and of each list; and one written, if `out` says so."""

    kind: Literal["quantize"] = "quantize"
    schemes: tuple[Literal["int8", "int4"], ...] = ("int8",)
    group_size: Annotated[int, Field(ge=16, le=MOST, strict=True)] = 128
    """Of int4: weights that share a scale."""
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    out: str | None = None
    """Folder for the last list in the last scheme."""
    replace: bool = False


class HealSpec(_Lists):
    """A short fine-tuning of low-rank adapters on the last of `lists`, its cuts mended without training, or both."""

    kind: Literal["heal"] = "heal"
    how: Literal["lora", "linear", "both"] = "lora"
    """`linear`: the last linear layer before each cut is fitted anew, by least squares; nothing is trained. `both`:
    that first, and then adapters are trained on what it gives."""
    source: str = "wikitext2"
    """Text to heal on, as for a search's calibration; conversations with `chat`."""
    chat: bool = False
    sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 1024
    """128 for `linear`, unless it is given."""
    sequence_length: Annotated[int, Field(ge=8, le=MOST, strict=True)] = 512
    epochs: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 1
    rank: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 8
    seed: Annotated[int, Field(ge=0, le=MOST, strict=True)] = 0
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    out: str | None = None
    """Folder to write; None keeps only what was measured."""
    adapter: bool = False
    """The adapter alone, to load beside the streamlined model; else merged."""
    replace: bool = False

    @model_validator(mode="before")
    @classmethod
    def _enough_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sequences") is None:
            return data | {"sequences": 128 if data.get("how") == "linear" else 1024}
        return data


class GenerateSpec(_Lists):
    """What the baseline and each list say to a prompt."""

    kind: Literal["generate"] = "generate"
    prompt: str
    tokens: Annotated[int, Field(ge=1, le=4096, strict=True)] = 64
    chat: bool = False
    """The prompt is a user's turn in the chat template."""

    @field_validator("prompt")
    @classmethod
    def _can_be_written(cls, prompt: str) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8
            raise ValueError(f"The prompt is no UTF-8 text (character {error.start})") from error
        return prompt


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
    """`acc`, `acc_norm`, ...: shares, or whatever the task measures; with the filter of the answers where it has one
    (`exact_match,strict-match`)."""
    standard_errors: dict[str, float]
    """Of those metrics that have one."""
    higher_is_better: dict[str, bool]
    examples: int
    shots: int | None
    limit: int | None
    version: str
    """Of the task, in lm-eval's words; and of lm-eval."""
    examples_hash: str = ""
    """Of the examples and of how they are put and scored: an edited file is another question."""
    changes: dict[str, float] = Field(default_factory=dict)
    """Of those metrics against the baseline; empty for the baseline."""
    change_standard_errors: dict[str, float] = Field(default_factory=dict)
    """Over examples, in pairs; of metrics that are a mean over them."""
    subtasks: tuple[str, ...] = ()
    """Of a group: the tasks that its metrics are taken over."""


class Timing(Finding):
    """Seconds of one list and of the baseline, taken in turn on the same input."""

    of = ("shape", "sequences", "tokens", "prompt_tokens", "device", "threads", "host")
    kind: Literal["timing"] = "timing"
    shape: Literal["prompt", "generation"]
    sequences: int
    tokens: int
    """Each: read in a prompt, or generated."""
    prompt_tokens: int = 0
    """Each: what generation began from, whose reading is part of the time."""
    baseline_times: tuple[float, ...]
    """Seconds of each repetition after the warm-up, in the order in which they were taken; those of the list beside
    them, and the same ones where the list is empty."""
    times: tuple[float, ...]
    threads: int | None
    """Of a CPU."""
    host: str
    baseline_peak_memory: int | None = None
    """Bytes of the GPU: the model's own weights, and what came on top while it worked; None on a CPU, where it cannot
    be told apart."""
    peak_memory: int | None = None
    baseline_cache_bytes: int
    """Of the KV cache at the end, or whatever state the family keeps in its place."""
    cache_bytes: int
    baseline_parameters: int
    parameters: int
    proportional: float
    """What the speedup would be were time proportional to blocks."""
    gone: bool = True
    """Whether the blocks were really gone; else they were skipped, because the family's config cannot say that they
    are, and memory and parameters are the unmodified model's."""

    @property
    def ratios(self) -> list[float]:
        """Time of the baseline over that of the list, round by round: a busier hour slows both of a round."""
        return [before / after for before, after in zip(self.baseline_times, self.times, strict=True)]

    @property
    def speedup(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @model_validator(mode="after")
    def _in_pairs(self) -> Timing:
        times = (*self.baseline_times, *self.times)
        if not times or len(self.baseline_times) != len(self.times) or min(times) <= 0:
            raise ValueError("times come in pairs, and are above zero")
        return self

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratios."""
        ratios = self.ratios
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
    change: float | None = None
    """Mean paired difference measured - before, nats per token."""
    change_standard_error: float | None = None
    weight_bytes_before: int
    """Of all weights of this list's model in its dtype."""
    weight_bytes: int
    """The same with quantised weights packed, scales included: as a file holds them."""
    quantised_share: float | None = None
    """Of the weights of this list's model; the others (embeddings, head, norms) stay as they are."""
    group_sizes: tuple[int, ...] = ()
    """Of int4: those that were used, since a group must divide its row."""
    library: str
    out: str | None = None
    """Folder that was written."""


class Healing(Finding):
    """Perplexity of one list before and after it was healed."""

    of = ("ask", "text", "healed_on")
    kind: Literal["healing"] = "healing"
    ask: HealSpec
    """What bears on the weights alone: the same question whatever else was asked with it."""
    text: EvaluatedText
    baseline: Measured
    before: Measured
    after: Measured
    """Of the merged weights."""
    change: float | None = None
    """Mean paired difference after - before, nats per token."""
    change_standard_error: float | None = None
    healed_on: str = ""
    """Hash of the token ids."""
    healing_text: str = ""
    """In words."""
    held_out_before: Measured | None = None
    """Of sequences of the text to heal on that were not healed on (`linear` chooses its ridge by them)."""
    held_out_after: Measured | None = None
    trained_parameters: int = 0
    """Of the adapters, or of the layers that were fitted anew."""
    trained_tokens: int = 0
    losses: tuple[float, ...] = ()
    """Of training, nats per token, over its course."""
    out: str | None = None
    """Folder that was written."""


class Flip(Record):
    """A place where the most likely next token is another one."""

    position: int
    """Of the predicted token in the baseline's text: prompt and continuation, from 0."""
    before: str
    """What the baseline finds most likely there: in the continuation, the token that is there."""
    after: str
    before_probability: float
    after_probability: float
    """Each model's own of its own token."""


class Generation(Finding):
    """A continuation by the baseline and by one list, and where their predictions part on the baseline's text."""

    of = ("ask",)
    kind: Literal["generation"] = "generation"
    ask: GenerateSpec
    """Without lists: the same question whatever other lists were asked with it."""
    prompt_tokens: tuple[str, ...]
    """The text each token stands for, special tokens and a chat template's turns included."""
    baseline_tokens: tuple[str, ...]
    """The continuation alone, up to and with the model's own end-of-sequence token."""
    tokens: tuple[str, ...]
    baseline_text: str
    """The continuation without special tokens."""
    text: str
    flips: tuple[Flip, ...]
    compared: int
    """Predictions on the baseline's text that were compared: of all its tokens but the first."""
    baseline_seconds: float
    list_seconds: float
    baseline_ids: tuple[int, ...] = ()
    """Token ids of the continuation."""
    ids: tuple[int, ...] = ()
    baseline_cached: bool = True
    """Whether it was generated with a KV cache; else every token took a whole forward pass."""
    cached: bool = True


AnyFinding = Annotated[
    TextPerplexity | TaskAccuracy | Timing | Quantization | Healing | Generation, Field(discriminator="kind")
]


def sorted_list(blocks: Any) -> RemovalList:
    """A removal list in the order of the stack."""
    return tuple(sorted(blocks))
