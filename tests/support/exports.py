"""Exports of a run as their processes leave them, without one."""

from __future__ import annotations

import time

from sleb.records import ExportJob, Job, JobState, JobStatus, Proof, Run
from sleb.runtime import job_folder


def export_job(run: Run, state: JobState, message: str = "", **spec: object) -> Job:
    """An export as its process left it."""
    settings = {"steps": 2, "out": str(run.run_dir / "out")} | spec
    job = job_folder.create_job(run.run_dir, ExportJob.model_validate(settings))
    status = JobStatus(state=state, message=message, heartbeat=time.time(), started=time.time())
    job_folder.write_status(job.directory, status)
    return job


def proof(**changes: object) -> Proof:
    """One that passed."""
    settings: dict[str, object] = dict(
        passed=True, blocks_before=12, blocks_after=10, kept_blocks=tuple(range(10)), parameters_before=200_000_000,
        parameters_after=150_000_000, bytes_after=300_000_000, dtype="bfloat16", tokens=64, max_logit_difference=0.0,
        tolerance=0.01, generated_tokens=3, generated_with_cache=(1, 2, 3), generated_without_cache=(1, 2, 3),
        generated_by_skipping=(1, 2, 3), seconds=4.0, versions={"torch": "2.13.0"},
    )  # fmt: skip
    return Proof.model_validate(settings | changes)
