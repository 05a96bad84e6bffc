"""Short probes in a process of their own: what a run would take. The server itself never loads a model."""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO

from pydantic import ValidationError

from app import access
from sleb.formats import command_line
from sleb.records import Forecast, JobSpec, RunSpec
from sleb.runtime.processes.job_processes import own_command

PATIENCE_SECONDS = 900.0


@dataclass
class Probe:
    """A probe on its way. Whoever holds it asks `poll` until there is an answer."""

    key: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def poll(self) -> Forecast | str | None:
        """The forecast, a sentence that says why there is none, or None while it is being made."""
        if self.process.poll() is None:
            if time.monotonic() - self.began < PATIENCE_SECONDS:
                return None
            self.cancel()
            return f"The probe took more than {PATIENCE_SECONDS / 60:.0f} minutes and was stopped."
        try:
            return Forecast.model_validate_json(_text(self.output))
        except ValidationError:
            lines = [line for line in _text(self.errors).splitlines() if line.strip()]
            return lines[-1].removeprefix("sleb: ") if lines else "The probe ended without an answer."

    def cancel(self) -> None:
        """End it; nothing is lost."""
        self.process.kill()
        self.process.wait()


def key_of(spec: RunSpec, job: JobSpec) -> str:
    """What the seconds of a block evaluation depend on; the number of them is counted anew."""
    parts = (spec.model, spec.revision, spec.dtype, spec.calibration.sequence_length, job.device, job.batch_size)
    return repr(parts)


def begin(spec: RunSpec, job: JobSpec) -> Probe:
    """Start one: `sleb search ... --dry-run --json`. Raises `NotAllowed`."""
    access.require_start(spec, job)
    allowed = [f"--{name.replace('_', '-')}" for name in ("allow_pickle", "trust_remote_code") if getattr(job, name)]
    wanted = own_command("search", "--dry-run", "--json", *allowed)
    output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (closed with the probe)
    rest = command_line.arguments(spec, job)[1:]
    process = subprocess.Popen([*wanted, *rest], stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
    return Probe(key_of(spec, job), process, output, errors)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
