"""Export: the removal list for other tools, the smaller model with its proof, and a report."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from app.page import run_page
from app.panels import export_panel, foreign_names
from app.widgets import chart, empty, link_to_runs
from app.wording import in_fields, plain, rise
from sleb.errors import SlebError
from sleb.formats.list_formats import in_words, remarks, render
from sleb.records import Run
from sleb.report import build
from sleb.report.figures import stack_strips, style
from sleb.report.summaries.compared_lists import Listed
from sleb.report.summaries.numbers import perplexity, share_of_parameters


@dataclass(frozen=True)
class ListFormat:
    """How the page offers a format of the removal list."""

    name: str
    ending: str
    mime: str
    language: str | None
    """The language by which the page colours it; None where it has none."""
    note: str
    """Which tool reads it, and what to beware of."""


FORMATS = {
    "json": ListFormat(
        "JSON", ".json", "application/json", "json",
        "For your own scripts: removed and kept blocks, half-open ranges of kept blocks, perplexities, and hashes of "
        "weights. Block indices are original and 0-based, as everywhere here.",
    ),
    "csv": ListFormat(
        "CSV", ".csv", "text/csv", None,
        "For a spreadsheet: one row a step, the baseline first. Lists inside a cell are JSON; an empty cell was not "
        "measured.",
    ),
    "list": ListFormat(
        "Plain list", ".txt", "text/plain", "python",
        "The blocks in the order of removal, 0-based, to paste into Python or a config file.",
    ),
    "sleb": ListFormat(
        "SLEB", "-sleb.sh", "text/x-shellscript", "bash",
        "For the paper's own code (github.com/jiwonsong-dev/SLEB), run in its folder: measures the perplexity of this "
        "list there. Beware: it knows LLaMA and OPT models by name only, and silently removes nothing for any "
        "other name.",
    ),
    "mergekit": ListFormat(
        "mergekit", "-mergekit.yaml", "application/yaml", "yaml",
        "For `mergekit-yaml FILE FOLDER`: a passthrough merge of the kept ranges. Beware: `layer_range` is half-open, "
        "and mergekit does not shorten lists of the config with one entry per block (`layer_types`): for such a model "
        "write the checkpoint instead.",
    ),
    "llama-quantize": ListFormat(
        "llama.cpp", "-llama-quantize.sh", "text/x-shellscript", "bash",
        "For llama.cpp's `llama-quantize` and a GGUF file of this model. `COPY` keeps the type of every tensor; name "
        "another type to quantise as well. Beware: metadata with one entry per block is not filtered; try the result "
        "before you rely on it. If this run's model is a GGUF file, write the smaller GGUF file instead.",
    ),
}  # fmt: skip


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page("Export", "Take the removal list, or the smaller model itself, to where you use it.")
    foreign_names.ask()
    try:
        run.require_trace()
    except SlebError as error:
        empty("No removal list yet", plain(in_fields(error)))
        link_to_runs(run.run_id)
        return
    steps = _which_list(run)
    left, right = st.columns([1, 1], gap="large")
    with left:
        _for_other_tools(run, steps)
        _report(run, steps)
    with right:
        export_panel.checkpoint(run, steps)


def _which_list(run: Run) -> int:
    """Draw strip, sentence and cost of the list after a chosen number of steps; returns that number."""
    assert run.trace is not None
    assert run.stack is not None
    done, first, stack = run.trace.steps, run.trace.baseline, run.stack
    steps = len(done)
    if len(done) > 1:
        if st.session_state.get("steps", 1) > len(done):  # of a run with more steps
            st.session_state["steps"] = len(done)
        swapped = any(each.is_swap for each in done)
        steps = st.slider(
            "After how many steps" if swapped else "After how many removals", 1, len(done), len(done), key="steps",
            bind="query-params",
            help="Each step of the search is a list of its own: fewer removed blocks raise the perplexity less."
            + (" The last steps are swaps, which do not remove further blocks." if swapped else ""),
        )  # fmt: skip
    step = done[steps - 1]
    with st.container(horizontal=True, gap="large"):
        st.metric("Blocks kept", f"{stack.num_blocks - len(step.removal_list)} of {stack.num_blocks}")
        st.metric(
            "Parameters",
            f"−{share_of_parameters(stack, step.removal_list):.1%}",
            help="Share of all parameters, embedding and LM head included.",
        )
        st.metric(
            "Held-out perplexity",
            f"{perplexity(first.held_out)} → {perplexity(step.held_out)}",
            rise(first, step),
            delta_color="off",
            delta_arrow="off",
            help="Before and after, on sequences on which no block was chosen; below, the rise ± its standard error.",
        )
        st.metric(
            "Calibration perplexity",
            f"{perplexity(first.calibration)} → {perplexity(step.calibration)}",
            help="Before and after, on the text on which the blocks were chosen: too good for other text.",
        )
    nested = tuple(each.removal_list for each in done[:steps])
    row = Listed("", "", stack.num_blocks, nested, style.PALETTE[0])
    chart(
        stack_strips.strips([row]),
        key="removal-list",
        alt=f"The stack of {stack.num_blocks} blocks, removed ones filled and numbered in the order of removal",
    )
    st.markdown(plain(in_words(stack.num_blocks, step.removal_list)))
    return steps


def _for_other_tools(run: Run, steps: int) -> None:
    st.subheader("The list, for other tools", anchor=False)
    chosen = st.segmented_control(
        "Format", list(FORMATS), default="json", required=True, key="format", bind="query-params",
        format_func=lambda name: FORMATS[name].name, help="The same list in the format of another tool.",
        wrap=True,
    )  # fmt: skip
    offered = FORMATS[chosen]
    st.markdown(offered.note)
    try:
        text = render(run, chosen, steps)
    except SlebError as error:
        st.info(plain(in_fields(error)), icon=":material/block:")
        return
    for remark in remarks(run, chosen):
        st.caption(plain(remark))
    st.code(text, language=offered.language, wrap_lines=True, height=260 if text.count("\n") > 9 else "content")
    st.download_button(
        "Download", text, f"{export_panel.name_of(run, steps)}{offered.ending}", offered.mime,
        icon=":material/download:", on_click="ignore", key="list-file",
    )  # fmt: skip


def _report(run: Run, steps: int) -> None:
    st.subheader("A report for others", anchor=False)
    st.markdown(
        "One HTML file with all of this and the figures of the other pages, the animation of the removal steps "
        "included. It opens in any browser without a network, and prints."
    )
    st.download_button(
        "Download the report", lambda: build.of(run, steps), f"{run.run_id}-report.html", "text/html",
        icon=":material/description:", on_click="ignore", key="report-file",
    )  # fmt: skip


main()
