"""The program of the forecast's own process: a spec and a job on stdin, a forecast or the reason for none on stdout.

It is started by its path, since the dashboard is not an installed package; it imports nothing of it.
"""

from __future__ import annotations

import sys

from pydantic import BaseModel, ConfigDict

from sleb import execution
from sleb.errors import SlebError
from sleb.records import Forecast, JobSpec, RunSpec


class ForecastRequest(BaseModel):
    """A run, and the job that would execute it."""

    model_config = ConfigDict(frozen=True)
    spec: RunSpec
    job: JobSpec


class ForecastAnswer(BaseModel):
    """A forecast, or the sentence that says why it failed."""

    model_config = ConfigDict(frozen=True)
    forecast: Forecast | None = None
    error: str = ""


def answer(request: ForecastRequest) -> ForecastAnswer:
    """Load the model and time a few blocks."""
    try:
        return ForecastAnswer(forecast=execution.forecast(request.spec, request.job))
    except (SlebError, OSError, UnicodeError) as error:
        return ForecastAnswer(error=str(error))


if __name__ == "__main__":
    print(answer(ForecastRequest.model_validate_json(sys.stdin.read())).model_dump_json())
