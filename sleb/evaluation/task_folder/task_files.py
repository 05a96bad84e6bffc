"""A stranger's task files are data: read within bounds, without code, and with their templates in a sandbox.

Knows what lm-eval's loader would run, and borrows those parts of it for a while. Sees no examples and no model.
lm-eval's own tasks are code of an installed library and stay as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from sleb.errors import OptionError, WorkEnded, excerpt
from sleb.evaluation.task_folder.task_limits import within
from sleb.evaluation.task_folder.task_yaml import FLAG, holds_function, parsed

_MEMBERS, _GROUPS_DEEP = 20_000, 50
_LONGEST_TEXT = 4_000_000  # characters that a template may make of one example
_LARGEST_EXAMPLES = 8 << 30  # bytes of local files
_DATA_SETS = "arrow, conll, csv, json, parquet, text, xml"
"""Readers of `datasets` that only read; others of it open pickles, or classes by their names."""
_PROTOCOLS = {"file", "hf", "http", "https", "zip", "tar", "gzip", "bz2", "xz", "zstd"}
_DATA_SETTINGS = {
    "data_files", "data_dir", "split", "revision", "verification_mode", "streaming", "trust_remote_code",
    "field", "column_names", "header", "names", "sep", "delimiter", "quotechar", "quoting", "escapechar", "encoding",
    "encoding_errors", "skiprows", "na_filter", "keep_default_na", "columns", "keep_linebreaks", "sample_by",
}  # fmt: skip
"""What a task file may say to `datasets`; the rest writes elsewhere, sends tokens, or opens other file systems."""
_GENERATION = {
    "until", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams", "length_penalty",
    "early_stopping", "repetition_penalty", "no_repeat_ngram_size", "max_gen_toks", "max_new_tokens", "max_tokens",
    "max_completion_tokens", "max_length", "min_length", "min_new_tokens", "seed",
}  # fmt: skip
"""What a task file may say to `generate`; `custom_generate`, for one, names a program."""
_NUMBERS = {"num_fewshot": 1_000, "repeats": 1_000}
_GENERATION_NUMBERS = {"num_beams": 64} | dict.fromkeys(
    ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length", "min_length"), 1_000_000
)
_CHANGEABLE = {
    "task", "group", "task_alias", "group_alias", "tag", "num_fewshot", "description", "doc_to_text", "gen_prefix",
    "target_delimiter", "fewshot_delimiter",
}  # fmt: skip
"""What a group may change about one of lm-eval's own tasks that has functions; the rest would reach them."""


