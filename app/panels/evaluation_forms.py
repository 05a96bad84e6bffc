"""The forms of the Evaluate page that start jobs."""

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
"""Tasks of the paper's Table 2 by their names in lm-eval."""
SHAPES: dict[str, dict[str, Any]] = {
    "small": dict(prompt=(1, 256), prompt_repetitions=5, generation=(1, 32), generation_repetitions=3),
    "paper": dict(prompt=(1, 2048), prompt_repetitions=50, generation=(64, 128), generation_repetitions=10),
}
LIMITS = (4, 16, 64, 256)
_DEVICE = "auto, cpu, cuda:0 …"


def measure(run: Run, curves: Curves, busy: bool) -> None:
    """Draw the two forms that fill the panels."""
    if _only_shows():
        return
    left, right = st.columns(2, gap="large")
    with left:
        _evaluate(run, curves, busy)
    with right:
        _benchmark(run, curves, busy)


def _evaluate(run: Run, curves: Curves, busy: bool) -> None:
    st.markdown("##### Perplexity and accuracy")
    texts = texts_control(run, "evaluate-texts")
    tasks = st.multiselect(
        "Tasks", TASKS, key="evaluate-tasks", accept_new_options=True, placeholder="None",
        help="Tasks of lm-eval by name; type any other. Needs `sleb[tasks]` on the server.", persist_state="session",
    )  # fmt: skip
    left, right = st.columns(2)
    limit = limit_control(left, "evaluate-limit")
    lists = lists_control(right, run, curves, "evaluate-lists")
    with st.popover("More", icon=":material/tune:", type="tertiary"):
        settings = _protocol()
        shots = st.number_input(
            "Few-shot examples", 0, 100, None, key="evaluate-shots", placeholder="as the task sets it",
            persist_state="session",
        )  # fmt: skip
        device = st.text_input("Device", "auto", key="evaluate-device", help=_DEVICE, persist_state="session")
    nothing = not texts and not tasks
    if st.button(
        "Evaluate", icon=":material/play_arrow:", type="primary", disabled=busy or nothing,
        help="Starts a process of its own: you may leave this page. Known results are not measured again.",
    ):  # fmt: skip
        ask = dict(settings, texts=named(texts, known_files(run)), tasks=tuple(tasks), shots=shots, limit=limit)
        _go(run, EvaluateSpec, lists, ask, device)


def _benchmark(run: Run, curves: Curves, busy: bool) -> None:
    st.markdown("##### Speed and memory")
    shape = st.segmented_control(
        "Extent", list(SHAPES), required=True, default="small", key="benchmark-shape",
        format_func=lambda each: {"small": "Short, for a CPU", "paper": "As in the paper, for a GPU"}[each],
        help="Short: a prompt of 256 tokens and 32 generated tokens, a few times. As in the paper: a prompt of 2048 "
        "tokens 50 times, and 64 sequences of 128 tokens 10 times (Appendix B.5).", persist_state="session", wrap=True,
    )  # fmt: skip
    shapes = st.segmented_control(
        "Measure", ["prompt", "generation"], selection_mode="multi", default=["prompt", "generation"],
        format_func=lambda each: {"prompt": "Reading a prompt", "generation": "Generating"}[each],
        key="benchmark-what", persist_state="session", wrap=True,
        help="The baseline and the smaller model, its blocks really removed, are timed alternately on the same input.",
    )  # fmt: skip
    left, right = st.columns(2)
    lists = lists_control(left, run, curves, "benchmark-lists")
    device = right.text_input("Device", "auto", key="benchmark-device", help=_DEVICE, persist_state="session")
    if st.button(
        "Time it", icon=":material/timer:", type="primary", disabled=busy or not shapes,
        help="Starts a process of its own. Other work on the machine disturbs the measurement.",
    ):  # fmt: skip
        ask = SHAPES[shape] | {each: None for each in ("prompt", "generation") if each not in shapes}
        _go(run, BenchmarkSpec, lists, ask, device)


