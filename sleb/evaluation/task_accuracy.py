"""Accuracy of removal lists on lm-eval's tasks, by the unmodified package on the live model.

Tasks are evaluated one by one, so that a stopped evaluation goes on after the last (list, task); a group's aggregate is
lm-eval's own, out of what was found about its tasks. Prompts have no chat template.
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
from sleb.evaluation.lm_eval_tasks import Leaf, Tasks, apart, failures, load, seeded, told
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

_ready: dict[tuple[EvaluateSpec, bool], Tasks] = {}
"""What `require` has loaded, until `work` takes it: reading some tasks' examples takes a minute."""


def require(ask: EvaluateSpec, trust_remote_code: bool = False) -> None:
    """Load the tasks, so that what is missing is said before minutes of loading the model. Raises `OptionError`."""
    _ready.clear()
    _ready[ask, trust_remote_code] = load(ask, trust_remote_code)


def work(subject: Subject, ask: EvaluateSpec) -> None:
    """Every task and group, for the baseline and its lists; each finding is kept as soon as it is there.

    A list whose predictions are not numbers is found to have no metrics. Raises `NotNumbers` where the baseline's are
    none.
    """
    trusted = subject.job.trust_remote_code
    tasks = _ready.pop((ask, trusted), None) or load(ask, trusted)
    with tasks.files.as_data():
        _work(subject, ask, tasks)


def _work(subject: Subject, ask: EvaluateSpec, tasks: Tasks) -> None:
    wanted = tuple(dict.fromkeys([(), *ask.lists]))
    have = {each.question: each for each in subject.known(TaskAccuracy)}

    def known(removed: RemovalList, asked: dict[str, Any]) -> TaskAccuracy | None:
        return have.get(_finding(subject, removed, asked, _Result(), 0.0).question)

    ahead = sum(
        leaf.count for removed in wanted for leaf in tasks.leaves.values() if known(removed, leaf.asked) is None
    )
    done = 0
    subject.meter.phase("Accuracy on tasks")

    def tell(leaf: Leaf, removed: RemovalList, share: float) -> None:
        message = f"{leaf.name}, {subject.num_removed(removed)}"
        subject.meter.part(min(1.0, (done + share * leaf.count) / max(1, ahead)), message)

    for removed in wanted:
        with ExitStack() as opened:
            lm: Any = None
            for leaf in tasks.leaves.values():
                answer = known(removed, leaf.asked)
                if answer is None:
                    lm = lm or opened.enter_context(_opened(subject, removed))
                    _require_possible(lm, leaf, removed, subject)
                    tell(leaf, removed, 0.0)
                    start = time.perf_counter()
                    with told(tasks.files, leaf.name, "cannot be evaluated with this model"):
                        try:
                            found = _evaluated(lm, leaf, partial(tell, leaf, removed))
                        except NotNumbers:
                            if not removed:
                                raise
                            found = _Result(examples=leaf.count, not_numbers=True)
                    done += leaf.count
                    answer = _kept(subject, removed, leaf, found, time.perf_counter() - start, have)
                    have[answer.question] = answer
                else:
                    subject.answer(answer)
        for group in tasks.groups:
            asked = tasks.asked(group)
            parts = [known(removed, leaf.asked) for leaf in tasks.of(group)]
            answer = known(removed, asked)
            if answer is None:
                of_baseline = None if not removed else known((), asked)
                with told(tasks.files, group.name, "cannot be aggregated"):
                    answer = _aggregated(subject, removed, group, asked, [each for each in parts if each], of_baseline)
                have[answer.question] = answer
                subject.keep(answer)
            else:
                subject.answer(answer)


# ---- evaluation


