"""A question about removal lists, checked, and the run that keeps its answer. Imports no torch.

The subject is a run, of which some steps' lists are evaluated, or a model and a list from anywhere: then a run that
searches nothing keeps the findings, and the next question about the same list is answered from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sleb import specs
from sleb.errors import OptionError, RunError, quoted
from sleb.records import NAMED_TEXTS, Ask, Finding, JobSpec, RemovalList, Run, RunSpec, sorted_list
from sleb.runtime import files, findings_folder, job_folder, run_folder
from sleb.runtime.listing.run_list import list_outlines
from sleb.runtime.run_index import Outline

RunOrModel = str | PathLike[str] | Run


def subject_run(
    subject: RunOrModel,
    removal_list: Sequence[int] | None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    run_dir: str | PathLike[str] | None = None,
) -> Run:
    """The run that keeps the findings: the one named, or one for this model and list, made where there is none.

    Raises `OptionError` where a run is named with what only a model can be given, `RunError` for a damaged one.
    """
    try:
        directory = run_folder.locate(subject.run_dir if isinstance(subject, Run) else subject)
    except RunError as error:
        if isinstance(subject, Run):
            raise
        if removal_list is None:
            raise RunError(
                f"No run is called {quoted(str(subject))}. For a model, say which blocks with `removal_list`: "
                "[14, 23], or [] for the baseline."
            ) from error
    else:
        for option, value in (("dtype", dtype != "auto"), ("revision", revision), ("run_dir", run_dir)):
            if value:
                raise OptionError(f"`{option}` is for a model; run {directory.name} has its own. Leave it out.")
        run_folder.refuse_sample(directory)
        return run_folder.load(directory)
    given = sorted_list(_list(removal_list))  # the order of removal makes no difference to a model
    spec = specs.run_spec(str(subject), kind="evaluate", dtype=dtype, revision=revision)  # type: ignore[arg-type]
    try:
        spec = RunSpec.model_validate(spec.model_dump() | {"given": given, "held_out": 0, "analysis": False})
    except ValidationError as error:
        raise OptionError(specs.sentence(error)) from error
    if run_dir is None:
        same = (each for each in list_outlines() if isinstance(each, Outline) and each.spec == spec)
        if (known := next(same, None)) is not None:
            return run_folder.load(known.run_dir)
    return run_folder.create(spec, None if run_dir is None else Path(run_dir))


def lists_of(
    run: Run, removal_list: Sequence[int] | None = None, steps: int | None = None, all_steps: bool = False
) -> tuple[RemovalList, ...]:
    """The lists that are asked for. Raises `OptionError`, or `RunError` for a run without steps."""
    if sum((removal_list is not None, steps is not None, all_steps)) > 1:
        raise OptionError("Give one of `removal_list`, `steps` and `all_steps`.")
    if removal_list is not None:
        given = _list(removal_list)
        return (sorted_list(given),) if given else ()
    if run.spec.kind == "evaluate":
        if steps is not None or all_steps:
            raise RunError(f"Run {run.run_id} searched nothing and has no steps; leave `steps` and `all_steps` out.")
        return (sorted_list(run.spec.given or ()),) if run.spec.given else ()
    if steps == 0:
        return ()
    if all_steps:
        return tuple(dict.fromkeys(sorted_list(step.removal_list) for step in run.require_trace().by_length))
    return (sorted_list(run.removal_list_after(steps)),)


def job_of(ask: Ask, **settings: Any) -> JobSpec:
    """A job that answers this question. Raises `OptionError`."""
    return specs.job_spec(ask.kind, ask=ask, **settings)


def ask_of(record: type[Any], **settings: Any) -> Any:
    """A question about removal lists, checked. Raises `OptionError` for a setting that is out of range."""
    return specs.validated(record, settings)


def answers(run: Run) -> list[Finding]:
    """The findings of a run's newest evaluation job, in the order in which it answered. Raises `RunError`."""
    own = [job for job in run.jobs if job.ask is not None]
    if not own:
        return []
    questions = job_folder.read_result(own[-1].directory)["findings"]
    findings = {each.question: each for each in findings_folder.findings(run.run_dir)}
    return [findings[each] for each in questions if each in findings]


def _list(removal_list: Sequence[int]) -> tuple[int, ...]:
    blocks = tuple(removal_list)
    wrong = [block for block in blocks if not isinstance(block, int) or isinstance(block, bool) or block < 0]
    if wrong:
        raise OptionError(f"A removal list holds block indices from 0 on; it has {quoted(wrong[0])}.")
    twice = [block for block in blocks if blocks.count(block) > 1]
    if twice:
        raise OptionError(f"The removal list names block {twice[0]} twice.")
    return blocks


def usual_text(subject: RunOrModel) -> str:
    """The text where none is named: the demo model comes with one; the others' is fetched from the hub."""
    model = subject.spec.model if isinstance(subject, Run) else str(subject)
    if not isinstance(subject, Run):
        with suppress(RunError):
            model = run_folder.load(subject).spec.model
    return "demo" if model == "demo" else "wikitext2"


def text_name(name: str) -> str:
    """The name of a text; a file's as an absolute path, so that a job finds it from any directory."""
    name = specs.text("A text", name)
    return name if name in NAMED_TEXTS else str(files.expanded(Path(name)).absolute())
