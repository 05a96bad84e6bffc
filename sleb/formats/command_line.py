"""What to type for the same run: a spec as a command line. Knows records only."""

from __future__ import annotations

import shlex

from sleb.records import CalibrationSpec, JobSpec, RunSpec

_ALWAYS = ("sequences", "sequence_length")  # their defaults depend on the model


def arguments(spec: RunSpec, job: JobSpec | None = None) -> list[str]:
    """Arguments of `sleb` that ask for the same run; permissions are left out: whoever types gives them."""
    given: dict[str, object] = {"calibration": spec.calibration.source}
    plain = CalibrationSpec()
    for name in ("sequences", "sequence_length", "sampling", "bos"):
        value = getattr(spec.calibration, name)
        if name in _ALWAYS or value != getattr(plain, name):
            given[name] = value
    given["revision"] = spec.revision
    if spec.dtype != "auto":
        given["dtype"] = spec.dtype
    if spec.seed:
        given["seed"] = spec.seed
    if spec.kind == "search":
        given["method"] = spec.method.value
        given["remove"], given["ratio"], given["held_out"] = spec.num_remove, spec.ratio, spec.held_out
        if spec.until_perplexity is not None:
            given["until_perplexity"] = f"+{spec.until_perplexity * 100:g}%"
        if spec.protected is not None:
            given["protect"] = ",".join(map(str, spec.protected))
        if spec.confidence != 0.95:
            given["confidence"] = spec.confidence
        if spec.objective != "nll":
            given["objective"] = spec.objective
        if spec.search != "auto":
            given["search"] = spec.search
        if spec.refine != "none":
            given["refine"] = spec.refine
    if job is not None and job.device != "auto":
        given["device"] = job.device
    if job is not None and job.batch_size is not None:
        given["batch_size"] = job.batch_size
    if job is not None and job.processes != 1:
        given["processes"] = job.processes
    if job is not None and job.memory_budget is not None:
        given["memory_budget"] = job.memory_budget
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    options += ["--no-speedups"] if job is not None and job.speedups == "off" else []
    options += ["--chat"] if spec.calibration.chat else []
    options += ["--no-analysis"] if spec.kind == "search" and not spec.analysis else []
    model = [spec.model] if not spec.model.startswith("-") else ["--", spec.model]
    return [spec.kind, *options, *model]


def command_line(spec: RunSpec, job: JobSpec | None = None) -> str:
    """The same, as a line for a shell."""
    return shlex.join(["sleb", *arguments(spec, job)])
