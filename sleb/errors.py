"""The tree of errors. A message is one sentence fit for the screen: what was found, what was needed, what to do."""

from __future__ import annotations


def excerpt(found: object, most: int = 200) -> str:
    """What a file or a library says, as a sentence may quote it: one line, no control characters, not too long."""
    text = str(found)[: 20 * most]
    plain = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


class SlebError(Exception):
    """Whatever can go wrong that is not a bug. `exit_code` is what the command line returns."""

    exit_code = 1


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


class WorkEnded(BadInput):
    """Work that data asked for reached a limit, or failed; the message is a clause that says which."""


class RankLost(SlebError):
    """One of several processes that share a run is gone."""
