"""Export: take the removal list to other tools, write the smaller model and see it proven, hand a report on."""

from __future__ import annotations

import streamlit as st

from app.page import run_page
from app.panels import export_panel, foreign_names
from app.widgets import chart, empty
from app.wording import perplexity, plain, rise
from sleb.errors import SlebError
from sleb.formats.list_formats import in_words, remarks, render
from sleb.records import Run
from sleb.report import build
from sleb.report.figures import compare

# Name, end of the file's name, kind, how it is coloured, who takes it and what to beware of.
FORMATS = {
    "json": (
        "JSON", ".json", "application/json", "json",
        "For your own scripts: removed and kept blocks, half-open ranges of kept blocks, perplexities, and hashes of "
        "weights. Block numbers are the original, 0-based ones, as everywhere here.",
    ),
    "csv": (
        "CSV", ".csv", "text/csv", None,
        "For a spreadsheet: one row a step, the baseline first. Lists inside a cell are JSON; what was not measured is "
        "an empty cell.",
    ),
    "list": (
        "Plain list", ".txt", "text/plain", "python",
        "The blocks in the order of removal, 0-based, to paste into Python or a config file.",
    ),
    "sleb": (
        "SLEB", "-sleb.sh", "text/x-shellscript", "bash",
        "For the paper's own code (github.com/jiwonsong-dev/SLEB), run in its folder: measures the perplexity of this "
        "list there. Beware: it knows LLaMA and OPT models by name only, and for any other name removes nothing, "
        "without saying so.",
    ),
    "mergekit": (
        "mergekit", "-mergekit.yaml", "application/yaml", "yaml",
        "For `mergekit-yaml FILE FOLDER`: a passthrough merge of the kept ranges. Beware: `layer_range` is half-open, "
        "and mergekit does not shorten lists of the config that hold one entry a block (`layer_types`): for such a "
        "model write the checkpoint instead, which does.",
    ),
    "llama-quantize": (
        "llama.cpp", "-llama-quantize.sh", "text/x-shellscript", "bash",
        "For llama.cpp's `llama-quantize` and a GGUF file of this very model. `COPY` keeps the type of every tensor; "
        "name another to quantize at once. Beware: settings that a GGUF file keeps for each block are not filtered; "
        "try the result before you rely on it. Where this run's model is a GGUF file, write the smaller file instead, "
        "which filters them.",
    ),
}  # fmt: skip


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page("Export", "Take the removal list, or the smaller model itself, to where you use it.")
    foreign_names.ask()
    try:
        run.require_trace()
    except SlebError as error:
        empty("No removal list yet", f"{plain(error)} The **Runs** page does both.")
        st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:")
        return
    steps = _which_list(run)
    left, right = st.columns([1, 1], gap="large")
    with left:
        _for_other_tools(run, steps)
        _report(run, steps)
    with right:
        export_panel.checkpoint(run, steps)


def _which_list(run: Run) -> int:
    """Strip, sentence and cost of the list after a chosen number of steps, which it returns."""
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
            help="Any step of the search is a list of its own: fewer blocks removed cost less perplexity."
            + (" The last steps are swaps, which remove no more blocks." if swapped else ""),
        )  # fmt: skip
    step = done[steps - 1]
    removed_parameters = sum(stack.block_parameters[block] for block in step.removal_list)
    with st.container(horizontal=True, gap="large"):
        st.metric("Blocks kept", f"{stack.num_blocks - len(step.removal_list)} of {stack.num_blocks}")
        st.metric(
            "Parameters",
            f"−{removed_parameters / stack.total_parameters:.1%}",
            help="Share of all parameters, embedding and LM head included.",
        )
        st.metric(
            "Held-out perplexity",
            f"{perplexity(first.held_out)} → {perplexity(step.held_out)}",
            rise(first, step),
            delta_color="off",
            delta_arrow="off",
            help="Before and after, on sequences that took no part in any choice; below, the rise with its standard "
            "error.",
        )
        st.metric(
            "Calibration perplexity",
            f"{perplexity(first.calibration)} → {perplexity(step.calibration)}",
            help="Before and after, on the text by which the blocks were chosen: too good to be true elsewhere.",
        )
    nested = tuple(each.removal_list for each in done[:steps])
    row = compare.Listed("", "", stack.num_blocks, nested, compare.PALETTE[0])
    chart(
        compare.strips([row]),
        key="removal-list",
        alt=f"The stack of {stack.num_blocks} blocks, removed ones filled and numbered in the order of removal",
    )
    st.markdown(plain(in_words(stack.num_blocks, step.removal_list)))
    return steps


def _for_other_tools(run: Run, steps: int) -> None:
    st.subheader("The list, for other tools", anchor=False)
    chosen = st.segmented_control(
        "Format", list(FORMATS), default="json", required=True, key="format", bind="query-params",
        format_func=lambda name: FORMATS[name][0], help="The same list as other tools read it.",
        wrap=True,
    )  # fmt: skip
    _, ending, kind, language, note = FORMATS[chosen]
    st.markdown(note)
    try:
        text = render(run, chosen, steps)
    except SlebError as error:
        st.info(plain(error), icon=":material/block:")
        return
    for remark in remarks(run, chosen):
        st.caption(plain(remark))
    st.code(text, language=language, wrap_lines=True, height=260 if text.count("\n") > 9 else "content")
    name = f"{export_panel.name_of(run, steps)}{ending}"
    st.download_button("Download", text, name, kind, icon=":material/download:", on_click="ignore", key="list-file")


def _report(run: Run, steps: int) -> None:
    st.subheader("A report to hand on", anchor=False)
    st.markdown(
        "One HTML file with everything above and the figures of the other pages, the animation of the removal steps "
        "included. It opens in any browser without a network, and prints."
    )
    st.download_button(
        "Download the report", lambda: build.of(run, steps), f"{run.run_id}-report.html", "text/html",
        icon=":material/description:", on_click="ignore", key="report-file",
    )  # fmt: skip


main()
