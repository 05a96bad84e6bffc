"""What a removal list costs and buys: one record for each answer, kept with its run."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Hashable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sleb.records.base import Measured, Record
from sleb.records.requests import GenerateSpec, HealSpec, RemovalList


class Finding(Record):
    """An answer about one removal list."""

    of: ClassVar[tuple[str, ...]] = ()
    """Fields that belong to the question, besides list, model and dtype."""
    kind: str
    removal_list: RemovalList
    dtype: str
    device: str
    """The device in torch's spelling, or the GPU's name where time was measured."""
    seconds: float
    """Seconds that the answer took."""
    finished: float
    """Time of the answer, in seconds since the epoch."""
    depends_on: str = ""
    """Key of the model and of the code that gave the answer; empty in files of versions that compared weights alone."""

    @property
    def question(self) -> str:
        """Equal for findings that answer the same question: the name of its file."""
        question = self.model_dump(mode="json", include={"removal_list", "dtype", *self.of})
        text = json.dumps(question, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


class EvaluatedText(Record):
    """A text as it was cut for evaluation."""

    name: str
    """`wikitext2`, `c4`, or the file's name."""
    description: str
    """The text in words; part of the question, and so of the name of a finding's file."""
    tokens_hash: str
    """Hash of the token ids evaluated."""
    windows: Annotated[int, Field(ge=1)]
    of_windows: Annotated[int, Field(ge=1)]
    """Number of windows in the text: more than `windows` where the result is an estimate."""
    window: int
    """Length of each window in tokens."""
    bos: bool

    @property
    def overlap(self) -> str:
        """What it shares with the text that the blocks were chosen on, in words; empty where nothing is known."""
        remark = self.description.rpartition("; ")[2]
        return remark if "the blocks were chosen on" in remark else ""

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
    """Standard error of the rise over windows, in pairs; None below two of them."""


class TaskAccuracy(Finding):
    """Metrics of one list on one task, as lm-eval gives them."""

    of = ("task", "shots", "limit", "version", "examples_hash")
    kind: Literal["accuracy"] = "accuracy"
    task: str
    metrics: dict[str, float]
    """Shares such as `acc` and `acc_norm`, or whatever the task measures; with the filter of the answers where it has
    one (`exact_match,strict-match`)."""
    standard_errors: dict[str, float]
    """Standard errors of those metrics that have one."""
    higher_is_better: dict[str, bool]
    examples: int
    shots: int | None
    limit: int | None
    version: str
    """Version of the task, in lm-eval's words, and of lm-eval."""
    examples_hash: str = ""
    """Hash of the examples and of their prompts and scoring: an edited file is another question."""
    changes: dict[str, float] = Field(default_factory=dict)
    """Differences of those metrics to the baseline's; empty for the baseline."""
    change_standard_errors: dict[str, float] = Field(default_factory=dict)
    """Standard errors over examples, in pairs, for metrics that are a mean over them."""
    subtasks: tuple[str, ...] = ()
    """The tasks that the metrics of a group are taken over."""
    truncated: int | None = None
    """Number of examples whose prompt is too long for the model, so that only its end was read; None if not counted."""
    not_numbers: bool = False
    """Whether the list's predictions were not numbers, so that it has no metrics."""


