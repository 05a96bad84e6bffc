"""Each kind of job has the fields that mean something for it, and what earlier versions wrote is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from sleb.errors import NotPermitted, RunError
from sleb.records import (
    JOB_SPEC,
    BenchmarkSpec,
    EvaluateSpec,
    ExportJob,
    GenerateSpec,
    HealSpec,
    Job,
    JobKind,
    JobStatus,
    Permissions,
    QuantizeSpec,
    QuestionJob,
    SearchJob,
    UnreadableJob,
)
from sleb.runtime.record_files import read_job_spec
from sleb.worker import EXECUTORS

VERSION_1 = {
    "format_version": 1, "kind": "search", "device": "cpu", "batch_size": 4, "speedups": "auto", "processes": 1,
    "memory_budget": None, "allow_pickle": False, "trust_remote_code": False, "steps": None, "out": None,
    "format": "hf", "gguf": None, "replace": False, "ask": None,
}  # fmt: skip
"""A job's file as version 0.1.0 wrote it: the fields of every kind."""
QUESTIONS = {
    "evaluate": EvaluateSpec(), "benchmark": BenchmarkSpec(), "quantize": QuantizeSpec(),
    "heal": HealSpec(lists=((1,),)), "generate": GenerateSpec(prompt="Once"),
}  # fmt: skip


@pytest.mark.parametrize("kind", get_args(JobKind))
def test_a_file_of_version_1_is_read_and_written_without_what_means_nothing(kind: JobKind) -> None:
    ask = QUESTIONS[kind].model_dump(mode="json") if kind in QUESTIONS else None
    spec = JOB_SPEC.validate_python(VERSION_1 | {"kind": kind, "ask": ask})
    assert (spec.kind, spec.device, spec.batch_size) == (kind, "cpu", 4)
    assert not isinstance(spec, QuestionJob) or spec.ask == QUESTIONS[kind]
    written = spec.model_dump(mode="json")
    assert written.items() <= (VERSION_1 | {"kind": kind, "ask": ask}).items()
    assert list(written)[:2] == ["format_version", "kind"]
    assert JOB_SPEC.validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "/somewhere"}, {"ask": EvaluateSpec().model_dump()}, {"replace": True}, {"kind": "evaluate"},
        {"kind": "heal", "ask": EvaluateSpec().model_dump()}, {"kind": "unreadable"}, {"processes": 0},
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JOB_SPEC.validate_python(VERSION_1 | changes)


def test_every_kind_of_job_has_one_executor() -> None:
    assert set(EXECUTORS) == set(get_args(JobKind))


def test_a_job_that_cannot_be_read_cannot_be_executed() -> None:
    job = Job(name="2-heal", directory="jobs/2-heal", spec=UnreadableJob(kind="heal"), status=JobStatus())  # type: ignore[arg-type]
    assert job.ask is None
    with pytest.raises(RunError, match="2-heal cannot be read"):
        job.require_spec()


def test_permissions_name_what_is_lacking() -> None:
    export = ExportJob(out="/a folder", replace=True, allow_pickle=True)
    with pytest.raises(NotPermitted, match=r"`allow_pickle=True` `out='/a folder'`") as caught:
        Permissions(replace=True).granted(export)
    assert caught.value.lacking == {"allow_pickle": True, "out": "/a folder"}
    assert Permissions.of(export).granted(export) == export
    assert Permissions().granted(SearchJob()) == SearchJob()


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ({"kind": "zap`replace`"}, "kind: Input should be one of 'search', 'analyze'"),
        ({"kind": ["search"]}, "kind: Input should be one of"),
        ({}, "kind: Field required"),
        ({"kind": "evaluate"}, "damaged: ask: Field required"),
        ({"kind": "search", "processes": -1}, "damaged: processes: Input should be"),
        ({"kind": "evaluate", "ask": {"kind": "generate"}}, "damaged: ask.kind: Input should be 'evaluate'"),
        ({"kind": "search", "format_version": "1"}, "is of version '1'"),
    ],
)
def test_a_damaged_file_is_told_by_the_names_that_it_has(tmp_path: Path, written: dict[str, Any], fault: str) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(written))
    with pytest.raises(RunError, match=fault) as refused:
        read_job_spec(tmp_path, "spec.json")
    assert "zap" not in str(refused.value)