@dataclass(frozen=True)
class _Result:
    """What lm-eval found out about one task."""

    metrics: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    examples: int = 0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Metric -> float64 (examples,), of metrics that are a mean over them."""
    truncated: int | None = None
    not_numbers: bool = False


@contextmanager
def _opened(subject: Subject, removed: RemovalList) -> Iterator[Any]:
    """lm-eval's wrapper around the model without these blocks; leaves model and tokenizer as they are."""
    streamed = subject.stack.streamed
    with ExitStack() as opened:
        model: Any
        if removed and streamed is not None:  # its weights are where the original's blocks load them
            opened.enter_context(subject.stack.skipping(removed))
            model = subject.model
        else:
            model = opened.enter_context(subject.without(removed))
        with apart(logging.ERROR), _keeping_weights(model):  # that the model is there already is no news
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
    """lm-eval's wrapper, which remembers the prompts that it cuts: it says so in its log alone."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        whose: str
        """Whose predictions they are."""
        cut: set[Any]
        """Requests by their texts: (context, continuation), or the context that is to be gone on from."""

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
            found = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            if left_truncate_len is not None and found[0].shape[1] == left_truncate_len:
                _, read = super().tok_batch_encode(strings, padding_side, None, truncation)
                lengths = read.sum(dim=1).tolist()
                self.cut |= {each for each, length in zip(strings, lengths, strict=True) if length > left_truncate_len}
            return found

    return Counting


def _batch_size(subject: Subject) -> int:
    """Examples at once, where nobody says."""
    streamed = subject.stack.streamed
    if streamed is None:
        return 32 if subject.stack.device.type == "cuda" else 8
    logits = _SKETCH * subject.stack.config.vocab_size * 3 * 4  # bytes: the model's, their float32, its softmax
    return max(1, min(64, streamed.spare_bytes // logits))  # many: every batch reads the whole model


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
            f"Task {leaf.name!r} has text generated, for which blocks must be gone; from this model they can only be "
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
                found = evaluate(lm, {"tasks": {leaf.name: leaf.task}}, limit=leaf.limit, bootstrap_iters=_BOOTSTRAPS)
                return replace(_result(found, leaf.name), truncated=_truncated(leaf, lm.cut))
            except failures() as error:
                if not is_out_of_memory(error):
                    raise
                if lm.batch_size_per_gpu == 1:
                    raise ScoringError(
                        f"Out of memory with one example of task {leaf.name!r}; choose a smaller --dtype."
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
    texts = itemgetter(0) if _generates(leaf) else tuple  # settings come with a context that is to be gone on from
    return len({each.doc_id for each in leaf.task.instances if texts(each.args) in cut})


class _Counter:
    """lm-eval tells whoever caches its answers of each of them: that is how far it is, and whether they are numbers."""

    def __init__(self, leaf: Leaf, tell: Callable[[float], None], refusal: Callable[[], NotNumbers]) -> None:
        self._leaf, self._tell, self._refusal, self._count = leaf, tell, refusal, 0

    def add_partial(self, _kind: str, _request: Any, answer: Any) -> None:
        """One more is there. Raises `NotNumbers` for a likelihood that is none."""
        likelihood = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise self._refusal()
        self._count += 1
        self._tell(min(1.0, self._count / max(1, len(self._leaf.task.instances))))


def _result(found: Any, name: str) -> _Result:
    """Metrics by name, the filter left out where it is lm-eval's `none`."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    better: dict[str, bool] = {}
    for key, value in found["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        number, label = _number(value), metric if kind == "none" else key
        if number is None:
            log.warning("%s of task %s is no number (%r) and is left out.", label, name, value)
            continue
        metrics[label] = number
        error = _number(found["results"][name].get(f"{metric}_stderr,{kind}"))
        if error is not None:
            errors[label] = error
        direction = found["higher_is_better"].get(name, {}).get(metric)
        if direction is not None:
            better[label] = bool(direction)
        samples = [_number(each.get(metric)) for each in found["samples"][name] if each["filter"] == kind]
        numbers = np.array([math.nan if each is None else each for each in samples])
        if len(numbers) and math.isclose(float(numbers.mean()), number, rel_tol=1e-9, abs_tol=1e-12):
            values[label] = numbers
    return _Result(metrics, errors, better, int(found["n-samples"][name]["effective"]), values)


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(float(value)):
        return float(value)
    return None


# ---- findings


def _finding(
    subject: Subject, removed: RemovalList, asked: dict[str, Any], found: _Result, seconds: float
) -> TaskAccuracy:
    return TaskAccuracy(
        **subject.facts(removed, seconds),
        **asked,
        metrics=found.metrics,
        standard_errors=found.standard_errors,
        higher_is_better=found.higher_is_better,
        examples=found.examples,
        truncated=found.truncated,
        not_numbers=found.not_numbers,
    )


def _kept(
    subject: Subject,
    removed: RemovalList,
    leaf: Leaf,
    found: _Result,
    seconds: float,
    have: Mapping[str, TaskAccuracy],
) -> TaskAccuracy:
    """A task's finding, with what its metrics changed by: over the same examples, in pairs."""
    changes: dict[str, float] = {}
    errors: dict[str, float] = {}
    finding = _finding(subject, removed, leaf.asked, found, seconds)
    _write_values(subject, finding, found.values)
    baseline = have.get(finding.model_copy(update={"removal_list": ()}).question) if removed else None
    if baseline is not None:
        changes = _changes(finding, baseline)
        before = _read_values(subject, baseline)
        for name, after in found.values.items():
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
    asked: dict[str, Any],
    parts: list[TaskAccuracy],
    baseline: TaskAccuracy | None,
) -> TaskAccuracy:
    """A group's own metrics, by lm-eval, out of what was found about its tasks; none where a task has none."""
    seconds = sum(part.seconds for part in parts)
    counts = [part.truncated for part in parts]
    truncated = None if None in counts else sum(each or 0 for each in counts)
    if any(part.not_numbers for part in parts):
        examples = sum(part.examples for part in parts)
        nothing = _Result(examples=examples, truncated=truncated, not_numbers=True)
        return _finding(subject, removed, asked, nothing, seconds)
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
    found = {"results": {group.name: entry}, "higher_is_better": {group.name: agreed}, "samples": {group.name: []}}
    result = _result(found | {"n-samples": {group.name: {"effective": entry["sample_len"]}}}, group.name)
    finding = _finding(subject, removed, asked, replace(result, truncated=truncated), seconds)
    return finding if baseline is None else finding.model_copy(update={"changes": _changes(finding, baseline)})


def _changes(after: TaskAccuracy, before: TaskAccuracy) -> dict[str, float]:
    return {name: value - before.metrics[name] for name, value in after.metrics.items() if name in before.metrics}


def _values_file(finding: TaskAccuracy) -> tuple[str, str]:
    """Where it lies in the run folder."""
    return findings_folder.FOLDER, f"examples-{finding.question.removeprefix('accuracy-')}.npz"


def _write_values(subject: Subject, finding: TaskAccuracy, values: Mapping[str, np.ndarray]) -> None:
    """What each example counts: a later list is compared with the baseline example by example."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *values.values(), names=np.array(json.dumps(list(values))))
    replace_file(inside(subject.run.run_dir, *_values_file(finding)), buffer.getvalue())


def _read_values(subject: Subject, finding: TaskAccuracy) -> dict[str, np.ndarray]:
    """Nothing where the file is missing or damaged: then a change has no standard error."""
    parts = _values_file(finding)
    try:
        arrays = read_arrays(subject.run.run_dir, *parts)
        names = parse_json(str(arrays["names"]).encode())
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}
    except NO_ARRAYS as error:
        log.warning("%s cannot be read: %s", subject.run.run_dir.joinpath(*parts), error)
        return {}
