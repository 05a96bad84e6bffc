"""A timing probe in a process of its own: what a run would take. The server itself never loads a model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from app import access
from app.panels import forecast_worker
from app.panels.forecast_worker import ForecastAnswer, ForecastRequest
from sleb.records import Forecast, JobSpec, RunSpec

PATIENCE_SECONDS = 900.0


@dataclass
class TimingProbe:
    """A timing probe that is running. Its holder calls `poll` until there is an answer."""

    key: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def poll(self) -> Forecast | str | None:
        """The forecast, a sentence that says why it failed, or None while the process is running."""
        if self.process.poll() is None:
            if time.monotonic() - self.began < PATIENCE_SECONDS:
                return None
            self.cancel()
            return f"The timing probe took more than {PATIENCE_SECONDS / 60:.0f} minutes and was stopped."
        self.output.seek(0)
        try:
            answer = ForecastAnswer.model_validate_json(self.output.read())
        except ValidationError:  # killed, or out of memory
            return f"The timing probe ended without an answer (exit code {self.process.returncode})."
        return answer.forecast or answer.error

    def cancel(self) -> None:
        """End the process; nothing is lost."""
        self.process.kill()
        self.process.wait()


def key_of(spec: RunSpec, job: JobSpec) -> str:
    """A key of everything that the seconds of a block evaluation depend on, but not their number."""
    parts = (spec.model, spec.revision, spec.dtype, spec.calibration.sequence_length, job.device, job.batch_size)
    return repr(parts)


def begin(spec: RunSpec, job: JobSpec) -> TimingProbe:
    """Start a timing probe, whatever files the current folder holds. Raises `NotAllowed`."""
    access.require_start(spec, job)
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the timing probe)
    with tempfile.TemporaryFile() as request:
        request.write(ForecastRequest(spec=spec, job=job).model_dump_json().encode())
        request.seek(0)
        command = [sys.executable, "-P", str(Path(forecast_worker.__file__).resolve())]
        process = subprocess.Popen(command, stdin=request, stdout=output, stderr=subprocess.DEVNULL)
    return TimingProbe(key_of(spec, job), process, output)
