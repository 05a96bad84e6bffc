"""The same work from a notebook: what the command line calls, with the same defaults. Imports torch only to work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from . import distributed, files, jobs, store
from .errors import OptionError, RunBusy
from .meter import Watcher
from .records import CalibrationSpec, Forecast, JobKind, JobSpec, JobState, Method, Proof, Run, RunSpec

PAPER_SEQUENCES = 128
PAPER_SEQUENCE_LENGTH = 2048
PAPER_RATIO = 0.2
DEMO_SEQUENCES = 16
DEMO_SEQUENCE_LENGTH = 256
DEMO_RATIO = 0.1


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
    watcher: Watcher | None = None,
) -> Run:
    """Go on after the last finished step, or with a stopped evaluation; a finished run is returned as it is.

    `processes` and `memory_budget` are those of the last try unless others are given.
    """
    found = _found(run)
    store.refuse_sample(found.run_dir)
    if is_finished(found):
        unanswered = jobs.unanswered(found)
        return found if unanswered is None else execute(found, unanswered, watcher)
    processes, memory_budget = as_before(found, processes, memory_budget)
    job = job_spec(
        found.spec.kind, device, batch_size, allow_pickle, trust_remote_code, processes, memory_budget, speedups
    )
    return execute(found, job, watcher)


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
    watcher: Watcher | None = None,
) -> Proof:
    """Write the smaller model to the folder `out` and prove it: reloaded in a fresh process, equal, smaller.

    With `format="gguf"` to the file `out`: the blocks are cut out of the GGUF file that the run searched (or of `gguf`,
    a file of the same model), and everything else of it is copied as it is, quantised weights included.

    Raises `ExportError` where the architecture cannot express the removal, or the proof fails.
    """
    found = _found(run)
    job = job_spec("export", device, None, allow_pickle, trust_remote_code, memory_budget=memory_budget)
    folder = str(files.expanded(Path(out)).absolute())
    if gguf is not None and format != "gguf":
        raise OptionError("--gguf names the file that --format gguf cuts; add that, or leave it out.")
    source = None if gguf is None else str(files.expanded(Path(gguf)).absolute())
    what = {"steps": steps, "replace": replace, "out": folder, "format": format, "gguf": source}
    job = _valid(JobSpec, job.model_dump() | what)
    done = execute(found, job, watcher)
    return store.read_proof(done)


def load(run: str | PathLike[str]) -> Run:
    """A run by its id or folder, with the state of its jobs. Raises `RunError`."""
    return jobs.watched(store.load(run))


def runs() -> list[Run]:
    """All readable runs under `SLEB_HOME`, newest first."""
    return [jobs.watched(run) for run in store.list_runs() if isinstance(run, Run)]


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
        raise OptionError(f"There is no run of kind {kind!r}; search and analyze are the two.")
    model, calibration = text("model", model), None if calibration is None else text("calibration", calibration)
    is_demo = model == "demo"
    if remove is None and ratio is None and until_perplexity is None:
        ratio = DEMO_RATIO if is_demo else PAPER_RATIO
    if not model.strip():
        raise OptionError("The model's name is empty. Give a Hugging Face name, a folder, a .gguf file, or demo.")
    given: object = protect
    if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
        raise OptionError(f"protect takes a list of block indices such as [0, 29]; found {given!r}.")
    protect = None if protect is None else tuple(protect)
    if protect is not None and len(set(protect)) != len(protect):
        raise OptionError(f"--protect names a block twice: {', '.join(map(str, protect))}.")
    names = [each.value for each in Method]
    if str(method) not in names:
        raise OptionError(f"There is no method {str(method)!r}; use one of {', '.join(names)}.")
    try:
        return RunSpec(
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


def job_spec(
    kind: JobKind,
    device: str = "auto",
    batch_size: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    processes: int = 1,
    memory_budget: int | None = None,
    speedups: Literal["auto", "off"] = "auto",
) -> JobSpec:
    """How it is to be done; the memory budget is in bytes. Raises `OptionError` out of range."""
    settings = {"kind": kind, "device": text("device", device), "batch_size": batch_size}
    scale = {"processes": processes, "memory_budget": memory_budget, "speedups": speedups}
    permissions = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return _valid(JobSpec, settings | scale | permissions)


def as_before(run: Run, processes: int | None, memory_budget: int | None) -> tuple[int, int | None]:
    """What was given, or else what the last try of the same kind had: it did not fit otherwise."""
    last = next((job.spec for job in reversed(run.jobs) if job.spec.kind == run.spec.kind), None)
    if last is None:
        return processes or 1, memory_budget
    return processes or last.processes, last.memory_budget if memory_budget is None else memory_budget


def start(
    spec: RunSpec, job: JobSpec, run_dir: str | PathLike[str] | None = None, watcher: Watcher | None = None
) -> Run:
    """Create a run and execute its first job here."""
    return execute(store.create(spec, Path(run_dir) if run_dir is not None else None), job, watcher)


def forecast(spec: RunSpec, job: JobSpec | None = None) -> Forecast:
    """What a run will take: loads the model and times a few blocks. Writes nothing."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .probe import probe

    return probe(spec, job or job_spec(spec.kind))


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do."""
    if run.spec.kind == "evaluate":
        return True
    if run.spec.kind == "search" and (run.trace is None or run.trace.finished is None):
        return False
    analysed = run.analysis is not None or run.analysis_unavailable is not None
    return analysed or (run.spec.kind == "search" and not run.spec.analysis)


def execute(run: Run, spec: JobSpec, watcher: Watcher | None = None) -> Run:
    """Execute a new job of a run in this process. Raises `RunBusy` while another process does."""
    job = jobs.next_job(run, spec)
    try:
        return jobs.watched(work(job.directory, watcher))
    except RunBusy:
        store.withdraw_job(job)
        raise


def work(job_dir: Path, watcher: Watcher | None = None) -> Run:
    """Execute a job that is waiting, in this process, once the device is free. Imports torch.

    Raises a `SlebError` with one sentence, after writing it down.
    """
    # Threads that spin while they wait cost nothing on idle cores and half the speed on busy ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    watcher = watcher or Watcher()
    rank = distributed.rank_here()
    if rank.rank > 0:
        _assist(job_dir)
        return store.load(job_dir.parent.parent)
    with jobs.executing(job_dir, watcher.progress, rank.local_size if rank.size > 1 else None) as reporter:
        from .worker import execute as execute_job  # torch: not before it is this job's turn

        execute_job(job_dir, reporter, watcher)
    return store.load(job_dir.parent.parent)


def _assist(job_dir: Path) -> None:
    """One of several processes, but not the first: it begins when that one has its turn."""
    distributed.die_with_the_first()
    while (job := store.load_job(job_dir)).status.state is JobState.QUEUED:
        time.sleep(0.2)
    if job.status.state is JobState.RUNNING:
        from .worker import assist

        assist(job_dir)


def _found(run: str | PathLike[str] | Run) -> Run:
    return store.load(run.run_dir if isinstance(run, Run) else run)


def _valid(record: type[JobSpec], settings: dict[str, Any]) -> JobSpec:
    try:
        return record.model_validate(settings)
    except ValidationError as error:
        raise OptionError(sentence(error)) from error


def text(name: str, value: object) -> str:
    """A name as text that can be written down. Raises `OptionError` for anything else."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if not isinstance(value, str):
        raise OptionError(f"{name} takes a name or a path; found {value!r}.")
    if not value.isprintable() and not value.encode("utf-8", "ignore").decode() == value:
        raise OptionError(f"{name} {value!r} is no UTF-8 text; rename the file.")
    return value


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
    return f"{option}: found {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}."
