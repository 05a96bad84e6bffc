"""The same work from a notebook: what the command line calls, with the same defaults. Imports torch only to work."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from sleb import specs
from sleb.errors import OptionError
from sleb.evaluation.request import RunOrModel, answers, ask_of, job_of, lists_of, subject_run, text_name
from sleb.execution import as_before, execute, is_finished, start
from sleb.export import finished_exports
from sleb.records import (
    BenchmarkSpec,
    EvaluateSpec,
    Finding,
    GenerateSpec,
    HealSpec,
    Method,
    Permissions,
    Proof,
    QuantizeSpec,
    Run,
)
from sleb.runtime import files, findings_folder, run_folder
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import Watcher
from sleb.specs import job_spec, run_spec


def search(
    model: str,
    *,
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
    device: str = "auto",
    batch_size: int | None = None,
    processes: int = 1,
    memory_budget: int | None = None,
    speedups: Literal["auto", "off"] = "auto",
    revision: str | None = None,
    analysis: bool = True,
    run_dir: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> Run:
    """Search for the blocks a model can lose, in this process, and return the finished run.

    Args:
        model: a Hugging Face name, a local folder, a `.gguf` file, or `"demo"`.
        remove: how many blocks; or `ratio`, a share rounded up. Default: the paper's 0.2 (demo: 0.1).
        method: `metric3` (SLEB), `metric2`, `metric1`, `early-exit` or `best-chunk`.
        calibration: `wikitext2`, `c4`, `wikitext2-rows`, `demo`, a local `.txt`, `.jsonl` or `.parquet` file
            (`file.jsonl:column`), or a hub data set `name:config:split:column`.
        sequences, sequence_length: windows of so many tokens. Default: 128 of 2048 (demo: 16 of 256).
        held_out: sequences that take no part in any choice. Default: a quarter of `sequences`.
        protect: blocks that are never removed. Default: the first and the last one (none for early exit and
            best chunk).
        until_perplexity: stop before the held-out perplexity rises by more than this share (0.1 is 10 %).
        confidence: of the interval by which candidates are told apart or called tied, and of a race in each step.
        objective: `nll`, of the text (the paper), or `kl`, the divergence from the unmodified model's predictions.
        search: `race` drops candidates once they cannot win, `full` scores all on everything; `auto` races from 32
            sequences on.
        refine: `swap` goes on after the last removal of `metric3`: one block back and another out, as long as that
            lowers the score beyond its error.
        device, batch_size: how, not what: they do not belong to the run.
        processes: on this machine, each with a share of the sequences, one GPU each where there are any.
        memory_budget: bytes for weights and hidden states; blocks that do not fit are read from disk as needed.
        speedups: in long searches, whether faster ways through the blocks are tried (they round differently).
        run_dir: a new folder for the run. Default: one under `SLEB_HOME`.

    Raises:
        SlebError: with one sentence that says what was found, what was needed and what to do. The run folder keeps
            what was finished; `resume` goes on from there.
    """
    spec = run_spec(
        model,
        remove=remove,
        ratio=ratio,
        method=method,
        calibration=calibration,
        sequences=sequences,
        sequence_length=sequence_length,
        held_out=held_out,
        sampling=sampling,
        seed=seed,
        protect=protect,
        until_perplexity=until_perplexity,
        confidence=confidence,
        objective=objective,
        search=search,
        refine=refine,
        bos=bos,
        chat=chat,
        dtype=dtype,
        revision=revision,
        analysis=analysis,
    )
    job = job_spec("search", device, batch_size, allow_pickle, trust_remote_code, processes, memory_budget, speedups)
    return start(spec, job, run_dir, watcher)


def analyze(
    model: str,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    processes: int = 1,
    memory_budget: int | None = None,
    run_dir: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    **options: Any,
) -> Run:
    """The two analyses alone: block output similarity and prediction alignment. Options as for `search`."""
    spec = run_spec(model, kind="analyze", **options)
    job = job_spec("analyze", device, batch_size, allow_pickle, trust_remote_code, processes, memory_budget)
    return start(spec, job, run_dir, watcher)


def resume(
    run: str | PathLike[str] | Run,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    processes: int | None = None,
    memory_budget: int | None = None,
    speedups: Literal["auto", "off"] = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_paths: bool = False,
    out: str | PathLike[str] | None = None,
    replace: bool = False,
    task_folder: str | PathLike[str] | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is returned as it is.

    `processes` and `memory_budget` are those of the last try here unless others are given. What a stopped evaluation
    asked to be allowed is given again (`out`, `replace`, `task_folder`, code and pickles), and `trust_paths` confirms
    the model and texts that a run folder from elsewhere names. Raises `NotPermitted` or `UnconfirmedNames` without.
    """
    found = _found(run)
    run_folder.refuse_sample(found.run_dir)
    allowed = Permissions(
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        trust_paths=trust_paths,
        out=specs.path_name(out),
        replace=replace,
        task_folder=specs.path_name(task_folder),
    )
    run_folder.tidy(found.run_dir)
    if is_finished(found):
        unanswered = job_processes.unanswered(found)
        if unanswered is None:
            return found
        job_processes.require_allowed(unanswered, allowed)
        return execute(found, unanswered.require_spec(), watcher, allowed)
    processes, memory_budget = as_before(found, processes, memory_budget)
    job = job_spec(
        found.spec.kind, device, batch_size, allow_pickle, trust_remote_code, processes, memory_budget, speedups
    )
    return execute(found, job, watcher, allowed)


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
    found = _found(run)
    folder = str(files.expanded(Path(out)).absolute())
    if gguf is not None and format != "gguf":
        raise OptionError("--gguf names the file that --format gguf cuts; add that, or leave it out.")
    source = None if gguf is None else str(files.expanded(Path(gguf)).absolute())
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
    done = execute(found, job, watcher, Permissions.of(job, trust_paths=trust_paths))
    return finished_exports.read_proof(done)


