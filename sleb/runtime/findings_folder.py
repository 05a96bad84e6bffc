"""Findings in a run folder: one file each in `evaluation/`, written once. Knows files; computes nothing."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from sleb.errors import RunError
from sleb.records import AnyFinding, EvaluatedText, Finding, RemovalList
from sleb.runtime.array_files import NO_ARRAYS, read_arrays
from sleb.runtime.files import inside, parse_json, read_json_inside, replace_file

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Finding)
_ANY: TypeAdapter[AnyFinding] = TypeAdapter(AnyFinding)
FOLDER = "evaluation"


def keep(run_dir: Path, finding: Finding) -> None:
    """Write a finding; an earlier answer to the same question is replaced."""
    replace_file(inside(run_dir, FOLDER, f"{finding.question}.json"), finding.model_dump_json(indent=1))


def findings(run_dir: Path) -> list[Finding]:
    """All findings of a run that can be read, oldest first."""
    return sorted((each for _, each in _by_file(run_dir)), key=lambda each: each.finished)


def adopt(run_dir: Path, depends_on: str) -> None:
    """Mark the findings of an earlier version, which do not say of which model they are, as findings of this one."""
    for path, each in _by_file(run_dir):
        if not each.depends_on:
            named = each.model_copy(update={"depends_on": depends_on})
            replace_file(path, named.model_dump_json(indent=1, exclude_unset=True))


def _by_file(run_dir: Path) -> Iterator[tuple[Path, Finding]]:
    for path in sorted(inside(run_dir, FOLDER).glob("*-*.json")):
        try:
            yield path, _ANY.validate_python(read_json_inside(run_dir, FOLDER, path.name))
        except (OSError, ValueError, ValidationError, RunError) as error:
            log.warning("%s cannot be read, and is left out: %s", path, str(error).splitlines()[0])


def of_kind(findings: Iterable[Finding], kind: type[F]) -> list[F]:
    """Select the findings of one kind."""
    return [each for each in findings if isinstance(each, kind)]


class Table:
    """Nats of removal lists on every window of one text, as far as they were scored: rows of NaN until then."""

    def __init__(self, run_dir: Path, text: EvaluatedText, weights: str, depends_on: str = "") -> None:
        """Name the table by text and weights: their type and treatment, and the `depends_on` of the findings."""
        self._windows = text.windows
        of = f"windows-{text.tokens_hash[:20]}-{text.window}-{weights}"
        self._run_dir, self._name = run_dir, f"{of}-{depends_on[:12]}.npz" if depends_on else f"{of}.npz"

    def read(self) -> dict[RemovalList, np.ndarray]:
        """Removal list -> float64 (windows,); nothing where it is missing or damaged: then it is computed again."""
        try:
            arrays = read_arrays(self._run_dir, FOLDER, self._name)
            lists, nats = parse_json(str(arrays["lists"]).encode()), arrays["nats"]
            if nats.ndim != 2 or nats.dtype != np.float64 or nats.shape[1] != self._windows:
                raise ValueError("it is not a table of nats")
            return {tuple(map(int, each)): row for each, row in zip(lists, nats, strict=True)}
        except FileNotFoundError:
            return {}
        except NO_ARRAYS as error:
            log.warning("%s cannot be read, and is computed again: %s", self._run_dir / FOLDER / self._name, error)
            return {}

    def write(self, rows: dict[RemovalList, np.ndarray]) -> None:
        """Write all rows, in place of those on disk."""
        buffer = io.BytesIO()
        np.savez(buffer, lists=np.array(json.dumps(list(rows))), nats=np.stack(list(rows.values())))
        replace_file(inside(self._run_dir, FOLDER, self._name), buffer.getvalue())
