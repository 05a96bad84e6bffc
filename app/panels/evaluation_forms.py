"""The Evaluate page's forms that start jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import access
from app.page import choose
from app.panels import foreign_names, job_panel
from app.panels.gate_controls import in_order_of_removal
from app.wording import plain
from sleb import specs
from sleb.evaluation import request
from sleb.records import (
    NAMED_TEXTS,
    BenchmarkSpec,
    EvaluateSpec,
    Finding,
    GenerateSpec,
    HealSpec,
    QuantizeSpec,
    RemovalList,
    Run,
)
from sleb.report.summaries.list_curves import Curves

TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""Of the paper's Table 2, by lm-eval's names."""
SHAPES: dict[str, dict[str, Any]] = {
    "small": dict(prompt=(1, 256), prompt_repetitions=5, generation=(1, 32), generation_repetitions=3),
    "paper": dict(prompt=(1, 2048), prompt_repetitions=50, generation=(64, 128), generation_repetitions=10),
}
LIMITS = (4, 16, 64, 256)
_DEVICE = "auto, cpu, cuda:0 …"


def measure(run: Run, found: Curves, busy: bool) -> None:
    """The two forms that fill the panels."""
    if _only_shows():
        return
    left, right = st.columns(2, gap="large")
    with left:
        _evaluate(run, found, busy)
    with right:
        _benchmark(run, found, busy)


def _evaluate(run: Run, found: Curves, busy: bool) -> None:
    st.markdown("##### Perplexity and accuracy")
    texts = texts_control(run, "evaluate-texts")
    tasks = st.multiselect(
        "Tasks", TASKS, key="evaluate-tasks", accept_new_options=True, placeholder="None",
        help="Of lm-eval, by name; type any other. Needs sleb[tasks] on the server.", persist_state="session",
    )  # fmt: skip
    left, right = st.columns(2)
    limit = limit_control(left, "evaluate-limit")
    lists = lists_control(right, run, found, "evaluate-lists")
    with st.popover("More", icon=":material/tune:", type="tertiary"):
        settings = _protocol()
        shots = st.number_input(
            "Examples in a prompt", 0, 100, None, key="evaluate-shots", placeholder="the task's own",
            persist_state="session",
        )  # fmt: skip
        device = st.text_input("Device", "auto", key="evaluate-device", help=_DEVICE, persist_state="session")
    nothing = not texts and not tasks
    if st.button(
        "Evaluate", icon=":material/play_arrow:", type="primary", disabled=busy or nothing,
        help="Starts a process of its own: you may leave this page meanwhile. What is known is not measured again.",
    ):  # fmt: skip
        ask = dict(settings, texts=named(texts, known_files(run)), tasks=tuple(tasks), shots=shots, limit=limit)
        _go(run, EvaluateSpec, lists, ask, device)


def _benchmark(run: Run, found: Curves, busy: bool) -> None:
    st.markdown("##### Speed and memory")
    shape = st.segmented_control(
        "How long", list(SHAPES), required=True, default="small", key="benchmark-shape",
        format_func=lambda each: {"small": "A look, for a CPU", "paper": "As in the paper, for a GPU"}[each],
        help="A look: a prompt of 256 tokens and 32 generated ones, a few times. The paper: a prompt of 2048 tokens "
        "50 times, and 64 sequences of 128 tokens 10 times (Appendix B.5).", persist_state="session", wrap=True,
    )  # fmt: skip
    what = st.segmented_control(
        "What", ["prompt", "generation"], selection_mode="multi", default=["prompt", "generation"],
        format_func=lambda each: {"prompt": "Reading a prompt", "generation": "Generating"}[each],
        key="benchmark-what", persist_state="session", wrap=True,
        help="The unmodified model and the list take turns on the same input, with the blocks really gone.",
    )  # fmt: skip
    left, right = st.columns(2)
    lists = lists_control(left, run, found, "benchmark-lists")
    device = right.text_input("Device", "auto", key="benchmark-device", help=_DEVICE, persist_state="session")
    if st.button(
        "Time it", icon=":material/timer:", type="primary", disabled=busy or not what,
        help="Starts a process of its own. Other work on the machine disturbs what it measures.",
    ):  # fmt: skip
        ask = SHAPES[shape] | {each: None for each in ("prompt", "generation") if each not in what}
        _go(run, BenchmarkSpec, lists, ask, device)


