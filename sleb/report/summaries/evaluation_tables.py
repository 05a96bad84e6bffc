"""What was measured of lists -> tables: two searches on all texts, quantisation, healing. Draws nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from sleb.formats.findings_tables import NO_NUMBER, scheme_of
from sleb.records import EvaluatedText, Finding, Healing, Measured, Quantization, RemovalList, TextPerplexity
from sleb.report.summaries.numbers import as_bytes, minus, rise
from sleb.runtime.findings_folder import of_kind
from sleb.runtime.processes.progress import duration


@dataclass(frozen=True)
class Side:
    """One of two searches on different texts."""

    text: str
    """The text on which its blocks were chosen, as the page names it."""
    source: str
    """The text, as the search was given it."""
    removal_list: RemovalList
    """Blocks in the order of the stack."""
    findings: Sequence[Finding]


def texts_of(sides: Sequence[Side]) -> list[EvaluatedText]:
    """Texts on which a list of either was measured."""
    texts = [
        each.text
        for side in sides
        for each in of_kind(side.findings, TextPerplexity)
        if each.removal_list == side.removal_list
    ]
    return list(dict.fromkeys(texts))


def rivals_table(sides: Sequence[Side], texts: Sequence[EvaluatedText], plain: Callable[[object], str]) -> pd.DataFrame:
    """Lists against texts, as Markdown: perplexity, its rise with the standard error, the better one bold.

    `plain` escapes names from outside.
    """
    known = [
        {each.text: each for each in of_kind(side.findings, TextPerplexity) if each.removal_list == side.removal_list}
        for side in sides
    ]
    first = {
        each.text: each for side in sides for each in of_kind(side.findings, TextPerplexity) if not each.removal_list
    }
    columns: dict[str, list[str]] = {"Blocks chosen on": ["none (baseline)", *(plain(side.text) for side in sides)]}
    columns["Removed"] = ["–", *(", ".join(map(str, side.removal_list)) for side in sides)]
    for text in texts:
        own = [each.get(text) for each in known]
        better = _better(own)
        cells = [_cell(first.get(text), False, False)]
        cells += [_cell(each, each is better, _is_own(side, text)) for each, side in zip(own, sides, strict=True)]
        name = plain(text.name) + ("" if text.is_whole else f" ≈ {text.windows} of {text.of_windows}")
        while name in columns:  # the same file, cut otherwise
            name += f", {text.window} tokens" if text.window != 2048 else "\N{ZERO WIDTH SPACE}"
        columns[name] = cells
    return pd.DataFrame(columns).set_index("Blocks chosen on")


def _better(pair: Sequence[TextPerplexity | None]) -> TextPerplexity | None:
    """The one with the lower rise, where they differ by more than both standard errors together."""
    if len(pair) != 2 or any(each is None or each.rise is None for each in pair):
        return None
    low, high = sorted((each for each in pair if each is not None), key=lambda each: each.rise or 0.0)
    difference = (high.rise or 0.0) - (low.rise or 0.0)
    return low if difference > math.hypot(low.rise_standard_error or 0.0, high.rise_standard_error or 0.0) else None


def _cell(answer: TextPerplexity | None, better: bool, own: bool) -> str:
    if answer is None:
        return "not measured"
    value = answer.measured.perplexity
    text = NO_NUMBER if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"
    text = f"**{text}**" if better else text
    if answer.rise is not None:
        text += f" ({rise(answer.rise, answer.rise_standard_error)})"
    return text + (", *its own text*" if own else "")


def _is_own(side: Side, text: EvaluatedText) -> bool:
    """Whether the blocks were chosen on this kind of text."""
    return re.split(r"[\\/]", side.source)[-1].removesuffix("-rows") == text.name


def quantization_table(answers: Sequence[Quantization]) -> pd.DataFrame:
    """One row a scheme, list and text, the newest answers last."""
    return pd.DataFrame(
        [
            {
                "Removed": len(each.removal_list),
                "Scheme": scheme_of(each),
                "Text": each.text.name + ("" if each.text.is_whole else " ≈"),
                "Before": each.before.perplexity,
                "Quantised": each.measured.perplexity,
                "Rise": _rise(each),
                "Weights": f"{as_bytes(each.weight_bytes_before)} → {as_bytes(each.weight_bytes)}",
                "Blocks removed": ", ".join(map(str, each.removal_list)) or "none",
                "By": each.library,
            }
            for each in sorted(answers, key=lambda each: (len(each.removal_list), each.scheme, each.text.name))
        ]
    )


def healing_table(answers: Sequence[Healing]) -> pd.DataFrame:
    """One row a healing and text: perplexity of the baseline, without the blocks, and healed."""
    names = {"lora": "LoRA", "linear": "least-squares refit", "both": "refit, then LoRA"}
    return pd.DataFrame(
        [
            {
                "Removed": len(each.removal_list),
                "Method": names.get(each.ask.how, each.ask.how)
                + (f", rank {each.ask.rank}" if each.ask.how != "linear" else ""),
                "Text": each.text.name + ("" if each.text.is_whole else " ≈"),
                "Baseline": each.baseline.perplexity,
                "Before": each.before.perplexity,
                "Healed": each.after.perplexity,
                "Change, nats": ""
                if each.change is None
                else minus(f"{each.change:+.4f}")
                + ("" if each.change_standard_error is None else f" ± {each.change_standard_error:.4f}"),
                "Loss": list(each.losses) or None,
                "Trained on": f"{each.trained_tokens:,} tokens of {re.split(r'[/]', each.ask.source)[-1]}",
                "Took": duration(each.seconds),
                "Blocks removed": ", ".join(map(str, each.removal_list)),
            }
            for each in sorted(answers, key=lambda each: (len(each.removal_list), each.finished))
        ]
    )


def _rise(answer: Quantization) -> str:
    """The rise in per cent, with its standard error where there is one."""
    if answer.change is None:
        return _share(answer.before, answer.measured)
    return rise(answer.change, answer.change_standard_error)


def _share(before: Measured, after: Measured) -> str:
    ratio = after.ratio_to(before)
    return "" if ratio is None else minus(f"{ratio - 1:+.1%}")