def generate(run: Run, blocks: RemovalList, busy: bool) -> None:
    """Draw the form that continues a prompt with both models."""
    if _only_shows():
        return
    prompt = st.text_area(
        "Prompt", "The capital of France is", key="prompt", height=90, max_chars=20_000, persist_state="session",
        help="Text that both models continue, greedily.",
    )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        tokens = st.number_input(
            "Tokens", 1, 4096, 32, key="prompt-tokens", width=130, persist_state="session", help="Tokens to generate."
        )
        chat = st.toggle(
            "As a chat", key="prompt-chat", persist_state="session",
            help="Puts the prompt as a user message into the model's chat template.",
        )  # fmt: skip
        if st.button(
            "Generate", icon=":material/play_arrow:", type="primary", disabled=busy or not blocks or not prompt,
            help="Starts a process of its own, which loads the model and continues the prompt with and without the "
            "blocks.",
        ):  # fmt: skip
            _go(run, GenerateSpec, (blocks,), dict(prompt=prompt, tokens=tokens, chat=chat))


def quantize(run: Run, blocks: RemovalList, busy: bool) -> None:
    """Draw the form that measures quantised weights."""
    if _only_shows():
        return
    schemes = st.segmented_control(
        "Weights as", ["int8", "int4"], selection_mode="multi", default=["int8"], key="quantize-schemes",
        persist_state="session", help="Weight-only quantisation by torchao, of the baseline and of the smaller model.",
    )  # fmt: skip
    texts = texts_control(run, "quantize-texts")
    left, right = st.columns(2)
    limit = limit_control(left, "quantize-limit")
    group = right.number_input(
        "Weights that share a scale", 16, 4096, 128, 16, key="quantize-group", disabled="int4" not in schemes,
        persist_state="session", help="Group size of int4.",
    )  # fmt: skip
    if st.button(
        "Quantise", icon=":material/compress:", type="primary", disabled=busy or not texts or not schemes,
        help="Measures only. To write the model, use `sleb quantize` on the command line.",
    ):  # fmt: skip
        ask = dict(schemes=tuple(schemes), group_size=group, texts=named(texts, known_files(run)), limit=limit)
        _go(run, QuantizeSpec, (blocks,), ask)


def heal(run: Run, blocks: RemovalList, busy: bool) -> None:
    """Draw the form that heals the list, and measures before and after."""
    if _only_shows():
        return
    method = st.segmented_control(
        "Method", ["lora", "linear", "both"], required=True, default="lora", key="heal-how", persist_state="session",
        format_func=lambda each: {"lora": "LoRA", "linear": "Least-squares refit", "both": "Both"}[each],
        help="LoRA trains low-rank adapters. A least-squares refit solves for the last linear layer before each cut, "
        "without training. Both: the refit, then LoRA.",
    )  # fmt: skip
    source = st.text_input(
        "Text to heal on", run.spec.calibration.source, key=f"heal-source-{run.run_id}",
        help="As the calibration text of a search: wikitext2, c4, demo, or a file on the server."
        + plain(access.explained()),
    )  # fmt: skip
    first, second, third = st.columns(3)
    sequences = first.number_input("Sequences", 1, 1_000_000, 32, key="heal-sequences", persist_state="session")
    length = second.number_input("Tokens each", 8, 100_000, 128, key="heal-length", persist_state="session")
    rank = third.number_input(
        "Rank",
        1,
        1024,
        8,
        key="heal-rank",
        disabled=method == "linear",
        persist_state="session",
        help="Rank of the adapters.",
    )
    left, right = st.columns([2, 1])
    with left:
        texts = texts_control(run, "heal-texts", "Measured on")
    limit = limit_control(right, "heal-limit")
    if st.button(
        "Heal", icon=":material/healing:", type="primary", disabled=busy or not texts or not source.strip(),
        help="Measures only. To write the model, use `sleb heal` on the command line.",
    ):  # fmt: skip
        ask = dict(
            how=method, source=specs.absolute(source.strip()), sequences=sequences, sequence_length=length, rank=rank,
            texts=named(texts, known_files(run)), limit=limit,
        )  # fmt: skip
        _go(run, HealSpec, (blocks,), ask)


def _only_shows() -> bool:
    """Whether the server shows runs only, with a caption in the place of the form."""
    shows_only = access.rule().read_only
    if shows_only:
        st.caption(plain(access.SHOWS_ONLY))
    return shows_only


def _how_much(limit: int) -> str:
    if not limit:
        return "everything"
    return f"{limit} {'windows or questions' if limit > 1 else 'window or question'} ≈"