class Timing(Finding):
    """Seconds of one list and of the baseline, measured alternately on the same input."""

    of = ("shape", "sequences", "tokens", "prompt_tokens", "device", "threads", "host")
    kind: Literal["timing"] = "timing"
    shape: Literal["prompt", "generation"]
    sequences: int
    tokens: int
    """Tokens of each sequence, read in a prompt or generated."""
    prompt_tokens: int = 0
    """Tokens of each prompt that generation began from; reading them is part of the time."""
    baseline_times: tuple[float, ...]
    """Seconds of each repetition after the warm-up, in the order in which they were taken; those of the list beside
    them, and the same ones where the list is empty."""
    times: tuple[float, ...]
    threads: int | None
    """Number of CPU threads; None on a GPU."""
    host: str
    baseline_peak_memory: int | None = None
    """Peak GPU memory in bytes: the model's own weights, and what it took while it worked; None on a CPU, where it
    cannot be separated."""
    peak_memory: int | None = None
    baseline_cache_bytes: int
    """Size of the KV cache at the end, or of the state that the family keeps in its place."""
    cache_bytes: int
    baseline_parameters: int
    parameters: int
    proportional: float
    """The speedup if time were proportional to blocks."""
    gone: bool = True
    """Whether the blocks were really removed; else they were skipped, because the family's config cannot express the
    removal, and memory and parameters are the baseline's."""

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
    """Mean paired difference `measured` - `before` in nats per token."""
    change_standard_error: float | None = None
    weight_bytes_before: int
    """Size of all weights of this list's model in its dtype."""
    weight_bytes: int
    """Size with quantised weights packed, scales included, as a file holds them."""
    quantised_share: float | None = None
    """Share of the weights that are quantised; the others (embeddings, head, norms) stay as they are."""
    group_sizes: tuple[int, ...] = ()
    """Group sizes used for int4, since a group must divide its row."""
    library: str
    out: str | None = None
    """The folder that was written, if one was."""


class Healing(Finding):
    """Perplexity of one list before and after it was healed."""

    of = ("ask", "text", "healed_on")
    kind: Literal["healing"] = "healing"
    ask: HealSpec
    """The settings that affect the weights: the question is the same whatever else was requested with it."""
    text: EvaluatedText
    baseline: Measured
    before: Measured
    after: Measured
    """Measured with the merged weights."""
    change: float | None = None
    """Mean paired difference `after` - `before` in nats per token."""
    change_standard_error: float | None = None
    healed_on: str = ""
    """Hash of the token ids that it was healed on."""
    healing_text: str = ""
    """The text that it was healed on, in words."""
    windows_healed_on: Annotated[int, Field(ge=0)] = 0
    """Evaluated windows that have half a window or more in common with a sequence that was healed on."""
    held_out_before: Measured | None = None
    """Measured on sequences of that text that were held out from healing (`linear` chooses its ridge by them)."""
    held_out_after: Measured | None = None
    trained_parameters: int = 0
    """Number of parameters of the adapters, or of the layers of the least-squares refit."""
    trained_tokens: int = 0
    losses: tuple[float, ...] = ()
    """Training losses in nats per token."""
    out: str | None = None
    """The folder that was written, if one was."""


class Flip(Record):
    """A place where the two models find different next tokens most likely."""

    position: int
    """Index of the predicted token in the baseline's text, prompt and continuation, from 0."""
    before: str
    """The baseline's most likely token there: in the continuation, the token that it generated."""
    after: str
    before_probability: float
    after_probability: float
    """The probability that the list's model gives its own token."""


class Generation(Finding):
    """A continuation by the baseline and by one list, and where their predictions differ on the baseline's text."""

    of = ("ask",)
    kind: Literal["generation"] = "generation"
    ask: GenerateSpec
    """The request without its lists: the question is the same whatever other lists came with it."""
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
    """Number of predictions compared on the baseline's text: for all its tokens but the first."""
    baseline_seconds: float
    list_seconds: float
    baseline_ids: tuple[int, ...] = ()
    """Token ids of the continuation."""
    ids: tuple[int, ...] = ()
    baseline_cached: bool = True
    """Whether it was generated with a KV cache; else every token took a full forward pass."""
    cached: bool = True

    @property
    def known_apart(self) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
        """The tokens of both continuations as they are compared: by id, or by text without ids.

        Of a character in several tokens only the last has text.
        """
        if len(self.baseline_ids) == len(self.baseline_tokens) and len(self.ids) == len(self.tokens):
            return self.baseline_ids, self.ids
        return self.baseline_tokens, self.tokens


AnyFinding = Annotated[
    TextPerplexity | TaskAccuracy | Timing | Quantization | Healing | Generation, Field(discriminator="kind")
]
