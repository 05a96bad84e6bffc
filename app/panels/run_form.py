"""The form that starts a run: its controls, its forecast, and the same as a command line. Draws; starts nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import access, data
from app.panels import forecast_process, option_controls
from app.wording import duration, in_fields, plain
from sleb import specs
from sleb.errors import CalibrationError, SlebError
from sleb.formats import command_line
from sleb.methods.cost_forecast import cost_of_spec
from sleb.records import Forecast, JobSettings, JobSpec, RunSpec
from sleb.records.options import Setting, settings_of
from sleb.report.figures import style
from sleb.runtime import files, run_folder
from sleb.runtime.processes import device_queue

UPLOAD_BYTES = 8 << 20
_SOURCES = {
    "default": "The default text",
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "wikitext2-rows": "WikiText-2 as in the paper's own program",
    "demo": "The demo text",
    "other": "A file on the server, or a data set of the hub",
    "upload": "Upload a text",
}
_AMOUNTS = {
    "ratio": "A share of the blocks",
    "remove": "A number of blocks",
    "until_perplexity": "Until it costs too much",
}
_FIRST = {"ratio": 10, "remove": 3, "until_perplexity": 10}
"""What the controls of an amount begin with."""
_OWN = {"model": "demo", "amount": "ratio", "source": "default", "other": "", **_FIRST}
"""The form's own controls, and what they begin with; all others are made from the fields of the records."""


@dataclass(frozen=True)
class RunRequest:
    """What the form asks for: a run, and the job that executes it."""

    spec: RunSpec
    job: JobSpec


def _settings() -> tuple[Setting, ...]:
    """The options that have a control each."""
    offered = (*settings_of(RunSpec), *settings_of(JobSettings))
    return tuple(each for each in offered if each.option.in_form and each.name not in (*_AMOUNTS, "calibration"))


def _beginnings() -> dict[str, Any]:
    """What all controls begin with where no earlier run is put into the form."""
    return _OWN | {
        each.name: option_controls.shown(each, None if each.depends else each.default) for each in _settings()
    }


def fill(spec: RunSpec, job: JobSpec | None = None) -> None:
    """Put an earlier run into the form, to be changed and started again."""
    values = _beginnings()
    for record in (spec,) if job is None else (spec, job):
        for setting in settings_of(type(record)):
            if (value := setting.value_in(record)) is not None:
                values[setting.name] = option_controls.shown(setting, value)
    is_named = values["calibration"] in _SOURCES
    amount = "until_perplexity" if spec.until_perplexity is not None else "remove" if spec.num_remove else "ratio"
    _begin_with(
        {name: values[name] for name in _beginnings()}
        | {
            "model": spec.model,
            "amount": amount,
            "source": values["calibration"] if is_named else "other",
            "other": "" if is_named else values["calibration"],
        }
    )


def draw() -> RunRequest | None:
    """Draw the controls; None, and the sentence that says why, where they do not make a run."""
    last = st.session_state.get("form-last")
    if last is not None and _key("model") not in st.session_state:  # hidden controls lose their values
        _begin_with(last)
    try:
        request = _controls()
        access.require_start(request.spec, request.job)
        return request
    except SlebError as error:
        st.error(plain(in_fields(error)), icon=":material/error:")
        return None
    finally:
        st.session_state["form-last"] = {name: st.session_state.get(_key(name), _first(name)) for name in _beginnings()}


