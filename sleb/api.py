"""The same work from a notebook: what the command line calls, with the same defaults. Imports torch only to work."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, Unpack

from sleb import specs
from sleb.errors import OptionError
from sleb.evaluation.request import RunOrModel, answers, ask_of, job_of, lists_of, subject_run, text_name, usual_text
from sleb.execution import execute, is_finished, resuming_job, start
from sleb.export import finished_exports
from sleb.records import (
    BenchmarkSpec,
    EvaluateSpec,
    Finding,
    GenerateSpec,
    HealSpec,
    Permissions,
    Proof,
    QuantizeSpec,
    Run,
)
from sleb.runtime import findings_folder, run_folder
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import Watcher
from sleb.specs import JobOptions, RunOptions, SearchOptions, job_spec, with_options


@with_options(RunOptions, JobOptions)
def search(
    model: str | PathLike[str],
    *,
    run_dir: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    **options: Unpack[SearchOptions],
) -> Run:
    """Search for the blocks a model can lose, in this process, and return the finished run.

    Args:
        model: a Hugging Face name, a local folder, a `.gguf` file, or `"demo"`.
        run_dir: a new folder for the run. Default: one under `SLEB_HOME`.
        options: those of the run, and of the job that executes it, which does not belong to the run. Blocks are lists
            of indices, shares are numbers (0.1 is 10 %), and sizes are bytes.

    Raises:
        SlebError: with one sentence that says what was found, what was needed and what to do. The run folder keeps
            what was finished; `resume` goes on from there.
    """
    spec = specs.run_spec(model, **specs.run_options(options))
    permitted = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return start(spec, job_spec("search", **specs.job_options(options), **permitted), run_dir, watcher)


@with_options(RunOptions, JobOptions, search=False)
def analyze(
    model: str | PathLike[str],
    *,
    run_dir: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    **options: Unpack[SearchOptions],
) -> Run:
    """Analyse a model without a search: block output similarity and prediction alignment."""
    spec = specs.run_spec(model, kind="analyze", **specs.run_options(options))
    permitted = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return start(spec, job_spec("analyze", **specs.job_options(options), **permitted), run_dir, watcher)


@with_options(JobOptions, as_before=("processes", "memory_budget"))
def resume(
    run: str | PathLike[str] | Run,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_paths: bool = False,
    out: str | PathLike[str] | None = None,
    replace: bool = False,
    task_folder: str | PathLike[str] | None = None,
    watcher: Watcher | None = None,
    **options: Unpack[JobOptions],
) -> Run:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is returned as it is.

    `processes` and `memory_budget` are those of the last try here unless others are given. What a stopped evaluation
    asked to be allowed is given again (`out`, `replace`, `task_folder`, code and pickles), and `trust_paths` confirms
    the model and texts that a run folder from elsewhere names. Raises `NotPermitted` or `UnconfirmedNames` without.
    """
    resumed = _loaded(run)
    run_folder.refuse_sample(resumed.run_dir)
    allowed = specs.permissions(allow_pickle, trust_remote_code, trust_paths, out, replace, task_folder)
    run_folder.tidy(resumed.run_dir)
    if is_finished(resumed):
        unanswered = job_processes.unanswered(resumed)
        if unanswered is None:
            return resumed
        job_processes.require_allowed(unanswered, allowed)
        return execute(resumed, unanswered.require_spec(), watcher, allowed)
    job = resuming_job(resumed, options, allow_pickle, trust_remote_code)
    return execute(resumed, job, watcher, allowed)


def export_model(
    run: str | PathLike[str] | Run,
    out: str | PathLike[str],
    *,
    format: Literal["hf", "gguf"] = "hf",
    gguf: str | PathLike[str] | None = None,
    steps: int | None = None,
    replace: bool = False,
    device: str = "cpu",
    memory_budget: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_paths: bool = False,
    watcher: Watcher | None = None,
) -> Proof:
    """Write the smaller model to the folder `out` and prove it: reloaded in a fresh process, equal, smaller.

    With `format="gguf"` to the file `out`: the blocks are cut out of the GGUF file that the run searched (or of `gguf`,
    a file of the same model), and everything else of it is copied as it is, quantised weights included.

    `trust_paths` confirms the model that a run folder from elsewhere names. Raises `ExportError` where the architecture
    cannot express the removal, or the proof fails.
    """
    exported = _loaded(run)
    folder = specs.path_name(specs.text("`out`", out))
    if gguf is not None and format != "gguf":
        raise OptionError("`gguf` names the file that `format=gguf` cuts; add that, or leave it out.")
    source = specs.path_name(gguf)
    job = job_spec(
        "export",
        device,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        memory_budget=memory_budget,
        steps=steps,
        out=folder,
        format=format,
        gguf=source,
        replace=replace,
    )
    done = execute(exported, job, watcher, Permissions.of(job, trust_paths=trust_paths))
    return finished_exports.read_proof(done)


def load(run: str | PathLike[str]) -> Run:
    """A run by its id or folder, with the state of its jobs. Raises `RunError`."""
    return job_processes.watched(run_folder.load(run))


def runs() -> list[Run]:
    """All readable runs under `SLEB_HOME`, newest first."""
    return [job_processes.watched(run) for run in run_folder.list_runs() if isinstance(run, Run)]


def _loaded(run: str | PathLike[str] | Run) -> Run:
    return run_folder.load(run.run_dir if isinstance(run, Run) else run)


