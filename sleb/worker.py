"""Executes a job: takes the run's lock, loads the model, does what the job says, writes how it went."""

from __future__ import annotations

import logging
import platform
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import calibration, distributed, gguf_export, jobs, results, store
from .blocks import BlockStack
from .errors import OptionError, RunError
from .export import export_checkpoint, model_card, require_free
from .formats import public_name, removal_list_after
from .loading import LoadedModel, load_model, weights_hash
from .meter import Meter, Watcher
from .records import Attempt, Job, JobSpec, Run
from .session import Session, describe
from .streaming import streamed_blocks
from .subject import Subject

log = logging.getLogger(__name__)

_JUDGES = {
    "evaluate": "evaluating",
    "benchmark": "timing",
    "quantize": "quantizing",
    "heal": "healing",
    "generate": "generating",
}


def execute(job_dir: Path, reporter: jobs.Reporter, watcher: Watcher) -> None:
    """Do what the job says; the caller holds the run (`jobs.executing`)."""
    job = store.load_job(job_dir)
    with _logging_to(job_dir / "log.txt"):
        run = store.load(job_dir.parent.parent)
        meter = Meter(reporter.progress, watcher.progress)
        attempt = _AttemptFile(job_dir, job.spec)
        log.info("Job %s of run %s: %s", job.name, run.run_id, run.spec.model)
        try:
            judge = _judge(job.spec)
            if job.spec.kind == "export":
                _require_exportable(run, job.spec)  # refused before minutes of loading
            elif judge is not None:
                judge.require(job.spec.ask)
            else:
                calibration.require_there(run.spec.calibration)
            meter.phase("Loading the model")
            if judge is not None:
                loaded = _load(run, job.spec, job.spec.device)
                attempt.loaded(loaded, watcher)
                judge.work(_subject(run, job, loaded, meter, watcher), job.spec.ask)
            elif job.spec.kind == "export":
                loaded = _load(run, job.spec, job.spec.device)
                attempt.loaded(loaded, watcher)
                _export(run, job.spec, job_dir, loaded, meter)
            else:
                with distributed.joined(job_dir, job.spec.processes, job.spec.device) as group:
                    session = _session(run, job.spec, group, meter, watcher)
                    attempt.loaded(session.loaded, watcher, processes=group.size)
                    session.go()
                attempt.learn(batch_size=session.batch_size)
            log.info("Done.")
        finally:
            attempt.learn(peak_memory=_peak_memory())


def assist(job_dir: Path) -> None:
    """Compute a share of what the first process of a job executes; writes nothing."""
    job = store.load_job(job_dir).spec
    run = store.load(job_dir.parent.parent)
    logging.getLogger("sleb").setLevel(logging.ERROR)  # the first one says it
    with jobs.stopping_on_sigterm(), distributed.joined(job_dir, job.processes, job.device) as group:
        _session(run, job, group, Meter(), Watcher()).go()


def _session(run: Run, job: JobSpec, group: distributed.Group, meter: Meter, watcher: Watcher) -> Session:
    """The same on every rank: run and type of the first one, a device of its own."""
    run = group.share(lambda: run)
    device = distributed.device_of(group, job.device)
    loaded = _load(run, job, device) if group.first else None
    dtype = group.share(lambda: loaded.dtype if loaded else "")
    if loaded is None:
        loaded = _load(run.model_copy(update={"spec": run.spec.model_copy(update={"dtype": dtype})}), job, device)
    return Session(run, job, loaded, meter, watcher, group)


def _judge(job: JobSpec) -> Any:
    """The module that does what a job asks about removal lists: `require` before the model is there, `work` with it."""
    if job.ask is None:
        if job.kind in _JUDGES:
            raise RunError(f"The job's spec.json does not say what to {job.kind}; it is damaged.")
        return None
    return import_module(f"{__package__}.{_JUDGES[job.ask.kind]}")


def _subject(run: Run, job: Job, loaded: LoadedModel, meter: Meter, watcher: Watcher) -> Subject:
    """The model as it was searched, or, in a run that searches nothing, as it is found now."""
    assert job.spec.ask is not None
    stack = BlockStack(loaded.model)
    if run.stack is None:
        if run.spec.kind != "evaluate":
            raise RunError(f"Run {run.run_id} has not opened its model yet. Go on with it first: sleb resume.")
        meter.phase("Checking the sweep against plain forward passes")
        described = describe(stack, loaded)
        store.write_stack(run.run_dir, described)
        run = run.model_copy(update={"stack": described})
        watcher.described(described)
    else:
        _require_same_weights(run, job.spec, loaded)
    subject = Subject(run, job.spec, job.directory, loaded, stack, meter)
    subject.require_within(job.spec.ask.lists)
    return subject


