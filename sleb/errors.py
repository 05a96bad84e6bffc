"""The tree of errors. A message is one sentence fit for the screen: what was found, what was needed, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class SlebError(Exception):
    """Whatever can go wrong that is not a bug. `exit_code` is what the command line returns."""

    exit_code = 1


def shown(text: object, most: int = 200) -> str:
    """Text from outside as it may stand in a sentence: on one line, without control characters, and cut."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


class BadInput(SlebError):
    """What was asked for cannot be done as asked; nothing was lost."""

    exit_code = 2


class ModelError(BadInput):
    """The model cannot be found, read or used."""


class CalibrationError(BadInput):
    """The text cannot be found, read, or gives too few tokens."""


class OptionError(BadInput):
    """An option is out of range, or does not fit the model."""


class RunError(BadInput):
    """A run folder is missing, damaged, of another version, or not in the state that was needed."""


class NotPermitted(BadInput):
    """A job asks for what only the command that executes it can allow; `options` are the ones to give."""

    def __init__(self, kind: str, options: str) -> None:
        self.options = options
        super().__init__(
            f"This {kind} job asks for more than a run folder can allow by itself; read it, and if you agree give the "
            f"command again with: {options}"
        )


class UnconfirmedNames(RunError):
    """A run folder that this machine did not write names a model or texts that nobody has confirmed yet."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.names = tuple(names)
        listed = ", ".join(map(shown, names))
        super().__init__(
            f"{folder} was not written here, and names what would be read: {listed}. If you agree, confirm it "
            "with --trust-paths (in a notebook: trust_paths=True)."
        )


class RunBusy(RunError):
    """Another process is executing the run."""


class ScoringError(SlebError):
    """The model's predictions cannot be scored (not numbers, or not enough memory)."""


class ExportError(SlebError):
    """The smaller model cannot be written, or its proof failed."""


class StorageError(SlebError):
    """The disk is full, or the folder cannot be written."""


class Stopped(SlebError):
    """The job was asked to stop, and did."""

    exit_code = 130


class RankLost(SlebError):
    """One of several processes that share a run is gone."""
