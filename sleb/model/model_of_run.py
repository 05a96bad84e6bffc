"""The model of a run, opened as the run began with it."""

from __future__ import annotations

from pathlib import Path

from sleb.errors import RunError
from sleb.model.loading import LoadedModel, load_model, weights_hash
from sleb.records import JobSpec, Run


def require_same_weights(run: Run, job: JobSpec, loaded: LoadedModel) -> None:
    """A list found on other weights proves nothing about these."""
    assert run.stack is not None
    if weights_hash(loaded.model, run.stack.dtype) == run.stack.weights_hash:
        return
    if loaded.dtype != run.stack.dtype:  # some families keep a few weights in float32 whatever was asked
        searched = load_run_model(run, job.model_copy(update={"kind": "search"}), job.device)
        if weights_hash(searched.model) == run.stack.weights_hash:
            return
    raise RunError(
        f"The weights of {run.spec.model} are not those that run {run.run_id} searched. Restore them, or search again."
    )


def load_run_model(run: Run, job: JobSpec, device: str, gguf: Path | None = None) -> LoadedModel:
    """The model of a run, or the GGUF file that an export cuts.

    An export writes what the checkpoint holds; a resumed run keeps the type it began with.
    """
    dtype = run.stack.dtype if run.stack else run.spec.dtype
    name = run.spec.model
    revision = run.stack.revision if run.stack and run.stack.revision else run.spec.revision
    if gguf is not None:
        name, revision = str(gguf), None
    return load_model(
        name,
        revision=revision,
        dtype="checkpoint" if job.kind == "export" else dtype,
        device=device,
        allow_pickle=job.allow_pickle,
        trust_remote_code=job.trust_remote_code,
        memory_budget=job.memory_budget,
        only_to_compare=gguf is not None,
    )
