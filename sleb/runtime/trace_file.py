"""The trace of a run, appended line by line, and the scores behind each step.

A line of the trace is written whole or not at all as far as a reader can tell: a torn last line is ignored when
reading, and cut off before the next one is appended.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sleb.errors import RunError
from sleb.records import FORMAT_VERSION, Baseline, Step, Trace
from sleb.runtime.array_files import NO_ARRAYS, read_arrays
from sleb.runtime.files import inside, open_to_append, parse_json, read_regular, replace_file, writing
from sleb.runtime.record_files import other_version, require_run

MOST_TRACE_BYTES = 512 << 20
"""Size in bytes above which a trace is not read: each swap of a long list brings thousands of candidates."""


def write_scores(directory: Path, name: str, **arrays: np.ndarray) -> None:
    """Write per-sequence sums of a step or of the baseline, before its line is added to the trace."""
    require_run(directory)
    path = inside(directory, "scores", f"{name}.npz")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.SpooledTemporaryFile() as buffer:
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            buffer.seek(0)
            replace_file(path, buffer.read())


def read_scores(directory: Path, name: str) -> dict[str, np.ndarray]:
    """Read what `write_scores` wrote. Raises `RunError` where it is missing or damaged."""
    try:
        return read_arrays(directory, "scores", f"{name}.npz")
    except NO_ARRAYS as error:
        raise RunError(f"{directory}/scores/{name}.npz cannot be read; it is missing or damaged.") from error


def append_baseline(directory: Path, baseline: Baseline) -> None:
    """Write the first line of the trace."""
    _append(directory, {"format_version": FORMAT_VERSION, "baseline": baseline.model_dump(mode="json")})


def append_step(directory: Path, step: Step) -> None:
    """Add a finished step to the trace."""
    _append(directory, {"step": step.model_dump(mode="json")})


def append_finished(directory: Path, reason: str) -> None:
    """Add to the trace that the search is over, and why."""
    _append(directory, {"finished": reason})


def read_trace(directory: Path) -> Trace | None:
    """Read the trace as far as it was written; None before the baseline."""
    path = inside(directory, "trace.jsonl")
    try:
        data = read_regular(path, MOST_TRACE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it, or delete the run.") from error
    lines = io.BytesIO(data[: data.rfind(b"\n") + 1])  # what follows the last newline was torn off
    baseline, finished = None, None
    steps: list[Step] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            if entry.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                raise RunError(other_version(path, entry["format_version"]))
            if "baseline" in entry and baseline is None:
                baseline = Baseline.model_validate(entry["baseline"])
            elif "step" in entry:
                step = Step.model_validate(entry["step"])
                before = set(steps[-1].removal_list) if steps else set()
                more = 0 if step.is_swap else 1
                if step.number != len(steps) + 1 or len(step.removal_list) != len(before) + more:
                    raise ValueError("steps follow each other, each with one block more, or one for another")
                if set(step.removal_list) != {*before, *step.removed} - {*step.restored}:
                    raise ValueError("a step removes what it says")
                steps.append(step)
            else:
                finished = str(entry["finished"])
        except (ValueError, ValidationError, KeyError, AttributeError) as error:
            raise RunError(
                f"Line {number} of {path} is damaged. Delete the lines from there on, and resume the run."
            ) from error
    if baseline is None:
        if steps:
            raise RunError(f"{path} has steps but no baseline; it is damaged. Delete the file, and resume the run.")
        return None
    return Trace(baseline=baseline, steps=tuple(steps), finished=finished)


def _append(directory: Path, entry: dict[str, Any]) -> None:
    require_run(directory)
    path = directory / "trace.jsonl"
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with writing(path), open_to_append(directory, "trace.jsonl") as file:  # a buffer would be written again on closing
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # a torn last line would swallow the next one
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise
