"""How runs, states and numbers are written on the pages. Text from anywhere is shown as text."""

from __future__ import annotations

import re
from typing import Literal

from app import data
from sleb.errors import respelled
from sleb.formats.list_formats import display_name
from sleb.records import Baseline, JobSettings, JobState, Run, RunSpec, Step
from sleb.records.options import settings_of
from sleb.report.figures import style
from sleb.report.summaries import numbers
from sleb.runtime.processes import progress
from sleb.runtime.run_index import Outline, Standing

Colour = Literal["gray", "blue", "green", "red", "orange"]
STATES: dict[JobState, tuple[str, str, Colour]] = {
    JobState.QUEUED: ("Waiting", ":material/hourglass_empty:", "gray"),
    JobState.RUNNING: ("Running", ":material/play_arrow:", "blue"),
    JobState.FINISHED: ("Finished", ":material/check:", "green"),
    JobState.FAILED: ("Failed", ":material/error:", "red"),
    JobState.STOPPED: ("Stopped", ":material/stop:", "orange"),
    JobState.INTERRUPTED: ("Interrupted", ":material/bolt:", "orange"),
}

# What Streamlit and its Markdown turn into icons, arrows and links although it is escaped: an invisible joiner after
# the first characters of each stops that.
_EAGER = re.compile(r":(?=[a-z])|://?|www(?=\.)|@|[<>=-](?=[<>=-])", re.IGNORECASE)

_SERVER_OPTIONS = ("--allow-path", "--read-only", "--allow-pickle", "--trust-remote-code")
_OF_SERVER = re.compile(f"((?:{'|'.join(_SERVER_OPTIONS)})(?: DIR)?\\b)")


def plain(text: object) -> str:
    """Text from anywhere as Markdown that shows it as it is: no markup, no HTML, no icons, no formulas.

    The server's own options stand as code, to be copied.
    """
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    parts = _OF_SERVER.split(shown)
    return "".join(f"`{part}`" if place % 2 else _escaped(part) for place, part in enumerate(parts))


def _escaped(text: str) -> str:
    text = _EAGER.sub("\\g<0>\N{WORD JOINER}", text)
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$^:-])", r"\\\1", text)


def in_fields(error: object) -> str:
    """A sentence for a page, which calls settings as the form does; those of the server are its options."""
    return respelled(str(error), _field)


def _field(name: str, value: str | None) -> str:
    option = f"--{name.replace('_', '-')}"
    if option in _SERVER_OPTIONS:
        return option
    if name == "replace":
        return "“Replace an earlier export”"
    settings = (*settings_of(RunSpec), *settings_of(JobSettings))
    label = next((f"“{each.option.label}”" for each in settings if each.name == name), name.replace("_", " "))
    return label if value is None else f"{label} {value}"


def run_label(run: Outline) -> str:
    """One line that names a run and no other."""
    name, method = model_name(run.spec).rpartition("/")[2], method_name(run.spec)
    if data.is_sample(run):
        return f"Sample: {name}, {method}"
    return f"{name}, {method}, {len(run.removal_list)} removed ({run.run_id})"


def model_name(spec: RunSpec) -> str:
    """What the run's model is called on the screen."""
    return display_name(spec.model)


def method_name(spec: RunSpec) -> str:
    """How blocks are chosen, or that none are."""
    others = {"analyze": "Analyses only", "evaluate": "List given"}
    return others.get(spec.kind) or style.method_name(spec)


def text_name(spec: RunSpec) -> str:
    """The calibration text: a file by its name, and how much of it."""
    source = re.split(r"[\\/]", spec.calibration.source)[-1] if "/" in spec.calibration.source[:1] else None
    return f"{source or spec.calibration.source}, {spec.calibration.sequences} × {spec.calibration.sequence_length}"


def state_word(state: JobState) -> str:
    """State of a run in one word."""
    return STATES[state][0]


def share_of_parameters(run: Run) -> float:
    """The removed blocks' share of the baseline's parameters."""
    if run.stack is None:
        return 0.0
    return numbers.share_of_parameters(run.stack, run.removal_list)


def rise(before: Baseline | Standing, after: Step | Standing) -> str | None:
    """How much worse the held-out text is predicted, with its standard error: in per cent, or how many times."""
    ratio = after.held_out.ratio_to(before.held_out)
    if ratio is None:
        return None
    error = after.held_out_standard_error
    return rise_in_words(ratio, ratio * error if error else None)


def rise_in_words(ratio: float, error: float | None) -> str:
    """A ratio of perplexities and its standard error: +33.0% ± 0.8%, or × 12.3 ± 0.4 where per cents say nothing."""
    if ratio >= 1e5:
        return f"× {ratio:.2e}".replace("e+0", "e").replace("e+", "e")
    if ratio >= 10:
        digits = 0 if ratio >= 100 else 1
        return f"× {ratio:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error else "")
    digits = 0 if ratio > 2 else 1
    return f"{ratio - 1:+.{digits}%}" + (f" ± {error:.{digits}%}" if error else "")


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None or not 0 <= seconds < 1e10:
        return "–"
    return progress.duration(seconds)
