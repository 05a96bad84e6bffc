"""The questions that a job can answer about removal lists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sleb.records.base import MOST, Record

RemovalList = tuple[int, ...]
"""Original, 0-based block indices in ascending order: the order of removal makes no difference to a model."""

NAMED_TEXTS = ("wikitext2", "c4", "demo")
"""Texts known by name, even where a file has that name: two with a published protocol, and the installed one."""


class _Lists(Record):
    """A question about the baseline and some removal lists."""

    lists: tuple[RemovalList, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Texts that the answer reads, by name or as files."""
        return ()

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
    """`wikitext2` and `c4` by the published protocols, or files: `.raw` as WikiText rows, `.jsonl` and `.parquet` as
    documents, others as one text."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, by name."""
    task_folder: str | None = None
    """A folder with more tasks, in lm-eval's own YAML."""
    shots: Annotated[int, Field(ge=0, le=MOST, strict=True)] | None = None
    """Examples in a task's prompt; None is the task's own number."""
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    """The most windows taken of a text, evenly spread, and examples of a task, the first ones: an estimate."""
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    """Length of a window in tokens; the published protocols have 2048."""
    bos: Literal["auto", "yes", "no"] = "no"
    """BOS at the head of every window; the published protocols have none."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Texts that the answer reads, by name or as files."""
        return self.texts


Shape = tuple[Annotated[int, Field(ge=1, le=MOST, strict=True)], Annotated[int, Field(ge=1, le=MOST, strict=True)]]
"""Number of sequences, and tokens in each."""


class BenchmarkSpec(_Lists):
    """Latency and throughput of the baseline and of each list, measured alternately."""

    kind: Literal["benchmark"] = "benchmark"
    prompt: Shape | None = (1, 2048)
    """Sequences and tokens each of prompt processing; None leaves it out."""
    generation: Shape | None = (64, 128)
    """Sequences and generated tokens each; None leaves it out."""
    generation_prompt: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 64
    """Prompt tokens of each sequence that is generated; 64 in the reference (latency_utils.py)."""
    prompt_repetitions: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 50
    generation_repetitions: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 10


class QuantizeSpec(_Lists):
    """Perplexity of the quantised baseline and of each quantised list; the last one is written to `out`, if given."""

    kind: Literal["quantize"] = "quantize"
    schemes: tuple[Literal["int8", "int4"], ...] = ("int8",)
    group_size: Annotated[int, Field(ge=16, le=MOST, strict=True)] = 128
    """Number of int4 weights that share a scale."""
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    out: str | None = None
    """Folder for the last list in the last scheme."""
    replace: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Texts that the answer reads, by name or as files."""
        return self.texts


class HealSpec(_Lists):
    """A short LoRA training of the model without the last of `lists`, a least-squares refit at its cuts, or both."""

    kind: Literal["heal"] = "heal"
    how: Literal["lora", "linear", "both"] = "lora"
    """`linear`: a least-squares refit of the last linear layer before each cut, without training. `both`: that
    first, and then LoRA training of the result."""
    source: str = "wikitext2"
    """Text to heal on, as for a search's calibration; conversations with `chat`."""
    chat: bool = False
    sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 1024
    """Sequences of that text; 128 for `linear`, unless it is given."""
    sequence_length: Annotated[int, Field(ge=8, le=MOST, strict=True)] = 512
    epochs: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 1
    rank: Annotated[int, Field(ge=1, le=8192, strict=True)] = 8
    learning_rate: Annotated[float, Field(ge=1e-12, le=1)] = 1e-4
    batch_sequences: Annotated[int, Field(ge=1, le=MOST, strict=True)] = 8
    seed: Annotated[int, Field(ge=0, le=MOST, strict=True)] = 0
    texts: tuple[str, ...] = ("wikitext2",)
    limit: Annotated[int, Field(ge=1, le=MOST, strict=True)] | None = None
    window: Annotated[int, Field(ge=2, le=MOST, strict=True)] = 2048
    out: str | None = None
    """Folder to write; None keeps only what was measured."""
    adapter: bool = False
    """Whether the adapter is written alone, to load beside the streamlined model; else it is merged."""
    replace: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Texts that the answer reads, by name or as files."""
        return (*self.texts, self.source)

    @model_validator(mode="before")
    @classmethod
    def _enough_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sequences") is None:
            return data | {"sequences": 128 if data.get("how") == "linear" else 1024}
        return data


class GenerateSpec(_Lists):
    """Continuations of a prompt by the baseline and each list."""

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
        except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
            raise ValueError(f"The prompt is not UTF-8 text (character {error.start})") from error
        return prompt


Ask = Annotated[EvaluateSpec | BenchmarkSpec | QuantizeSpec | HealSpec | GenerateSpec, Field(discriminator="kind")]


def sorted_list(blocks: Any) -> RemovalList:
    """A removal list in the order of the stack."""
    return tuple(sorted(blocks))
