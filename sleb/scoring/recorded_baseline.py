"""Whether what a run recorded was scored by the model that is loaded now, found out by scoring a little of it again."""

from __future__ import annotations

import numpy as np

from sleb.errors import RunError
from sleb.model.identity import identity_of
from sleb.model.loading import LoadedModel
from sleb.records import SCORING_VERSION, Measured, Run, StackDescription
from sleb.runtime import origin, trace_file
from sleb.scoring.scorer import Scorer


def agrees(now: float, then: float, tokens: float, dtype: str) -> bool:
    """Whether two sums of nats over so many tokens can be one model's, on other machines and in other batches."""
    per_token = 1e-4 if dtype in ("float32", "float64") else 0.02
    return bool(abs(now - then) <= per_token * tokens)


def recorded(run: Run) -> np.ndarray:
    """Nats of the baseline on every sequence; one sum over the calibration text where the scores are missing."""
    assert run.trace is not None
    try:
        nats = np.asarray(trace_file.read_scores(run.run_dir, "baseline")["nats"], dtype=np.float64).ravel()
        if len(nats):
            return nats
    except (RunError, KeyError, ValueError):
        pass  # missing, or no scores
    return np.array([run.trace.baseline.calibration.nll_sum], dtype=np.float64)


def require_same(run: Run, scorer: Scorer, then: np.ndarray, sequences: int) -> None:
    """Score the first calibration sequence of a run again, or all `sequences` where only their sum is `recorded`.

    Every rank of the scorer's group calls this. Raises `RunError` where the two differ.
    """
    assert run.stack is not None
    again = np.arange(sequences if len(then) == 1 else 1)
    with scorer.uncounted():  # what it takes is on record already
        now = float(scorer.score([()], again).sum())
    tokens = int(scorer.token_counts[again].sum())
    if not agrees(now, float(then[0]), tokens, run.stack.dtype):
        ours, theirs = (Measured(nll_sum=each, token_count=tokens).nats_per_token for each in (now, float(then[0])))
        raise RunError(
            f"The baseline scores {ours:.6g} nats per token on the calibration text where run "
            f"{run.run_id} has {theirs:.6g}: the model's config, tokenizer or code has changed. Restore "
            "it, or start a new run."
        )


def write_identity(run: Run, stack: StackDescription, loaded: LoadedModel) -> StackDescription:
    """Record the identity of the model in a run by an earlier version, once its scores agreed with this model's."""
    stack = stack.model_copy(update={"identity": identity_of(loaded), "scoring_version": SCORING_VERSION})
    origin.write_stack(run.run_dir, stack)
    return stack
