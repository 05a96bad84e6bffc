"""The model of a run, opened as the run began with it."""

from __future__ import annotations

from pathlib import Path

from sleb.errors import RunError
from sleb.model.identity import default_fields, identity_of, weights_hash
from sleb.model.loading import LoadedModel, load_model
from sleb.records import SCORING_VERSION, ExportJob, JobSettings, Run

_NAMED = 3  # changes in one sentence


def require_same_model(run: Run, job: JobSettings, loaded: LoadedModel) -> None:
    """Require the model that the run began with: a list found on another one proves nothing about it.

    A run by an earlier version recorded weights alone, and the rest is unknown here. Raises `RunError`,
    naming what has changed.
    """
    assert run.stack is not None
    dtype = None if loaded.dtype == run.stack.dtype else run.stack.dtype
    changes = []
    if weights_hash(loaded.model, dtype) != run.stack.weights_hash and not _searched_so(run, job, loaded):
        changes.append("the weights are others")
    if run.stack.identity is not None:
        changes += run.stack.identity.differences(identity_of(loaded), default_fields(loaded.model.config))
    if changes:
        more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
        instead = "keep the new results apart with `run_dir`" if run.spec.kind == "evaluate" else "start a new run"
        raise RunError(
            f"{run.spec.model}{_commits(run, loaded)} is not the model that run {run.run_id} began with: "
            f"{'; '.join(changes[:_NAMED])}{more}. Restore it, or {instead}."
        )


def require_same_scoring(run: Run) -> None:
    """Require the version of the scoring code that began the run: scores of two do not compare. Raises `RunError`."""
    assert run.stack is not None
    if run.stack.scoring_version not in (None, SCORING_VERSION):
        raise RunError(
            f"Run {run.run_id} was scored by version {run.stack.scoring_version} of the scoring code, and this program "
            f"has version {SCORING_VERSION}: their scores do not compare. Start a new run, or use that program."
        )


def _searched_so(run: Run, job: JobSettings, loaded: LoadedModel) -> bool:
    """Whether the weights are the run's once loaded in its type: some families keep a few in float32 in any."""
    assert run.stack is not None
    if loaded.dtype == run.stack.dtype:
        return False
    searched = load_run_model(run, job, job.device, dtype=run.stack.dtype)
    return weights_hash(searched.model) == run.stack.weights_hash


def _commits(run: Run, loaded: LoadedModel) -> str:
    """The hub's commits, where there are any."""
    assert run.stack is not None
    began, now = run.stack.revision, loaded.revision
    if began is None and now is None:
        return ""
    return f" at commit {now or 'unknown'}" + ("" if began == now else f", which was {began or 'not recorded'},")


def load_run_model(
    run: Run, job: JobSettings, device: str, gguf: Path | None = None, dtype: str | None = None
) -> LoadedModel:
    """The model of a run, or the GGUF file that an export cuts; in `dtype`, if that is given.

    An export writes what the checkpoint holds; a resumed run keeps the type it began with.
    """
    if dtype is None:
        dtype = run.stack.dtype if run.stack else run.spec.dtype
        dtype = "checkpoint" if isinstance(job, ExportJob) else dtype
    name = run.spec.model
    revision = run.stack.revision if run.stack and run.stack.revision else run.spec.revision
    if gguf is not None:
        name, revision = str(gguf), None
    return load_model(
        name,
        revision=revision,
        dtype=dtype,
        device=device,
        allow_pickle=job.allow_pickle,
        trust_remote_code=job.trust_remote_code,
        memory_budget=job.memory_budget,
        only_to_compare=gguf is not None,
    )
