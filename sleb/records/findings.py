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
    depends_on: str = ""
    """Key of the model and of the code that found it; empty in files of versions that compared weights alone."""

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
    def overlap(self) -> str:
        """What it shares with the text that the blocks were chosen on, in words; empty where nothing is known."""
        said = self.description.rpartition("; ")[2]
        return said if "the blocks were chosen on" in said else ""

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
    truncated: int | None = None
    """Examples with a prompt longer than the model, of which only the end was read; None where nobody counted."""
    not_numbers: bool = False
    """Whether the list's predictions were not numbers: then there are no metrics."""


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
    windows_healed_on: Annotated[int, Field(ge=0)] = 0
    """Evaluated windows that have half a window or more in common with a sequence that was healed on."""
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

    @property
    def known_apart(self) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
        """What tells the tokens of both continuations apart: ids, since of a character in several tokens only the last
        has text; texts where there are no ids.
        """
        if len(self.baseline_ids) == len(self.baseline_tokens) and len(self.ids) == len(self.tokens):
            return self.baseline_ids, self.ids
        return self.baseline_tokens, self.tokens


AnyFinding = Annotated[
    TextPerplexity | TaskAccuracy | Timing | Quantization | Healing | Generation, Field(discriminator="kind")
]