class TaskFiles:
    """The task files of one folder, and whether they may run code."""

    def __init__(self, folder: Path | None, trusted: bool = False) -> None:
        self.folder = folder
        self.trusted = trusted
        self.restricted = folder is not None and not trusted
        self._own: list[Any] = []  # tasks of lm-eval as they are
        self._building: Path | None = None
        self._is_own = False

    def is_own(self, task: Any) -> bool:
        """Whether a task is lm-eval's, as it is."""
        return not self.restricted or any(each is task for each in self._own)

    @contextmanager
    def as_data(self) -> Iterator[None]:
        """Treat task files as data while tasks are loaded, put and scored; lm-eval is as it was afterwards."""
        from lm_eval import utils
        from lm_eval.api import task as tasks
        from lm_eval.tasks import _factory, _index, _yaml_loader, manager

        with ExitStack() as stack:
            stack.enter_context(_nothing_from_here(self.trusted))
            stack.enter_context(_replaced(tasks, "get_metric", self._metric(tasks.get_metric)))
            if not self.restricted:
                yield
                return
            for module in (_factory, _index, _yaml_loader, manager):
                stack.enter_context(_replaced(module, "load_yaml", self._load_yaml(_yaml_loader.load_yaml)))
            for owner, name, made in (
                (utils, "env", _sandbox(utils.env)),
                (utils, "apply_template", self._rendered(utils.apply_template)),
                (tasks, "get_prompt", self._prompt(tasks.get_prompt)),
                (tasks.ConfigurableTask, "download", self._download(tasks.ConfigurableTask.download)),
                (tasks.ConfigurableTask, "apply_filters", self._ended(tasks.ConfigurableTask.apply_filters)),
                (tasks.ConfigurableTask, "process_results", self._ended(tasks.ConfigurableTask.process_results)),
                (_factory.TaskFactory, "_build_task", self._built(_factory.TaskFactory._build_task)),
            ):
                stack.enter_context(_replaced(owner, name, made))
            yield

    # ---- reading

    def _load_yaml(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        def load_yaml(
            path: str | Path, *, resolve_func: bool = True, recursive: bool = True, _seen: set[Path] | None = None
        ) -> Any:
            if is_lm_evals(path):
                return lm_evals(path, resolve_func=resolve_func, recursive=recursive, _seen=_seen)
            return self._read(Path(path).expanduser().resolve(), resolve_func, recursive, set())

        return load_yaml

    def _read(self, path: Path, refuse: bool, recursive: bool, seen: set[Path]) -> dict[str, Any]:
        """Read and merge as lm-eval does, but for code: it is refused, or left as text where lm-eval only lists."""
        if path in seen:
            raise OptionError(f"The task file {path} includes itself, or is included twice.")
        seen.add(path)
        config = parsed(path, refuse)
        if not recursive or "include" not in config:
            return config
        includes = config.pop("include")
        merged: dict[str, Any] = {}
        for each in includes if isinstance(includes, list) else [includes]:
            if not isinstance(each, str):
                raise OptionError(f"The task file {path} includes what is not a file name: {excerpt(each, 80)}.")
            included = (path.parent / each).resolve()
            if not (self._holds(included) or is_lm_evals(included)):
                raise OptionError(f"The task file {path} includes {included} outside its folder, {FLAG}.")
            content = self._read(included, refuse, True, seen)
            content.pop("task_list", None)
            merged.update(content)
        merged.update(config)
        return merged

    def _holds(self, path: Path) -> bool:
        return self.folder is not None and path.is_relative_to(self.folder.resolve())

    # ---- what lm-eval would run

    @property
    def _where(self) -> str:
        return f"The task file {self._building}" if self._building else f"A task of {self.folder}"

    def _built(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        def build_task(factory: Any, entry: Any, overrides: dict[str, Any] | None) -> Any:
            before = self._is_own, self._building
            path = entry.yaml_path
            self._is_own = path is not None and is_lm_evals(path) and not set(overrides or {}) - _CHANGEABLE
            self._building = path
            try:
                task = lm_evals(factory, entry, overrides)
                if self._is_own:
                    self._own.append(task)
                return task
            finally:
                self._is_own, self._building = before

        return build_task

    def _metric(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse a metric that is a program, of the hub or of the current folder, where it must not run."""
        from lm_eval.api import metrics, registry  # noqa: F401  importing the metrics registers them

        def get_metric(name: Any, hf_evaluate_metric: bool = False) -> Any:
            known = isinstance(name, str) and name in registry.metric_registry and not hf_evaluate_metric
            if not known and self.restricted and not self._is_own:
                own = ", ".join(sorted(registry.metric_registry.keys()))
                raise OptionError(
                    f"{self._where} has the program of metric {excerpt(name, 80)!r} fetched and run, {FLAG}; lm-eval "
                    f"itself has {own}."
                )
            if not known and isinstance(name, str) and os.path.exists(name) and not _may_run(name, self.trusted):
                raise OptionError(
                    f"Metric {excerpt(name, 80)!r} is a file of this folder, which would be run; start elsewhere."
                )
            return lm_evals(name, hf_evaluate_metric)

        return get_metric

    def _prompt(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        from lm_eval.prompts import PROMPT_REGISTRY

        def get_prompt(prompt_id: Any, *args: Any, **kwargs: Any) -> Any:
            category = str(prompt_id).split(":")[0]
            if category not in PROMPT_REGISTRY and not self._is_own:
                raise OptionError(f"{self._where} takes prompts from {excerpt(category, 80)!r}, {FLAG}.")
            return lm_evals(prompt_id, *args, **kwargs)

        return get_prompt

    def _download(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        def download(task: Any, dataset_kwargs: Any = None, **kwargs: Any) -> Any:
            if not self._is_own:
                self._require_plain(task.DATASET_PATH, dataset_kwargs or {})
            return lm_evals(task, dataset_kwargs, **kwargs)

        return download

    def _require_plain(self, path: Any, settings: Any) -> None:
        """Require examples in files that are only read. Raises `OptionError`."""
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if not isinstance(path, str) or not isinstance(settings, dict):
            raise OptionError(f"{self._where} needs a dataset_path that is text, and dataset_kwargs with names.")
        if path in _PACKAGED_DATASETS_MODULES and path not in _DATA_SETS.split(", "):
            raise OptionError(f"{self._where} has its examples opened by {path!r}, {FLAG}; {_DATA_SETS} are read.")
        unknown = sorted(str(name) for name in settings if name not in _DATA_SETTINGS)
        if unknown:
            raise OptionError(f"{self._where} sets {excerpt(unknown[0], 80)!r} in dataset_kwargs, {FLAG}.")
        files = [each for name in ("data_files", "data_dir") for each in _texts(settings.get(name))]
        for each in [path, *files]:
            strange = {part.partition("://")[0] for part in each.split("::") if "://" in part} - _PROTOCOLS
            if strange:
                raise OptionError(f"{self._where} opens {excerpt(each, 80)!r} as {strange.pop()[:40]!r}, {FLAG}.")
        sizes = sum(os.stat(each).st_size for each in files if "::" not in each and os.path.isfile(each))
        if sizes > _LARGEST_EXAMPLES:
            raise OptionError(
                f"{self._where} has {sizes / 1e9:.1f} GB of examples; at most {_LARGEST_EXAMPLES / 1e9:.1f} GB are "
                "read. Cut them into smaller tasks."
            )

    # ---- templates, filters and scores

    def _rendered(self, lm_evals: Callable[..., str]) -> Callable[..., str]:
        def apply_template(template: str, doc: dict[str, Any]) -> str:
            with within():
                text = lm_evals(template, doc)
            if len(text) > _LONGEST_TEXT:
                raise WorkEnded(f"a template made {len(text):,} characters of one example")
            return text

        return apply_template

    def _ended(self, lm_evals: Callable[..., Any]) -> Callable[..., Any]:
        def done(task: Any, *args: Any) -> Any:
            if self.is_own(task):
                return lm_evals(task, *args)
            with within():
                return lm_evals(task, *args)

        return done

    def refusal(self, task: str, error: Exception) -> OptionError:
        """The sentence for a template that reaches for more than its example."""
        return OptionError(
            f"A template of task {task[:200]!r} of {self.folder} reaches for Python itself ({excerpt(error, 120)}), "
            f"{FLAG}."
        )

    # ---- before and after loading

    def require_loadable(self, index: Mapping[str, Any], name: str) -> None:
        """Require that groups end, and reach lm-eval's own functions only as they are. Raises `OptionError`."""
        if self.restricted:
            _Members(index, self).visit(index[name], frozenset(), ())

    def require_bounded(self, task: Any) -> None:
        """Require bounds of what a task asks of the model. Raises `OptionError`."""
        if self.is_own(task):
            return
        name, config = task.task_name, task.config
        settings = config.generation_kwargs or {}
        unknown = sorted(str(each) for each in settings if each not in _GENERATION)
        if unknown:
            setting = excerpt(unknown[0], 80)
            raise OptionError(f"Task {name!r} of {self.folder} sets {setting!r} in generation_kwargs, {FLAG}.")
        numbers = [(each, getattr(config, each), most) for each, most in _NUMBERS.items()]
        numbers += [(each, settings.get(each), most) for each, most in _GENERATION_NUMBERS.items()]
        for each, number, most in numbers:
            if number is not None and not (type(number) in (int, float) and 0 <= number <= most):
                raise OptionError(
                    f"Task {name!r} of {self.folder} says {each}: {excerpt(number, 40)}; it must be a number from 0 to "
                    f"{most:,}."
                )


class _Members:
    """A walk through a group as lm-eval would build it, which counts, with what its task files change on the way."""

    def __init__(self, index: Mapping[str, Any], files: TaskFiles) -> None:
        self._index, self._files, self._left = index, files, _MEMBERS

    def visit(self, entry: Any, changed: frozenset[str], path: tuple[str, ...]) -> None:
        from lm_eval.tasks._index import Kind

        self._count(path)
        if entry.kind is Kind.GROUP:
            if entry.name in path:
                circle = " > ".join([*path[path.index(entry.name) :], entry.name])
                raise OptionError(f"The task group {entry.name[:200]!r} contains itself: {excerpt(circle)}.")
            self._group(entry.cfg, changed, (*path, entry.name), strange=not is_lm_evals(entry.yaml_path))
        elif entry.kind is Kind.TAG:
            for name in sorted(entry.tags):
                if name in self._index:
                    self.visit(self._index[name], changed, path)
        elif changed - _CHANGEABLE and is_lm_evals(entry.yaml_path) and self._has_code(entry.yaml_path):
            raise OptionError(
                f"A group of {self._files.folder} changes {_listed(changed - _CHANGEABLE)} of lm-eval's task "
                f"{entry.name!r}, whose functions would run on that, {FLAG}."
            )

    def _group(self, config: Any, changed: frozenset[str], path: tuple[str, ...], strange: bool) -> None:
        from lm_eval.tasks._factory import GROUP_FIELD_NAMES

        if strange:
            changed |= {str(key) for key in config} - GROUP_FIELD_NAMES
        members = config.get("task")
        for item in members if isinstance(members, list) else ():
            self._count(path)
            named = {"task": item} if isinstance(item, str) else item
            if not isinstance(named, dict) or not all(isinstance(named.get(key, ""), str) for key in ("group",)):
                raise OptionError(f"The task group {path[-1][:200]!r} has a member that is neither a name nor a task.")
            key = "group" if "group" in named else "task"
            name = named.get(key)
            also = changed | ({str(each) for each in named} - {key} if strange else frozenset())
            if isinstance(name, str) and name in self._index:
                self.visit(self._index[name], also, path)
            elif key == "group":
                self._group(named, changed, (*path, f"{path[-1]}::{name}"), strange)

    def _count(self, path: tuple[str, ...]) -> None:
        self._left -= 1
        if self._left < 0:
            raise OptionError(f"The task group {path[0][:200]!r} has more than {_MEMBERS:,} members.")
        if len(path) > _GROUPS_DEEP:
            raise OptionError(f"The task group {path[0][:200]!r} holds groups more than {_GROUPS_DEEP} deep.")

    def _has_code(self, path: Path) -> bool:
        return holds_function(self._files._read(Path(path).resolve(), False, True, set()))


def is_lm_evals(path: str | Path | None) -> bool:
    """Whether a file came with lm-eval."""
    import lm_eval.tasks

    package = Path(lm_eval.tasks.__file__).resolve().parent
    return path is not None and Path(path).expanduser().resolve().is_relative_to(package)


def _sandbox(lm_evals: Any) -> Any:
    """lm-eval's own environment, without Python behind it; nothing is drawn at random, so that a trial is telling."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    same = ("loader", "undefined", "keep_trailing_newline", "trim_blocks", "lstrip_blocks", "autoescape", "finalize")
    made = ImmutableSandboxedEnvironment(**{name: getattr(lm_evals, name) for name in same})
    made.filters.update({name: each for name, each in lm_evals.filters.items() if name != "random"})
    made.filters.pop("random", None)
    made.tests.update(lm_evals.tests)
    made.globals.pop("lipsum", None)
    return made


class _Import(MetaPathFinder):
    """A finder that changes a module as soon as anything imports it."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Python's own spec for that one module; None for others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self._name else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        pythons = loader.exec_module

        def exec_module(module: Any) -> None:
            pythons(module)
            self._change(module)

        loader.exec_module = exec_module
        return spec


@contextmanager
def _nothing_from_here(trusted: bool) -> Iterator[None]:
    """Keep `evaluate` from programs in the current folder: it prefers one with a metric's name to the hub.

    Any function of lm-eval's tasks may import it at any time. Importing it here would take seconds from all others.
    """
    with ExitStack() as stack:

        def change(loading: Any) -> None:
            evaluates = loading.LocalEvaluationModuleFactory.get_module

            def get_module(factory: Any) -> Any:
                if not _may_run(factory.path, trusted):
                    raise OptionError(
                        f"Metric {excerpt(factory.path, 80)!r} is a program of this folder; start elsewhere."
                    )
                return evaluates(factory)

            stack.enter_context(_replaced(loading.LocalEvaluationModuleFactory, "get_module", get_module))

        loaded = sys.modules.get("evaluate.loading")
        if loaded is not None:
            change(loaded)
        else:
            finder = _Import("evaluate.loading", change)
            sys.meta_path.insert(0, finder)
            stack.callback(sys.meta_path.remove, finder)
        yield


def _may_run(program: str, trusted: bool) -> bool:
    """Whether a program is lm-eval's own, or one that trusted code names by its whole path."""
    return is_lm_evals(program) or (trusted and os.path.isabs(program))


@contextmanager
def _replaced(owner: Any, name: str, made: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, made)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _texts(value: Any) -> list[str]:
    """All file names in what `data_files` may be: one, a list, or either for each split."""
    if isinstance(value, dict | list):
        return [text for each in (value.values() if isinstance(value, dict) else value) for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def _listed(names: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(excerpt(name, 40) for name in names))
