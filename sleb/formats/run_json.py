"""A run and findings as objects for other programs: what `--json` prints. Knows records and outlines only."""

from __future__ import annotations

import json
from typing import Any

from sleb.records import Candidate, Finding, Measured, Run, Step, finite
from sleb.runtime.run_index import Outline


def summary(run: Run) -> dict[str, Any]:
    """The object of `search`, `resume` and `show` alike; numbers that are not finite become null."""
    trace, stack = run.trace, run.stack
    first = trace.baseline if trace else None
    return {
        "run_id": run.run_id,
        "run_dir": str(run.run_dir),
        "model": run.spec.model,
        "num_blocks": stack.num_blocks if stack else None,
        "method": run.spec.method.value,
        "refine": run.spec.refine,
        "removal_list": list(run.removal_list),
        "kept_blocks": list(run.kept_blocks),
        "baseline": None
        if first is None
        else {
            "nll_sum": first.calibration.nll_sum,
            "token_count": first.calibration.token_count,
            "perplexity": finite(first.perplexity),
            "held_out_perplexity": finite(first.held_out.perplexity),
        },
        "steps": [_step(step) for step in trace.steps] if trace else [],
        "block_evaluations": trace.block_evaluations if trace else 0,
        "head_evaluations": trace.head_evaluations if trace else 0,
        "finished": trace.finished if trace else None,
        "dtype": stack.dtype if stack else None,
        "scoring": stack.self_check.scoring if stack else None,
        "protected": list(stack.protected) if stack else None,
        "warnings": list(first.warnings) if first else [],
    }


def summary_text(run: Run) -> str:
    """The `summary` as the inside of a JSON object, without what depends on where the run lies."""
    lasting = {key: value for key, value in summary(run).items() if key not in ("run_id", "run_dir")}
    return json.dumps(lasting)[1:-1]


def listed_text(run: Outline, text: str) -> str:
    """The JSON object of a run in a list, from its `summary_text`: `summary`, and the state as it is now."""
    place = json.dumps({"run_id": run.run_id, "run_dir": str(run.run_dir)})[1:-1]
    return f'{{{place}, {text}, "state": "{run.state.value}"}}'


def finding(record: Finding) -> dict[str, Any]:
    """A finding as it is kept, with `perplexity` beside each sum and its count."""
    kept: dict[str, Any] = record.model_dump(mode="json")
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, Measured):
            kept[name]["perplexity"] = finite(value.perplexity)
    return kept


def _step(step: Step) -> dict[str, Any]:
    return {
        "number": step.number,
        "removed": list(step.removed),
        "restored": list(step.restored),
        "removal_list": list(step.removal_list),
        "perplexity": finite(step.perplexity),
        "held_out_perplexity": finite(step.held_out.perplexity),
        "held_out_standard_error": step.held_out_standard_error,
        "margin": step.margin,
        "margin_standard_error": step.margin_standard_error,
        "tied": list(step.tied),
        "tied_restored": list(step.tied_restored),
        "improvement": step.improvement,
        "improvement_standard_error": step.improvement_standard_error,
        "candidates": [_candidate(candidate) for candidate in step.candidates],
        "seconds": step.seconds,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "block": candidate.block,
        "skipped": list(candidate.skipped),
        "objective": candidate.objective,
        "score": finite(candidate.score),
        "nll_sum": candidate.nll_sum,
        "token_count": candidate.token_count,
        "perplexity": finite(candidate.perplexity),
    }
