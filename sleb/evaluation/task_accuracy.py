"""Accuracy of removal lists on lm-eval's tasks, by the package as it is, on the live model.

Tasks are evaluated one by one, so that a stopped evaluation goes on after the last (list, task); a group's aggregate is
lm-eval's own, out of the findings about its tasks. Prompts have no chat template.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from sleb.errors import NotNumbers, OptionError, ScoringError, model_without
from sleb.evaluation.evaluated_model import Subject
from sleb.evaluation.lm_eval_library import apart, failures, seeded
from sleb.evaluation.lm_eval_tasks import Leaf, Tasks, as_sentences
from sleb.methods.statistics import mean_and_error
from sleb.model.generation import numbers_only
from sleb.model.out_of_memory import is_out_of_memory
from sleb.records import EvaluateSpec, RemovalList, TaskAccuracy
from sleb.runtime import findings_folder
from sleb.runtime.array_files import NO_ARRAYS, read_arrays
from sleb.runtime.files import inside, parse_json, replace_file

log = logging.getLogger(__name__)

_BOOTSTRAPS = 100_000  # lm-eval's own number, for metrics whose standard error has no formula
_SKETCH = 256  # tokens that an example is taken for where memory is short


def work(subject: Subject, ask: EvaluateSpec, tasks: Tasks) -> None:
    """Evaluate every task and group, for the baseline and the lists; each finding is kept as soon as it is made.

    A list whose predictions are not numbers has no metrics. Raises `NotNumbers` where the baseline's are
    none.
    """
    with tasks.files.as_data():
        _Evaluation(subject, ask, tasks).run()


class _Evaluation:
    """All tasks and groups for all lists: which answers are known, and how far the others are."""

    def __init__(self, subject: Subject, ask: EvaluateSpec, tasks: Tasks) -> None:
        self.subject, self.tasks = subject, tasks
        self.lists: tuple[RemovalList, ...] = tuple(dict.fromkeys([(), *ask.lists]))
        self.have = {each.question: each for each in subject.known(TaskAccuracy)}
        leaves = tasks.leaves.values()
        self.ahead = sum(
            leaf.count for removed in self.lists for leaf in leaves if not self.known(removed, leaf.question)
        )
        self.done = 0

    def known(self, removed: RemovalList, question: dict[str, Any]) -> TaskAccuracy | None:
        return self.have.get(_finding(self.subject, removed, question, _Result(), 0.0).question)

    def tell(self, leaf: Leaf, removed: RemovalList, share: float) -> None:
        message = f"{leaf.name}, {self.subject.num_removed(removed)}"
        self.subject.meter.part(min(1.0, (self.done + share * leaf.count) / max(1, self.ahead)), message)

    def run(self) -> None:
        self.subject.meter.phase("Accuracy on tasks")
        for removed in self.lists:
            with ExitStack() as opened:
                lm: Any = None
                for leaf in self.tasks.leaves.values():
                    answer = self.known(removed, leaf.question)
                    if answer is None:
                        lm = lm or opened.enter_context(_opened(self.subject, removed))
                        self._evaluate(lm, leaf, removed)
                    else:
                        self.subject.answer(answer)
            for group in self.tasks.groups:
                self._aggregate(group, removed)

    def _evaluate(self, lm: Any, leaf: Leaf, removed: RemovalList) -> None:
        _require_possible(lm, leaf, removed, self.subject)
        self.tell(leaf, removed, 0.0)
        start = time.perf_counter()
        with as_sentences(self.tasks.files, leaf.name, "cannot be evaluated with this model"):
            try:
                result = _evaluated(lm, leaf, partial(self.tell, leaf, removed))
            except NotNumbers:
                if not removed:
                    raise
                result = _Result(examples=leaf.count, not_numbers=True)
        self.done += leaf.count
        answer = _kept(self.subject, removed, leaf, result, time.perf_counter() - start, self.have)
        self.have[answer.question] = answer

    def _aggregate(self, group: Any, removed: RemovalList) -> None:
        question = self.tasks.question(group)
        answer = self.known(removed, question)
        if answer is not None:
            self.subject.answer(answer)
            return
        parts = [self.known(removed, leaf.question) for leaf in self.tasks.of(group)]
        of_baseline = self.known((), question) if removed else None
        with as_sentences(self.tasks.files, group.name, "cannot be aggregated"):
            answer = _aggregated(self.subject, removed, group, question, [each for each in parts if each], of_baseline)
        self.have[answer.question] = answer
        self.subject.keep(answer)


# ---- evaluation


@dataclass(frozen=True)
class _Result:
    """The result of one task, as lm-eval gives it."""

    metrics: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    examples: int = 0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Values of each example by metric, float64 (examples,), of metrics that are a mean over them."""
    truncated: int | None = None
    not_numbers: bool = False


