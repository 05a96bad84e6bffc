"""Arguments -> specs: what is asked and how, with the defaults of the paper or of the demo. Imports no torch.

The options are those that the fields of the records describe (`records/options.py`). `RunOptions` and `JobOptions`
list their names and types once more, because type checkers and editors read no other; a test compares them.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from sleb.errors import OptionError, quoted
from sleb.records import JOB_SPEC, JobKind, JobSettings, JobSpec, Method, Permissions, Record, RunSpec
from sleb.records.options import Setting, settings_of
from sleb.runtime import files

R = TypeVar("R", bound=Record)
F = TypeVar("F", bound=Callable[..., Any])


class RunOptions(TypedDict, total=False):
    """Options of a run; the fields of `RunSpec` and `CalibrationSpec` describe each."""

    calibration: str | PathLike[str] | None
    sequences: int | None
    sequence_length: int | None
    held_out: int | None
    sampling: Literal["random", "first"]
    bos: Literal["auto", "yes", "no"]
    chat: bool
    seed: int
    remove: int | None
    ratio: float | None
    method: str | Method
    until_perplexity: float | None
    protect: Sequence[int] | None
    candidates: Sequence[int] | None
    objective: Literal["nll", "kl"]
    search: Literal["auto", "full", "race"]
    refine: Literal["none", "swap"]
    confidence: float
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    revision: str | None
    analysis: bool


class JobOptions(TypedDict, total=False):
    """Options of the job that executes a run; the fields of `JobSettings` describe each."""

    device: str
    batch_size: int | None
    processes: int | None
    memory_budget: int | None
    speedups: Literal["auto", "off"]


class SearchOptions(RunOptions, JobOptions, total=False):
    """All options of a search: of the run and of its job."""


def with_options(
    *kinds: type[RunOptions | JobOptions], search: bool = True, as_before: Sequence[str] = ()
) -> Callable[[F], F]:
    """Give a function that takes `**options` a signature and a docstring that name each, for tooltips and `help`.

    Without `search`, those that only a search has are left out. The default of those `as_before` is what an earlier job
    had, and so None.
    """
    records: dict[type, type[Record]] = {RunOptions: RunSpec, JobOptions: JobSettings}

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        given, lines = [], []
        for kind in kinds:
            hints = get_type_hints(kind)
            for setting in settings_of(records[kind], search=search):
                default = None if setting.depends or setting.name in as_before else setting.default
                given.append(
                    inspect.Parameter(
                        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[setting.name]
                    )
                )
                lines.append(_described(setting))
        positional = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        rest = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=[*positional, *given, *rest])  # type: ignore[attr-defined]
        function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\nOptions:\n" + "\n".join(lines)
        return function

    return decorate


def _described(setting: Setting) -> str:
    """A setting in the docstring of a function."""
    default = f" Default: {setting.default_in_words}." if setting.depends and setting.default_in_words else ""
    sentence = f"{setting.name}: {setting.option.help}{default}"
    return textwrap.fill(sentence, 110, initial_indent="    ", subsequent_indent="        ")


def run_options(options: SearchOptions) -> RunOptions:
    """The options of a search that belong to its run, and unknown names, which the run refuses."""
    own = {name: value for name, value in options.items() if name not in JobOptions.__annotations__}
    return cast("RunOptions", own)


def job_options(options: SearchOptions) -> JobOptions:
    """The options of a search that belong to its job."""
    return cast("JobOptions", {name: value for name, value in options.items() if name in JobOptions.__annotations__})


@with_options(RunOptions)
def run_spec(
    model: str | PathLike[str],
    *,
    kind: Literal["search", "analyze", "evaluate"] = "search",
    **options: Unpack[RunOptions],
) -> RunSpec:
    """The spec of a run, with the defaults of the paper, or of the demo. Raises `OptionError` out of range."""
    if kind not in get_args(RunSpec.model_fields["kind"].annotation):
        raise OptionError(f"A run of kind {quoted(kind)} does not exist; search and analyze are the two.")
    model = text("model", model)
    if not model.strip():
        raise OptionError("The model's name is empty. Give a Hugging Face name, a folder, a .gguf file, or demo.")
    given: dict[str, Any] = dict(options)
    settings = {each.name: each for each in settings_of(RunSpec)}
    if unknown := sorted(set(given) - set(settings)):
        raise TypeError(f"run_spec() got an unexpected keyword argument {unknown[0]!r}")
    fields: dict[str, Any] = {"kind": kind, "model": absolute(model)}
    is_limited = any(given.get(name) is not None for name in ("remove", "ratio", "until_perplexity"))
    for name, setting in settings.items():
        value = given.get(name)
        if name not in given or (value is None and setting.depends):
            value = setting.usual(demo=model == "demo")
        if name == "ratio" and is_limited:
            value = given.get(name)
        _put(fields, setting.path, _plain(setting, value))
    return validated(RunSpec, fields)


def _plain(setting: Setting, value: Any) -> Any:
    """A value as its field takes it. Raises `OptionError` for what cannot be one."""
    if value is None:
        return None
    if setting.name == "calibration":
        return absolute(text(f"`{setting.name}`", value))
    if setting.kind != "blocks":
        return value
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(each, int) for each in value):
        raise OptionError(f"`{setting.name}` takes a list of block indices such as [0, 29]; found {quoted(value)}.")
    blocks = tuple(value)
    if len(set(blocks)) != len(blocks):
        raise OptionError(f"`{setting.name}` names a block twice: {', '.join(map(str, blocks))}.")
    return blocks


def _put(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        fields = fields.setdefault(name, {})
    fields[path[-1]] = value


def job_spec(
    kind: JobKind,
    device: str = "auto",
    batch_size: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    processes: int | None = 1,
    memory_budget: int | None = None,
    speedups: Literal["auto", "off"] = "auto",
    **own: Any,
) -> JobSpec:
    """A job with its settings, and the fields that only its kind has; the memory budget is in bytes.

    Raises `OptionError` out of range.
    """
    settings = {"kind": kind, "device": text("`device`", device), "batch_size": batch_size}
    scale = {"processes": 1 if processes is None else processes, "memory_budget": memory_budget, "speedups": speedups}
    permissions = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return validated(JOB_SPEC, settings | scale | permissions | own)


def permissions(
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_paths: bool = False,
    out: str | PathLike[str] | None = None,
    replace: bool = False,
    task_folder: str | PathLike[str] | None = None,
) -> Permissions:
    """What a command or a notebook allows a job; its paths made absolute."""
    return Permissions(
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        trust_paths=trust_paths,
        out=path_name(out),
        replace=replace,
        task_folder=path_name(task_folder),
    )


def validated(record: type[R] | TypeAdapter[R], settings: dict[str, Any]) -> R:
    """A record made of settings. Raises `OptionError` with one sentence where one is out of range."""
    try:
        validate = record.validate_python if isinstance(record, TypeAdapter) else record.model_validate
        return writable(validate(settings))
    except ValidationError as error:
        raise OptionError(sentence(error)) from error


def writable(record: R) -> R:
    """The record, if a file can hold it. Raises `OptionError` for bytes of a command line that are not UTF-8 text."""
    try:
        record.model_dump_json()
    except PydanticSerializationError as error:
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in _leaves(record).items()}
        names = [
            name for name, own in parts.items() if not all(_is_text(each) for each in own if isinstance(each, str))
        ]
        named = ", ".join(f"`{name}`" for name in names) or "An option"
        raise OptionError(f"{named} is not UTF-8 text; rename the file, or spell it in another way.") from error
    return record


def _leaves(record: Record) -> dict[str, object]:
    """Values by the names of their options, or else of their fields."""
    return dict(record) | {each.name: each.value_in(record) for each in settings_of(type(record))}


def _is_text(value: str) -> bool:
    return value == value.encode("utf-8", "ignore").decode()


def text(name: str, value: object) -> str:
    """A name or path as text that a file can hold. Raises `OptionError` for anything else."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if not isinstance(value, str):
        raise OptionError(f"{name} takes a name or a path; found {quoted(value)}.")
    if not _is_text(value):
        raise OptionError(f"{name} {quoted(value)} is not UTF-8 text; rename the file.")
    if "\0" in value:
        raise OptionError(f"{name} {quoted(value)} holds a null character, which no name has; leave it out.")
    return value


def path_name(path: str | PathLike[str] | None) -> str | None:
    """A folder or file to write or to read from, absolute."""
    return None if path is None else str(files.expanded(Path(text("A path", path))).absolute())


def absolute(name: str) -> str:
    """Local paths are kept absolute, so that a run resumes from any directory; other names stay as they are."""
    path, _, column = name.partition(":")
    if name in ("demo", "wikitext2", "c4", "wikitext2-rows"):
        return name
    with suppress(OSError, ValueError):  # what no file system takes is a name
        local = files.expanded(Path(name))
        if local.exists():
            return str(local.absolute())
        if column and files.expanded(Path(path)).is_file():
            return f"{files.expanded(Path(path)).absolute()}:{column}"
    return name


def sentence(error: ValidationError) -> str:
    """An error of pydantic as one sentence about an option."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}."
    path = tuple(part for part in first["loc"] if isinstance(part, str))
    names = {each.path: each.name for record in (RunSpec, JobSettings) for each in settings_of(record)}
    option = f"`{names.get(path, path[-1])}`" if path else "The options"
    return f"{option}: found {quoted(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}."
