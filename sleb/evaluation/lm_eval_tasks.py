"""lm-eval's tasks by name, with their examples. Knows tasks; never sees a model.

Those of a task folder are data (`task_files`); before they are loaded here, a process that can be ended does so.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sleb.errors import OptionError, WorkEnded, excerpt
from sleb.evaluation.lm_eval_library import apart, failures, first_line, seeded
from sleb.evaluation.task_folder import task_limits
from sleb.evaluation.task_folder.task_files import TaskFiles
from sleb.records import EvaluateSpec
from sleb.runtime.files import expanded

log = logging.getLogger(__name__)

_LONGEST = 200  # characters of a version or a name


@dataclass(frozen=True, eq=False)
class Leaf:
    """A task, loaded with its examples."""

    task: Any
    name: str
    shots: int
    count: int
    """Examples to evaluate."""
    limit: int | None
    """How many examples were wanted; None where that is all of them."""
    digest: str
    """A hash of the examples and of how they are put and scored."""

    @property
    def question(self) -> dict[str, Any]:
        """The fields of a finding that say which task was evaluated, on which examples."""
        of_task = f"{str(self.task.VERSION)[:_LONGEST]}, lm-eval {version('lm_eval')}"
        return dict(task=self.name, shots=self.shots, limit=self.limit, version=of_task, examples_hash=self.digest)


@dataclass(frozen=True, eq=False)
class Tasks:
    """The tasks that a request names, in its order, and groups, inner ones before outer ones."""

    leaves: dict[str, Leaf]
    groups: tuple[Any, ...]
    files: TaskFiles
    """The files they come from, within whose `as_data` they are put and scored."""

    def question(self, group: Any) -> dict[str, Any]:
        """The fields of a finding that say which group was aggregated, over which tasks."""
        leaves = self.of(group)
        digest = _digest([group.aggregate_metric_list, [leaf.question for leaf in leaves]])
        shots, limits = ({getattr(leaf, name) for leaf in leaves} for name in ("shots", "limit"))
        return dict(
            task=group.name,
            shots=shots.pop() if len(shots) == 1 else None,
            limit=max((each for each in limits if each is not None), default=None),
            version=f"{group.version[:_LONGEST]}, lm-eval {version('lm_eval')}",
            examples_hash=digest,
            subtasks=tuple(leaf.name for leaf in leaves),
        )

    def of(self, group: Any) -> list[Leaf]:
        """A group's tasks."""
        return [self.leaves[task.task_name] for task in group.get_all_tasks()]


def load(ask: EvaluateSpec, trust_remote_code: bool = False) -> Tasks:
    """The tasks by name, with their examples; a folder's run code only where that is trusted. Raises `OptionError`."""
    folder = None if ask.task_folder is None else expanded(Path(ask.task_folder))
    if folder is not None and not folder.is_dir():
        raise OptionError(
            f"The task folder {folder} does not exist; `task_folder` takes a folder with tasks in lm-eval's YAML."
        )
    try:
        from lm_eval.tasks import TaskManager  # noqa: F401
    except ImportError as error:
        raise OptionError(f"Accuracy on tasks needs lm-eval: pip install 'sleb[tasks]' ({error}).") from error
    files = TaskFiles(folder, trust_remote_code)
    with apart(), seeded(), files.as_data():
        if files.restricted:
            try:
                task_limits.tried(partial(_tried, ask, files))
            except WorkEnded as error:
                names = excerpt(", ".join(ask.tasks), 80)
                raise OptionError(f"Tasks of {folder} cannot be loaded ({names}): {error}.") from error
        return _loaded(ask, files)


def _tried(ask: EvaluateSpec, files: TaskFiles) -> None:
    """Do all that will be done with a folder's tasks without a model, in a process that is ended at a limit."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for leaf in _loaded(ask, files).leaves.values():
        if not files.is_own(leaf.task):
            with as_sentences(files, leaf.name, "cannot be put as questions"):
                leaf.task.set_fewshot_seed(DEFAULT_OTHER_SEED)
                leaf.task.build_all_requests(limit=leaf.limit)
                for made in (each for ensemble in leaf.task._filters for each in ensemble.filters):
                    made()


def _loaded(ask: EvaluateSpec, files: TaskFiles) -> Tasks:
    leaves: dict[str, Leaf] = {}
    groups: dict[str, Any] = {}
    grouped: set[str] = set()
    manager = _manager(ask.tasks, files.folder)
    for name in ask.tasks:
        named = _load(manager, name, files)
        inside = {task.task_name for group in named["groups"].values() for task in group.get_all_tasks()}
        for task in named["tasks"].values():
            twice = task.task_name in leaves
            if twice and task.task_name in inside | grouped:  # a group may put the same task differently
                raise OptionError(f"Task {task.task_name!r} is asked for twice, the second time by {name!r}.")
            if not twice:
                leaves[task.task_name] = _leaf(task, ask, files)
        grouped |= inside
        for group in named["groups"].values():
            groups.setdefault(group.name, group)
    inner_first = sorted(groups.values(), key=lambda group: len(group.get_all_groups()))
    return Tasks(leaves, tuple(group for group in inner_first if group.has_aggregation), files)


def _manager(names: tuple[str, ...], folder: Path | None) -> Any:
    """An index of tasks by lm-eval. Reading all of its own takes four seconds: a folder with all names needs none."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return _own()
    try:
        alone = TaskManager(include_path=str(folder), include_defaults=False)
        if all(_is_complete(alone.task_index, name, set()) for name in names):
            return alone
        return TaskManager(include_path=str(folder))
    except failures() as error:
        raise OptionError(
            f"The tasks in {folder} cannot be listed ({type(error).__name__}: {first_line(error)}). Names of tasks, "
            "groups and tags must be text."
        ) from error


