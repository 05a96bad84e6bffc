"""Windows of token ids from a text. Knows data sets, files and tokenizers; knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import xxhash

from sleb.errors import CalibrationError, WorkEnded
from sleb.model import demo
from sleb.records import CalibrationSpec, default_held_out
from sleb.text import chat_template, text_files
from sleb.text.hub_data import hub_parts, load_dataset
from sleb.text.repetition import count_distinct, count_sharing, distinct_first
from sleb.text.text_files import Document, Wanted

RESERVED = ("demo", "wikitext2", "c4", "wikitext2-rows")
"""Sources by name, even where a file has that name."""
DRAWING = 2
"""Version of the way a text is drawn; raised by hand, and kept with a run so that it finds its text again. In version 1
equal windows could be drawn, messages had nothing but role and content, templates wrote today's date, and a byte-order
mark was text."""
SEPARATOR = "\n\n"
_STREAMED_CHARACTERS = 8_000_000
"""The least text that is drawn from a data set too large to be tokenised whole."""
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
_DAY = datetime(2024, 7, 26)  # in templates that write the date; tomorrow a run must find the same text (Llama 3's own)


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids: the first `sequences` choose, the others are held out."""

    ids: np.ndarray  # (sequences + held_out, sequence_length) int64
    sequences: int
    bos: bool
    text: str
    """The origin of the text and its amount, in words."""
    warnings: tuple[str, ...] = ()
    """Reasons why it is a worse judge than it seems, one sentence each."""

    @property
    def held_out(self) -> int:
        """Sequences that take no part in any choice."""
        return len(self.ids) - self.sequences

    @property
    def tokens_hash(self) -> str:
        """Hash of the token ids in their order."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.ids).tobytes())


def require_there(spec: CalibrationSpec) -> None:
    """Raises `CalibrationError` for a local file that is missing, before minutes of loading a model."""
    if spec.source not in RESERVED:
        text_files.local(spec.source)


def build(
    spec: CalibrationSpec,
    held_out: int | None,
    seed: int,
    tokenizer: Any,
    vocab_size: int,
    *,
    drawing: int = DRAWING,
) -> CalibrationSet:
    """Read, tokenise whole, cut into windows, draw. Raises `CalibrationError` where the text cannot give them.

    A window has `sequence_length` tokens, of which the first is BOS where the tokenizer adds one by default. No two
    windows are equal, so that none that is held out is one that chose. `drawing` is `DRAWING`, or that of an earlier
    run whose text is wanted again.
    """
    bos = bos_of(spec.bos, tokenizer, vocab_size)
    if spec.chat and spec.source in RESERVED:
        raise CalibrationError(f"`chat` needs a column of conversations, and {spec.source} is text. Leave `chat` out.")
    if spec.source == "wikitext2-rows":
        return _rows(spec, held_out, seed, tokenizer, vocab_size, bos, drawing)
    held = default_held_out(spec.sequences) if held_out is None else held_out
    wanted = spec.sequences + held
    needed = max(_STREAMED_CHARACTERS, 8 * wanted * spec.sequence_length)
    while True:
        source = _documents(spec, needed, seed, drawing)
        texts, remark = _rendered(source.documents, spec, tokenizer, drawing)
        parts = texts if spec.chat and drawing >= 2 else [SEPARATOR.join(texts)]
        ids = token_ids(parts, tokenizer, vocab_size, source.origin)
        windows = cut(ids, spec.sequence_length, bos, twice=drawing < 2)
        order = np.random.default_rng(seed).permutation(len(windows)) if spec.sampling == "random" else None
        chosen, distinct = distinct_first(windows, order, all_of_them=drawing < 2)
        if len(chosen) >= wanted or source.is_whole or needed > text_files.MOST_CHARACTERS or drawing < 2:
            break
        needed *= 4  # what there is repeats itself; there is more
    some = f", {distinct:,} of them distinct" if distinct < len(windows) else ""
    if len(chosen) < wanted:
        more = ", or give more text" if some else ""
        raise CalibrationError(
            f"Calibration asks for {spec.sequences} sequences of {spec.sequence_length} tokens and {held} held out; "
            f"{source.origin} gives {len(windows)}{some}. Lower `sequences`, `held_out` or `sequence_length`{more}."
        )
    ids = windows[chosen[:wanted]]
    joined = "one document" if len(texts) == 1 else f"{len(texts):,} documents"
    doubts = [remark] if remark else []
    if drawing >= 2 and (shared := count_sharing(ids[spec.sequences :], ids[: spec.sequences])):
        doubts.append(f"{shared:,} of {held:,} held-out windows repeat half a window of those that choose")
    counted = f"{source.origin}: {joined}, {len(windows):,} windows of {spec.sequence_length} tokens{some}"
    text = "; ".join([counted, *doubts])
    warnings = tuple(f"{source.origin}: {each}." for each in doubts)
    return CalibrationSet(ids, spec.sequences, bos is not None, text, warnings)


def _rows(
    spec: CalibrationSpec,
    held_out: int | None,
    seed: int,
    tokenizer: Any,
    vocab_size: int,
    bos: int | None,
    drawing: int,
) -> CalibrationSet:
    """The reference's loader: `sequences` shuffled rows (many empty) joined, every whole window used.

    Held-out windows come from the rows that follow in the same shuffle.
    """
    data = load_dataset(*WIKITEXT, split="train").shuffle(seed=seed)
    rows = [str(row) for row in data[:]["text"]]
    origin = f"{spec.sequences} shuffled rows of WikiText-2 raw"

    def windows_of(rows: list[str]) -> np.ndarray:
        return cut(token_ids([SEPARATOR.join(rows)], tokenizer, vocab_size, origin), spec.sequence_length, bos)

    calibration = windows_of(rows[: spec.sequences])
    if not len(calibration):
        raise CalibrationError(
            f"{origin} give less than one window of {spec.sequence_length} tokens. Raise `sequences` (rows) or lower "
            "`sequence_length`."
        )
    held = default_held_out(len(calibration)) if held_out is None else held_out
    rest = windows_of(rows[spec.sequences :])
    if drawing >= 2:
        both = np.concatenate([calibration, rest])
        first, _ = distinct_first(both, None, all_of_them=False)
        rest = both[first[first >= len(calibration)]]
    distinct = count_distinct(calibration)
    some = f", {distinct:,} of them distinct" if distinct < len(calibration) else ""
    text = f"{origin}: {len(calibration)} windows of {spec.sequence_length} tokens{some}, as in the reference's loader"
    return CalibrationSet(np.concatenate([calibration, rest[:held]]), len(calibration), bos is not None, text)


def bos_of(choice: str, tokenizer: Any, vocab_size: int) -> int | None:
    """The BOS id that begins every window, or None. Raises `CalibrationError`."""
    token = tokenizer.bos_token_id
    if choice == "no":
        return None
    if token is not None and token >= vocab_size:
        raise CalibrationError(
            f"The tokenizer's BOS token is {token}, and the model knows {vocab_size} tokens. "
            "Use `bos=no`, or its own tokenizer."
        )
    if choice == "yes":
        if token is None:
            raise CalibrationError("`bos=yes`: this tokenizer has no BOS token. Use `bos=auto` or `bos=no`.")
        return int(token)
    habit = tokenizer("a").input_ids
    return int(token) if token is not None and len(habit) > 1 and habit[0] == token else None


def token_ids(texts: Sequence[str], tokenizer: Any, vocab_size: int, origin: str) -> np.ndarray:
    """Each text tokenised whole, without special tokens of the tokenizer's own, one behind another; int64 (tokens,)."""
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{origin} is empty; give a text with some words in it.")
    whole = [text.encode("utf-8", "replace").decode() for text in texts]  # a lone surrogate is not a character
    parts = tokenizer(whole, add_special_tokens=False, verbose=False).input_ids
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    if len(ids) and int(ids.max()) >= vocab_size:
        raise CalibrationError(
            f"The tokenizer gives the token id {int(ids.max())}, and the model knows {vocab_size}: they do not belong "
            "together. Save the model's own tokenizer beside it."
        )
    return ids


