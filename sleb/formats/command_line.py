"""What to type for the same run: a spec as a command line. Knows records only."""

from __future__ import annotations

import shlex

from sleb.formats import spelling
from sleb.records import JobSpec, Record, RunSpec
from sleb.records.options import Setting, settings_of


def arguments(spec: RunSpec, job: JobSpec | None = None) -> list[str]:
    """Arguments of `sleb` that ask for the same run; permissions are left out: who types them gives them."""
    options: list[str] = []
    for record in (spec, job):
        if record is not None:
            for setting in settings_of(type(record), search=spec.kind == "search"):
                options += _option(setting, record)
    model = [spec.model] if not spec.model.startswith("-") else ["--", spec.model]
    return [spec.kind, *options, *model]


def command_line(spec: RunSpec, job: JobSpec | None = None) -> str:
    """A line for a shell that asks for the same run."""
    return shlex.join(["sleb", *arguments(spec, job)])


def _option(setting: Setting, record: Record) -> list[str]:
    """What is typed for one value; nothing for a default that does not depend on the model."""
    value = setting.value_in(record)
    if value is None or (value == setting.default and setting.option.demo is None):
        return []
    if setting.kind != "check":
        return [f"{setting.flag}={spelling.written(setting, value)}"]
    is_on = setting.on_off is not None and value == setting.on_off[0]
    return [setting.flag if is_on else setting.flag.replace("--", "--no-", 1)]