def evaluate(
    subject: RunOrModel,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    all_steps: bool = False,
    perplexity: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | PathLike[str] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    window: int = 2048,
    bos: str = "no",
    watcher: Watcher | None = None,
    **options: Any,
) -> list[Finding]:
    """Perplexity by the published protocols, and accuracy by lm-eval, of the baseline and of removal lists.

    Args:
        subject: a run, or a model (a Hugging Face name, a folder, a `.gguf` file, `"demo"`) with a `removal_list`.
        removal_list, steps, all_steps: these blocks; the run's list after so many steps; or after each number of
            removals. Default: the run's last list.
        perplexity: `wikitext2`, `c4`, or files (`.raw` as WikiText rows, `.jsonl` as documents, others as one text).
            Default: `wikitext2`; for the demo model `demo`, the text that comes with it. `()` measures none.
        tasks: of lm-eval, by name; `task_folder` adds some in lm-eval's own YAML. `shots` in the prompt.
        limit: at most so many windows of each text and examples of each task: an estimate.
        options: `device`, `batch_size`, `memory_budget`, `allow_pickle`, `trust_remote_code`; for a model `dtype`,
            `revision`, `run_dir`; `trust_paths` for a run folder from elsewhere, whose model is not read without.

    Returns the findings that answer the question, kept from before or measured now. Raises `SlebError`.
    """
    folder = specs.path_name(task_folder)
    settings = dict(tasks=tuple(tasks), task_folder=folder, shots=shots, limit=limit, window=window, bos=bos)
    ask = dict(settings, texts=_texts(subject, perplexity))
    return _judged(EvaluateSpec, ask, subject, removal_list, steps, all_steps, watcher, options)


def benchmark(
    subject: RunOrModel,
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
    **options: Any,
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
    return _judged(BenchmarkSpec, ask, subject, removal_list, steps, all_steps, watcher, options)


def quantize(
    subject: RunOrModel,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    schemes: Sequence[str] = ("int8",),
    perplexity: Sequence[str] | None = None,
    limit: int | None = None,
    window: int = 2048,
    group_size: int = 128,
    out: str | PathLike[str] | None = None,
    replace: bool = False,
    watcher: Watcher | None = None,
    **options: Any,
) -> list[Finding]:
    """Perplexity before and after weight-only quantisation, of the baseline and of a list (paper, Figures 10 to 12).

    `out` is a folder for the streamlined model in the last scheme. The rest as for `evaluate`.
    """
    ask = dict(
        schemes=tuple(schemes),
        texts=_texts(subject, perplexity),
        limit=limit,
        window=window,
        group_size=group_size,
        out=specs.path_name(out),
        replace=replace,
    )
    return _judged(QuantizeSpec, ask, subject, removal_list, steps, False, watcher, options)


def heal(
    subject: RunOrModel,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    perplexity: Sequence[str] | None = None,
    out: str | PathLike[str] | None = None,
    watcher: Watcher | None = None,
    **settings: Any,
) -> list[Finding]:
    """Perplexity before and after low-rank adapters were trained on the streamlined model (paper, Table 13).

    `settings` are those of `HealSpec` (source, rank, epochs, ...), and device, dtype and the like as for `evaluate`.
    how="linear" repairs the cuts by a least-squares refit instead of training; "both" does so before training.
    `out` is a folder for the healed model, or for its adapter with `adapter=True`.
    """
    own = {name: settings.pop(name) for name in list(settings) if name in HealSpec.model_fields}
    own["source"] = specs.absolute(own["source"]) if "source" in own else usual_text(subject)
    ask = dict(own, texts=_texts(subject, perplexity), out=specs.path_name(out))
    return _judged(HealSpec, ask, subject, removal_list, steps, False, watcher, settings)


def generate(
    subject: RunOrModel,
    prompt: str,
    *,
    removal_list: Sequence[int] | None = None,
    steps: int | None = None,
    all_steps: bool = False,
    tokens: int = 64,
    chat: bool = False,
    watcher: Watcher | None = None,
    **options: Any,
) -> list[Finding]:
    """Continue a prompt greedily with the baseline and with the lists, and compare their predictions."""
    ask = dict(prompt=prompt, tokens=tokens, chat=chat)
    return _judged(GenerateSpec, ask, subject, removal_list, steps, all_steps, watcher, options)


def findings_of(run: str | PathLike[str] | Run) -> list[Finding]:
    """All findings about a run's lists, oldest first."""
    return findings_folder.findings(_loaded(run).run_dir)


def _texts(subject: RunOrModel, perplexity: Sequence[str] | None) -> tuple[str, ...]:
    """Texts as a request has them: those named, or the usual one of the model."""
    return tuple(text_name(name) for name in ((usual_text(subject),) if perplexity is None else perplexity))


def _judged(
    record: type[Any],
    settings: dict[str, Any],
    subject: RunOrModel,
    removal_list: Sequence[int] | None,
    steps: int | None,
    all_steps: bool,
    watcher: Watcher | None,
    options: dict[str, Any],
) -> list[Finding]:
    ask_of(record, **settings)  # refused before a run is made
    trust_paths = options.pop("trust_paths", False)
    own = {name: options.pop(name) for name in ("dtype", "revision", "run_dir") if name in options}
    run = subject_run(subject, removal_list, **own)
    lists = lists_of(run, removal_list, steps, all_steps)
    job = job_of(ask_of(record, lists=lists, **settings), **options)
    return answers(execute(run, job, watcher, Permissions.of(job, trust_paths=trust_paths)))
