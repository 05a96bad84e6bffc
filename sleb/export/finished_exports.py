"""The finished exports of a run, with their proofs. Knows files; no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sleb.errors import RunError
from sleb.records import Job, Proof, Run
from sleb.runtime import job_folder
from sleb.runtime.job_folder import RESULT

log = logging.getLogger(__name__)


def read_proof(run: Run) -> Proof:
    """The proof of the run's newest export. Raises `RunError` where there is none."""
    done = [job.directory for job in run.jobs if job.spec.kind == "export" and (job.directory / RESULT).exists()]
    if not done:
        raise RunError(f"Run {run.run_id} has no finished export.")
    return Proof.model_validate(job_folder.read_result(done[-1])["proof"])


@dataclass(frozen=True)
class Export:
    """A smaller model that was written and proven."""

    job: Job
    out: Path
    """Where it was written; it may have been moved since."""
    proof: Proof


def read_exports(run: Run) -> list[Export]:
    """The run's finished exports, oldest first; one whose result cannot be read is left out."""
    exports = []
    for job in run.jobs:
        if job.spec.kind == "export":
            try:
                result = job_folder.read_result(job.directory)
                exports.append(Export(job, Path(result["out"]), Proof.model_validate(result["proof"])))
            except (OSError, ValueError, KeyError, TypeError, RunError) as error:
                log.debug("No export in %s: %s", job.directory, error)
    return exports
