"""Seconds of removal lists and of the baseline, by turns on the same input. Reads no text.

Of predictions it sees, in the warm-up, whether they are numbers.

What is timed is the model's own `generate`, which every family has and which users of the smaller model call: reading a
prompt is the time to the first token, generating is a fixed number of tokens from a short prompt, whatever ends a
sentence. The baseline and all lists run once each in every round, in the opposite order every other round, so that
a machine that grows slower or faster does so for all of them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from sleb.errors import ModelError, NotNumbers, OptionError, ScoringError, model_without
from sleb.evaluation.evaluated_model import Subject
from sleb.model.generation import cache_bytes, continued, numbers_only, positions_of, require_resident
from sleb.model.out_of_memory import is_out_of_memory
from sleb.records import BenchmarkJob, BenchmarkSpec, RemovalList, Timing

T = TypeVar("T")


@dataclass(frozen=True)
class _Shape:
    """What is timed, and how often."""

    name: Literal["prompt", "generation"]
    sequences: int
    tokens: int
    prompt_tokens: int  # that generation begins from; none of its own for a prompt
    repetitions: int

    @property
    def setting(self) -> str:
        return f"`{self.name}={self.sequences}x{self.tokens}`"

    @property
    def read(self) -> int:
        """Tokens of each sequence that go in."""
        return self.tokens if self.name == "prompt" else self.prompt_tokens

    @property
    def generated(self) -> int:
        """Tokens of each sequence that come out; a prompt has been read when its first one does."""
        return 1 if self.name == "prompt" else self.tokens


@dataclass
class _Timed:
    """The baseline or a list, and what was measured of it so far."""

    removal_list: RemovalList
    model: nn.Module
    removed: bool
    """Whether the blocks are really removed; else they are skipped while it runs."""
    times: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_memory: int | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the model that ran; shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def require(job: BenchmarkJob) -> None:
    """Refuse what can be refused before minutes of loading. Raises `OptionError`."""
    if job.ask.prompt is None and job.ask.generation is None:
        raise OptionError("Nothing to measure: give `prompt` or `generation` a shape such as 1x2048.")


def work(subject: Subject, ask: BenchmarkSpec) -> None:
    """Time both shapes one after the other, each kept when it is done.

    Raises `OptionError` for a shape that the model has no positions for, `ScoringError` for one that memory has no room
    for, `ModelError` where the family cannot generate, `NotNumbers` where one of these models predicts no numbers; of a
    list, once the others are done.
    """
    require_resident(subject.stack.streamed, "timing it")
    shapes = _shapes(ask)
    for shape in shapes:
        _require_positions(subject, shape)
    refused: NotNumbers | None = None
    for shape in shapes:
        questions = {each: _question(subject, shape, each) for each in ask.lists or ((),)}
        known = {each.question: each for each in subject.known(Timing) if len(each.times) >= shape.repetitions}
        ahead = [each for each, question in questions.items() if question not in known]
        timings, without_numbers = _measured(subject, shape, ahead) if ahead else ({}, None)
        refused = refused or without_numbers
        for each, question in questions.items():
            if each in timings:
                subject.keep(timings[each])
            elif each not in ahead:
                subject.answer(known[question])
    if refused is not None:
        raise refused


def _shapes(ask: BenchmarkSpec) -> list[_Shape]:
    shapes = []
    if ask.prompt is not None:
        shapes.append(_Shape("prompt", *ask.prompt, 0, ask.prompt_repetitions))
    if ask.generation is not None:
        shapes.append(_Shape("generation", *ask.generation, ask.generation_prompt, ask.generation_repetitions))
    return shapes


def _require_positions(subject: Subject, shape: _Shape) -> None:
    limit = positions_of(subject.stack.config)
    if limit is None or shape.read + shape.generated - 1 <= limit:  # the last token is not read
        return
    if shape.name == "prompt":
        raise OptionError(
            f"{shape.setting}: the model has {limit} positions, fewer than {shape.tokens} tokens; "
            f"give `prompt={shape.sequences}x{limit}` or less."
        )
    room = limit - shape.prompt_tokens + 1
    advice = f"give `generation={shape.sequences}x{room}` or less" if room > 0 else "lower `generation_prompt`"
    raise OptionError(
        f"{shape.setting} after a prompt of {shape.prompt_tokens} tokens: the model has {limit} positions; {advice}."
    )


def _question(subject: Subject, shape: _Shape, removal_list: RemovalList) -> str:
    """The question that a timing of this list would answer."""
    where = _where(subject, shape)
    return Timing.model_construct(removal_list=removal_list, dtype=subject.loaded.dtype, **where).question


def _where(subject: Subject, shape: _Shape) -> dict[str, Any]:
    """Fields that say what is timed, and on what machine."""
    gpus = _gpus(subject.model)
    name = " + ".join(torch.cuda.get_device_name(index) for index in gpus)
    return dict(
        shape=shape.name,
        sequences=shape.sequences,
        tokens=shape.tokens,
        prompt_tokens=shape.prompt_tokens,
        device=name or subject.loaded.device,
        threads=None if gpus else torch.get_num_threads(),
        host=socket.gethostname(),
    )


def _measured(
    subject: Subject, shape: _Shape, lists: list[RemovalList]
) -> tuple[dict[RemovalList, Timing], NotNumbers | None]:
    """Timings of these lists beside the baseline, round by round, and the error of those that predict no numbers."""
    size = f"{shape.sequences} x {shape.tokens}"
    subject.meter.phase(f"Reading a prompt: {size} tokens" if shape.name == "prompt" else f"Generating: {size} tokens")
    started = time.perf_counter()
    try:
        with _opened(subject, lists) as models:
            refused = _run_rounds(subject, shape, models)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        half = f"{max(1, shape.sequences // 2)}x{shape.tokens if shape.sequences > 1 else max(1, shape.tokens // 2)}"
        raise ScoringError(
            f"Out of memory with {shape.setting}; lower it, to {half} for one, or choose a smaller `dtype`."
        ) from error
    seconds = (time.perf_counter() - started) / len(lists)
    baseline, blocks = models[0], len(subject.stack)
    timings = {
        each.removal_list: Timing(
            **subject.facts(each.removal_list, seconds)
            | _where(subject, shape)
            | dict(
                baseline_times=tuple(baseline.times),
                times=tuple(each.times),
                baseline_peak_memory=baseline.peak_memory,
                peak_memory=each.peak_memory,
                baseline_cache_bytes=baseline.cache_bytes,
                cache_bytes=each.cache_bytes,
                baseline_parameters=baseline.parameters,
                parameters=each.parameters,
                proportional=blocks / (blocks - len(each.removal_list)),
                gone=each.removed,
            )
        )
        for each in models
        if each.removal_list in lists
    }
    return timings, refused


@contextmanager
def _opened(subject: Subject, lists: list[RemovalList]) -> Iterator[list[_Timed]]:
    """The baseline first, then the lists; all of them in memory at once, with the weights of one."""
    with ExitStack() as held:
        models = [_Timed((), subject.model, removed=True)]
        for each in lists:
            if not each:
                continue
            of_its_own = ExitStack()
            model = of_its_own.enter_context(subject.without(each))
            if model is subject.model:
                of_its_own.close()  # skipped while it runs: the baseline shares the model
            else:
                held.enter_context(of_its_own)
            models.append(_Timed(each, model, removed=model is not subject.model))
        yield models


def _run_rounds(subject: Subject, shape: _Shape, models: list[_Timed]) -> NotNumbers | None:
    """Run all models round by round; returns the error of the first that predicts no numbers in the warm-up.

    Such a model leaves `models`. Raises `NotNumbers` where it is the baseline.
    """
    refused: NotNumbers | None = None
    ids = _ids(subject, shape)
    total, done = (shape.repetitions + 1) * len(models), 0
    for number in range(shape.repetitions + 1):
        for each in list(models if number % 2 == 0 else reversed(models)):
            name = subject.num_removed(each.removal_list)
            try:
                with ExitStack() as around:
                    if not each.removed:
                        around.enter_context(subject.stack.skipping(each.removal_list))
                    if number == 0:
                        around.enter_context(numbers_only(each.model, model_without(each.removal_list)))
                    _run(each, ids, shape.generated)
            except NotNumbers as error:
                if not each.removal_list:
                    raise
                refused = refused or error
                models.remove(each)
            except ModelError as error:
                other = "" if shape.name == "prompt" else "; `generation=none` times the prompt alone"
                sentence = f"{name}: {str(error).removesuffix('.')}{other}."
                raise ModelError(sentence[0].upper() + sentence[1:]) from error
            done += 1
            which = f"repetition {number} of {shape.repetitions}" if number else "warm-up"
            subject.meter.part(done / total, f"{which}, {name}")
        if number == 0:
            for each in models:
                each.times.clear()  # one dummy each (paper, Appendix B.5)
    return refused


def _run(timed: _Timed, ids: torch.Tensor, tokens: int) -> None:
    """Run one model once, and note its time, memory and cache; every run's cache is equally large."""
    gpus = _gpus(timed.model)
    before = 0
    for index in gpus:
        torch.cuda.reset_peak_memory_stats(index)
        before += torch.cuda.memory_allocated(index)
    (_, cache), seconds = _clocked(gpus, lambda: continued(timed.model, ids, tokens, stop=False))
    timed.times.append(seconds)
    if gpus:
        # The baseline's weights are in memory whichever model runs: each model's own count, and what came on top.
        on_top = sum(torch.cuda.max_memory_allocated(index) for index in gpus) - before
        timed.peak_memory = max(timed.peak_memory or 0, on_top + _resident_bytes(timed.model))
    timed.cache_bytes = cache_bytes(cache)