def generate(run: Run, blocks: RemovalList, busy: bool) -> None:
    """Prompt, number of tokens, chat."""
    if _only_shows():
        return
    prompt = st.text_area(
        "Prompt", "The capital of France is", key="prompt", height=90, max_chars=20_000, persist_state="session",
        help="What both models go on from, greedily.",
    )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        tokens = st.number_input(
            "Tokens", 1, 4096, 32, key="prompt-tokens", width=130, persist_state="session", help="To be generated."
        )
        chat = st.toggle(
            "As a chat", key="prompt-chat", persist_state="session",
            help="The prompt is a user's turn in the model's chat template.",
        )  # fmt: skip
        if st.button(
            "Generate", icon=":material/play_arrow:", type="primary", disabled=busy or not blocks or not prompt,
            help="Starts a process of its own: it loads the model, and answers once for each of both.",
        ):  # fmt: skip
            _go(run, GenerateSpec, (blocks,), dict(prompt=prompt, tokens=tokens, chat=chat))


def quantize(run: Run, blocks: RemovalList, busy: bool) -> None:
    """Schemes and texts."""
    if _only_shows():
        return
    schemes = st.segmented_control(
        "Weights as", ["int8", "int4"], selection_mode="multi", default=["int8"], key="quantize-schemes",
        persist_state="session", help="Weight-only, by torchao; for the unmodified model and for the list.",
    )  # fmt: skip
    texts = texts_control(run, "quantize-texts")
    left, right = st.columns(2)
    limit = limit_control(left, "quantize-limit")
    group = right.number_input(
        "Weights that share a scale", 16, 4096, 128, 16, key="quantize-group", disabled="int4" not in schemes,
        persist_state="session", help="Of int4.",
    )  # fmt: skip
    if st.button(
        "Quantise", icon=":material/compress:", type="primary", disabled=busy or not texts or not schemes,
        help="Measures only; the command line writes the model: sleb quantize, with out and a folder.",
    ):  # fmt: skip
        ask = dict(schemes=tuple(schemes), group_size=group, texts=named(texts, known_files(run)), limit=limit)
        _go(run, QuantizeSpec, (blocks,), ask)


def heal(run: Run, blocks: RemovalList, busy: bool) -> None:
    """How, on what and for how long."""
    if _only_shows():
        return
    how = st.segmented_control(
        "How", ["lora", "linear", "both"], required=True, default="lora", key="heal-how", persist_state="session",
        format_func=lambda each: {"lora": "LoRA", "linear": "Least squares", "both": "Both"}[each],
        help="LoRA trains low-rank adapters. Least squares fits the last linear layer before each cut anew: nothing is "
        "trained. Both does one after the other.",
    )  # fmt: skip
    source = st.text_input(
        "Text to heal on", run.spec.calibration.source, key=f"heal-source-{run.run_id}",
        help="As a search's calibration text: wikitext2, c4, demo, or a file on the server."
        + plain(access.explained()),
    )  # fmt: skip
    first, second, third = st.columns(3)
    sequences = first.number_input("Sequences", 1, 1_000_000, 32, key="heal-sequences", persist_state="session")
    length = second.number_input("Tokens each", 8, 100_000, 128, key="heal-length", persist_state="session")
    rank = third.number_input(
        "Rank", 1, 1024, 8, key="heal-rank", disabled=how == "linear", persist_state="session", help="Of the adapters."
    )
    left, right = st.columns([2, 1])
    with left:
        texts = texts_control(run, "heal-texts", "Measured on")
    limit = limit_control(right, "heal-limit")
    if st.button(
        "Heal", icon=":material/healing:", type="primary", disabled=busy or not texts or not source.strip(),
        help="Measures only; the command line writes the model: sleb heal, with out and a folder.",
    ):  # fmt: skip
        ask = dict(
            how=how, source=specs.absolute(source.strip()), sequences=sequences, sequence_length=length, rank=rank,
            texts=named(texts, known_files(run)), limit=limit,
        )  # fmt: skip
        _go(run, HealSpec, (blocks,), ask)


def _only_shows() -> bool:
    """Whether the server starts nothing, said where a form would be."""
    shows_only = access.rule().read_only
    if shows_only:
        st.caption(plain(access.SHOWS_ONLY))
    return shows_only


def _how_much(limit: int) -> str:
    if not limit:
        return "all of it"
    return f"{limit} {'windows or questions' if limit > 1 else 'window or question'} ≈"


