"""Removal steps: blocks being removed one at a time, with all the evidence of each decision."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data
from app.components import stepper
from app.page import run_page
from app.widgets import chart, csv, empty, link_to_runs, progress, switch
from app.wording import in_fields, plain
from sleb.methods.statistics import Comparison
from sleb.records import JobState, Method, Run
from sleb.report.figures import steps as charts
from sleb.report.figures import style
from sleb.report.summaries import step_comparison
from sleb.runtime.processes import job_processes
from sleb.runtime.run_index import Outline

LIVE_SECONDS = 2.0


def main(run: Run) -> None:
    """The screen, from top to bottom."""
    if run.spec.kind != "search":
        empty("This run removes no block", "It is not a search. Start a search on the **Runs** page.")
        return
    with st.expander("How to read this", icon=":material/help:"):
        explain()
    live = job_processes.active(run) is not None
    st.fragment(steps, run_every=LIVE_SECONDS if live else None)(run.run_id)
    curves(run)


def steps(run_id: str) -> None:
    """Stepper and evidence, drawn again and again while the search runs."""
    run = data.load(run_id)
    job = job_processes.active(run)
    if job is not None:
        progress(job)
    elif st.session_state.get("steps-live") == run_id:
        st.session_state.pop("steps-live")
        st.rerun()
    if job is not None:
        st.session_state["steps-live"] = run_id
    if run.trace is None or not run.trace.steps:
        waiting(run)
        return
    ended(run)
    shown = payload(run) | {"live": job is not None}
    count = len(run.trace.steps)
    wanted_step = wanted(count)
    step = stepper.draw(shown | {"step": wanted_step}, key=f"stepper-{run_id}")
    if step is not None and step != wanted_step:
        st.query_params["step"] = str(step)
        wanted_step = step
    evidence(run, min(max(wanted_step, 1), count))


def payload(run: Run) -> dict[str, Any]:
    """Data of the stepper."""
    return stepper.payload(run, comparisons(run))


def comparisons(run: Run) -> list[Comparison | None]:
    """The comparison of each step's candidates, cached by `data`."""
    assert run.trace is not None
    return [data.evidence(run, step) for step in run.trace.steps]


def wanted(count: int) -> int:
    """The step of the address, brought into range; the last one where it names none."""
    text = st.query_params.get("step", "")
    return min(int(text), count) if text.isdecimal() and text.isascii() and len(text) < 6 else count


def ended(run: Run) -> None:
    """Say that a search failed or was stopped; its finished steps are shown all the same."""
    own = job_processes.own_job(run)
    unfinished = run.trace is not None and run.trace.finished is None
    if unfinished and own and own.status.state in (JobState.FAILED, JobState.STOPPED, JobState.INTERRUPTED):
        outcome = "failed" if own.status.state is JobState.FAILED else f"was {own.status.state.value}"
        why = plain(in_fields(job_processes.last_word(own)))
        st.warning(f"This search {outcome}; its finished steps are below. Resume it on the **Runs** page. {why}")


def waiting(run: Run) -> None:
    """Say why the run has no steps, and what to do."""
    own = job_processes.own_job(run)
    if own is not None and job_processes.is_active(own):
        empty("No step finished yet", "The first step appears here as soon as it is finished.")
        return
    why = "This run has not been started." if own is None else job_processes.last_word(own)
    empty("No step finished", f"{plain(in_fields(why))} Resume the run on the **Runs** page.")
    link_to_runs(run.run_id)


def evidence(run: Run, number: int) -> None:
    """Every candidate of the step as a table."""
    assert run.trace is not None
    shown = step_comparison.bars(run, number, data.evidence(run, run.trace.steps[number - 1]))
    table = charts.evidence_table(shown)
    unit = step_comparison.unit_of(run)
    confidence = f"{run.spec.confidence:.0%}"
    with st.expander(f"All candidates of step {number}", icon=":material/table_rows:"):
        st.dataframe(
            table,
            hide_index=True,
            height=min(36 * len(table) + 38, 400),
            column_order=[name for name in table.columns if name != "sequences" or table[name].notna().any()],
            placeholder="–",
            column_config={
                "rank": st.column_config.NumberColumn("Rank", format="%d", width="small"),
                "block": st.column_config.TextColumn(
                    "Swap" if shown.step.is_swap else "Block",
                    help="Original, 0-based index.",
                    width=None if shown.step.is_swap else "small",
                ),
                "score": st.column_config.NumberColumn("Score", format="%.4f", help=f"Lower is better: {unit}."),
                "perplexity": st.column_config.NumberColumn(
                    "Perplexity", format="%.4g", help="Perplexity of the calibration text."
                ),
                "difference": st.column_config.NumberColumn(
                    "Above the best", format="%.4f", help="Mean difference from the removed one, on the same sequences."
                ),
                "interval": st.column_config.NumberColumn(
                    f"± ({confidence})", format="%.4f", help="Half-width of the interval of that difference."
                ),
                "sequences": st.column_config.NumberColumn(
                    "Sequences", format="%d", help="Sequences on which it was scored: fewer if it left the race early."
                ),
                "verdict": st.column_config.TextColumn(
                    "Verdict", help="Statistically tied: the interval of the difference contains zero."
                ),
            },
        )
        st.download_button(
            "Download (CSV)",
            lambda: csv(table),
            f"{run.run_id}-step-{number}.csv",
            "text/csv",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )


def curves(run: Run) -> None:
    """Perplexity against blocks removed, for every method run on the same model and text (Figure 7)."""
    if run.stack is None:
        return
    comparable = list(same_model_and_text(run))
    if not comparable:
        return
    st.subheader("Methods compared", anchor=False)
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.caption(
        "Perplexity against the number of blocks removed, for the same model and text (paper, Figure 7). A curve that "
        f"leaves the chart is beyond {style.READABLE} times the lowest perplexity; **Compare** shows all of it."
    )
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        text = switch(
            "Text",
            "text",
            {"calibration": "Calibration", "held-out": "Held-out"},
            "Blocks were chosen on the calibration text; held-out text shows what their removal really costs.",
            hidden_label=True,
        )
        axis = switch("Axis", "axis", {"log": "Log", "linear": "Linear"}, "The axis of perplexity.", hidden_label=True)
    figure = charts.methods(comparable, held_out=text == "held-out", logarithmic=axis == "log")
    chart(figure, key="methods", alt="Perplexity by method", table=lambda: charts.methods_table(comparable))
    missing = [
        style.METHOD_NAMES[each.value] for each in Method if all(run.spec.method is not each for run in comparable)
    ]
    if missing:
        st.caption(
            f"Not run on this model and text: {', '.join(missing)}. Duplicate the run on the **Runs** page and choose "
            "the method there."
        )
        link_to_runs(run.run_id)


def same_model_and_text(run: Run) -> list[Run]:
    """This run and, for each other method, the longest search of the same weights and tokens."""
    assert run.stack is not None
    comparable = [run] if run.trace and run.trace.steps else []
    rows = [each for each in data.outlines() if isinstance(each, Outline) and each.run_id != run.run_id]
    for each in sorted(rows, key=lambda row: -len(row.removal_list)):  # of several, the longest
        method = (each.spec.method, each.spec.refine)
        taken = any(method == (have.spec.method, have.spec.refine) for have in comparable)
        if taken or not each.removal_list or each.num_blocks != run.stack.num_blocks:
            continue
        other = data.load(each.run_id)
        if other.stack and other.stack.tokens_hash == run.stack.tokens_hash and other.stack.is_of_same_model(run.stack):
            comparable.append(other)
    return comparable


def explain() -> None:
    """How to read the page, for those who see it for the first time."""
    st.markdown(
        """
- **A step** scores every remaining block: how badly does the current model predict the calibration text without it?
  That is **Metric3**, a mean negative log-likelihood in nats per token (paper, 3.2 and Algorithm 1). The block with the
  lowest score is removed, and all others are scored again, because the model has changed.
- **Bars** show that cost: the score minus the score before the step. The model misses a block with a lower bar less. A
  bar cut off at the top (↑) is a block that the model cannot do without.
- **Error bars** are the interval of each block's difference to the removed one, over the same sequences. Where it
  contains zero, the two are **statistically tied** (≈): on this text either might have been removed. Otherwise they are
  **significantly different**. More text leaves fewer ties.
- **Calibration perplexity** is too good, because blocks were chosen on that text. No block was chosen on **held-out**
  text; its band is one standard error either way.
- **A swap**, in a run that was started with swaps, takes one block back (▲) after the last removal and removes another.
  All swaps are compared with each other and with the current list, and the best one is made if it lowers the score
  beyond its error. Bars then show, for each block, the best swap that removes it: below zero is better than before.
- Arrow keys step, Home and End jump, the space bar plays. The address names the step.
"""
    )


main(run_page("Removal steps", "Watch blocks being removed one at a time, and how sure each choice is."))