@contextmanager
def _opened(subject: Subject, removed: RemovalList) -> Iterator[Any]:
    """lm-eval's wrapper around the model without these blocks; leaves model and tokenizer as they are."""
    streamed = subject.stack.streamed
    with ExitStack() as opened:
        model: Any
        if removed and streamed is not None:  # its weights are where the baseline's blocks load them
            opened.enter_context(subject.stack.skipping(removed))
            model = subject.model
        else:
            model = opened.enter_context(subject.without(removed))
        with apart(logging.ERROR), _keeping_weights(model):  # without the warning that the model is already loaded
            lm = _counting()(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(subject.tokenizer),  # it may be given a padding token
                batch_size=subject.job.batch_size or _batch_size(subject),
                softmax_dtype="float32",  # in bfloat16 sums of log-likelihoods have three digits, and choices tie
            )
        lm.whose = model_without(removed)
        opened.enter_context(_uncached(model))
        yield lm


def _counting() -> Any:
    """lm-eval's wrapper, which also remembers the prompts that it cuts."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        whose: str
        """The model that predicts, in words."""
        cut: set[Any]
        """Requests by their texts: (context, continuation), or the context to be continued."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.cut |= {texts for texts, context, rest in requests if len(context) + len(rest) > self.max_length + 1}
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:
            encoded = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            if left_truncate_len is not None and encoded[0].shape[1] == left_truncate_len:
                _, read = super().tok_batch_encode(strings, padding_side, None, truncation)
                lengths = read.sum(dim=1).tolist()
                self.cut |= {each for each, length in zip(strings, lengths, strict=True) if length > left_truncate_len}
            return encoded

    return Counting