def forecast(request: RunRequest) -> None:
    """What it would take: counted at once, and in minutes once a few blocks have been timed."""
    num_blocks = data.num_blocks_of(request.spec.model)
    rates: dict[str, Forecast] = st.session_state.setdefault("forecasts", {})
    timed = rates.get(forecast_process.key_of(request.spec, request.job))
    if timed is not None:
        num_blocks = timed.num_blocks
    if num_blocks is None:
        st.markdown(":material/help: The number of blocks is known once the model has been opened.")
    else:
        try:
            cost, removing = cost_of_spec(request.spec, num_blocks)
        except SlebError as error:
            st.error(plain(in_fields(error)), icon=":material/error:")
            return
        calibration = request.spec.calibration
        tokens = calibration.sequences * calibration.sequence_length
        st.markdown(
            f"**{removing} of {num_blocks}** blocks, chosen on **{tokens:,}** tokens "
            f"({calibration.sequences} × {calibration.sequence_length})  \n"
            f"{cost.block_evaluations:,} block evaluations and {cost.head_evaluations:,} of the LM head"
            + ("; one round of swaps is counted, each swap takes another" if request.spec.refine == "swap" else "")
        )
        if timed is not None:
            searching = cost.units(timed.head_weight) * timed.seconds_per_unit
            total = searching + timed.loading_seconds + (timed.analysis_seconds if request.spec.analysis else 0)
            st.markdown(
                f":material/timer: About **{duration(total)}** on {plain(timed.device)} in "
                f"{timed.dtype}, {duration(searching)} of it the search; "
                f"about {timed.peak_memory / 1e9:.1f} GB of memory"
            )
    _timing(request, timed)


def _timing(request: RunRequest, timed: Forecast | None) -> None:
    if device_queue.queue(run_folder.home(), request.job.device):
        st.caption("Another run is using the device: it comes first, and an estimate now would be too long.")
    running = st.session_state.get("timing")
    if running is not None:
        _watch()
        return
    if timed is None and st.button(
        "Estimate the time",
        icon=":material/timer:",
        help="Loads the model and times a few blocks, in a process of its own: some seconds for a small model.",
    ):
        st.session_state["timing"] = forecast_process.begin(request.spec, request.job)
        st.rerun()
    failed = st.session_state.get("timing_failed")
    if failed and failed[0] == forecast_process.key_of(request.spec, request.job):
        st.error(plain(failed[1]), icon=":material/error:")


@st.fragment(run_every=1.0)
def _watch() -> None:
    running = st.session_state.get("timing")
    if running is None:
        return
    result = running.poll()
    if result is None:
        left, right = st.columns([3, 1], vertical_alignment="center")
        left.markdown(":material/progress_activity: Timing a few blocks …")
        if not right.button("Cancel", type="tertiary"):
            return
        running.cancel()
    elif isinstance(result, Forecast):
        st.session_state["forecasts"][running.key] = result
    else:
        st.session_state["timing_failed"] = (running.key, result)
    del st.session_state["timing"]
    st.rerun()


def equivalent(request: RunRequest) -> None:
    """The same run from the command line."""
    with st.expander("The same from the command line", icon=":material/terminal:"):
        st.code(command_line.command_line(request.spec, request.job), language="shell", wrap_lines=True)


def _controls() -> RunRequest:
    settings = {each.name: each for each in _settings()}
    model_column, method_column = st.columns([3, 2])
    model = model_column.text_input(
        "Model",
        value=_first("model"),
        key=_key("model"),
        help="A Hugging Face name such as meta-llama/Llama-2-7b-hf, a folder or a .gguf file on the server, or demo: "
        "a real model of 135 million parameters that comes with the installation." + plain(access.explained()),
    ).strip()
    method = _control(settings.pop("method"), method_column, names=style.METHOD_NAMES)
    left, middle, right = st.columns([2, 1, 2], vertical_alignment="bottom")
    limit = _limit(left, middle)
    source = right.selectbox(
        "Calibration text",
        list(_SOURCES),
        format_func=lambda name: _SOURCES[name],
        index=list(_SOURCES).index(_first("source")),
        key=_key("source"),
        help="The text whose likelihood decides: best one like what the model will be used for (paper, Table 8). "
        "The default is WikiText-2; for the demo model, its own text.",
    )
    text = _calibration(source)
    with st.expander("More choices", icon=":material/tune:"):
        typed = _more(tuple(settings.values()), demo=model == "demo", method=method)
    # All controls are drawn by now: what is skipped in one run of the page forgets its value.
    given = {name: option_controls.value(settings[name], each) for name, each in typed.items()}
    job = {name: given.pop(name) for name in specs.JobOptions.__annotations__ if name in given}
    spec = specs.run_spec(model, method=method, calibration=text(), **limit, **given)
    return RunRequest(spec, data.job_spec("search", **job))


