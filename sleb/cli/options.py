"""The options of the command line that several commands share: their types, names and help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from sleb import specs
from sleb.cli.groups import FieldOptions, field_option
from sleb.formats import spelling
from sleb.records import JobSettings, Permissions, RunSpec
from sleb.records.options import EXECUTION, settings_of
from sleb.specs import JobOptions, RunOptions

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face name, a local folder, a .gguf file, or **demo**."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run id (see sleb runs), a run folder, or a sample's name.")
]
RunArguments = Annotated[RunOptions, FieldOptions(RunSpec)]
"""All options of a run, as one parameter of a command with groups; so are the next ones."""
AnalysisArguments = Annotated[RunOptions, FieldOptions(RunSpec, search=False)]
JobArguments = Annotated[JobOptions, FieldOptions(JobSettings)]
AnalysisJobArguments = Annotated[JobOptions, FieldOptions(JobSettings, search=False)]
ResumingJobArguments = Annotated[
    JobOptions,
    FieldOptions(
        JobSettings,
        changes={
            "processes": {"otherwise": "as in the last try"},
            "memory_budget": {"otherwise": "as in the last try"},
        },
    ),
]
Seed = Annotated[int, field_option(RunSpec, "seed")]
Chat = Annotated[bool, field_option(RunSpec, "chat")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], field_option(RunSpec, "dtype")]
Revision = Annotated[str | None, field_option(RunSpec, "revision")]
Device = Annotated[str, field_option(JobSettings, "device")]
BatchSize = Annotated[int | None, field_option(JobSettings, "batch_size")]
MemoryBudget = Annotated[str | None, field_option(JobSettings, "memory_budget")]
Prepare = Annotated[
    bool,
    typer.Option(
        "--prepare",
        rich_help_panel=EXECUTION,
        help="Only write the job and print its folder, to be executed by sleb work, under torchrun if you like.",
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(rich_help_panel=EXECUTION, help="A new folder for the run. [default: under SLEB_HOME]"),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        rich_help_panel=EXECUTION,
        help="Also read pickled weights, which can run code when they are read.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", rich_help_panel=EXECUTION, help="Run code that comes with the model or with tasks."
    ),
]
TrustPaths = Annotated[
    bool,
    typer.Option(
        "--trust-paths",
        rich_help_panel=EXECUTION,
        help="Read the model and texts that the run names, though it comes from elsewhere.",
    ),
]
JobOut = Annotated[
    Path | None, typer.Option("--out", rich_help_panel=EXECUTION, help="Allow the job to write this folder or file.")
]
JobReplace = Annotated[
    bool,
    typer.Option(
        "--replace", rich_help_panel=EXECUTION, help="Allow the job to replace what an earlier one left at --out."
    ),
]
JobTaskFolder = Annotated[
    Path | None,
    typer.Option(
        "--task-folder",
        metavar="DIR",
        rich_help_panel=EXECUTION,
        help="Allow the job to read task files in this folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]


@dataclass(frozen=True)
class AllowedCode:
    """Code that the command allows its job to run."""

    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False

    def of_job(self) -> dict[str, bool]:
        """What is allowed, as fields of a job."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class NewRun(AllowedCode):
    """Where a run will be kept, and what its job is allowed."""

    run_dir: RunDir = None


@dataclass(frozen=True)
class Allowed(AllowedCode):
    """What the command allows a job of a run that exists."""

    trust_paths: TrustPaths = False


@dataclass(frozen=True)
class AllowedAgain(Allowed):
    """What a job that waits, or was stopped, is allowed: a run folder allows nothing by itself."""

    out: JobOut = None
    replace: JobReplace = False
    task_folder: JobTaskFolder = None

    def permissions(self) -> Permissions:
        """What is allowed, as a record."""
        return specs.permissions(**vars(self))


def as_bytes(text: str | None) -> int | None:
    """Read a size: `24GB` -> 24 billion. Raises `OptionError`."""
    (setting,) = (each for each in settings_of(JobSettings) if each.name == "memory_budget")
    return None if text is None else spelling.read(setting, text)