def _batch_size(subject: Subject) -> int:
    """Examples at once, where the job does not say."""
    streamed = subject.stack.streamed
    if streamed is None:
        return 32 if subject.stack.device.type == "cuda" else 8
    logits = _SKETCH * subject.stack.config.vocab_size * 3 * 4  # bytes: the model's, their float32, its softmax
    return max(1, min(64, streamed.spare_bytes // logits))  # many: every batch reads all blocks


@contextmanager
def _keeping_weights(model: Any) -> Iterator[None]:
    """HFLM ties weights again as the config has it, which replaces a head that the checkpoint has of its own."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def _uncached(model: Any) -> Iterator[None]:
    """Comparing choices needs no cache, and some families' blocks pass theirs on, which a skipped block does not.

    Generating asks for a cache itself.
    """
    config = model.config.get_text_config()
    before = getattr(config, "use_cache", None)
    try:
        if before:
            config.use_cache = False
        yield
    finally:
        if before:
            config.use_cache = before


def _require_possible(lm: Any, leaf: Leaf, removed: RemovalList, subject: Subject) -> None:
    """A cache knows how far a text is by its first block: where that is skipped, nothing can be generated with it."""
    if removed and lm.model is subject.model and _generates(leaf):
        raise OptionError(
            f"Task {leaf.name!r} has text generated, for which blocks must be removed; in this model they can only be "
            "skipped. Choose tasks that compare choices."
        )


def _evaluated(lm: Any, leaf: Leaf, tell: Callable[[float], None]) -> _Result:
    """One task. A batch that does not fit into memory is halved. Raises `NotNumbers`, `ScoringError`."""
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    dtype = str(lm.model.dtype).removeprefix("torch.")
    lm.cut = set()
    while True:
        with apart(), seeded(lm.device), numbers_only(lm.model, lm.whose) if _generates(leaf) else nullcontext():
            leaf.task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            lm.set_cache_hook(_Counter(leaf, tell, partial(NotNumbers, lm.whose, dtype)))
            try:
                results = evaluate(lm, {"tasks": {leaf.name: leaf.task}}, limit=leaf.limit, bootstrap_iters=_BOOTSTRAPS)
                return replace(_result(results, leaf.name), truncated=_truncated(leaf, lm.cut))
            except failures() as error:
                if not is_out_of_memory(error):
                    raise
                if lm.batch_size_per_gpu == 1:
                    raise ScoringError(
                        f"Out of memory with one example of task {leaf.name!r}; choose a smaller `dtype`."
                    ) from error
        lm.batch_size_per_gpu //= 2
        log.warning("Out of memory: going on with batches of %d.", lm.batch_size_per_gpu)
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()


def _generates(leaf: Leaf) -> bool:
    """Whether answers are texts, which do not show what they were chosen from."""
    return bool(leaf.task.OUTPUT_TYPE == "generate_until")


def _truncated(leaf: Leaf, cut: set[Any]) -> int:
    """Examples with a request that did not fit."""
    texts = itemgetter(0) if _generates(leaf) else tuple  # settings come with a context to be continued
    return len({each.doc_id for each in leaf.task.instances if texts(each.args) in cut})


class _Counter:
    """A cache of answers to lm-eval, which counts them for the progress, and refuses those that are not numbers."""

    def __init__(self, leaf: Leaf, tell: Callable[[float], None], refusal: Callable[[], NotNumbers]) -> None:
        self._leaf, self._tell, self._refusal, self._count = leaf, tell, refusal, 0

    def add_partial(self, _kind: str, _request: Any, answer: Any) -> None:
        """Count one more answer. Raises `NotNumbers` for a likelihood that is not a number."""
        likelihood = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise self._refusal()
        self._count += 1
        self._tell(min(1.0, self._count / max(1, len(self._leaf.task.instances))))


def _result(results: Any, name: str) -> _Result:
    """Metrics by name, the filter left out where it is lm-eval's `none`."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    better: dict[str, bool] = {}
    for key, value in results["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        number, label = _number(value), metric if kind == "none" else key
        if number is None:
            log.warning("%s of task %s is not a number (%r) and is left out.", label, name, value)
            continue
        metrics[label] = number
        error = _number(results["results"][name].get(f"{metric}_stderr,{kind}"))
        if error is not None:
            errors[label] = error
        direction = results["higher_is_better"].get(name, {}).get(metric)
        if direction is not None:
            better[label] = bool(direction)
        samples = [_number(each.get(metric)) for each in results["samples"][name] if each["filter"] == kind]
        numbers = np.array([math.nan if each is None else each for each in samples])
        if len(numbers) and math.isclose(float(numbers.mean()), number, rel_tol=1e-9, abs_tol=1e-12):
            values[label] = numbers
    return _Result(metrics, errors, better, int(results["n-samples"][name]["effective"]), values)


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(float(value)):
        return float(value)
    return None


# ---- findings


def _finding(
    subject: Subject, removed: RemovalList, question: dict[str, Any], result: _Result, seconds: float
) -> TaskAccuracy:
    return TaskAccuracy(
        **subject.facts(removed, seconds),
        **question,
        metrics=result.metrics,
        standard_errors=result.standard_errors,
        higher_is_better=result.higher_is_better,
        examples=result.examples,
        truncated=result.truncated,
        not_numbers=result.not_numbers,
    )


def _kept(
    subject: Subject,
    removed: RemovalList,
    leaf: Leaf,
    result: _Result,
    seconds: float,
    have: Mapping[str, TaskAccuracy],
) -> TaskAccuracy:
    """A task's finding, with what its metrics changed by: over the same examples, in pairs."""
    changes: dict[str, float] = {}
    errors: dict[str, float] = {}
    finding = _finding(subject, removed, leaf.question, result, seconds)
    _write_values(subject, finding, result.values)
    baseline = have.get(finding.model_copy(update={"removal_list": ()}).question) if removed else None
    if baseline is not None:
        changes = _changes(finding, baseline)
        before = _read_values(subject, baseline)
        for name, after in result.values.items():
            if name in changes and name in before and len(before[name]) == len(after) > 1:
                _, error = mean_and_error(after - before[name], np.ones(len(after)))
                errors[name] = float(error)
    finding = finding.model_copy(update={"changes": changes, "change_standard_errors": errors})
    subject.keep(finding)
    return finding


def _aggregated(
    subject: Subject,
    removed: RemovalList,
    group: Any,
    question: dict[str, Any],
    parts: list[TaskAccuracy],
    baseline: TaskAccuracy | None,
) -> TaskAccuracy:
    """A group's own metrics, by lm-eval, out of the findings about its tasks; none where a task has none."""
    seconds = sum(part.seconds for part in parts)
    counts = [part.truncated for part in parts]
    truncated = None if None in counts else sum(each or 0 for each in counts)
    if any(part.not_numbers for part in parts):
        examples = sum(part.examples for part in parts)
        nothing = _Result(examples=examples, truncated=truncated, not_numbers=True)
        return _finding(subject, removed, question, nothing, seconds)
    rows: dict[str, dict[str, Any]] = {}
    for part in parts:
        row = rows[part.task] = {"name": part.task, "alias": part.task, "sample_len": part.examples}
        for name, value in part.metrics.items():
            metric, _, kind = name.partition(",")
            row[f"{metric},{kind or 'none'}"] = value
            row[f"{metric}_stderr,{kind or 'none'}"] = part.standard_errors.get(name, "N/A")
    with apart():
        entry = group.aggregate(rows)
    directions: dict[str, set[bool]] = {}
    for part in parts:
        for name, better in part.higher_is_better.items():
            directions.setdefault(name.partition(",")[0], set()).add(better)
    agreed = {metric: each.pop() for metric, each in directions.items() if len(each) == 1}
    results = {"results": {group.name: entry}, "higher_is_better": {group.name: agreed}, "samples": {group.name: []}}
    result = _result(results | {"n-samples": {group.name: {"effective": entry["sample_len"]}}}, group.name)
    finding = _finding(subject, removed, question, replace(result, truncated=truncated), seconds)
    return finding if baseline is None else finding.model_copy(update={"changes": _changes(finding, baseline)})


def _changes(after: TaskAccuracy, before: TaskAccuracy) -> dict[str, float]:
    return {name: value - before.metrics[name] for name, value in after.metrics.items() if name in before.metrics}


def _values_file(finding: TaskAccuracy) -> tuple[str, str]:
    """Where the values of a finding's examples lie in the run folder."""
    return findings_folder.FOLDER, f"examples-{finding.question.removeprefix('accuracy-')}.npz"


def _write_values(subject: Subject, finding: TaskAccuracy, values: Mapping[str, np.ndarray]) -> None:
    """Keep the values of the examples: a later list is compared with the baseline example by example."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *values.values(), names=np.array(json.dumps(list(values))))
    replace_file(inside(subject.run.run_dir, *_values_file(finding)), buffer.getvalue())


def _read_values(subject: Subject, finding: TaskAccuracy) -> dict[str, np.ndarray]:
    """The values of the examples; none where the file is missing or damaged: then a change has no standard error."""
    parts = _values_file(finding)
    try:
        arrays = read_arrays(subject.run.run_dir, *parts)
        names = parse_json(str(arrays["names"]).encode())
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}
    except NO_ARRAYS as error:
        log.warning("%s cannot be read: %s", subject.run.run_dir.joinpath(*parts), error)
        return {}
