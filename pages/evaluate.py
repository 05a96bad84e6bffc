"""Evaluate: what each list costs and buys, which one passes the gates, and the jobs that measure more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import streamlit as st

from app import data
from app.components import side_by_side
from app.page import run_page
from app.panels import evaluation_forms, foreign_names, gate_controls, job_panel, other_calibration
from app.widgets import PERPLEXITY_AS, PERPLEXITY_AS_HELP, chart, empty, link_to_runs, switch
from app.wording import in_fields, plain
from sleb.formats.findings_tables import NO_NUMBER, healing_notes, without_numbers
from sleb.records import Finding, Generation, Healing, Quantization, Run
from sleb.report.figures import evaluate, style
from sleb.report.summaries import evaluation_tables, gates, list_curves
from sleb.report.summaries.list_curves import Curves
from sleb.report.summaries.numbers import number, span
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes import job_processes
from sleb.runtime.run_index import findings_signature

MISSING = {
    "cost": "No text measured yet: <b>Evaluate</b> below",
    "accuracy": "No accuracy yet: choose tasks below, then <b>Evaluate</b>",
    "speed": "Not timed yet: <b>Time it</b> below",
    "size": "The size of this dtype is unknown",
}
"""What to do for a panel in which nothing was measured."""


def main() -> None:
    """The screen, from top to bottom."""
    run = run_page("Evaluate", "What does each list cost, what does it buy, and which one should you take?")
    foreign_names.ask()
    if run.stack is None and run.spec.kind != "evaluate":
        empty("Model not opened yet", "Start or resume this run on the **Runs** page.")
        link_to_runs(run.run_id)
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
        st.caption(":material/progress_activity: A process is working on this run; its progress is below the panels.")
    if run.stack is None:
        empty("Nothing measured yet", "**Evaluate** below opens the model and measures the baseline and the list.")
        _tabs(run, curves, findings, None, busy)
        return
    left, right = st.columns([2.5, 1], gap="large")
    with right:
        st.subheader("Which list should I take?", anchor=False)
        on, limits = gate_controls.gates(curves)
        judgement = gates.judge(on, curves.lists)
        gate_controls.proposal(run, curves, on, judgement)
    with left:
        if curves.too_good:
            st.warning(
                plain("; ".join(curves.too_good)) + ". Costs measured there are too low; rely on held-out text.",
                icon=":material/warning:",
            )
        _panels(curves, judgement, limits, gated=bool(on))
    _tabs(run, curves, findings, judgement.proposal, busy)


def _nothing_yet(run: Run) -> None:
    if run.spec.kind == "analyze":
        text = "This run analysed the model and removed no block. Search it on the **Runs** page to have lists here."
    elif job_processes.active(run) is not None:
        text = "The first list appears after the first step of the search."
    else:
        text = "The search has not finished a step. Resume it on the **Runs** page."
    empty("No list to evaluate yet", text)
    link_to_runs(run.run_id)


def _panels(curves: Curves, judgement: gates.Judgement, limits: Sequence[evaluate.Limit], *, gated: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("What it costs and what it buys", anchor=False)
        unit = switch("Perplexity as", "as", PERPLEXITY_AS, PERPLEXITY_AS_HELP, hidden_label=True)
    chart(
        evaluate.panels(
            curves, admissible=judgement.admissible if gated else (), proposal=judgement.proposal, limits=limits,
            missing=MISSING, over_baseline=unit == "times",
        ),
        key="cost-and-gain",
        alt="Perplexity, accuracy, speedup and size against the number of blocks removed, one panel above the other; "
        + (f"{span([each for each in judgement.admissible if each])} removed pass the gates" if gated else ""),
        table=lambda: list_curves.table(curves),
    )  # fmt: skip
    st.caption(" ".join(_notes(curves, gated)))


def _notes(curves: Curves, gated: bool) -> list[str]:
    """Captions for the marks that the panels show."""
    kinds = {each.kind for each in curves.cost}
    notes = ["Shaded: passes every gate; dashed frame: proposed."] if gated else []
    notes.append("Bars: one standard error; for speed, quartiles.")
    if {"held-out", "calibration"} & kinds:
        notes.append("Dotted: the search's own texts; the calibration set, on which blocks were chosen, is too good.")
    beyond = evaluate.beyond(curves.cost)
    if beyond:
        notes.append(f"Beyond the upper edge: {plain(', '.join(beyond))}.")
    if any(each.is_estimate for each in (*curves.cost, *curves.accuracy)):
        notes.append("≈ and open marks: estimates from a part of the text or of the questions.")
    if not curves.speed:
        notes.append("Dashed: speedup predicted from the number of blocks.")
    else:
        about = "; ".join(f"{each.name}: {each.about}" for each in curves.speed)
        notes.append(f"Speedup of {plain(about)}; dashed: predicted from the number of blocks.")
    notes += [plain(in_fields(each)) for each in curves.notes]
    if curves.elsewhere:
        notes.append(f"Findings about other lists: {curves.elsewhere} (`sleb show` prints them).")
    return notes


def _tabs(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    """Everything below the first screen; only the open tab is drawn."""
    job_panel.bar(run)
    drawn: dict[str, Callable[[], None]] = {
        "Measure": lambda: evaluation_forms.measure(run, curves, busy),
        "Side by side": lambda: _side_by_side(run, curves, findings, proposed, busy),
        "Another calibration set": lambda: other_calibration.draw(run, findings, busy),
        "Quantise": lambda: _quantized(run, curves, findings, proposed, busy),
        "Heal": lambda: _healed(run, curves, findings, proposed, busy),
    }
    for tab, draw in zip(st.tabs(list(drawn), key="show", bind="query-params"), drawn.values(), strict=True):
        if tab.open:
            with tab:
                draw()


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
                help="Earlier prompts for this list, the newest first.",
            )  # fmt: skip
    with right:
        evaluation_forms.generate(run, blocks, busy)
    if chosen is None:
        others = sorted({len(each.removal_list) for each in answers})
        more = f" Answers exist for {span(others)} removed." if others else ""
        empty("Nothing generated yet", f"**Generate** continues your prompt with both models.{more}")
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
        if own:
            _table(evaluation_tables.quantization_table(own), ("Before", "Quantised"), "quantisation", own)
            _captions(without_numbers(own))
        else:
            empty("Nothing quantised yet", "**Quantise** measures int8 or int4 weights, with and without the list.")


def _healed(run: Run, curves: Curves, findings: Sequence[Finding], proposed: int | None, busy: bool) -> None:
    own = of_kind(findings, Healing)
    left, right = st.columns([1, 1.6], gap="large")
    with left:
        evaluation_forms.heal(run, evaluation_forms.which(run, curves, own, "list-healed", proposed), busy)
    with right:
        if own:
            _table(evaluation_tables.healing_table(own), ("Baseline", "Before", "Healed"), "healing", own)
            _captions(healing_notes(own))
        else:
            empty("Nothing healed yet", "**Heal** trains adapters or refits the cuts, and measures before and after.")


def _captions(notes: Sequence[str]) -> None:
    for each in notes:
        st.caption(plain(in_fields(each)))


def _table(
    table: pd.DataFrame, numbers: tuple[str, ...], measure: str, findings: Sequence[Quantization | Healing]
) -> None:
    st.dataframe(
        table.style.format(number, subset=list(numbers), na_rep=NO_NUMBER), hide_index=True, placeholder="–",
        column_config={
            "Loss": st.column_config.LineChartColumn("Loss", width="small", color=style.BLUE, help="While training.")
        },
        alt=f"Perplexity before and after {measure}",
    )  # fmt: skip
    if not all(each.text.is_whole for each in findings):
        st.caption("≈: estimates from some of the windows.")


main()