def which(run: Run, found: Curves, findings: Sequence[Finding], key: str, proposed: int | None) -> RemovalList:
    """One of the run's lists: at first the newest that `findings` tell of, or the proposed one."""
    numbers = [each for each in found.lists if each] or [0]
    known = [len(each.removal_list) for each in findings if each.removal_list in found.lists.values()]
    first = next((each for each in (*reversed(known), proposed) if each in numbers), numbers[-1])
    if st.session_state.get(key) not in (None, *numbers):  # of another run
        del st.session_state[key]
    chosen = st.selectbox(
        "List", numbers, index=numbers.index(first), key=key, persist_state="session",
        format_func=lambda each: f"{each} removed: {', '.join(map(str, in_order_of_removal(run, found, each)))}",
        help="The run's list after so many removals.",
    )  # fmt: skip
    return found.lists[chosen]


def texts_control(run: Run, key: str, label: str = "Texts") -> list[str]:
    """Texts by name; files that were measured before are offered again."""
    known = {name: name for name in NAMED_TEXTS} | known_files(run)
    last = [each for job in run.jobs if job.ask and job.ask.kind != "benchmark" for each in _texts_of(job.ask)]
    return st.multiselect(
        label, list(known), [short(last[-1])] if last else ["wikitext2"], key=f"{key}-{run.run_id}",
        accept_new_options=True, placeholder="None",
        help="wikitext2 and c4 by their published protocols, or type the path of a file on the server: .raw as "
        "WikiText rows, .jsonl and .parquet (FILE:COLUMN) as documents, any other as one text."
        + plain(access.explained()),
    )  # fmt: skip


def limit_control(place: Any, key: str, first: int | None = 4) -> int | None:
    """How much of each text and task; None is all of it."""
    choices = sorted({*LIMITS, *([first] if first else [])})
    chosen = place.selectbox(
        "How much of each", [*choices, 0], ([*choices, 0]).index(first or 0), key=key, persist_state="session",
        format_func=_how_much,
        help="Windows of a text, evenly spread, and questions of a task: fewer are an estimate, and marked as such. "
        "Take all of it for numbers to report.",
    )  # fmt: skip
    return int(chosen) or None


def lists_control(place: Any, run: Run, found: Curves, key: str) -> list[RemovalList]:
    """Every list, or one of them."""
    numbers = [each for each in found.lists if each]
    every = f"every number, {numbers[0]} to {numbers[-1]}" if numbers else "none"
    chosen = place.selectbox(
        "Blocks removed", numbers if len(numbers) == 1 else [0, *numbers], key=f"{key}-{run.run_id}",
        format_func=lambda each: f"{each} removed" if each else every,
        help="The unmodified model is measured beside it.",
    )  # fmt: skip
    return [found.lists[each] for each in ([chosen] if chosen else numbers)]


def _protocol() -> dict[str, Any]:
    window = st.number_input(
        "Tokens a window", 2, 1_000_000, 2048, key="evaluate-window", help="Published numbers have 2048.",
        persist_state="session",
    )  # fmt: skip
    bos = st.selectbox(
        "BOS token", ["no", "yes", "auto"], key="evaluate-bos", persist_state="session",
        help="At the head of every window: the published protocols have none; some models need it.",
    )  # fmt: skip
    return dict(window=int(window or 2048), bos=bos)


def known_files(*runs: Run) -> dict[str, str]:
    """Files that were asked for before, by name: findings do not say where a text lies."""
    asked = [each for run in runs for job in run.jobs if job.ask for each in _texts_of(job.ask)]
    return {short(each): each for each in asked if short(each) not in NAMED_TEXTS}


def named(texts: Sequence[str], known: dict[str, str]) -> tuple[str, ...]:
    """Texts as a job takes them: files by their whole path, which `known_files` says."""
    return tuple(request.text_name(known.get(each, each.strip())) for each in texts)


def _texts_of(ask: Any) -> tuple[str, ...]:
    return getattr(ask, "texts", ())


def short(name: str) -> str:
    """A file by its name."""
    return re.split(r"[\\/]", name)[-1]


def _go(run: Run, record: type[Any], lists: Sequence[RemovalList], ask: dict[str, Any], device: str = "auto") -> None:
    """Start it, and draw the page anew with its progress."""
    if job_panel.start(run, record, lists, device=device, **ask):
        choose(run.run_id)
        st.rerun()
    if foreign_names.is_asked():
        st.rerun()
