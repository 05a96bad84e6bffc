"""Run folders from elsewhere, damaged or made to harm: every page stays usable, and says what it cannot read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sleb.export import finished_exports
from sleb.runtime import files, job_folder, run_folder
from tests.support.dashboard import open_page, words
from tests.support.runs.stores import write_run

PAGES = ("runs", "similarity", "alignment", "steps", "compare", "export")


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """The file with other content."""

    def change(run_dir: Path) -> None:
        path = run_dir / name
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def value(name: str, *keys: str | int, to: str) -> Callable[[Path], None]:
    """One value of a JSON file replaced by a piece of JSON, valid or not."""

    def change(run_dir: Path) -> None:
        path = run_dir / name
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        kept = json.loads(lines[keys[0]] if path.suffix == ".jsonl" else lines[0])  # type: ignore[index]
        place = kept
        rest = keys[1:] if path.suffix == ".jsonl" else keys
        for key in rest[:-1]:
            place = place[key]
        place[rest[-1]] = "MARK"
        changed = json.dumps(kept).replace('"MARK"', to)
        if path.suffix == ".jsonl":
            lines[keys[0]] = changed  # type: ignore[index]
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_text(changed)

    return change


def arrays(name: str, **changes: object) -> Callable[[Path], None]:
    """Arrays of an npz file replaced; None takes one away."""

    def change(run_dir: Path) -> None:
        with np.load(run_dir / name) as kept:
            kept = dict(kept) | {key: np.array(new) for key, new in changes.items() if new is not None}
        np.savez(run_dir / name, **{key: each for key, each in kept.items() if changes.get(key, 0) is not None})

    return change


def pipe(name: str) -> Callable[[Path], None]:
    """A named pipe, as an archive can carry one: reading it would never end."""

    def change(run_dir: Path) -> None:
        (run_dir / name).unlink(missing_ok=True)
        os.mkfifo(run_dir / name)

    return change


def folder(name: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).mkdir()

    return change


DEEP = "[" * 200_000
HOSTILE = {
    "spec nested deeply": text("spec.json", DEEP),
    "spec with half a character": value("spec.json", "model", to='"a\\ud800b"'),
    "source with half a character": value("spec.json", "calibration", "source", to='"\\udfff"'),
    "spec is a pipe": pipe("spec.json"),
    "stack nested deeply": text("stack.json", DEEP),
    "stack with too few blocks": value("stack.json", "block_parameters", to="[1]"),
    "stack of no block": value("stack.json", "num_blocks", to="0"),
    "stack of another model": value("stack.json", "total_parameters", to="9" * 40),
    "trace nested deeply": text("trace.jsonl", DEEP + "\n"),
    "trace is a pipe": pipe("trace.jsonl"),
    "seconds that are not a number": value("trace.jsonl", 0, "baseline", "seconds", to="NaN"),
    "seconds without end": value("trace.jsonl", 0, "baseline", "seconds", to="1e999"),
    "tokens beyond counting": value("trace.jsonl", 0, "baseline", "calibration", "token_count", to="9" * 400),
    "a step that removes nothing": value("trace.jsonl", 1, "step", "removed", to="[]"),
    "a candidate that skips nothing": value("trace.jsonl", 1, "step", "candidates", 0, "skipped", to="[]"),
    "an error beyond belief": value("trace.jsonl", 1, "step", "held_out_standard_error", to="1e300"),
    "analysis is a pipe": pipe("analysis/analysis.json"),
    "analysis of another model": value("analysis/analysis.json", "similarity", "metric1", to="[0.1]"),
    "a share that is not a number": value(
        "analysis/analysis.json", "alignment", "calibration", "agreement", 0, to="NaN"
    ),
    "unavailable is a folder": folder("analysis/unavailable.txt"),
    "tokens are damaged": text("analysis/tokens.npz", b"PK\x03\x04 nothing"),
    "tokens are none": arrays("analysis/tokens.npz", sequence=np.zeros(0, int)),
    "positions that are not numbers": arrays("analysis/tokens.npz", position=np.full(128, np.nan)),
    "positions far away": arrays("analysis/tokens.npz", position=np.full(128, 2**62)),
    "scores are torn": text("scores/step-0001.npz", b"PK\x03\x04"),
    "scores are empty": text("scores/step-0001.npz", b""),
    "scores of another shape": arrays("scores/step-0001.npz", nats=np.zeros(3)),
    "scores are text": arrays("scores/step-0001.npz", nats=np.full((10, 16), "x")),
    "counts are one number": arrays("scores/baseline.npz", token_counts=5),
    "status nested deeply": text("jobs/1-search/status.json", DEEP),
    "progress that is not a number": text(
        "jobs/1-search/status.json", '{"state": "finished", "progress": {"phase": "x", "fraction": NaN}}'
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_page_breaks(name: str, home: Path) -> None:
    runs = home / "runs"
    write_run(runs / "good", 12, 3)
    write_run(runs / "bad", 12, 3)
    HOSTILE[name](runs / "bad")
    for page in PAGES:
        app = open_page(page, run="bad")
        assert not app.exception, (page, app.exception)
    app = open_page("runs", run="good")
    assert not app.exception, app.exception
    assert "3 of 12" in words(app)
    assert "good" in list(app.dataframe[0].value["Run"])


def test_a_damaged_export_is_left_out(home: Path) -> None:
    run = write_run(home / "runs" / "bad", 12, 3)
    job = job_folder.create_job(run.run_dir, run.jobs[0].spec.model_copy(update={"kind": "export"}))
    for content in (DEEP, "{}", '{"out": "\\ud800", "proof": {}}', "[1]"):
        (job.directory / "result.json").write_text(content)
        assert finished_exports.read_exports(run_folder.load("bad")) == []
    app = open_page("export", run="bad")
    assert not app.exception


@pytest.mark.parametrize("content", ["NaN", "[Infinity]", "-Infinity", "1e400", "9" * 30, DEEP, '"\\ud800"', "{", ""])
def test_json_from_anywhere_holds_numbers_and_text(content: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (of many kinds)
        files.parse_json(content.encode())
    assert files.parse_json(b'{"a": [1.5, -3, "\\u00e9", null]}') == {"a": [1.5, -3, "é", None]}