def _require_exportable(run: Run, job: JobSpec) -> tuple[tuple[int, ...], Path]:
    if job.out is None:
        raise OptionError("An export needs a folder to write: --out PATH.")
    out = Path(job.out)
    removal_list = removal_list_after(run, job.steps)
    if job.format == "gguf":
        source = gguf_export.source_of(run, job)
        gguf_export.require_free(out, job.replace, source)
        gguf_export.plan_cut(source, removal_list)
    else:
        require_free(out, job.replace)
    return removal_list, out


def _require_same_weights(run: Run, job: JobSpec, loaded: LoadedModel) -> None:
    """A list found on other weights proves nothing about these."""
    assert run.stack is not None
    if weights_hash(loaded.model, run.stack.dtype) == run.stack.weights_hash:
        return
    if loaded.dtype != run.stack.dtype:  # some families keep a few weights in float32 whatever was asked
        searched = _load(run, job.model_copy(update={"kind": "search"}), job.device)
        if weights_hash(searched.model) == run.stack.weights_hash:
            return
    raise RunError(
        f"The weights of {run.spec.model} are not those that run {run.run_id} searched. Restore them, or search again."
    )


def _export(run: Run, job: JobSpec, job_dir: Path, loaded: LoadedModel, meter: Meter) -> None:
    removal_list, out = _require_exportable(run, job)
    if job.gguf is None:
        _require_same_weights(run, job, loaded)
    if job.format == "gguf":
        _export_gguf(run, job, job_dir, loaded, removal_list, meter)
        return
    proof = export_checkpoint(
        loaded.model,
        loaded.tokenizer,
        removal_list,
        out,
        model_card(
            run,
            removal_list,
            base_model=public_name(run.spec.model),
            found=results.findings(run.run_dir),
        ),
        allow_existing=job.replace,
        progress=meter.phase,
        trust_remote_code=job.trust_remote_code,
        memory_budget=job.memory_budget,
    )
    store.write_result(job_dir, {"out": job.out, "proof": proof.model_dump(mode="json")})


def _export_gguf(
    run: Run, job: JobSpec, job_dir: Path, loaded: LoadedModel, removal_list: tuple[int, ...], meter: Meter
) -> None:
    source = gguf_export.source_of(run, job)
    if job.gguf is not None:
        gguf_export.require_same_model(run, source, loaded.model)
    assert job.out is not None
    proof = gguf_export.export_gguf(
        loaded.model,
        loaded.tokenizer,
        source,
        removal_list,
        Path(job.out),
        run.run_id,
        allow_existing=job.replace,
        progress=meter.phase,
        trust_remote_code=job.trust_remote_code,
    )
    store.write_result(job_dir, {"out": job.out, "proof": proof.model_dump(mode="json")})


def _load(run: Run, job: JobSpec, device: str) -> LoadedModel:
    """An export writes what the checkpoint holds; a resumed run keeps the type it began with."""
    dtype = run.stack.dtype if run.stack else run.spec.dtype
    name = run.spec.model
    revision = run.stack.revision if run.stack and run.stack.revision else run.spec.revision
    if job.kind == "export" and job.format == "gguf":
        name, revision = str(gguf_export.source_of(run, job)), None
    return load_model(
        name,
        revision=revision,
        dtype="checkpoint" if job.kind == "export" else dtype,
        device=device,
        allow_pickle=job.allow_pickle,
        trust_remote_code=job.trust_remote_code,
        memory_budget=job.memory_budget,
    )


class _AttemptFile:
    """`attempt.json`, written at once and again whenever more is known."""

    def __init__(self, job_dir: Path, job: JobSpec) -> None:
        self.job_dir = job_dir
        self.attempt = Attempt(
            device=job.device,
            batch_size=job.batch_size,
            processes=job.processes,
            memory_budget=job.memory_budget,
            threads=torch.get_num_threads(),
            host=socket.gethostname(),
            versions=versions(),
        )
        self.learn()

    def loaded(self, loaded: LoadedModel, watcher: Watcher, **changes: Any) -> None:
        """The model is there: said in the log and on the screen."""
        streamed = streamed_blocks(loaded.model) is not None
        self.learn(device=loaded.device, threads=torch.get_num_threads(), streamed=streamed, **changes)
        log.info("Loaded in %s, %s", loaded.dtype, self.attempt.described)
        watcher.attempt(self.attempt)

    def learn(self, **changes: Any) -> None:
        """Something about this try became known."""
        self.attempt = self.attempt.model_copy(update=changes)
        store.write_attempt(self.job_dir, self.attempt)


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """What the numbers depend on besides model and text."""
    found = {"python": platform.python_version()}
    for package in ("sleb", "torch", "transformers", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Log(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written must not end the work it tells of."""


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = _Log(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("sleb")
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        with suppress(OSError):  # a full disk
            handler.close()
