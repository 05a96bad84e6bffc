"""The scores behind a step, read from its run folder and compared. Knows files and numbers; knows no Streamlit."""

from __future__ import annotations

from sleb import methods, store
from sleb.records import Run, Step


def of(run: Run, step: Step) -> methods.Comparison | None:
    """How each candidate of a step compares with the chosen one, with intervals; None without its scores."""
    try:
        found = store.read_scores(run.run_dir, f"step-{step.number:04d}")
        scores, seen = found["nats"], found.get("seen")
        counts = store.read_scores(run.run_dir, "baseline")["token_counts"][: scores.shape[1]]
    except (OSError, KeyError, ValueError):
        return None
    if len(scores) != len(step.candidates):
        return None
    # Metric1 is a mean over hidden states, of which the last token has one too.
    return methods.compare(scores, counts + (step.candidates[0].objective == "metric1"), run.spec.confidence, seen)