def cut(ids: np.ndarray, length: int, bos: int | None, *, twice: bool = False) -> np.ndarray:
    """Non-overlapping windows (count, length) int64 of the tokens, BOS at the head of each; the rest is dropped.

    Where the text itself has BOS at that place, as a chat template writes it, it is not put there `twice`.
    """
    size = length - (bos is not None)
    if bos is None or twice or not (ids == bos).any():
        windows = ids[: len(ids) // size * size].reshape(-1, size)
        if bos is not None:
            windows = np.concatenate([np.full((len(windows), 1), bos, dtype=np.int64), windows], axis=1)
        return windows
    windows_with_bos = []
    at = 0
    while at < len(ids):
        own = ids[at] == bos
        window = ids[at : at + length] if own else np.concatenate([[bos], ids[at : at + size]])
        at += length if own else size
        if len(window) == length:
            windows_with_bos.append(window)
    return np.stack(windows_with_bos) if windows_with_bos else np.empty((0, length), dtype=np.int64)


@dataclass(frozen=True)
class _Source:
    """Documents, and a name for where they came from."""

    documents: list[Document]
    origin: str
    is_whole: bool
    """Whether the documents are all that the source has."""


def _documents(spec: CalibrationSpec, needed: int, seed: int, drawing: int) -> _Source:
    source = spec.source
    if source in ("demo", "wikitext2"):
        if source == "demo":
            texts, origin = demo.documents(), "the demo text (Wikipedia sample)"
        else:
            texts, origin = list(load_dataset(*WIKITEXT, split="train")[:]["text"]), "WikiText-2 raw, train"
        return _Source([Document(each, origin, {}) for each in texts], origin, is_whole=True)
    order = seed if spec.sampling == "random" else None
    wanted = Wanted(None, spec.chat, needed, order, keep_marks=drawing < 2)
    if source == "c4":
        data = load_dataset(_C4[0], data_files={"train": _C4[1]}, split="train", streaming=True)
        return _drawn(data, replace(wanted, column="text"), "C4, train", "C4, train (first shard)")
    local = text_files.local(source)
    if local is None:
        name, config, split, column = hub_parts(source)
        data = load_dataset(name, *([config] if config else []), split=split or "train", streaming=True)
        return _drawn(data, replace(wanted, column=column), source, source)
    path, column = local
    documents = text_files.documents(path, replace(wanted, column=column))
    is_table = path.suffix.lower() in text_files.TABLES
    return _Source(documents, path.name, is_whole=_is_whole(documents, needed) or not is_table)


def _drawn(data: Iterable[Any], wanted: Wanted, name: str, origin: str) -> _Source:
    rows = text_files.drawn(map(text_files.table_row, data), wanted, name, f"Row {{}} of {name}")
    return _Source(rows, origin, is_whole=_is_whole(rows, wanted.characters))


def _is_whole(documents: list[Document], needed: int | None) -> bool:
    return needed is None or sum(each.size for each in documents) < needed


def _rendered(documents: list[Document], spec: CalibrationSpec, tokenizer: Any, drawing: int) -> tuple[list[str], str]:
    """Documents as text, and a remark about it: conversations go through the tokenizer's chat template."""
    if not spec.chat:
        return [each.content for each in documents], ""
    if not tokenizer.chat_template:
        raise CalibrationError("`chat`: this model's tokenizer has no chat template. Leave `chat` out.")
    conversations = []
    for each in documents:
        try:
            conversations.append(
                chat_template.conversation(each.content, each.beside)
                if drawing >= 2
                else chat_template.Conversation([_turn(turn) for turn in each.content])
            )
        except WorkEnded as error:
            raise CalibrationError(f"`chat`: {each.where} cannot be read as a conversation: {error}.") from error
    try:
        rendering = chat_template.rendered(tokenizer, conversations, day=_DAY if drawing >= 2 else None)
    except chat_template.RefusedConversation as error:
        where = documents[error.index].where
        raise CalibrationError(f"`chat`: the tokenizer's chat template refuses {where} ({error}).") from error
    except WorkEnded as error:
        raise CalibrationError(f"`chat`: the tokenizer's chat template refuses a conversation ({error}).") from error
    if not rendering.without_tools:
        return rendering.texts, ""
    some = f"{rendering.without_tools:,} of {len(documents):,} conversations"
    return rendering.texts, f"the chat template leaves out the tools or calls of {some}"


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """A message as drawing 1 gave it to the template: a role and a text, whatever else it said."""
    if "role" in turn and "content" in turn:
        return {"role": str(turn["role"]), "content": str(turn["content"])}
    if "from" in turn and "value" in turn:
        roles = {"human": "user", "gpt": "assistant"}
        return {"role": roles.get(str(turn["from"]), str(turn["from"])), "content": str(turn["value"])}
    raise WorkEnded("a message has no role and content")
