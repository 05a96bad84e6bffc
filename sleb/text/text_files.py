"""Local files -> documents, each with the row that it stands in: one reader for all commands. Knows no tokenizer.

A plain text is one document; a `.jsonl` or `.parquet` file has one in each row. All are UTF-8, with or without a
byte-order mark, and read within bounds. A refusal names the row, counted from 1.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb import bounded
from sleb.errors import CalibrationError, WorkEnded, excerpt, quoted
from sleb.runtime.files import expanded

SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".ndjson", ".parquet")
"""Endings of names that mean a file even where it is missing; an existing file of another name is a plain text."""
_LINES = (".jsonl", ".ndjson")
TABLES = (*_LINES, ".parquet")
"""Endings of files with a document in each row."""
_OTHER_FORMATS = {
    ".json": "one JSON value: write one object a line into a .jsonl file",
    ".csv": "a table: make it .jsonl or .parquet",
    ".tsv": "a table: make it .jsonl or .parquet",
    ".arrow": "a table: make it .parquet",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"), "compressed: unpack it first"),
}
MOST_CHARACTERS = 1 << 30
"""The longest text that is read whole."""
_LINE = 64 << 20  # characters
_ROWS_AT_ONCE = 256
_PARQUET_SECONDS, _PARQUET_BYTES = 300.0, 6 << 30
_BUFFER_DOCUMENTS = 10_000  # of the shuffle of rows that are not held whole
_BUFFER_BYTES = 1 << 29
_MARK = "\ufeff"
_TEXTS, _CONVERSATIONS = ("text", "content"), ("messages", "conversations")
_TURN = ("prompt", "completion")
BESIDE = ("tools", "system", "chat_template_kwargs")
"""Columns beside a conversation that belong to it."""
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns beside a conversation without which its text is incomplete."""


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a conversation with what stands beside them, as the row has them."""

    content: Any
    where: str
    """The place of its row, in words."""
    beside: dict[str, Any]

    @property
    def size(self) -> int:
        """The approximate number of characters."""
        return len(self.content) if isinstance(self.content, str) else sum(len(str(turn)) for turn in self.content)


@dataclass(frozen=True)
class Wanted:
    """The documents that are wanted, and how many."""

    column: str | None
    """The column; None is the first with a known name in the first row of the file."""
    chat: bool = False
    """Whether conversations are wanted; else texts."""
    characters: int | None = None
    """The number of characters that is enough; None is the whole file, up to the largest that is read whole."""
    seed: int | None = None
    """Seed of the order in which rows are drawn; None is the order of the file."""
    keep_marks: bool = False
    """Whether a byte-order mark stays in the text, as it did in runs of earlier versions."""


def local(source: str) -> tuple[Path, str | None] | None:
    """A local file and the column named after it; None where the source names neither.

    Raises `CalibrationError` for a file that is missing, or of a format that is not read.
    """
    for name, column in ((source, None), source.rpartition(":")[::2]):
        if not name or "\0" in name:
            continue
        path = expanded(Path(name))
        known = name.lower().endswith(SUFFIXES)
        try:
            there, exists = path.is_file(), path.exists()
        except (OSError, ValueError):  # names that no file system takes
            there = exists = False
        other = _OTHER_FORMATS.get(path.suffix.lower())
        if other and there:
            raise CalibrationError(f"{path} is {other}.")
        if known and not there:
            raise CalibrationError(
                f"There is no file {path}; give a {', '.join(SUFFIXES)} file, or a text by its name."
            )
        if known or (there and column is None):
            return path, column or None
        if exists and column is None:
            raise CalibrationError(f"{source} is none of the files that can be read: {', '.join(SUFFIXES)}.")
    return None


def documents(path: Path, wanted: Wanted) -> list[Document]:
    """Documents of a file. Raises `CalibrationError` where it cannot be read so."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return _of_parquet(path, wanted)
        _require_utf8(path)
        if kind in _LINES:
            return drawn(_json_lines(path), wanted, path.name, f"Line {{}} of {path}")
        if wanted.column is not None:
            raise CalibrationError(f"{path} is a text and has no columns; leave out {quoted(wanted.column)}.")
        if wanted.chat:
            raise CalibrationError(
                f"`chat` needs a column of conversations, and {path} is a plain text. Give a .jsonl or .parquet file, "
                "or leave `chat` out."
            )
        return [Document(_plain_text(path, wanted), str(path), {})]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}.") from error


def drawn(rows: Iterable[dict[str, Any]], wanted: Wanted, origin: str, where: str) -> list[Document]:
    """Documents until there is text enough: in order, or shuffled with the seed through a buffer.

    `where` is a pattern that takes the number of a row, from 1 on; a row may be empty, and counts.
    """
    documents: list[Document] = []
    characters = 0
    numbered = ((number, row) for number, row in enumerate(rows, 1) if row)
    first = next(numbered, None)
    if first is None:
        return []
    columns = (wanted.column,) if wanted.column else _default_columns(first[1], wanted, origin)
    iterator: Iterator[tuple[int, dict[str, Any]]] = itertools.chain([first], numbered)
    if wanted.seed is not None:
        iterator = _shuffled(iterator, wanted.seed)
    for number, row in iterator:
        document = _document(row, columns, wanted, where.format(number), origin)
        if document is None:
            continue
        documents.append(document)
        characters += document.size
        if wanted.characters is not None and characters >= wanted.characters:
            break
        if wanted.characters is None and characters > MOST_CHARACTERS:
            raise CalibrationError(
                f"{origin} has more than {MOST_CHARACTERS / 1e9:.0f} GB of text, the most that is read whole. Cut it."
            )
    return documents


def _document(
    row: dict[str, Any], columns: tuple[str, ...], wanted: Wanted, where: str, origin: str
) -> Document | None:
    """The document of a row; None where it is empty. Raises `CalibrationError`."""
    for column in columns:
        if column not in row:
            raise CalibrationError(
                f"{where} has no column {quoted(column)}; it has {_names(row)}. Name one after a colon."
            )
    named = quoted(columns[0]) if len(columns) == 1 else " and ".join(map(quoted, columns))
    values = [row[column] for column in columns]
    if columns == _TURN:
        values = [_conversation_of(*values)]
    value = values[0]
    if value is None or value == "" or value == []:
        return None
    is_conversation = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if not isinstance(value, str) and not is_conversation:
        raise CalibrationError(
            f"{where}: column {named} of {origin} holds {_kind_of(value)}, not text. Name another one after a colon."
        )
    if wanted.chat and not is_conversation:
        raise CalibrationError(
            "`chat` needs a column of conversations (a list of messages with role and content); found text in column "
            f"{named} in {where[0].lower()}{where[1:]}. Name that column after a colon, or leave `chat` out."
        )
    if is_conversation and not wanted.chat:
        raise CalibrationError(
            f"{where}: column {named} holds conversations, not text. Use `chat` where the command has it, or name a "
            "text column after a colon."
        )
    if isinstance(value, str) and not wanted.keep_marks:
        value = value.removeprefix(_MARK)
        if not value:
            return None
    media = [name for name in _MEDIA if is_conversation and row.get(name)]
    if media:
        raise CalibrationError(f"{where} has {media[0]} beside its conversation; only text can be scored.")
    beside = {name: row[name] for name in BESIDE if row.get(name)} if is_conversation else {}
    return Document(value, where, beside)


def _conversation_of(prompt: Any, completion: Any) -> Any:
    """A prompt and its completion, each a text or messages, as one conversation; what is neither stays as it is."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return None if prompt is None and completion is None else {"prompt": prompt, "completion": completion}


def _kind_of(value: Any) -> str:
    """The kind of a value in words, for an error."""
    if isinstance(value, dict):
        return "objects"
    if not isinstance(value, list):
        return type(value).__name__
    odd = next(each for each in value if not isinstance(each, dict))
    if isinstance(odd, bool) or not isinstance(odd, int | float):
        kinds = {str: "strings", list: "lists", type(None): "nulls"}
        return f"lists of {kinds.get(type(odd), type(odd).__name__)}"
    return "lists of numbers (token ids?)"


def _default_columns(row: dict[str, Any], wanted: Wanted, origin: str) -> tuple[str, ...]:
    known = _CONVERSATIONS + _TEXTS if wanted.chat else _TEXTS + _CONVERSATIONS
    for name in known if not wanted.chat or not set(_TURN) <= row.keys() else _CONVERSATIONS:
        if name in row:
            return (name,)
    if wanted.chat and set(_TURN) <= row.keys():
        return _TURN
    first = known[0]
    layout = ""
    if wanted.chat:
        read = f"{' and '.join(_CONVERSATIONS)}, and {' with '.join(_TURN)}"
        layout = f" Known are {read}; write other layouts as messages."
    raise CalibrationError(
        f"{origin} has no column {quoted(first)}; it has {_names(row)}. Name one after a colon.{layout}"
    )


def _names(row: dict[str, Any]) -> str:
    return excerpt(", ".join(sorted(map(str, row))[:8])) or "none"


def _shuffled(rows: Iterator[tuple[int, dict[str, Any]]], seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    draw = random.Random(seed)
    buffer: list[tuple[int, dict[str, Any]]] = []
    characters = 0
    for row in itertools.islice(rows, _BUFFER_DOCUMENTS):
        buffer.append(row)
        characters += sum(len(value) for value in row[1].values() if isinstance(value, str | list))
        if characters > _BUFFER_BYTES:  # of documents that long, fewer
            break
    for row in rows:
        place = draw.randrange(len(buffer))
        buffer[place], row = row, buffer[place]
        yield row
    draw.shuffle(buffer)
    yield from buffer


def _require_utf8(path: Path) -> None:
    with open(path, "rb") as file:
        first = file.read(2)
    if first in (b"\xff\xfe", b"\xfe\xff"):
        raise CalibrationError(f"{path} is not UTF-8 text but UTF-16, by its first bytes; save it as UTF-8.")


def _plain_text(path: Path, wanted: Wanted) -> str:
    size = path.stat().st_size
    if size > MOST_CHARACTERS:
        raise CalibrationError(
            f"{path} has {size / 1e9:.1f} GB; a text is read whole, and at most {MOST_CHARACTERS / 1e9:.0f} GB of it. "
            "Cut it, or make it a .jsonl file of documents."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    if not wanted.keep_marks:
        text = text.removeprefix(_MARK)
        if (place := text.find("\0")) >= 0:
            raise CalibrationError(
                f"{path} is not UTF-8 text (character {place} is NUL): another kind of file, or UTF-16; save it as "
                "UTF-8 text."
            )
    return text


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A row for every line; an empty one for a blank line."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number in itertools.count(1):
            line = file.readline(_LINE + 1)
            if not line:
                return
            line = line.removeprefix(_MARK)  # of the file, or of one that was put behind another
            yield _row(line, f"Line {number} of {path}") if line.strip() else {}


def _row(line: str, where: str) -> dict[str, Any]:
    """A line of JSON with columns in it. Raises `CalibrationError`."""
    if len(line) > _LINE:
        raise CalibrationError(f"{where} is longer than {_LINE / 1e6:.0f} MB; make documents of it.")
    try:
        line.encode()
        row = json.loads(line)
    except RecursionError as error:
        raise CalibrationError(f"{where} is not JSON (it is nested too deeply).") from error
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} is not UTF-8 text (character {error.start} of it); convert the file first."
        ) from error
    except ValueError as error:
        if line.lstrip().startswith("["):
            raise CalibrationError(f"{where} begins a JSON list; write one object a line.") from error
        cut = "" if line.endswith("\n") else "; it is the last line, and may have been cut off"
        raise CalibrationError(f"{where} is not JSON ({excerpt(error)}){cut}.") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is not a JSON object with columns; write one object a line.")
    if not row:
        raise CalibrationError(f"{where} has no column: it is an empty object.")
    return row


def _of_parquet(path: Path, wanted: Wanted) -> list[Document]:
    """Documents of a table, read where it can be ended: a few bytes of it can hold more than any memory."""
    most = MOST_CHARACTERS if wanted.characters is None else 8 * wanted.characters
    try:
        rows = bounded.call(
            _parquet_rows, path, wanted,
            seconds=_PARQUET_SECONDS, memory=_PARQUET_BYTES, answer=_BUFFER_BYTES + most,
        )  # fmt: skip
    except WorkEnded as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}.") from error
    if isinstance(rows, str):
        raise CalibrationError(rows)
    return [Document(*each) for each in rows]


def _parquet_rows(path: Path, wanted: Wanted) -> list[tuple[Any, str, dict[str, Any]]] | str:
    """In the child: the documents, or the sentence that says why there are none."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    names = dict.fromkeys(table.schema_arrow.names)
    try:
        columns = (wanted.column,) if wanted.column else _default_columns(names, wanted, path.name)
        read = [each for each in (*columns, *BESIDE, *_MEDIA) if each in names]
        batches = table.iter_batches(_ROWS_AT_ONCE, columns=read, use_threads=False)
        rows = (names | table_row(row) for batch in batches for row in batch.to_pylist())
        pinned = Wanted(columns[0] if len(columns) == 1 else None, wanted.chat, wanted.characters, wanted.seed)
        return [
            (each.content, each.where, each.beside) for each in drawn(rows, pinned, path.name, f"Row {{}} of {path}")
        ]
    except CalibrationError as error:
        return str(error)


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without nulls: a field that one message has is null in all others, and means nothing there."""
    return {column: _present(value) for column, value in row.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _present(each) for name, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value
