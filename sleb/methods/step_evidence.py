"""The scores behind a step, read from its run folder and compared. Knows files and numbers; knows no Streamlit."""

from __future__ import annotations

import numpy as np

from sleb.errors import RunError
from sleb.methods.statistics import Comparison, compare
from sleb.records import Run, Step
from sleb.runtime import trace_file


def of(run: Run, step: Step) -> Comparison | None:
    """Each candidate of a step compared with the chosen one, with intervals; None without sound scores."""
    try:
        arrays = trace_file.read_scores(run.run_dir, f"step-{step.number:04d}")
        scores, counts = arrays["nats"], trace_file.read_scores(run.run_dir, "baseline")["token_counts"]
    except (RunError, KeyError):
        return None
    seen = arrays.get("seen", np.ones(scores.shape, dtype=bool))
    sound = (
        scores.dtype.kind == "f"
        and scores.ndim == 2
        and scores.shape[0] == len(step.candidates)
        and scores.shape[1] > 0
        and seen.shape == scores.shape
        and seen.dtype == bool
        and seen.any(axis=1).all()
        and seen.all(axis=1).any()
        and counts.dtype.kind in "iu"
        and counts.ndim == 1
        and len(counts) >= scores.shape[1]
        and (counts > 0).all()
    )
    if not sound:
        return None
    # Metric1 is a mean over hidden states, of which the last token has one too.
    counts = counts[: scores.shape[1]] + (step.candidates[0].objective == "metric1")
    return compare(scores, counts, run.spec.confidence, seen)