def which(run: Run, curves: Curves, findings: Sequence[Finding], key: str, proposed: int | None) -> RemovalList:
    """Draw the choice of one of the run's lists: at first the newest in `findings`, or the proposed one."""
    numbers = [each for each in curves.lists if each] or [0]
    known = [len(each.removal_list) for each in findings if each.removal_list in curves.lists.values()]
    first = next((each for each in (*reversed(known), proposed) if each in numbers), numbers[-1])
    if st.session_state.get(key) not in (None, *numbers):  # of another run
        del st.session_state[key]
    chosen = st.selectbox(
        "List", numbers, index=numbers.index(first), key=key, persist_state="session",
        format_func=lambda each: f"{each} removed: {', '.join(map(str, in_order_of_removal(run, curves, each)))}",
        help="The removal list of the run after so many removals.",
    )  # fmt: skip
    return curves.lists[chosen]


def texts_control(run: Run, key: str, label: str = "Texts") -> list[str]:
    """Draw the choice of texts; files that were measured before are offered again."""
    known = {name: name for name in NAMED_TEXTS} | known_files(run)
    last = [each for job in run.jobs if job.ask and job.ask.kind != "benchmark" for each in _texts_of(job.ask)]
    return st.multiselect(
        label, list(known), [short(last[-1])] if last else ["wikitext2"], key=f"{key}-{run.run_id}",
        accept_new_options=True, placeholder="None",
        help="wikitext2 and c4 by their published protocols, or the path of a file on the server: .raw is read as "
        "WikiText rows, .jsonl and .parquet (FILE:COLUMN) as documents, any other as one text."
        + plain(access.explained()),
    )  # fmt: skip


def limit_control(place: Any, key: str, first: int | None = 4) -> int | None:
    """Draw the choice of how much of each text and task is measured; None is everything."""
    choices = sorted({*LIMITS, *([first] if first else [])})
    chosen = place.selectbox(
        "How much of each", [*choices, 0], ([*choices, 0]).index(first or 0), key=key, persist_state="session",
        format_func=_how_much,
        help="Evenly spread windows of each text, and questions of each task: a part gives an estimate, marked ≈. "
        "Measure everything for numbers to report.",
    )  # fmt: skip
    return int(chosen) or None


def lists_control(place: Any, run: Run, curves: Curves, key: str) -> list[RemovalList]:
    """Draw the choice of every list or one of them."""
    numbers = [each for each in curves.lists if each]
    every = f"every number, {numbers[0]} to {numbers[-1]}" if numbers else "none"
    chosen = place.selectbox(
        "Blocks removed", numbers if len(numbers) == 1 else [0, *numbers], key=f"{key}-{run.run_id}",
        format_func=lambda each: f"{each} removed" if each else every,
        help="The baseline is measured as well.",
    )  # fmt: skip
    return [curves.lists[each] for each in ([chosen] if chosen else numbers)]


def _protocol() -> dict[str, Any]:
    window = st.number_input(
        "Tokens per window", 2, 1_000_000, 2048, key="evaluate-window", help="Published perplexities use 2048.",
        persist_state="session",
    )  # fmt: skip
    bos = st.selectbox(
        "BOS token", ["no", "yes", "auto"], key="evaluate-bos", persist_state="session",
        help="At the start of every window: the published protocols have none, but some models need it.",
    )  # fmt: skip
    return dict(window=int(window or 2048), bos=bos)


def known_files(*runs: Run) -> dict[str, str]:
    """Paths of texts that earlier jobs measured, by file name: findings keep the name only."""
    names = [each for run in runs for job in run.jobs if job.ask for each in _texts_of(job.ask)]
    return {short(each): each for each in names if short(each) not in NAMED_TEXTS}


def named(texts: Sequence[str], known: dict[str, str]) -> tuple[str, ...]:
    """Texts as a job takes them: files by the full path in `known`."""
    return tuple(request.text_name(known.get(each, each.strip())) for each in texts)


def _texts_of(ask: Any) -> tuple[str, ...]:
    return getattr(ask, "texts", ())


def short(name: str) -> str:
    """The name of a file without its folder."""
    return re.split(r"[\\/]", name)[-1]


def _go(run: Run, record: type[Any], lists: Sequence[RemovalList], ask: dict[str, Any], device: str = "auto") -> None:
    """Start a job, and draw the page again with its progress."""
    if job_panel.start(run, record, lists, device=device, **ask):
        choose(run.run_id)
        st.rerun()
    if foreign_names.is_asked():
        st.rerun()
