"""Evaluate: what each list costs and buys, which one passes the gates, and the jobs that measure more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import data
from app.components import side_by_side
from app.page import run_page
from app.panels import evaluation_forms, foreign_names, gate_controls, job_panel, other_calibration
from app.widgets import chart, empty
from app.wording import in_fields, number, plain
from sleb.formats.findings_tables import NO_NUMBER, healing_notes, without_numbers
from sleb.records import Finding, Generation, Healing, Quantization, Run
from sleb.report.figures import evaluate, style
from sleb.report.summaries import gates, list_curves
from sleb.report.summaries.list_curves import Curves
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes import job_processes
from sleb.runtime.run_index import findings_signature

MISSING = {
    "cost": "No text measured yet: <b>Evaluate</b> below",
    "accuracy": "No accuracy yet: choose tasks below, then <b>Evaluate</b>",
    "speed": "Not timed yet: <b>Time it</b> below",
    "size": "How many bytes this dtype takes is not known",
}
TABS = ("Measure", "Side by side", "Another calibration set", "Quantise", "Heal")


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page("Evaluate", "What does each list cost, what does it buy, and which one can you take?")
    foreign_names.ask()
    if run.stack is None and run.spec.kind != "evaluate":
        empty("Not opened yet", "This run has not loaded its model. Start or resume it on the **Runs** page.")
        st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:")
        return
    findings = data.findings_of(run)
    st.session_state["drawn-findings"] = (run.run_id, len(findings_signature(run.run_dir)))
    curves = list_curves.curves(run, findings)
    busy = job_processes.active(run) is not None
    if len(curves.lists) == 1 and not findings:
        job_panel.bar(run)
        _nothing_yet(run)
        return
    if busy:
        st.caption(":material/progress_activity: A process works on this run; how far it is stands below the panels.")
    if run.stack is None:
        empty("Nothing measured yet", "**Evaluate** below opens the model, and measures it with and without the list.")
        _tabs(run, curves, findings, None, busy)
        return
    left, right = st.columns([2.5, 1], gap="large")
    with right:
        st.subheader("Which list can I take?", anchor=False)
        on, limits = gate_controls.gates(curves)
        judgement = gates.judge(on, curves.lists)
        gate_controls.proposal(run, curves, on, judgement)
    with left:
        if curves.too_good:
            st.warning(
                plain("; ".join(curves.too_good)) + ". What lists cost there is too good; held-out text tells more.",
                icon=":material/warning:",
            )
        _panels(curves, judgement, limits, gated=bool(on))
    _tabs(run, curves, findings, judgement.proposal, busy)


def _nothing_yet(run: Run) -> None:
    if run.spec.kind == "analyze":
        text = (
            "This run analysed the model and removed no block. Search it on the **Runs** page: then its lists are here."
        )
    elif job_processes.active(run) is not None:
        text = "The first list appears after the first step of the search."
    else:
        text = "The search has finished no step. Resume it on the **Runs** page."
    empty("No list to evaluate yet", text)
    st.page_link("../pages/runs.py", label="Go to Runs", icon=":material/list:")


def _panels(curves: Curves, judgement: gates.Judgement, limits: Sequence[evaluate.Limit], *, gated: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("What it costs and what it buys", anchor=False)
        unit = st.segmented_control(
            "Perplexity as", ["perplexity", "times"], default="perplexity", required=True, key="as",
            bind="query-params", label_visibility="collapsed",
            format_func=lambda each: {"perplexity": "Perplexity", "times": "× baseline"}[each],
            help="Perplexity, or how many times the unmodified model's perplexity on the same text.",
        )  # fmt: skip
    chart(
        evaluate.panels(
            curves, admissible=judgement.admissible if gated else (), proposal=judgement.proposal, limits=limits,
            missing=MISSING, over_baseline=unit == "times",
        ),
        key="cost-and-gain",
        alt="Perplexity, accuracy, speedup and size against the number of blocks removed, one panel above the other; "
        + (f"{gates.span([each for each in judgement.admissible if each])} removed pass the gates" if gated else ""),
        table=lambda: list_curves.table(curves),
    )  # fmt: skip
    st.caption(" ".join(_notes(curves, gated)))


def _notes(curves: Curves, gated: bool) -> list[str]:
    """What the marks of the panels mean: only of those that are there."""
    kinds = {each.kind for each in curves.cost}
    notes = ["Shaded: passes every gate; dashed frame: proposed."] if gated else []
    notes.append("Bars: one standard error; for speed, quartiles.")
    if {"held-out", "calibration"} & kinds:
        notes.append("Dotted: the search's own text. The blocks were chosen on the calibration set: too good.")
    beyond = evaluate.beyond(curves.cost)
    if beyond:
        notes.append(f"Leaving the chart at its upper edge: {plain(', '.join(beyond))}.")
    if any(each.is_estimate for each in (*curves.cost, *curves.accuracy)):
        notes.append("≈ and open marks: estimates from a part of the text or of the questions.")
    if not curves.speed:
        notes.append("Dashed: the speed that the number of blocks predicts.")
    else:
        about = "; ".join(f"{each.name}: {each.about}" for each in curves.speed)
        notes.append(f"Speed of {plain(about)}; dashed: were time proportional to blocks.")
    notes += [plain(in_fields(each)) for each in curves.notes]
    if curves.elsewhere:
        notes.append(
            f"Findings about other lists, which are not on this run's way: {curves.elsewhere} (sleb show tells them)."
        )
    return notes


def _tabs(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    """Everything below the first screen; only the open tab is drawn."""
    job_panel.bar(run)
    tabs = dict(zip(TABS, st.tabs(TABS, key="show", bind="query-params"), strict=True))
    if tabs["Measure"].open:
        with tabs["Measure"]:
            evaluation_forms.measure(run, curves, busy)
    if tabs["Another calibration set"].open:
        with tabs["Another calibration set"]:
            other_calibration.draw(run, findings, busy)
    for name, draw in {"Side by side": _side_by_side, "Quantise": _quantized, "Heal": _healed}.items():
        if tabs[name].open:
            with tabs[name]:
                draw(run, curves, findings, proposed, busy)


def _side_by_side(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    answers = of_kind(findings, Generation)
    left, right = st.columns([1, 1], gap="large")
    with left:
        blocks = evaluation_forms.which(run, curves, answers, "list-said", proposed)
        own = [each for each in reversed(answers) if each.removal_list == blocks]
        chosen = own[0] if own else None
        if len(own) > 1:
            chosen = st.selectbox(
                "Earlier prompts", own, key="earlier", format_func=_prompt_in_short,
                help="What was asked about this list before, newest first.",
            )  # fmt: skip
    with right:
        evaluation_forms.generate(run, blocks, busy)
    if chosen is None:
        others = sorted({len(each.removal_list) for each in answers})
        more = f" There are answers about {gates.span(others)} removed." if others else ""
        empty("Nothing said yet", f"**Generate** lets both models go on from your prompt.{more}")
    else:
        side_by_side.draw(chosen)


def _prompt_in_short(answer: Generation) -> str:
    text = " ".join(answer.ask.prompt.split())
    return (text if len(text) <= 70 else text[:69] + "…") + f" ({answer.ask.tokens} tokens)"


def _quantized(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    own = of_kind(findings, Quantization)
    left, right = st.columns([1, 1.6], gap="large")
    with left:
        evaluation_forms.quantize(run, evaluation_forms.which(run, curves, own, "list-quantized", proposed), busy)
    with right:
        if not own:
            empty("Nothing quantised yet", "**Quantise** measures int8 or int4 weights, with and without the list.")
            return
        _table(evaluate.quantization_table(own), ("Before", "Quantised"), "Perplexity before and after quantisation")
        _captions(without_numbers(own))


def _healed(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    own = of_kind(findings, Healing)
    left, right = st.columns([1, 1.6], gap="large")
    with left:
        evaluation_forms.heal(run, evaluation_forms.which(run, curves, own, "list-healed", proposed), busy)
    with right:
        if not own:
            empty("Nothing healed yet", "**Heal** trains a little, or mends the cuts, and measures before and after.")
            return
        columns = {
            "Loss": st.column_config.LineChartColumn(
                "Loss", width="small", color=style.BLUE, help="While it was trained."
            )
        }
        numbers = ("Unmodified", "Before", "Healed")
        _table(evaluate.healing_table(own), numbers, "Perplexity before and after healing", columns)
        _captions(healing_notes(own))


def _captions(notes: Sequence[str]) -> None:
    for each in notes:
        st.caption(plain(in_fields(each)))


def _table(table: Any, numbers: tuple[str, ...], alt: str, columns: dict[str, Any] | None = None) -> None:
    st.dataframe(
        table.style.format(number, subset=list(numbers), na_rep=NO_NUMBER), hide_index=True, placeholder="–",
        column_config=columns, alt=alt,
    )  # fmt: skip
    if table["Text"].str.endswith("≈").any():
        st.caption("≈: estimates from some of the windows.")


main()
