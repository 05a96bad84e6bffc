"""The tree of errors. A message is one sentence fit for the screen: what was found, what was needed, what to do.

Below the edges a message names a setting as Python spells it, in back quotes: "lower `sequence_length`", "use
`memory_budget=24GB`". A notebook shows that as it is; the command line and the dashboard spell it their own way
(`respelled`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr

MOST_CHARACTERS = 1000
"""Maximum length of a message in characters: a longer one repeats all of a file or an option."""


def printable(text: str) -> str:
    """Text for a screen: characters that would steer a terminal, or turn the writing around, as their escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text)


def quoted(value: object) -> str:
    """What somebody gave, or a file holds, as a message shows it: in quotes, escaped, and no more than its ends.

    Back quotes are escaped, too: what stands in them would be taken for a setting.
    """
    shortened = Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 100
    try:
        return printable(shortened.repr(value)).replace("`", r"\x60")
    except ValueError:  # Python does not write out numbers of thousands of digits
        return f"a number of {type(value).__name__} that is too long to show"


def sentence(text: str) -> str:
    """A message on one line, printable, and cut in its middle where it is too long: its end says what to do."""
    line = printable(" ".join(text.split("\n")))
    if len(line) <= MOST_CHARACTERS:
        return line
    end = MOST_CHARACTERS // 3
    return f"{line[: MOST_CHARACTERS - end - 3]} … {line[-end:]}"


_SETTING = re.compile(r"(?<![^\s(])`([a-z][a-z_]*)(?:=([^`\n]*))?`(?![^\s.,;:!?)’'])")
"""A setting in a message: a word of its own, which back quotes in the middle of a name or path are not."""


def respelled(text: str, spell: Callable[[str, str | None], str | None]) -> str:
    """A message in which `spell(name, value)` has written each setting; its value is None where none is given.

    Where it returns None, because there is no setting of that name, the text stays as it is.
    """

    def replacement(match: re.Match[str]) -> str:
        spelled = spell(match[1], match[2])
        return match[0] if spelled is None else spelled

    return _SETTING.sub(replacement, text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def excerpt(quotation: object, most: int = 200) -> str:
    """What a file or a library says, as a sentence may quote it: one line, no control characters, not too long.

    Its back quotes become others: they enclose no setting.
    """
    text = str(quotation)[: 20 * most].replace("`", "'")
    plain = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


class SlebError(Exception):
    """Anything that can go wrong and is not a bug. `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        return sentence(super().__str__())


class BadInput(SlebError):
    """The request cannot be carried out as it is; nothing was lost."""

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
    """A job needs permissions that only the command that executes it can give; `lacking` are their names."""

    def __init__(self, kind: str, lacking: Mapping[str, str | bool]) -> None:
        self.kind, self.lacking = kind, dict(lacking)
        settings = " ".join(f"`{name}={_for_a_shell(str(value))}`" for name, value in lacking.items())
        super().__init__(
            f"This {kind} job needs permissions that no run folder can give by itself. If you agree, repeat the "
            f"command with {settings}."
        )


def _for_a_shell(value: str) -> str:
    """A value as one word of a shell, in one line and without back quotes, which would end the setting."""
    if "`" not in value and value.isprintable():
        return shlex.quote(value)
    escaped = value.replace("\\", r"\\").replace("'", r"\'").replace("`", r"\x60")
    return f"$'{printable(escaped).replace(chr(10), chr(92) + 'n')}'"


class UnconfirmedNames(RunError):
    """A run folder that this machine did not write names a model or texts that a user has yet to confirm."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.names = tuple(names)
        listed = ", ".join(names)
        if len(listed) > 600:
            listed = f"{len(names)} names, too long for a sentence: see its spec.json"
        super().__init__(
            f"{folder} was not written here, or was changed since, and names: {listed}. If you agree, confirm it "
            "with `trust_paths=True`."
        )


class RunBusy(RunError):
    """Another process is executing the run."""


class ScoringError(SlebError):
    """The model's predictions cannot be scored (not numbers, or not enough memory)."""


class NotNumbers(ScoringError, BadInput):
    """Predictions are not numbers, so that nothing can be measured with them; the message says whose they are."""

    def __init__(self, whose: str, dtype: str, quantities: str = "predictions") -> None:
        super().__init__(not_numbers(whose, dtype, quantities))


def model_without(blocks: Sequence[int]) -> str:
    """The subject of a sentence about a model: the baseline, or the model without these blocks."""
    return f"The model without blocks {sorted(blocks)}" if blocks else "The baseline"


def not_numbers(whose: str, dtype: str, quantities: str = "predictions") -> str:
    """The sentence about predictions that are not numbers: whose they are, in which type, and what to use."""
    others = {"float16": "`dtype=bfloat16` or float32", "bfloat16": "`dtype=float32`"}.get(dtype)
    advice = f"Use {others}, or check the weights." if others else "Check the weights."
    return f"{whose} gives {quantities} that are not numbers in {dtype}. {advice}"


class ExportError(SlebError):
    """The smaller model cannot be written, or its proof failed."""


class StorageError(SlebError):
    """The disk is full, or the folder cannot be written."""


class Stopped(SlebError):
    """The job was stopped on request."""

    exit_code = 130


class WorkEnded(BadInput):
    """Work that data asked for reached a limit, or failed; the message is a clause that says which."""


class RankLost(SlebError):
    """One of several processes that share a run has ended."""
