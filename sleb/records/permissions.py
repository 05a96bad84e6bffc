"""What the command or the server that acts now allows a job: code, pickles, task folders and destinations.

A job's own file says what the job needs. It lies in a run folder, and so may come from anybody: nothing in it is
a permission.
"""

from __future__ import annotations

from typing import TypeVar

from sleb.errors import NotPermitted
from sleb.records.base import Record
from sleb.records.job import JobSettings, QuestionJob

J = TypeVar("J", bound=JobSettings)


class Permissions(Record):
    """Permissions of one command or server, handed to its worker by argument, never through a run folder."""

    allow_pickle: bool = False
    """Weights may be read that can run code when they are read."""
    trust_remote_code: bool = False
    """Code that comes with a model or with a task may run."""
    trust_paths: bool = False
    """The model and texts that the run folder names may be read, no matter who wrote it."""
    task_folder: str | None = None
    """The folder whose task files may be read."""
    out: str | None = None
    """The folder or file that may be written."""
    replace: bool = False
    """What an earlier job wrote there may be replaced."""

    @classmethod
    def of(cls, job: JobSettings, *, trust_paths: bool = False) -> Permissions:
        """Permissions for all that a job needs, by the command that makes it; never for one read from a run folder."""
        return cls.model_validate(_needed(job) | {"trust_paths": trust_paths})

    @property
    def given(self) -> dict[str, str | bool]:
        """The permissions that are given, by name."""
        return {name: value for name, value in self if value not in (None, False)}

    def granted(self, job: J) -> J:
        """The job with what it is permitted. Raises `NotPermitted`, with what is lacking, where it needs more."""
        needed = Permissions.model_validate(_needed(job)).given
        lacking = {name: value for name, value in needed.items() if value != getattr(self, name)}
        if lacking:
            raise NotPermitted(job.kind, lacking)
        return job.model_copy(update={"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code})


def _needed(job: JobSettings) -> dict[str, object]:
    """The fields of a job, and of the question in it, that are permissions."""
    records = (job, job.ask) if isinstance(job, QuestionJob) else (job,)
    fields = {name: value for record in records for name, value in record if value not in (None, False)}
    return {name: value for name, value in fields.items() if name in Permissions.model_fields}
