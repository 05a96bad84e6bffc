"""The form that starts a run: its controls, its forecast, and the same as a command line. Draws; starts nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import access, data
from app.panels import forecast_process
from app.wording import duration, in_fields, plain
from sleb import specs
from sleb.errors import CalibrationError, SlebError, quoted
from sleb.formats import command_line
from sleb.methods.cost_forecast import cost_of_spec
from sleb.records import Forecast, JobSpec, Method, RunSpec
from sleb.report.figures import style
from sleb.runtime import files, run_folder
from sleb.runtime.processes import device_queue

UPLOAD_BYTES = 8 << 20
_SOURCES = {
    "default": "The usual text",
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "wikitext2-rows": "WikiText-2 as in the paper's own program",
    "demo": "The demo text",
    "other": "A file on the server, or a data set of the hub",
    "upload": "Upload a text",
}
_AMOUNTS = {"ratio": "A share of the blocks", "remove": "A number of blocks", "until": "Until it costs too much"}
_FIELDS: dict[str, Any] = dict(
    model="demo",
    method=Method.METRIC3.value,
    amount="ratio",
    ratio=10,
    remove=3,
    until=10,
    source="default",
    other="",
    sequences=None,
    sequence_length=None,
    held_out=None,
    sampling="random",
    seed=0,
    protect="",
    confidence=95,
    objective="nll",
    search="auto",
    refine=False,
    bos="auto",
    chat=False,
    dtype="auto",
    revision="",
    device="auto",
    batch_size=None,
    analysis=True,
)


@dataclass(frozen=True)
class Asked:
    """What the form asks for."""

    spec: RunSpec
    job: JobSpec


def fill(spec: RunSpec, job: JobSpec | None = None) -> None:
    """Put an earlier run into the form, to be changed and started anew."""
    amount = "until" if spec.until_perplexity is not None else "remove" if spec.num_remove is not None else "ratio"
    values = dict(
        model=spec.model,
        method=spec.method.value,
        amount=amount,
        ratio=max(1, round(100 * (spec.ratio or 0.2))),
        remove=spec.num_remove or 3,
        until=max(1, round(100 * (spec.until_perplexity or 0.1))),
        source=spec.calibration.source if spec.calibration.source in _SOURCES else "other",
        other="" if spec.calibration.source in _SOURCES else spec.calibration.source,
        sequences=spec.calibration.sequences,
        sequence_length=spec.calibration.sequence_length,
        held_out=spec.held_out,
        sampling=spec.calibration.sampling,
        seed=spec.seed,
        protect="" if spec.protected is None else ", ".join(map(str, spec.protected)) or "none",
        confidence=round(100 * spec.confidence),
        objective=spec.objective,
        search=spec.search,
        refine=spec.refine == "swap",
        bos=spec.calibration.bos,
        chat=spec.calibration.chat,
        dtype=spec.dtype,
        revision=spec.revision or "",
        device=job.device if job else "auto",
        batch_size=job.batch_size if job else None,
        analysis=spec.analysis,
    )
    _begin_with(values)


def draw() -> Asked | None:
    """The controls; None where they do not make a run, with the sentence that says why."""
    last = st.session_state.get("form-last")
    if last is not None and _key("model") not in st.session_state:  # they were hidden, and forgot
        _begin_with(last)
    try:
        asked = _controls()
        access.require_start(asked.spec, asked.job)
        return asked
    except SlebError as error:
        st.error(plain(in_fields(error)), icon=":material/error:")
        return None
    finally:
        st.session_state["form-last"] = {name: st.session_state.get(_key(name), _first(name)) for name in _FIELDS}


def forecast(asked: Asked) -> None:
    """What it would take: counted at once, and in minutes once a few blocks have been timed."""
    num_blocks = data.num_blocks_of(asked.spec.model)
    rates: dict[str, Forecast] = st.session_state.setdefault("forecasts", {})
    timed = rates.get(forecast_process.key_of(asked.spec, asked.job))
    if timed is not None:
        num_blocks = timed.num_blocks
    if num_blocks is None:
        st.markdown(":material/help: The number of blocks is known once the model has been opened.")
    else:
        try:
            cost, removing = cost_of_spec(asked.spec, num_blocks)
        except SlebError as error:
            st.error(plain(in_fields(error)), icon=":material/error:")
            return
        calibration = asked.spec.calibration
        tokens = calibration.sequences * calibration.sequence_length
        st.markdown(
            f"**{removing} of {num_blocks}** blocks, chosen on **{tokens:,}** tokens "
            f"({calibration.sequences} × {calibration.sequence_length})  \n"
            f"{cost.block_evaluations:,} block evaluations and {cost.head_evaluations:,} read-outs"
            + ("; one round of swaps is counted, each swap found takes another" if asked.spec.refine == "swap" else "")
        )
        if timed is not None:
            searching = cost.units(timed.head_weight) * timed.seconds_per_unit
            total = searching + timed.loading_seconds + (timed.analysis_seconds if asked.spec.analysis else 0)
            st.markdown(
                f":material/timer: About **{duration(total)}** on {plain(timed.device)} in "
                f"{timed.dtype}, {duration(searching)} of it the search; "
                f"about {timed.peak_memory / 1e9:.1f} GB of memory"
            )
    _probe(asked, timed)


def _probe(asked: Asked, timed: Forecast | None) -> None:
    if device_queue.queue(run_folder.home(), asked.job.device):
        st.caption("Another run is using the device: it comes first, and an estimate now would be too long.")
    running: forecast_process.TimingProbe | None = st.session_state.get("probe")
    if running is not None:
        _watch()
        return
    if timed is None and st.button(
        "Estimate the time",
        icon=":material/timer:",
        help="Loads the model and times a few blocks, in a process of its own: some seconds for a small model.",
    ):
        st.session_state["probe"] = forecast_process.begin(asked.spec, asked.job)
        st.rerun()
    failed = st.session_state.get("probe_failed")
    if failed and failed[0] == forecast_process.key_of(asked.spec, asked.job):
        st.error(plain(failed[1]), icon=":material/error:")


@st.fragment(run_every=1.0)
def _watch() -> None:
    running: forecast_process.TimingProbe | None = st.session_state.get("probe")
    if running is None:
        return
    found = running.poll()
    if found is None:
        left, right = st.columns([3, 1], vertical_alignment="center")
        left.markdown(":material/progress_activity: Timing a few blocks …")
        if not right.button("Cancel", type="tertiary"):
            return
        running.cancel()
    elif isinstance(found, Forecast):
        st.session_state["forecasts"][running.key] = found
    else:
        st.session_state["probe_failed"] = (running.key, found)
    del st.session_state["probe"]
    st.rerun()


def equivalent(asked: Asked) -> None:
    """The same run from the command line."""
    with st.expander("The same from the command line", icon=":material/terminal:"):
        st.code(command_line.command_line(asked.spec, asked.job), language="shell", wrap_lines=True)


def _controls() -> Asked:
    model_column, method_column = st.columns([3, 2])
    model = model_column.text_input(
        "Model",
        value=_first("model"),
        key=_key("model"),
        help="A Hugging Face name such as meta-llama/Llama-2-7b-hf, a folder or a .gguf file on the server, or demo: "
        "a real model of 135 million parameters that comes with the installation." + plain(access.explained()),
    )
    method = method_column.selectbox(
        "Method",
        [method.value for method in Method],
        format_func=lambda name: style.METHOD_NAMES[name],
        index=[method.value for method in Method].index(_first("method")),
        key=_key("method"),
        help="Metric3 is SLEB: after each removal all blocks are scored anew (paper, Algorithm 1). The others are what "
        "the paper compares it with (Figures 4 and 7): they take less time and choose worse.",
    )
    left, middle, right = st.columns([2, 1, 2], vertical_alignment="bottom")
    amount = left.selectbox(
        "Remove",
        list(_AMOUNTS),
        format_func=lambda name: _AMOUNTS[name],
        index=list(_AMOUNTS).index(_first("amount")),
        key=_key("amount"),
        help="Every step is kept, so a longer list contains all shorter ones (but for best chunk).",
    )
    limit: dict[str, Any] = {}
    if amount == "ratio":
        share = middle.number_input(
            "Per cent",
            1,
            99,
            value=_first("ratio"),
            key=_key("ratio"),
            help="Rounded up to whole blocks (paper, 4.1).",
        )
        limit["ratio"] = share / 100
    elif amount == "remove":
        limit["remove"] = middle.number_input(
            "Blocks",
            1,
            1000,
            value=_first("remove"),
            key=_key("remove"),
            help="How many steps to take.",
        )
    else:
        rise = middle.number_input(
            "Per cent",
            1,
            1000,
            value=_first("until"),
            key=_key("until"),
            help="Stops before the held-out perplexity rises by more.",
        )
        limit["until_perplexity"] = rise / 100
    source = right.selectbox(
        "Calibration text",
        list(_SOURCES),
        format_func=lambda name: _SOURCES[name],
        index=list(_SOURCES).index(_first("source")),
        key=_key("source"),
        help="The text whose likelihood decides. Best something like what the model will be used for (paper, Table 8). "
        "The usual text is WikiText-2; for the demo model, its own.",
    )
    text = _calibration(source)
    with st.expander("More choices", icon=":material/tune:"):
        more = _more(demo=model.strip() == "demo", refinable=method == Method.METRIC3.value)
    # All controls are drawn by now: what is skipped in one run of the page forgets its value.
    calibration, more["protect"] = text(), _blocks(more["protect"])
    device, batch_size = more.pop("device"), more.pop("batch_size")
    spec = specs.run_spec(model.strip(), method=method, calibration=calibration, **limit, **more)
    return Asked(spec, data.job_spec("search", device.strip() or "auto", batch_size))


def _calibration(source: str) -> Callable[[], str | None]:
    """Controls of the text; what they come to is asked for later, and raises `CalibrationError`."""
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
        raise CalibrationError(f"The upload is no UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if "\0" in text or not text.strip():
        raise CalibrationError("The upload has no text in it.")
    lines = name.lower().endswith(".jsonl")
    for number, line in enumerate(text.split("\n") if lines else [], 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"Line {number} of the upload is not JSON.") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"Line {number} of the upload is no JSON object with a text in it.")
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = run_folder.home() / "uploads" / f"{digest}{'.jsonl' if lines else '.txt'}"
    if not path.exists():
        files.replace_file(path, text)
    return path


def _more(*, demo: bool, refinable: bool) -> dict[str, Any]:
    first, second, third, fourth = st.columns(4)
    found: dict[str, Any] = dict(
        sequences=first.number_input(
            "Sequences",
            1,
            100_000,
            value=_first("sequences"),
            key=_key("sequences"),
            placeholder=str(specs.DEMO_SEQUENCES if demo else specs.PAPER_SEQUENCES),
            help="Pieces of text that decide. More of them tell more blocks apart, and take longer.",
        ),
        sequence_length=second.number_input(
            "Tokens each",
            2,
            1_000_000,
            value=_first("sequence_length"),
            key=_key("sequence_length"),
            placeholder=str(specs.DEMO_SEQUENCE_LENGTH if demo else specs.PAPER_SEQUENCE_LENGTH),
            help="Their length.",
        ),
        held_out=third.number_input(
            "Held-out sequences",
            0,
            100_000,
            value=_first("held_out"),
            key=_key("held_out"),
            placeholder="a quarter",
            help="Text that takes no part in any choice, and so tells what a removal really costs.",
        ),
        seed=fourth.number_input(
            "Seed",
            0,
            value=_first("seed"),
            key=_key("seed"),
            help="Of everything that is drawn.",
        ),
    )
    first, second, third, fourth = st.columns(4)
    found["sampling"] = first.selectbox(
        "Windows",
        ["random", "first"],
        index=["random", "first"].index(_first("sampling")),
        key=_key("sampling"),
        help="Drawn without overlap, or the first ones.",
    )
    found["bos"] = second.selectbox(
        "BOS token",
        ["auto", "yes", "no"],
        index=["auto", "yes", "no"].index(_first("bos")),
        key=_key("bos"),
        help="Heads every window; auto asks the tokenizer.",
    )
    protect = third.text_input(
        "Protected blocks",
        value=_first("protect"),
        key=_key("protect"),
        placeholder="first and last",
        help="Never removed: indices such as 0, 29, or none. Empty: the first and the last one.",
    )
    found["protect"] = protect
    confidence = fourth.number_input(
        "Confidence, per cent",
        50,
        99,
        value=_first("confidence"),
        key=_key("confidence"),
        help="Of the interval that calls two blocks tied.",
    )
    found["confidence"] = confidence / 100
    first, second, third, fourth = st.columns(4)
    found["dtype"] = first.selectbox(
        "Computed in",
        ["auto", "float32", "bfloat16", "float16"],
        index=["auto", "float32", "bfloat16", "float16"].index(_first("dtype")),
        key=_key("dtype"),
        help="auto is what is fast there.",
    )
    found["device"] = second.text_input(
        "Device", value=_first("device"), key=_key("device"), help="auto, cpu, cuda:0 …"
    )
    found["batch_size"] = third.number_input(
        "Batch",
        1,
        100_000,
        value=_first("batch_size"),
        key=_key("batch_size"),
        placeholder="chosen",
        help="Sequences at once.",
    )
    found["revision"] = (
        fourth.text_input(
            "Revision",
            value=_first("revision"),
            key=_key("revision"),
            help="Of a model on the hub.",
        )
        or None
    )
    first, second, third, fourth = st.columns(4, vertical_alignment="bottom")
    found["objective"] = third.segmented_control(
        "Objective",
        ["nll", "kl"],
        required=True,
        default=_first("objective"),
        key=_key("objective"),
        help="What is lowest without the removed block: nll, the negative log-likelihood of the text (the paper), or "
        "kl, the divergence from the unmodified model's own predictions (as in EvoPress).",
    )
    found["search"] = fourth.segmented_control(
        "Candidates",
        ["auto", "race", "full"],
        required=True,
        default=_first("search"),
        key=_key("search"),
        help="In a race a candidate leaves once it cannot win: several times less work for the same list, but for bad "
        "luck in at most 5 % of the steps. full scores all on all the text; auto races from 32 sequences on.",
    )
    found["chat"] = first.checkbox(
        "Conversations",
        value=_first("chat"),
        key=_key("chat"),
        help="The column holds chats: use the template.",
    )
    refine = second.checkbox(
        "Refine by swaps",
        value=_first("refine"),
        key=_key("refine"),
        disabled=not refinable,
        help="After Metric3's last removal: one block back and another out, as long as that lowers the score beyond "
        "its error. A round takes about as long as one step for every removed block.",
    )
    found["refine"] = "swap" if refine and refinable else "none"
    found["analysis"] = second.checkbox(
        "Analyses too",
        value=_first("analysis"),
        key=_key("analysis"),
        help="Similarity and prediction alignment after the search.",
    )
    return found


def _blocks(text: str) -> tuple[int, ...] | None:
    text = text.strip()
    if not text:
        return None
    if text.lower() == "none":
        return ()
    parts = text.replace(",", " ").split()
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise CalibrationError(f"Protected blocks are indices such as 0, 29, or none; found {quoted(text)}.")
    return tuple(int(part) for part in parts)


def _key(name: str) -> str:
    generation = st.session_state.get("form-generation", 0)
    return f"new-{generation}-{name}" if generation else f"new-{name}"


def _first(name: str) -> Any:
    """What a control begins with: a default of its own. Set through the session state, a quick second run of the page
    could lose it on the way to the browser.
    """
    return st.session_state.get("form-fields", _FIELDS)[name]


def _begin_with(values: dict[str, Any]) -> None:
    """New keys, so that the controls are new ones, which begin with these values."""
    st.session_state["form-fields"] = st.session_state["form-last"] = values
    st.session_state["form-generation"] = st.session_state.get("form-generation", 0) + 1
