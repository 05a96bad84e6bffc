"""Arguments -> specs: what is asked and how, with the defaults of the paper or of the demo. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from sleb.errors import OptionError, quoted
from sleb.records import JOB_SPEC, CalibrationSpec, JobKind, JobSpec, Method, Record, RunSpec
from sleb.runtime import files

R = TypeVar("R", bound=Record)

PAPER_SEQUENCES = 128
PAPER_SEQUENCE_LENGTH = 2048
PAPER_RATIO = 0.2
DEMO_SEQUENCES = 16
DEMO_SEQUENCE_LENGTH = 256
DEMO_RATIO = 0.1


def run_spec(
    model: str,
    *,
    kind: Literal["search", "analyze", "evaluate"] = "search",
    remove: int | None = None,
    ratio: float | None = None,
    method: str | Method = Method.METRIC3,
    calibration: str | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    held_out: int | None = None,
    sampling: Literal["random", "first"] = "random",
    seed: int = 0,
    protect: Sequence[int] | None = None,
    until_perplexity: float | None = None,
    confidence: float = 0.95,
    objective: Literal["nll", "kl"] = "nll",
    search: Literal["auto", "full", "race"] = "auto",
    refine: Literal["none", "swap"] = "none",
    bos: Literal["auto", "yes", "no"] = "auto",
    chat: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    revision: str | None = None,
    analysis: bool = True,
) -> RunSpec:
    """What is asked, with the defaults of the paper, or of the demo. Raises `OptionError` out of range."""
    if kind not in get_args(RunSpec.model_fields["kind"].annotation):
        raise OptionError(f"There is no run of kind {quoted(kind)}; search and analyze are the two.")
    model, calibration = text("model", model), None if calibration is None else text("calibration", calibration)
    is_demo = model == "demo"
    if remove is None and ratio is None and until_perplexity is None:
        ratio = DEMO_RATIO if is_demo else PAPER_RATIO
    if not model.strip():
        raise OptionError("The model's name is empty. Give a Hugging Face name, a folder, a .gguf file, or demo.")
    given: object = protect
    if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
        raise OptionError(f"protect takes a list of block indices such as [0, 29]; found {quoted(given)}.")
    protect = None if protect is None else tuple(protect)
    if protect is not None and not all(isinstance(block, int) for block in protect):
        raise OptionError(f"protect takes a list of block indices such as [0, 29]; found {quoted(given)}.")
    if protect is not None and len(set(protect)) != len(protect):
        raise OptionError(f"--protect names a block twice: {', '.join(map(str, protect))}.")
    names = [each.value for each in Method]
    if str(method) not in names:
        raise OptionError(f"There is no method {quoted(str(method))}; use one of {', '.join(names)}.")
    try:
        made = RunSpec(
            kind=kind,
            model=absolute(model),
            revision=revision,
            dtype=dtype,
            calibration=CalibrationSpec(
                source=absolute(calibration or ("demo" if is_demo else "wikitext2")),
                sequences=_default(sequences, DEMO_SEQUENCES if is_demo else PAPER_SEQUENCES),
                sequence_length=_default(sequence_length, DEMO_SEQUENCE_LENGTH if is_demo else PAPER_SEQUENCE_LENGTH),
                sampling=sampling,
                bos=bos,
                chat=chat,
            ),
            held_out=held_out,
            method=Method(method),
            num_remove=remove,
            ratio=ratio,
            protected=protect,
            until_perplexity=until_perplexity,
            confidence=confidence,
            objective=objective,
            search=search,
            refine=refine,
            seed=seed,
            analysis=analysis,
        )
    except ValidationError as error:
        raise OptionError(sentence(error)) from error
    return writable(made)


def job_spec(
    kind: JobKind,
    device: str = "auto",
    batch_size: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    processes: int = 1,
    memory_budget: int | None = None,
    speedups: Literal["auto", "off"] = "auto",
    **own: Any,
) -> JobSpec:
    """A job with its settings, and the fields that only its kind has; the memory budget is in bytes.

    Raises `OptionError` out of range.
    """
    settings = {"kind": kind, "device": text("device", device), "batch_size": batch_size}
    scale = {"processes": processes, "memory_budget": memory_budget, "speedups": speedups}
    permissions = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return validated(JOB_SPEC, settings | scale | permissions | own)


def validated(record: type[R] | TypeAdapter[R], settings: dict[str, Any]) -> R:
    """What is asked, checked. Raises `OptionError` with one sentence."""
    try:
        validate = record.validate_python if isinstance(record, TypeAdapter) else record.model_validate
        return writable(validate(settings))
    except ValidationError as error:
        raise OptionError(sentence(error)) from error


def writable(record: R) -> R:
    """The record, which a file will hold. Raises `OptionError` for bytes of a command line that are no UTF-8 text."""
    try:
        record.model_dump_json()
    except PydanticSerializationError as error:
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in record}
        names = [
            name for name, own in parts.items() if not all(_is_text(each) for each in own if isinstance(each, str))
        ]
        named = ", ".join("--" + name.replace("_", "-") for name in names)
        raise OptionError(f"{named or 'An option'} is no UTF-8 text; rename the file, or spell it anew.") from error
    return record


def _is_text(value: str) -> bool:
    return value == value.encode("utf-8", "ignore").decode()


def text(name: str, value: object) -> str:
    """A name as text that can be written down. Raises `OptionError` for anything else."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if not isinstance(value, str):
        raise OptionError(f"{name} takes a name or a path; found {quoted(value)}.")
    if not _is_text(value):
        raise OptionError(f"{name} {quoted(value)} is no UTF-8 text; rename the file.")
    return value


def path_name(path: str | PathLike[str] | None) -> str | None:
    """A folder or file to write or to read from, absolute."""
    return None if path is None else str(files.expanded(Path(text("A path", path))).absolute())


def _default(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


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
    """What pydantic refused, as one sentence about an option."""
    """What pydantic refused, as one sentence about an option."""
    first = error.errors()[0]
    named = [part for part in first["loc"] if isinstance(part, str)]
    where = "--" + named[-1].replace("_", "-") if named else "The options"
    option = {"--num-remove": "--remove", "--protected": "--protect"}.get(where, where)
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}."
    return f"{option}: found {quoted(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}."
