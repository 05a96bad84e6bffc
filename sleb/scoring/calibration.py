"""Text -> windows of token ids. Knows data sets, files and tokenizers; knows no model."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sleb import bounded
from sleb.errors import CalibrationError, WorkEnded, excerpt, quoted
from sleb.model import demo
from sleb.records import CalibrationSpec, default_held_out
from sleb.scoring import chat_template

log = logging.getLogger(__name__)

RESERVED = ("demo", "wikitext2", "c4", "wikitext2-rows")
"""Sources by name, whatever files of that name lie around."""
SEPARATOR = "\n\n"
_STREAMED_CHARACTERS = 8_000_000
"""At least so much text is drawn from a data set that is too large to be tokenised whole."""
_BUFFER_DOCUMENTS = 10_000  # of the shuffle of a streamed data set
_BUFFER_BYTES = 1 << 29
_TEXT_BYTES = 1 << 30
_LINE = 64 << 20  # characters
_ROWS_AT_ONCE = 256
_PARQUET_SECONDS, _PARQUET_BYTES = 300.0, 6 << 30
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
_REMOTE, _ARCHIVES = {"hf", "https", "http"}, {"zip", "tar", "gzip", "bz2", "xz", "zstd"}
_CONTENT_KEYS = ("text", "content", "messages", "conversations")


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids: the first `sequences` choose, the others are held out."""

    ids: np.ndarray  # (sequences + held_out, sequence_length) int64
    sequences: int
    bos: bool
    text: str
    """Where the text came from and how much of it there was, in words."""

    @property
    def held_out(self) -> int:
        """Sequences that take no part in any choice."""
        return len(self.ids) - self.sequences

    @property
    def tokens_hash(self) -> str:
        """Equal means the same token ids in the same order."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.ids).tobytes())


def require_there(spec: CalibrationSpec) -> None:
    """A local file that is missing is said before minutes of loading a model. Raises `CalibrationError`."""
    if spec.source not in RESERVED:
        _local(spec.source)


def build(spec: CalibrationSpec, held_out: int | None, seed: int, tokenizer: Any, vocab_size: int) -> CalibrationSet:
    """Read, tokenise whole, cut into windows, draw. Raises `CalibrationError` where the text cannot give them.

    A window has `sequence_length` tokens, of which the first is BOS where the tokenizer's habit is to add one.
    """
    bos = bos_of(spec.bos, tokenizer, vocab_size)
    if spec.source == "wikitext2-rows":
        return _rows(spec, held_out, seed, tokenizer, vocab_size, bos)
    held = default_held_out(spec.sequences) if held_out is None else held_out
    wanted = spec.sequences + held
    documents, origin = _documents(spec, wanted, seed)
    texts = _rendered(documents, spec, tokenizer)
    windows = cut(SEPARATOR.join(texts), spec.sequence_length, tokenizer, vocab_size, bos, origin)
    if len(windows) < wanted:
        raise CalibrationError(
            f"Calibration asks for {spec.sequences} sequences of {spec.sequence_length} tokens and {held} held out; "
            f"{origin} gives {len(windows)}. Lower --sequences, --held-out or --sequence-length."
        )
    if spec.sampling == "random":
        chosen = np.random.default_rng(seed).permutation(len(windows))[:wanted]
    else:
        chosen = np.arange(wanted)
    joined = "one document" if len(texts) == 1 else f"{len(texts):,} documents"
    text = f"{origin}: {joined}, {len(windows):,} windows of {spec.sequence_length} tokens"
    return CalibrationSet(windows[chosen], spec.sequences, bos is not None, text)


def _rows(
    spec: CalibrationSpec, held_out: int | None, seed: int, tokenizer: Any, vocab_size: int, bos: int | None
) -> CalibrationSet:
    """The reference's loader: `sequences` shuffled rows (many empty) joined, every whole window used.

    Held-out windows come from the rows that follow in the same shuffle.
    """
    data = load_dataset(*WIKITEXT, split="train").shuffle(seed=seed)
    rows = [str(row) for row in data[:]["text"]]
    origin = f"{spec.sequences} shuffled rows of WikiText-2 raw"
    calibration = cut(SEPARATOR.join(rows[: spec.sequences]), spec.sequence_length, tokenizer, vocab_size, bos, origin)
    if not len(calibration):
        raise CalibrationError(
            f"{origin} give less than one window of {spec.sequence_length} tokens. Raise --sequences (rows) or lower "
            "--sequence-length."
        )
    held = default_held_out(len(calibration)) if held_out is None else held_out
    rest = cut(SEPARATOR.join(rows[spec.sequences :]), spec.sequence_length, tokenizer, vocab_size, bos, origin)[:held]
    text = f"{origin}: {len(calibration)} windows of {spec.sequence_length} tokens, as in the reference's loader"
    return CalibrationSet(np.concatenate([calibration, rest]), len(calibration), bos is not None, text)


def bos_of(choice: str, tokenizer: Any, vocab_size: int) -> int | None:
    """The id that begins every window, or None."""
    token = tokenizer.bos_token_id
    if choice == "no":
        return None
    if token is not None and token >= vocab_size:
        raise CalibrationError(
            f"The tokenizer's BOS token is {token}, and the model knows {vocab_size} tokens. "
            "Use --bos no, or its own tokenizer."
        )
    if choice == "yes":
        if token is None:
            raise CalibrationError("--bos yes: this tokenizer has no BOS token. Use --bos auto or no.")
        return int(token)
    habit = tokenizer("a").input_ids
    return int(token) if token is not None and len(habit) > 1 and habit[0] == token else None


def cut(text: str, length: int, tokenizer: Any, vocab_size: int, bos: int | None, origin: str) -> np.ndarray:
    """Non-overlapping windows (count, length) int64 of the text tokenised whole; the rest is dropped."""
    if not text.strip():
        raise CalibrationError(f"{origin} is empty; give a text with some words in it.")
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no character
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise CalibrationError(
            f"The tokenizer gives the token id {int(ids.max())}, and the model knows {vocab_size}: they do not belong "
            "together. Save the model's own tokenizer beside it."
        )
    size = length - (bos is not None)
    windows = ids[: len(ids) // size * size].reshape(-1, size)
    if bos is not None:
        windows = np.concatenate([np.full((len(windows), 1), bos, dtype=np.int64), windows], axis=1)
    return windows


def _documents(spec: CalibrationSpec, wanted: int, seed: int) -> tuple[list[Any], str]:
    """Documents (strings, or conversations) and a name for where they came from."""
    source = spec.source
    if source == "demo":
        return demo.documents(), "the demo text (Wikipedia sample)"
    if source == "wikitext2":
        return list(load_dataset(*WIKITEXT, split="train")[:]["text"]), "WikiText-2 raw, train"
    needed = max(_STREAMED_CHARACTERS, 8 * wanted * spec.sequence_length)
    if source == "c4":
        data = load_dataset(_C4[0], data_files={"train": _C4[1]}, split="train", streaming=True)
        return _drawn(data, "text", needed, spec, seed, "C4, train"), "C4, train (first shard)"
    path, column = _local(source)
    if path is not None:
        return _from_file(path, column, spec, needed, seed), path.name
    name, config, split, column = _hub_parts(source)
    data = load_dataset(name, *([config] if config else []), split=split or "train", streaming=True)
    return _drawn(data, column, needed, spec, seed, source), source


def _from_file(path: Path, column: str | None, spec: CalibrationSpec, needed: int, seed: int) -> list[Any]:
    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            rows: Iterable[dict[str, Any]] = _json_lines(path)
        elif kind == ".parquet":
            return _parquet(path, column, spec, needed, seed)
        else:
            if column is not None:
                raise CalibrationError(f"{path} is a text and has no columns; leave out {quoted(column)}.")
            return [read_text(path)]
        return _drawn(rows, column, needed, spec, seed, path.name)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file, whole. Raises `CalibrationError` for one that is too large, else as `Path.read_text` does."""
    size = path.stat().st_size
    if size > _TEXT_BYTES:
        raise CalibrationError(
            f"{path} has {size / 1e9:.1f} GB; a text is read whole, and at most {_TEXT_BYTES / 1e9:.0f} GB of it. "
            "Cut it, or make it a .jsonl file of documents."
        )
    return path.read_text(encoding=encoding)


def _parquet(path: Path, column: str | None, spec: CalibrationSpec, needed: int, seed: int) -> list[Any]:
    """Documents of a table, read where it can be ended: a few bytes of it can hold more than any memory."""
    try:
        found = bounded.call(
            _parquet_documents, path, column, spec, needed, seed,
            seconds=_PARQUET_SECONDS, memory=_PARQUET_BYTES, answer=_BUFFER_BYTES + 8 * needed,
        )  # fmt: skip
    except WorkEnded as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}.") from error
    if isinstance(found, str):
        raise CalibrationError(found)
    return list(found)


def _parquet_documents(
    path: Path, column: str | None, spec: CalibrationSpec, needed: int, seed: int
) -> list[Any] | str:
    """In the child: the documents, or the sentence that says why there are none."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    names = dict.fromkeys(table.schema_arrow.names)
    try:
        wanted = column or _default_column(names, path.name)
        columns = [wanted] if wanted in names else []
        batches = table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False)
        rows = (names | row for batch in batches for row in batch.to_pylist())
        return _drawn(rows, wanted, needed, spec, seed, path.name)
    except CalibrationError as error:
        return str(error)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number in itertools.count(1):
            line = file.readline(_LINE + 1)
            if not line:
                return
            if line.strip():
                yield parse_line(line, f"Line {number} of {path}")


def parse_line(line: str, where: str) -> dict[str, Any]:
    """A line of JSON with columns in it. Raises `CalibrationError`."""
    if len(line) > _LINE:
        raise CalibrationError(f"{where} is longer than {_LINE / 1e6:.0f} MB; make documents of it.")
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise CalibrationError(f"{where} is not JSON (it is nested too deeply).") from error
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON ({excerpt(error)}).") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is no JSON object with columns.")
    return row


def _drawn(
    rows: Iterable[dict[str, Any]],
    column: str | None,
    needed: int,
    spec: CalibrationSpec,
    seed: int,
    origin: str,
) -> list[Any]:
    """Documents until there is text enough: in order, or shuffled with the seed through a buffer."""
    found: list[Any] = []
    characters = 0
    iterator = iter(rows)
    if spec.sampling == "random":
        iterator = _shuffled(iterator, seed)
    for row in iterator:
        column = column or _default_column(row, origin)
        if column not in row:
            raise CalibrationError(
                f"{origin} has no column {quoted(column)}; it has {_columns(row)}. Name one after a colon."
            )
        value = row[column]
        if value is None or value == "" or value == []:
            continue
        if not isinstance(value, str | list):
            raise CalibrationError(
                f"Column {quoted(column)} of {origin} holds {type(value).__name__}, not text. "
                "Name another one after a colon."
            )
        found.append(value)
        characters += len(value) if isinstance(value, str) else sum(len(str(turn)) for turn in value)
        if characters >= needed:
            break
    return found


def _shuffled(rows: Iterator[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    buffer: list[dict[str, Any]] = []
    characters = 0
    for row in itertools.islice(rows, _BUFFER_DOCUMENTS):
        buffer.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str | list))
        if characters > _BUFFER_BYTES:  # of documents that long, fewer
            break
    for row in rows:
        place = draw.randrange(len(buffer))
        buffer[place], row = row, buffer[place]
        yield row
    draw.shuffle(buffer)
    yield from buffer


def _default_column(row: dict[str, Any], origin: str) -> str:
    for name in _CONTENT_KEYS:
        if name in row:
            return name
    raise CalibrationError(f"{origin} has no column 'text'; it has {_columns(row)}. Name one after a colon.")


def _columns(row: dict[str, Any]) -> str:
    return excerpt(", ".join(sorted(map(str, row))[:8])) or "none"


def _rendered(documents: list[Any], spec: CalibrationSpec, tokenizer: Any) -> list[str]:
    """Documents as text: conversations through the tokenizer's chat template where `--chat` asks for it."""
    if not spec.chat:
        if all(isinstance(document, str) for document in documents):
            return documents
        raise CalibrationError("The column holds conversations, not text. Add --chat, or name a text column.")
    for document in documents:
        if not isinstance(document, list) or not all(isinstance(turn, dict) for turn in document):
            raise CalibrationError(
                "--chat needs a column of conversations (a list of messages with role and content); found text. "
                "Name that column after a colon, or leave --chat out."
            )
    if not tokenizer.chat_template:
        raise CalibrationError("--chat: this model's tokenizer has no chat template. Leave --chat out.")
    try:
        return chat_template.rendered(tokenizer, [[_turn(turn) for turn in document] for document in documents])
    except WorkEnded as error:
        raise CalibrationError(f"--chat: the tokenizer's chat template refuses a conversation ({error}).") from error


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    if "role" in turn and "content" in turn:
        return {"role": str(turn["role"]), "content": str(turn["content"])}
    if "from" in turn and "value" in turn:  # the ShareGPT layout
        roles = {"human": "user", "gpt": "assistant"}
        return {"role": roles.get(str(turn["from"]), str(turn["from"])), "content": str(turn["value"])}
    raise CalibrationError(f"A message has the keys {_columns(turn)}; role and content are needed.")


def _local(source: str) -> tuple[Path | None, str | None]:
    """A local file and the column named after it, where the source is one."""
    suffixes = (".txt", ".raw", ".md", ".jsonl", ".parquet")
    for text, column in ((source, None), tuple(source.rpartition(":")[::2])):
        if text and text.lower().endswith(suffixes):
            path = Path(text).expanduser()
            if not path.is_file():
                raise CalibrationError(f"There is no file {path}. Give a {', '.join(suffixes)} file or a data set.")
            return path, column or None
    if Path(source).expanduser().exists():
        raise CalibrationError(f"{source} is none of the files that can be read: {', '.join(suffixes)}.")
    return None, None


def _hub_parts(source: str) -> tuple[str, str | None, str | None, str | None]:
    parts = [part or None for part in source.split(":")]
    if len(parts) > 4 or not parts[0]:
        raise CalibrationError(f"{quoted(source)} is no data set; write name:config:split:column, or a local file.")
    name, config, split, column = (*parts, None, None, None)[:4]
    assert name is not None
    return name, config, split, column


def load_dataset(name: str, *args: Any, split: str, streaming: bool = False, **kwargs: Any) -> Any:
    """The hub's, or the one in its cache; never files of this machine. Raises `CalibrationError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        _require_not_here(name)
        builder = datasets.load_dataset_builder(name, *args, **kwargs)
        _require_remote(name, builder.config.data_files or {})
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = excerpt((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise CalibrationError(
            f"The data set {quoted(name)} could not be loaded ({first}). Check its name and the network, or name a "
            "local .txt or .jsonl file instead, or demo."
        ) from error


def _require_not_here(name: str) -> None:
    """`datasets` prefers a folder of that name to the hub, and `text`, `csv` and others are readers of any files."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise CalibrationError(f"{quoted(name)} is a reader of files, no data set; name the file itself.")
    if os.path.lexists(name):
        raise CalibrationError(
            f"{quoted(name)} lies in the current folder and would be taken for the hub's data set; start elsewhere."
        )


def _require_remote(name: str, files: Mapping[str, Iterable[Any]]) -> None:
    """A data set says itself which files it has, and could name some of this machine."""
    for each in (str(each) for of_split in files.values() for each in of_split):
        *archives, file = (hop.partition("://")[0] if "://" in hop else "" for hop in each.split("::"))
        if file not in _REMOTE or not _ARCHIVES.issuperset(archives):
            raise CalibrationError(
                f"The data set {quoted(name)} has {quoted(each)} of this machine among its files; choose another one."
            )
