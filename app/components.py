"""What pages share: the run picker, headers, empty states, charts with their downloads. Text is shown as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app import data
from app.charts import style
from sleb import jobs, meter
from sleb.errors import RunError, SlebError
from sleb.formats import display_name
from sleb.outline import Outline
from sleb.records import Baseline, Job, JobState, Run, RunSpec, Step

_Colour = Literal["gray", "blue", "green", "red", "orange"]
_STATES: dict[JobState, tuple[str, str, _Colour]] = {
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


def plain(text: object) -> str:
    """Text from anywhere as Markdown that shows it as it is: no markup, no HTML, no icons, no formulas."""
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    shown = _EAGER.sub("\\g<0>\N{WORD JOINER}", shown)
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$^:-])", r"\\\1", shown)


def title(text: str, caption: str) -> None:
    """The page's name, and one sentence that says what it answers."""
    st.title(text, anchor=False)
    st.caption(caption)


def run_page(name: str, caption: str) -> Run:
    """Title, run picker and facts of a page about one run, which it returns.

    The run comes from the URL, the session, or is the newest. Ends the page with an empty state where there is none
    that can be read.
    """
    rows = [each for each in data.outlines() if isinstance(each, Outline)]
    left, middle, right = st.columns([10, 8, 2.4], vertical_alignment="bottom")
    with left:
        title(name, caption)
    if not rows:
        empty("No runs yet", "Start one on the **Runs** page: the demo model needs no download and no GPU.")
        st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:")
        st.stop()
    run_id = asked(rows)
    with middle:
        labels = {each.run_id: run_label(each) for each in rows}
        picked = st.selectbox(
            "Run",
            list(labels),
            index=list(labels).index(run_id),
            format_func=lambda each: labels[each],
            help="Every page shows one run; the address bar names it. Start new ones on the Runs page.",
        )
    with right:
        copy_link()
    if picked != run_id:
        choose(picked)
        st.rerun()
    try:
        run = data.load(run_id)
    except RunError as error:
        empty("This run cannot be read", plain(error), icon=":material/broken_image:")
        st.stop()
    facts(run)
    return run


def asked(rows: list[Outline]) -> str:
    """The run of the URL or the session, if it is there; what is asked for in vain is said."""
    ids = {each.run_id for each in rows}
    wanted = st.query_params.get("run") or st.session_state.get("chosen_run")
    if wanted is not None and wanted not in ids:
        try:
            data.folder_of(wanted)
        except RunError as error:
            st.warning(plain(error), icon=":material/link_off:")
    run_id = wanted if wanted in ids else default_run_id(rows)
    choose(run_id)
    return run_id


def default_run_id(rows: list[Outline]) -> str:
    """The newest run that has something to show, else the recorded sample."""
    own = [each for each in rows if not data.is_sample(each)]
    with_steps = [each for each in own if each.last is not None]
    sample = [each for each in rows if each.run_id == data.SAMPLE]
    return (with_steps or sample or rows)[0].run_id


def choose(run_id: str) -> None:
    """Make it the run of all pages, and of the URL."""
    st.session_state["chosen_run"] = run_id
    if st.query_params.get("run") != run_id:
        st.query_params["run"] = run_id


def run_label(run: Outline) -> str:
    """One line that tells runs apart."""
    name, what = model_name(run.spec).rpartition("/")[2], method_name(run.spec)
    if data.is_sample(run):
        return f"Sample: {name}, {what}"
    return f"{name}, {what}, {len(run.removal_list)} removed ({run.run_id})"


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


def badge(state: JobState) -> None:
    """State of a run: a word, an icon and a colour."""
    word, icon, colour = _STATES[state]
    st.badge(word, icon=icon, color=colour)


def state_word(state: JobState) -> str:
    """State of a run in one word."""
    return _STATES[state][0]


def facts(run: Run) -> None:
    """Where every number on the page comes from, in one line."""
    words = []
    if data.is_sample(run):
        words.append(":material/science: **Recorded sample**, made by this program on a real model.")
    if run.stack is not None:
        stack = run.stack
        about = (
            f"{model_name(run.spec)} · {stack.num_blocks} blocks · {stack.total_parameters / 1e6:,.0f} M parameters · "
            f"{stack.dtype} · "
        ) + (
            f"{stack.sequences} × {stack.sequence_length} tokens of {stack.text.partition(':')[0]}, "
            f"{stack.held_out} × held out"
            if stack.sequences
            else f"a list that was given: {list(run.removal_list)}"
        )
        words.append(plain(about))
    if words:
        st.caption(" ".join(words))


