"""The gates of the Evaluate page, and the list that they propose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from app.wording import plain
from sleb.records import Run
from sleb.report.figures.evaluate import Limit
from sleb.report.summaries import line_gates
from sleb.report.summaries.gates import Gate, Judgement
from sleb.report.summaries.list_curves import Curves, Line
from sleb.report.summaries.numbers import span, upper


def gates(curves: Curves) -> tuple[list[Gate], list[Limit]]:
    """Draw the controls of all gates; returns those that are on, and their lines in the panels."""
    on: list[Gate] = []
    limits: list[Limit] = []
    for each in (_cost, _accuracy, _speed, _size):
        gate, limit = each(curves)
        if gate is not None:
            on.append(gate)
        if limit is not None:
            limits.append(limit)
    return on, limits


GateAndLimit = tuple[Gate | None, Limit | None]


def _cost(curves: Curves) -> GateAndLimit:
    share, line = _gate(
        "At most … % worse", "worse", 10.0, "%g", 0.0, 1000.0, 1.0, curves.texts, lambda each: f"on {each.name}",
        on=True, there=bool(curves.texts),
        help="Rise of the perplexity over the baseline, on a text on which no block was chosen.",
    )  # fmt: skip
    if share is None or line is None:
        return None, None
    first = line.at(0)
    times = 1 + share / 100
    limit = Limit("cost", times * first.value, f"{share:g}% worse, {line.name}", times) if first else None
    return line_gates.cost_gate(line, share / 100), limit


def _accuracy(curves: Curves) -> GateAndLimit:
    lost, line = _gate(
        "At most … points lost", "lost", 2.0, "%g", 0.0, 100.0, 0.5,
        sorted(curves.accuracy, key=lambda each: each.kind != "mean"), _of_task, there=bool(curves.accuracy),
        help="Points of accuracy below the baseline: per cent of the questions. Accuracy has to be measured first: "
        "choose tasks under **Measure**.",
    )  # fmt: skip
    if lost is None or line is None:
        return None, None
    first = line.at(0)
    limit = Limit("accuracy", first.value - lost / 100, f"{lost:g} points less, {line.name}") if first else None
    return line_gates.accuracy_gate(line, lost / 100), limit


def _speed(curves: Curves) -> GateAndLimit:
    times, line = _gate(
        "At least … × faster", "faster", 1.25, "%.2f", 1.0, 100.0, 0.05, curves.speed, lambda each: f"at {each.name}",
        help="Speedup over the baseline. Where nothing was timed, it is predicted from the number of blocks.",
    )  # fmt: skip
    if times is None or not curves.num_blocks:
        return None, None
    return line_gates.speed_gate(curves, line, times), Limit("speed", times, f"{times:g}×")


def _size(curves: Curves) -> GateAndLimit:
    line = line_gates.whole_size(curves)
    gigabytes, _ = _gate(
        "Fits in … GB", "fits", 24.0, "%g", 0.001, 100_000.0, 1.0, there=line is not None,
        help=(f"Counts {line.about}. " if line else "The size of this dtype is unknown. ")
        + "Working memory comes on top, and so does a KV cache, unless a generation was timed. A GB is 1,000,000,000 "
        "bytes.",
    )  # fmt: skip
    if gigabytes is None or line is None:
        return None, None
    return line_gates.size_gate(curves, gigabytes * 1e9), Limit("size", gigabytes * 1e9, f"{gigabytes:g} GB")


def _gate(
    label: str,
    key: str,
    value: float,
    format: str,
    low: float,
    high: float,
    step: float,
    lines: Sequence[Line] = (),
    name: Callable[[Line], str] = str,
    *,
    help: str,
    on: bool = False,
    there: bool = True,
) -> tuple[float | None, Line | None]:
    """Draw a switch and, while it is on, its limit and line, which it returns; None while it is off or unavailable."""
    if not st.toggle(
        label, on, key=f"{key}-gate", bind="query-params", help=help, disabled=not there, persist_state="session",
        wrap=True,
    ) or not there:  # fmt: skip
        return None, None
    left, right = st.columns([1, 1.5], gap="small")
    limit = left.number_input(
        f"{label}: the limit", low, high, value, step, format=format, key=key, bind="query-params",
        label_visibility="collapsed", persist_state="session",
    )  # fmt: skip
    line = _choice(right, f"{label}: measured on", f"{key}-on", lines, name) if lines else None
    return (None if limit is None else float(limit)), line


def _choice(place: Any, label: str, key: str, lines: Sequence[Line], name: Callable[[Line], str]) -> Line:
    """Draw the choice of the line that a gate reads."""
    by_name = {each.name: each for each in lines}
    if st.session_state.get(key) not in (None, *by_name):  # of another run
        del st.session_state[key]
    chosen = place.selectbox(
        label, list(by_name), key=key, bind="query-params", label_visibility="collapsed",
        format_func=lambda each: name(by_name[each]) + (" ≈" if by_name[each].is_estimate else ""),
        persist_state="session",
    )  # fmt: skip
    return by_name[chosen]


def _of_task(line: Line) -> str:
    return f"{line.about}" if line.kind == "mean" else f"on {line.name}"


def proposal(run: Run, curves: Curves, on: Sequence[Gate], judgement: Judgement) -> None:
    """Draw the list that the gates propose, how sure that is, and a button that takes it."""
    numbers = [each for each in curves.lists if each]
    if not on:
        st.caption("Switch a gate on to shade the numbers of blocks that pass, and to have one list proposed.")
        return
    if judgement.proposal is None:
        st.warning(plain(judgement.refusal), icon=":material/block:")
        return
    count = judgement.proposal
    passing = [each for each in judgement.admissible if each]
    with st.container(border=True):
        st.markdown(f"#### :material/balance: Remove {count} of {curves.num_blocks} blocks")
        st.markdown("`" + ", ".join(map(str, in_order_of_removal(run, curves, count))) + "`")
        st.markdown("\n".join(f"- {plain(upper(each))}" for each in judgement.reasons))
        for each in judgement.doubts:
            st.caption(f":material/help: {plain(each)}")
        if len(numbers) > 1:
            st.caption(f"{len(passing)} of {len(numbers)} lists pass: {span(passing)} removed.")
        if run.trace is not None and run.trace.steps:
            help = "Opens the Export page with this list, for other tools or as a smaller checkpoint."
            if st.button("Take this list", type="primary", icon=":material/output:", help=help, width="stretch"):
                step = next(each for each in run.trace.by_length if len(each.removal_list) == count)
                st.switch_page(
                    "../pages/export.py", query_params={"run": run.run_id, "steps": str(step.number)}
                )  # fmt: skip


def in_order_of_removal(run: Run, curves: Curves, count: int) -> Sequence[int]:
    """Blocks of a list in the order of removal, where there is one."""
    steps = run.trace.by_length if run.trace else ()
    ordered = [*(each.removal_list for each in steps), *([run.spec.given] if run.spec.given else [])]
    return next((each for each in ordered if tuple(sorted(each)) == curves.lists[count]), curves.lists[count])
