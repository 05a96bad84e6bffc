"""Perplexity of removal lists on a text, by the published protocols. Knows texts and the sweep; knows no run.

WikiText-2: the rows of the test split joined by blank lines, no special tokens, windows of 2048 tokens, the rest
dropped. C4: the first 1100 documents of the first validation shard joined by spaces, at most 256 windows, as in the
reference (and in SparseGPT's evaluation, where it comes from).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from sleb.errors import CalibrationError, quoted
from sleb.methods.statistics import mean_and_error
from sleb.model import demo
from sleb.records import NAMED_TEXTS, EvaluatedText, RemovalList
from sleb.scoring.scorer import Scorer
from sleb.text import text_files
from sleb.text.calibration import SEPARATOR, WIKITEXT, bos_of, cut, token_ids
from sleb.text.hub_data import load_dataset
from sleb.text.repetition import count_distinct
from sleb.text.text_files import Wanted

log = logging.getLogger(__name__)

_C4 = ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256
_ROUNDS_AT_ONCE = 4  # sweeps between two writings of what was scored


@dataclass(frozen=True, eq=False)
class Windows:
    """A text, cut into windows."""

    ids: np.ndarray  # (windows, window) int64
    text: EvaluatedText

    @property
    def token_counts(self) -> np.ndarray:
        """Predicted tokens of each window, int64 (windows,): all but the first."""
        return np.full(len(self.ids), self.ids.shape[1] - 1, dtype=np.int64)


def require_there(names: Sequence[str]) -> None:
    """Require that files exist, before a model is loaded. Raises `CalibrationError`."""
    for name in names:
        if name not in NAMED_TEXTS:
            _local(name)


def windows(
    name: str,
    tokenizer: Any,
    vocab_size: int,
    *,
    window: int = 2048,
    bos: Literal["auto", "yes", "no"] = "no",
    limit: int | None = None,
) -> Windows:
    """A text by its published protocol, or a file, cut into windows of so many tokens.

    `.raw` files are WikiText's rows, `.jsonl` and `.parquet` files are documents joined by spaces (of a column named
    after a colon), any other file is one text. `limit` takes so many windows, evenly spread.

    Raises `CalibrationError` where the text cannot be read or gives no window.
    """
    text, origin, most = _text(name)
    origin = " ".join(origin.split())  # a file's name may have line ends in it
    head = bos_of(bos, tokenizer, vocab_size)
    ids = cut(token_ids([text], tokenizer, vocab_size, origin), window, head)[:most]
    if not len(ids):
        raise CalibrationError(f"{origin} gives no window of {window} tokens. Lower `window`, or give a longer text.")
    whole = len(ids)
    if limit is not None and limit < whole:
        ids = ids[np.linspace(0, whole - 1, limit).round().astype(int)]
    ids = np.ascontiguousarray(ids)
    counted = f"{whole:,} windows of {window} tokens"
    some = f"{len(ids)} of {counted}, evenly spread" if len(ids) < whole else counted
    distinct = count_distinct(ids)  # a protocol says which windows: those that repeat others stay
    if distinct < len(ids):
        some += f", {distinct:,} of them distinct"
    return Windows(
        ids,
        EvaluatedText(
            name=name if name in NAMED_TEXTS else Path(name).name,
            description=f"{origin}: {some}" + (", BOS at the head of each" if head is not None else ""),
            tokens_hash=xxhash.xxh3_128_hexdigest(ids.tobytes()),
            windows=len(ids),
            of_windows=whole,
            window=window,
            bos=head is not None,
        ),
    )


def score(
    scorer: Scorer,
    lists: Sequence[RemovalList],
    known: dict[RemovalList, np.ndarray] | None = None,
    save: Callable[[dict[RemovalList, np.ndarray]], None] = lambda nats: None,
) -> dict[RemovalList, np.ndarray]:
    """Nats of each list on every window of the scorer: float64 (windows,), in one sweep for all lists.

    `known` are rows from before, NaN where a window is missing; `save` is called with the rows every few sweeps.
    """
    count = len(scorer.ids)
    nats = {each: np.full(count, np.nan) for each in lists}
    for each, row in (known or {}).items():
        if each in nats and len(row) == count:
            nats[each] = row.copy()
    ahead = [each for each in nats if np.isnan(nats[each]).any()]
    size = max(1, scorer.round_size(ahead or [()])) * _ROUNDS_AT_ONCE
    for start in range(0, count, size):
        part = np.arange(start, min(start + size, count))
        missing = [each for each in ahead if np.isnan(nats[each][part]).any()]
        if not missing:
            continue
        for each, row in zip(missing, scorer.score(missing, part), strict=True):
            nats[each][part] = np.where(np.isfinite(row), row, np.inf)  # not a number: scored, and worse than any
        save(nats)
    return nats


def rise(nats: np.ndarray, baseline: np.ndarray, token_counts: np.ndarray) -> tuple[float | None, float | None]:
    """Mean paired difference to the baseline per token, in nats, and its standard error over the windows."""
    if not (np.isfinite(nats).all() and np.isfinite(baseline).all()):
        return None, None
    mean, error = mean_and_error(nats - baseline, token_counts)
    return float(mean), float(error) if np.isfinite(error) else None


def _text(name: str) -> tuple[str, str, int | None]:
    """A text, a name for where it came from, and how many windows of it count."""
    if name == "wikitext2":
        return "\n\n".join(load_dataset(*WIKITEXT, split="test")[:]["text"]), "WikiText-2 raw, test", None
    if name == "c4":
        data = load_dataset(_C4[0], data_files={"validation": _C4[1]}, split="validation", streaming=True)
        documents = [str(row["text"]) for row in data.take(_C4_DOCUMENTS)]
        return " ".join(documents), "C4, validation (first shard)", _C4_WINDOWS
    if name == "demo":
        return SEPARATOR.join(demo.documents()), "the demo text (Wikipedia sample)", None
    path, column = _local(name)
    text = " ".join(each.content for each in text_files.documents(path, Wanted(column)))
    kind = path.suffix.lower()
    if kind == ".raw":
        lines = text.removesuffix("\n").split("\n")
        return (
            "\n\n".join(line + "\n" if line.strip() else "" for line in lines),
            f"{path.name}, as WikiText rows",
            None,
        )
    return text, f"{path.name}, as documents" if kind in text_files.TABLES else path.name, None


def _local(name: str) -> tuple[Path, str | None]:
    local = text_files.local(name)
    if local is None:
        raise CalibrationError(f"No text is called {quoted(name)}; give {', '.join(NAMED_TEXTS)}, or a file.")
    return local