def progress(job: Job) -> None:
    """How far the job is."""
    now = job.status.progress
    if now is None:
        st.progress(0.0, "Starting" if job.status.state is JobState.RUNNING else "Waiting for its process")
        return
    text = f"Step {now.step} of {now.steps}" if now.steps and now.step else now.phase
    text += f": {now.message}" if now.message else ""
    if now.eta_seconds is not None:
        text += f" · {duration(now.eta_seconds)} left"
    st.progress(min(max(now.fraction, 0.0), 1.0), plain(text))


def stop_job(run: Run) -> None:
    """Stop what is executing the run and draw the page anew, or say why that could not be done."""
    try:
        with st.spinner("Stopping"):
            jobs.stop(run)
    except SlebError as error:
        st.error(plain(error))
    else:
        st.rerun()


def log_of(run: Run, job: Job) -> None:
    """The log of one job, folded, if it wrote any."""
    log = data.log_of(run.model_copy(update={"jobs": (job,)}))
    if log:
        with st.expander("Log", icon=":material/notes:"):
            st.code(log, language=None, wrap_lines=True, height=240)


def empty(headline: str, text: str, *, icon: str = ":material/inbox:") -> None:
    """What to do where there is nothing to see. `text` is Markdown: escape what comes from outside."""
    with st.container(border=True):
        st.markdown(f"#### {icon} {headline}")
        st.markdown(text)


def chart(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    table: Callable[[], pd.DataFrame] | None = None,
    on_pick: Callable[[], None] | None = None,
) -> Any:
    """A chart, as wide as its place, with its data and itself to take away.

    `key` names the files too. `table` gives the data; `on_pick` is called when a point is clicked, and finds it in
    `st.session_state[key]["selection"]["points"]`.
    """
    found = st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        config=style.CONFIG | {"toImageButtonOptions": {"format": "svg", "filename": key}},
        on_select=on_pick or "ignore",
        selection_mode="points",
    )
    if table is not None:
        downloads(figure, key, table)
    return found


def downloads(figure: go.Figure, key: str, table: Callable[[], pd.DataFrame]) -> None:
    """Data and figure as files, made when they are asked for."""
    with st.popover("Download", icon=":material/download:", type="tertiary"):
        st.download_button(
            "Data (CSV)", lambda: csv(table()), f"{key}.csv", "text/csv", key=f"{key}-csv", on_click="ignore"
        )
        st.download_button(
            "Figure (HTML, self-contained)",
            lambda: figure.to_html(include_plotlyjs=True, config=style.CONFIG),
            f"{key}.html",
            "text/html",
            key=f"{key}-html",
            on_click="ignore",
        )
        st.caption("As SVG: the camera in the chart's corner.")


def csv(table: pd.DataFrame) -> bytes:
    """A table as a file that spreadsheets open without running what is in it."""
    shown = table.map(lambda value: f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value)
    return shown.to_csv(index=False).encode()


def number(value: float | None, digits: int = 2) -> str:
    """A number for the screen; what is not there is a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def share_of_parameters(run: Run) -> float:
    """Of the whole model, those of the blocks that are gone."""
    if run.stack is None:
        return 0.0
    gone = sum(run.stack.block_parameters[block] for block in run.removal_list)
    return gone / run.stack.total_parameters


def rise(before: Baseline, after: Step) -> str | None:
    """How much worse the held-out text is predicted, with its standard error: in per cent, or how many times."""
    first, last = before.held_out.perplexity, after.held_out.perplexity
    if first is None or last is None or not math.isfinite(last) or not 0 < first < math.inf:
        return None
    error = after.held_out_standard_error
    ratio = last / first
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
    return meter.duration(seconds)


_COPY = st.components.v2.component(
    "sleb_copy_link",
    html='<button type="button">Copy link</button>',
    css="""
button { font: inherit; font-size: 0.875rem; white-space: nowrap; padding: 0.45rem 0.75rem; cursor: pointer;
  color: var(--st-text-color); background: var(--st-background-color); border: 1px solid var(--st-border-color);
  border-radius: var(--st-base-radius); }
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
""",
    js="""
export default function ({ parentElement }) {
  const button = parentElement.querySelector("button");
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(location.href); button.textContent = "Copied"; }
    catch { button.textContent = "Copy it from the address bar"; }
    setTimeout(() => { button.textContent = "Copy link"; }, 2000);
  };
}
""",
)


def copy_link() -> None:
    """A button that puts this page's address, with all its choices, on the clipboard."""
    _COPY(key="copy-link", width="content")