def _clocked(gpus: list[int], work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and its seconds: by the GPU's own clock where there is one GPU, else by the wall's.

    Nothing is waited for but the end: the GPU is idle before, because the end of the last run was waited for.
    """
    if len(gpus) == 1:
        stream = torch.cuda.current_stream(gpus[0])
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        result = work()
        end.record(stream)
        end.synchronize()
        return result, start.elapsed_time(end) / 1000
    for index in gpus:
        torch.cuda.synchronize(index)
    begin = time.perf_counter()
    result = work()
    for index in gpus:
        torch.cuda.synchronize(index)
    return result, time.perf_counter() - begin


def _gpus(model: nn.Module) -> list[int]:
    """Where a model's weights are, by index; none on a CPU."""
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's own weights on GPUs."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda)


def _ids(subject: Subject, shape: _Shape) -> torch.Tensor:
    """Ordinary tokens drawn at random, the same ones every time: int64 (sequences, tokens)."""
    known = subject.stack.config.vocab_size
    if hasattr(subject.tokenizer, "__len__"):
        known = min(known, len(subject.tokenizer))
    special = set(getattr(subject.tokenizer, "all_special_ids", ()))
    choices = torch.tensor([token for token in range(known) if token not in special] or range(known))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(choices), (shape.sequences, shape.read), generator=generator)
    return choices[drawn].to(subject.stack.device)
