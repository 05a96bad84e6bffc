"""Judging removal lists from a notebook: what the command line calls. Imports torch only to work.

The subject is a run, of which some steps' lists are judged, or a model and a list from anywhere: then a run that
searches nothing keeps what is found, and the next question about the same list finds it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import api, files, results, store
from .errors import OptionError, RunError
from .files import read_json
from .findings import (
    NAMED_TEXTS,
    Ask,
    BenchmarkSpec,
    EvaluateSpec,
    Finding,
    GenerateSpec,
    HealSpec,
    QuantizeSpec,
    RemovalList,
    sorted_list,
)
from .formats import removal_list_after, trace_of
from .meter import Watcher
from .records import JobSpec, Run, RunSpec

Subject = str | PathLike[str] | Run


def evaluate(
    subject: Subject,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    all_steps: bool = False,
    perplexity: Sequence[str] = ("wikitext2",),
    tasks: Sequence[str] = (),
    task_folder: str | PathLike[str] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    window: int = 2048,
    bos: str = "no",
    watcher: Watcher | None = None,
    **how: Any,
) -> list[Finding]:
    """Perplexity by the published protocols, and accuracy by lm-eval, of the baseline and of removal lists.

    Args:
        subject: a run, or a model (a Hugging Face name, a folder, a `.gguf` file, `"demo"`) with a `removal_list`.
        removal_list, steps, all_steps: these blocks; the run's list after so many steps; or after each number of
            removals. Default: the run's last list.
        perplexity: `wikitext2`, `c4`, or files (`.raw` as WikiText rows, `.jsonl` as documents, others as one text).
        tasks: of lm-eval, by name; `task_folder` adds some in lm-eval's own YAML. `shots` in the prompt.
        limit: at most so many windows of each text and examples of each task: an estimate.
        how: `device`, `batch_size`, `memory_budget`, `allow_pickle`, `trust_remote_code`; for a model `dtype`,
            `revision`, `run_dir`.

    Returns what answers the question, whether it was known already or found now. Raises `SlebError`.
    """
    folder = folder_name(task_folder)
    settings = dict(tasks=tuple(tasks), task_folder=folder, shots=shots, limit=limit, window=window, bos=bos)
    ask = dict(settings, texts=tuple(text_name(name) for name in perplexity))
    return _judged(EvaluateSpec, ask, subject, removal_list, steps, all_steps, watcher, how)


def benchmark(
    subject: Subject,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    all_steps: bool = False,
    watcher: Watcher | None = None,
    prompt: tuple[int, int] | None = (1, 2048),
    generation: tuple[int, int] | None = (64, 128),
    generation_prompt: int = 64,
    prompt_repetitions: int = 50,
    generation_repetitions: int = 10,
    **how: Any,
) -> list[Finding]:
    """Seconds of prompt processing and token generation, baseline and lists in turn (paper, Appendix B.5).

    `prompt` is (sequences, tokens), `generation` (sequences, generated tokens) after prompts of `generation_prompt`
    tokens; None leaves one out. The rest as for `evaluate`.
    """
    ask = dict(
        prompt=prompt,
        generation=generation,
        generation_prompt=generation_prompt,
        prompt_repetitions=prompt_repetitions,
        generation_repetitions=generation_repetitions,
    )
    return _judged(BenchmarkSpec, ask, subject, removal_list, steps, all_steps, watcher, how)


def quantize(
    subject: Subject,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    schemes: Sequence[str] = ("int8",),
    perplexity: Sequence[str] = ("wikitext2",),
    limit: int | None = None,
    window: int = 2048,
    group_size: int = 128,
    out: str | PathLike[str] | None = None,
    replace: bool = False,
    watcher: Watcher | None = None,
    **how: Any,
) -> list[Finding]:
    """Perplexity before and after weight-only quantisation, of the baseline and of a list (paper, Figures 10 to 12).

    `out` is a folder for the streamlined model in the last scheme. The rest as for `evaluate`.
    """
    ask = dict(
        schemes=tuple(schemes),
        texts=tuple(text_name(name) for name in perplexity),
        limit=limit,
        window=window,
        group_size=group_size,
        out=folder_name(out),
        replace=replace,
    )
    return _judged(QuantizeSpec, ask, subject, removal_list, steps, False, watcher, how)


def heal(
    subject: Subject,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    perplexity: Sequence[str] = ("wikitext2",),
    out: str | PathLike[str] | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> list[Finding]:
    """Perplexity before and after low-rank adapters were trained on the streamlined model (paper, Table 13).

    `settings` are those of `HealSpec` (source, rank, epochs, ...; how="linear" mends without training, "both" before
    it), and device, dtype and the like as for `evaluate`. `out` is a folder for the healed model, or for its adapter
    with `adapter=True`.
    """
    own = {name: settings.pop(name) for name in list(settings) if name in HealSpec.model_fields}
    if "source" in own:
        own["source"] = api.absolute(own["source"])
    ask = dict(own, texts=tuple(text_name(name) for name in perplexity), out=folder_name(out))
    return _judged(HealSpec, ask, subject, removal_list, steps, False, watcher, settings)


def generate(
    subject: Subject,
    prompt: str,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    all_steps: bool = False,
    tokens: int = 64,
    chat: bool = False,
    watcher: Watcher | None = None,
    **how: Any,
) -> list[Finding]:
    """What the baseline and the lists say to a prompt, greedily, and where their predictions part."""
    ask = dict(prompt=prompt, tokens=tokens, chat=chat)
    return _judged(GenerateSpec, ask, subject, removal_list, steps, all_steps, watcher, how)


def findings_of(run: str | PathLike[str] | Run) -> list[Finding]:
    """Everything that was ever found about a run's lists, oldest first."""
    return results.findings(store.load(run.run_dir if isinstance(run, Run) else run).run_dir)


