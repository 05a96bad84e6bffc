"""The progress of a job, and who is told of it. Knows work done and clocks; knows no model and no screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from sleb.records import Attempt, Baseline, Progress, StackDescription, Step


class Watcher:
    """Is called while a job works; the command line draws what it is told. Does nothing by itself."""

    def waiting(self, progress: Progress) -> None:
        """Called when the number of jobs that hold or await the device before this one changes."""
        self.progress(progress)

    def progress(self, progress: Progress) -> None:
        """Called with how far the job is; at most a few times a second."""

    def described(self, stack: StackDescription) -> None:
        """Called when the model is open, the text is cut and the self-check is done."""

    def attempt(self, attempt: Attempt) -> None:
        """Called when the model is loaded: where, by how many processes, streamed or not."""

    def baseline(self, baseline: Baseline) -> None:
        """Called when the baseline has been scored."""

    def step(self, step: Step, baseline: Baseline) -> None:
        """Called when a step has been decided and written."""


class WaitingWatcher(Watcher):
    """For callers that draw nothing, such as a notebook: prints on stderr what a job waits for, and nothing else."""

    def waiting(self, progress: Progress) -> None:
        """Print what the job waits for."""
        print(f"{progress.phase}: {progress.message}", file=sys.stderr, flush=True)


class Meter:
    """Turns work done into progress with an ETA, a few times a second."""

    def __init__(self, *sinks: Callable[[Progress], None]) -> None:
        self.sinks = sinks
        self._progress = Progress(phase="Starting")
        self._total = self._done = 0.0
        self._start = self._told = 0.0

    def phase(self, name: str) -> None:
        """Begin a phase of unknown length."""
        self._start = time.perf_counter()
        self._tell(Progress(phase=name), force=True)

    def within(self, name: str) -> None:
        """Begin a part of the search that is not one of the requested steps."""
        self._tell(self._progress.model_copy(update={"phase": name, "step": 0}), force=True)

    def expect(self, units: float, finished_steps: int, steps: int) -> None:
        """Begin the search, with `units` of work ahead."""
        self._total, self._done, self._start = max(units, 1.0), 0.0, time.perf_counter()
        self._progress = Progress(phase="Searching", step=finished_steps, steps=steps)

    def revise(self, ahead: float) -> None:
        """Correct the forecast: `ahead` is left of it, and the work done shows how far off it was."""
        forecast = self._total - ahead
        if forecast > 0:
            self._total = self._done + ahead * self._done / forecast

    def extend(self, ahead: float) -> None:
        """Add `ahead` units of work that were not in the forecast."""
        self._total = max(self._done, self._total) + ahead

    def step(self, number: int) -> None:
        """Begin step `number`."""
        self._tell(self._progress.model_copy(update={"phase": "Searching", "step": number}), force=True)

    def advance(self, units: float, where: str) -> None:
        """Add `units` of work that were done, and say where the work is."""
        self._done += units
        if time.perf_counter() - self._told < 0.2 or not self._total:
            return
        fraction = min(self._done / self._total, 1.0)
        eta = (time.perf_counter() - self._start) * (1 - fraction) / fraction
        self._tell(self._progress.model_copy(update={"fraction": fraction, "eta_seconds": eta, "message": where}))

    def part(self, fraction: float, message: str) -> None:
        """Say how far a phase without units of its own is."""
        passed = time.perf_counter() - self._start
        eta = passed * (1 - fraction) / fraction if fraction > 0.02 else None
        self._tell(self._progress.model_copy(update={"fraction": fraction, "message": message, "eta_seconds": eta}))

    def _tell(self, progress: Progress, *, force: bool = False) -> None:
        self._progress = progress
        if force or time.perf_counter() - self._told >= 0.2:
            self._told = time.perf_counter()
            for sink in self.sinks:
                sink(progress)


def duration(seconds: float) -> str:
    """Seconds in words: `90` -> `1 min 30 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