def _limit(left: DeltaGenerator, right: DeltaGenerator) -> dict[str, Any]:
    """How much is removed: one of three options, and its amount."""
    amount = left.selectbox(
        "Remove",
        list(_AMOUNTS),
        format_func=lambda name: _AMOUNTS[name],
        index=list(_AMOUNTS).index(_first("amount")),
        key=_key("amount"),
        help="Every step is kept, so a longer list contains all shorter ones (but for best chunk).",
    )
    setting = next(each for each in settings_of(RunSpec) if each.name == amount)
    label = setting.option.label if setting.option.percent is None else "Per cent"
    return {amount: option_controls.value(setting, _control(setting, right, label=label))}


def _more(settings: tuple[Setting, ...], *, demo: bool, method: str) -> dict[str, Any]:
    """A control for each option, four in a row, checks last; what they hold."""
    typed: dict[str, Any] = {}
    checks = [each for each in settings if each.on_off is not None]
    for group in ([each for each in settings if each.on_off is None], checks):
        for number, setting in enumerate(group):
            if number % 4 == 0:
                columns = st.columns(4, vertical_alignment="bottom")
            is_taken = not setting.option.methods or method in setting.option.methods
            held = _control(setting, columns[number % 4], demo=demo, disabled=not is_taken)
            if is_taken:
                typed[setting.name] = held
    return typed


def _control(setting: Setting, column: DeltaGenerator, **how_shown: Any) -> Any:
    """A control of this form; what it holds."""
    return option_controls.draw(setting, column, first=_first(setting.name), key=_key(setting.name), **how_shown)


def _calibration(source: str) -> Callable[[], str | None]:
    """Draw the controls of the text; returns a function that gives its source, or raises `CalibrationError`."""
    if source == "other":
        name = st.text_input(
            "File or data set",
            value=_first("other"),
            key=_key("other"),
            help="A .txt, .jsonl or .parquet file on the server (FILE:COLUMN), or NAME:CONFIG:SPLIT:COLUMN on the hub."
            + plain(access.explained()),
        )
        return lambda: _named(name)
    if source == "upload":
        given = st.file_uploader(
            "Text", type=["txt", "jsonl"], help=f"UTF-8, at most {UPLOAD_BYTES >> 20} MB. It stays on the server."
        )
        return lambda: _uploaded(given)
    return lambda: None if source == "default" else source


def _named(name: str) -> str:
    if not name.strip():
        raise CalibrationError("Name the file or data set to calibrate on.")
    return name.strip()


def _uploaded(given: Any) -> str:
    if given is None:
        raise CalibrationError("Choose a text to upload.")
    return str(keep_upload(given.name, given.getvalue()))


def keep_upload(name: str, content: bytes) -> Any:
    """Check an uploaded text and keep it under a name of its own; returns its path. Raises `CalibrationError`."""
    access.require_changes()
    if len(content) > UPLOAD_BYTES:
        raise CalibrationError(
            f"The upload has {len(content) / 1e6:.1f} MB; at most {UPLOAD_BYTES >> 20} MB are taken. Put the file "
            "on the server and name it instead."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"The upload is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if "\0" in text or not text.strip():
        raise CalibrationError("The upload has no text in it.")
    lines = name.lower().endswith(".jsonl")
    for number, line in enumerate(text.split("\n") if lines else [], 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"Line {number} of the upload is not JSON.") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"Line {number} of the upload is not a JSON object with a text in it.")
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = run_folder.home() / "uploads" / f"{digest}{'.jsonl' if lines else '.txt'}"
    if not path.exists():
        files.replace_file(path, text)
    return path


def _key(name: str) -> str:
    generation = st.session_state.get("form-generation", 0)
    return f"new-{generation}-{name}" if generation else f"new-{name}"


def _first(name: str) -> Any:
    """What a control begins with.

    It is the control's own default: set through the session state, a quick second run of the page could lose it on the
    way to the browser.
    """
    return st.session_state.get("form-fields", _beginnings())[name]


def _begin_with(values: dict[str, Any]) -> None:
    """Give the controls new keys, so that they are new ones, which begin with these values."""
    st.session_state["form-fields"] = st.session_state["form-last"] = values
    st.session_state["form-generation"] = st.session_state.get("form-generation", 0) + 1