def _is_complete(index: Any, name: str, seen: set[str]) -> bool:
    """Whether a task is in an index, or a group with all its members. A name that was seen is not looked at again."""
    if name in seen:
        return True
    seen.add(name)
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return not isinstance(members, list) or all(
        isinstance(each, str) and _is_complete(index, each, seen) for each in members
    )


@cache
def _own() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str, files: TaskFiles) -> Any:
    """Tasks and groups of one name. Raises `OptionError` where there are none, or their examples are missing."""
    folder = files.folder
    if name not in manager.task_index:
        where = "" if folder is None else f" and {folder}"
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        nearest = f"; the nearest are {', '.join(excerpt(each, 60) for each in near)}" if near else ""
        command = "lm-eval ls tasks" + ("" if folder is None else f" --include_path {folder}")
        unread = "" if folder is None else _unreadable(folder)
        raise OptionError(
            f"No task is called {name[:200]!r} in lm-eval{where}{nearest}.{unread} List all with: {command}"
        )
    files.require_loadable(manager.task_index, name)
    with as_sentences(
        files, name, "cannot be loaded", "Check its YAML, the files it names and the libraries it needs."
    ):
        try:
            named = manager.load([name])
        except ConnectionError as error:  # the hub's, as datasets puts it
            raise OptionError(
                f"The examples of task {name!r} could not be fetched ({first_line(error)}): they come from the Hugging "
                "Face hub. Check the network, or run it once where there is one and bring its cache along (HF_HOME); a "
                "task with examples in local files goes into a `task_folder`."
            ) from error
    if not named["tasks"]:
        raise OptionError(f"{name!r} is a group without tasks.")
    return named


@contextmanager
def as_sentences(files: TaskFiles, name: str, cannot: str, check: str = "") -> Iterator[None]:
    """Raise what a task's YAML, template, function or data set raises as a sentence: an `OptionError`."""
    from jinja2.exceptions import SecurityError

    try:
        yield
    except SecurityError as error:
        raise files.refusal(name, error) from error
    except WorkEnded as error:
        raise OptionError(f"Task {name[:_LONGEST]!r} {cannot}: {error}.") from error
    except failures() as error:
        log.info("Task %s", name, exc_info=True)
        raise OptionError(
            f"Task {name[:_LONGEST]!r} {cannot} ({type(error).__name__}: {first_line(error)}). {check}".rstrip()
        ) from error


def _unreadable(folder: Path) -> str:
    """The first file that lm-eval passed over in silence because it is not YAML, or must not be read."""
    from lm_eval.tasks import TaskManager
    from yaml import YAMLError

    passed: list[tuple[Any, ...]] = []

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple):
                passed.append(record.args)

    logger, handler = logging.getLogger("lm_eval"), Hearing(logging.DEBUG)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        TaskManager(include_path=str(folder), include_defaults=False)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    errors = [args for args in passed if len(args) == 2 and isinstance(args[1], YAMLError | OptionError)]
    if not errors:
        return ""
    path, error = errors[0]
    return (
        f" {error}"
        if isinstance(error, OptionError)
        else f" {path} is not YAML that it could read ({first_line(error)})."
    )


def _leaf(task: Any, ask: EvaluateSpec, files: TaskFiles) -> Leaf:
    name = task.task_name
    files.require_bounded(task)
    if getattr(task, "UNSAFE_CODE", False):
        raise OptionError(f"Task {name!r} runs code that the model has written, which is not done here.")
    if getattr(task, "MULTIMODAL", False):
        raise OptionError(f"Task {name!r} needs more than text.")
    own = task.get_config("num_fewshot")
    shots = own or 0
    if ask.shots is not None and ask.shots != shots:
        if own == 0:  # as lm-eval has it: a task that says zero gets zero
            log.warning("Task %s says itself that it has no examples in the prompt; `shots` does not change it.", name)
        else:
            shots = ask.shots
    task.set_config("num_fewshot", shots)
    try:
        docs = list(itertools.islice(task.eval_docs, ask.limit))
        whole = len(task.eval_docs)
        shown = list(task.sampler.df) if shots and hasattr(task, "sampler") else []
        digest = _digest([_config(task), docs, shown])
    except failures() as error:
        raise OptionError(
            f"The examples of task {name[:_LONGEST]!r} cannot be read ({type(error).__name__}: {first_line(error)})."
        ) from error
    return Leaf(
        task=task,
        name=name,
        shots=shots,
        count=len(docs),
        limit=ask.limit if len(docs) < whole else None,
        digest=digest,
    )


def _config(task: Any) -> dict[str, Any]:
    """How examples are put and scored, without where they lie."""
    config = dict(vars(task.config))
    config["metadata"] = {key: value for key, value in (config["metadata"] or {}).items() if key != "config_source"}
    for name in ("dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(name, None)
    return config | {"class": type(task)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_as_json).encode()).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    """A value as JSON. A function is the text of its file, since what it calls counts as well."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if callable(value):
        try:
            return Path(inspect.getsourcefile(value) or "").read_text(encoding="utf-8")
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "__dict__"):
        return vars(value)
    return str(value)