def load(run: str | PathLike[str]) -> Run:
    """A run by its id or folder, with the state of its jobs. Raises `RunError`."""
    return job_processes.watched(run_folder.load(run))


def runs() -> list[Run]:
    """All readable runs under `SLEB_HOME`, newest first."""
    return [job_processes.watched(run) for run in run_folder.list_runs() if isinstance(run, Run)]


def _found(run: str | PathLike[str] | Run) -> Run:
    return run_folder.load(run.run_dir if isinstance(run, Run) else run)


def evaluate(
    subject: RunOrModel,
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
            `revision`, `run_dir`; `trust_paths` for a run folder from elsewhere, whose model is not read without.

    Returns what answers the question, whether it was known already or found now. Raises `SlebError`.
    """
    folder = specs.path_name(task_folder)
    settings = dict(tasks=tuple(tasks), task_folder=folder, shots=shots, limit=limit, window=window, bos=bos)
    ask = dict(settings, texts=tuple(text_name(name) for name in perplexity))
    return _judged(EvaluateSpec, ask, subject, removal_list, steps, all_steps, watcher, how)


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
    subject: RunOrModel,
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
        out=specs.path_name(out),
        replace=replace,
    )
    return _judged(QuantizeSpec, ask, subject, removal_list, steps, False, watcher, how)


def heal(
    subject: RunOrModel,
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
        own["source"] = specs.absolute(own["source"])
    ask = dict(own, texts=tuple(text_name(name) for name in perplexity), out=specs.path_name(out))
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
    **how: Any,
) -> list[Finding]:
    """What the baseline and the lists say to a prompt, greedily, and where their predictions part."""
    ask = dict(prompt=prompt, tokens=tokens, chat=chat)
    return _judged(GenerateSpec, ask, subject, removal_list, steps, all_steps, watcher, how)


def findings_of(run: str | PathLike[str] | Run) -> list[Finding]:
    """Everything that was ever found about a run's lists, oldest first."""
    return findings_folder.findings(run_folder.load(run.run_dir if isinstance(run, Run) else run).run_dir)


def _judged(
    record: type[Any],
    settings: dict[str, Any],
    subject: RunOrModel,
    removal_list: Sequence[int] | None,
    steps: int | None,
    all_steps: bool,
    watcher: Watcher | None,
    how: dict[str, Any],
) -> list[Finding]:
    ask_of(record, **settings)  # refused before a run is made
    trust_paths = how.pop("trust_paths", False)
    own = {name: how.pop(name) for name in ("dtype", "revision", "run_dir") if name in how}
    run = subject_run(subject, removal_list, **own)
    lists = lists_of(run, removal_list, steps, all_steps)
    job = job_of(ask_of(record, lists=lists, **settings), **how)
    return answers(execute(run, job, watcher, Permissions.of(job, trust_paths=trust_paths)))