def subject_run(
    subject: Subject,
    removal_list: Sequence[int] | None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    run_dir: str | PathLike[str] | None = None,
) -> Run:
    """The run that keeps what is found: the one named, or one for this model and list, made where there is none.

    Raises `OptionError` where a run is named with what only a model can be given, `RunError` for a damaged one.
    """
    try:
        found = store.locate(subject.run_dir if isinstance(subject, Run) else subject)
    except RunError as error:
        if isinstance(subject, Run):
            raise
        if removal_list is None:
            raise RunError(
                f"There is no run {str(subject)!r}. For a model, say which blocks: --removal-list '[14, 23]', "
                "or '[]' for the unmodified one."
            ) from error
    else:
        for option, value in (("--dtype", dtype != "auto"), ("--revision", revision), ("--run-dir", run_dir)):
            if value:
                raise OptionError(f"{option} is for a model; run {found.name} has its own. Leave it out.")
        store.refuse_sample(found)
        return store.load(found)
    given = sorted_list(_list(removal_list))  # the order of removal is nothing to a model
    spec = api.run_spec(str(subject), kind="evaluate", dtype=dtype, revision=revision)  # type: ignore[arg-type]
    try:
        spec = RunSpec.model_validate(spec.model_dump() | {"given": given, "held_out": 0, "analysis": False})
    except ValidationError as error:
        raise OptionError(api.sentence(error)) from error
    if run_dir is None:
        same = (each for each in store.list_runs() if isinstance(each, Run) and each.spec == spec)
        known = next(same, None)
        if known is not None:
            return known
    return store.create(spec, None if run_dir is None else Path(run_dir))


def lists_of(
    run: Run, removal_list: Sequence[int] | None = None, steps: int | None = None, all_steps: bool = False
) -> tuple[RemovalList, ...]:
    """The lists that are asked for. Raises `OptionError`, or `RunError` for a run without steps."""
    asked = [removal_list is not None, steps is not None, all_steps]
    if sum(asked) > 1:
        raise OptionError("Give one of --removal-list, --steps and --all-steps.")
    if removal_list is not None:
        given = _list(removal_list)
        return (sorted_list(given),) if given else ()
    if run.spec.kind == "evaluate":
        if steps is not None or all_steps:
            raise RunError(f"Run {run.run_id} searched nothing and has no steps; leave --steps and --all-steps out.")
        return (sorted_list(run.spec.given or ()),) if run.spec.given else ()
    if steps == 0:
        return ()
    if all_steps:
        return tuple(dict.fromkeys(sorted_list(step.removal_list) for step in trace_of(run).by_length))
    return (sorted_list(removal_list_after(run, steps)),)


def job_of(ask: Ask, **how: Any) -> JobSpec:
    """A job that asks this. Raises `OptionError`."""
    job = api.job_spec(ask.kind, **how)
    return JobSpec.model_validate(job.model_dump() | {"ask": ask})


def ask_of(record: type[Any], **settings: Any) -> Any:
    """A question, checked. Raises `OptionError` out of range."""
    try:
        return record.model_validate(settings)
    except ValidationError as error:
        raise OptionError(api.sentence(error)) from error


def answers(run: Run) -> list[Finding]:
    """What the newest judging job of a run was asked, in the order in which it was answered."""
    own = [job for job in run.jobs if job.spec.ask is not None]
    if not own:
        return []
    questions = read_json(own[-1].directory / "result.json")["findings"]
    found = {each.question: each for each in results.findings(run.run_dir)}
    return [found[each] for each in questions if each in found]


def _judged(
    record: type[Any],
    settings: dict[str, Any],
    subject: Subject,
    removal_list: Sequence[int] | None,
    steps: int | None,
    all_steps: bool,
    watcher: Watcher | None,
    how: dict[str, Any],
) -> list[Finding]:
    ask_of(record, **settings)  # refused before a run is made
    own = {name: how.pop(name) for name in ("dtype", "revision", "run_dir") if name in how}
    run = subject_run(subject, removal_list, **own)
    lists = lists_of(run, removal_list, steps, all_steps)
    job = job_of(ask_of(record, lists=lists, **settings), **how)
    return answers(api.execute(run, job, watcher))


def _list(removal_list: Sequence[int]) -> tuple[int, ...]:
    blocks = tuple(removal_list)
    wrong = [block for block in blocks if not isinstance(block, int) or isinstance(block, bool) or block < 0]
    if wrong:
        raise OptionError(f"A removal list holds block indices from 0 on; found {wrong[0]!r}.")
    twice = [block for block in blocks if blocks.count(block) > 1]
    if twice:
        raise OptionError(f"The removal list names block {twice[0]} twice.")
    return blocks


def text_name(name: str) -> str:
    """Files are kept absolute, so that a job finds them from any directory."""
    name = api.text("A text", name)
    return name if name in NAMED_TEXTS else str(files.expanded(Path(name)).absolute())


def folder_name(out: str | PathLike[str] | None) -> str | None:
    """A folder to write or to read from, absolute."""
    return None if out is None else str(files.expanded(Path(api.text("A folder", out))).absolute())
