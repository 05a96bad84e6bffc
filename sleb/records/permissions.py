"""What the command or the server that acts now allows a job: code, pickles, task folders and destinations.

A job's own file says what the job asks for. It lies in a run folder, and so may come from anybody: nothing in it is
a permission.
"""

from __future__ import annotations

import shlex

from sleb.errors import NotPermitted
from sleb.records.base import Record
from sleb.records.job import JobSpec


class Permissions(Record):
    """Permissions of one command or server, handed to its worker by argument, never through a run folder."""

    allow_pickle: bool = False
    """Weights may be read that can run code when they are read."""
    trust_remote_code: bool = False
    """Code that comes with a model or with a task may run."""
    trust_paths: bool = False
    """The model and texts that the run folder names may be read, whoever wrote it."""
    task_folder: str | None = None
    """The folder whose task files may be read."""
    out: str | None = None
    """The folder or file that may be written."""
    replace: bool = False
    """What an earlier job wrote there may be replaced."""

    @classmethod
    def of(cls, job: JobSpec, *, trust_paths: bool = False) -> Permissions:
        """What a job asks for, allowed by the command that asks for it; never for a job read from a run folder."""
        return cls.model_validate(_asked(job) | {"trust_paths": trust_paths})

    @property
    def arguments(self) -> list[str]:
        """Options of `sleb work` that allow the same."""
        found: list[str] = []
        for name, value in self.model_dump().items():
            if value is not None and value is not False:
                found += [_flag(name)] if value is True else [_flag(name), str(value)]
        return found

    def granted(self, job: JobSpec) -> JobSpec:
        """The job with what it may. Raises `NotPermitted`, naming the options to give, where it asks for more."""
        asked = Permissions.model_validate(_asked(job))
        lacking = {name: value for name, value in asked if value not in (None, False) and value != getattr(self, name)}
        if lacking:
            raise NotPermitted(job.kind, shlex.join(Permissions.model_validate(lacking).arguments))
        return job.model_copy(update={"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code})


def _asked(job: JobSpec) -> dict[str, object]:
    """The fields of a job, and of the question in it, that are permissions."""
    found: dict[str, object] = {}
    for source in (job, job.ask):
        for name in Permissions.model_fields:
            value = getattr(source, name, None)
            if value not in (None, False):
                found[name] = value
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
