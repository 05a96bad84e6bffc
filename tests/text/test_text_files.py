"""One reader of files for all commands: what is read is the same in each, and what is refused names its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sleb.errors import CalibrationError
from sleb.evaluation import perplexity
from sleb.records import CalibrationSpec
from sleb.text import calibration, text_files
from sleb.text.text_files import Wanted
from tests.support import tiny

TEXTS = [tiny.text(90, seed) for seed in range(4)]
MARK = b"\xef\xbb\xbf"


def lines(*rows: Any, end: bytes = b"\n") -> bytes:
    return end.join(json.dumps(row).encode() for row in rows) + end


def searched(source: str) -> str:
    """What the search's windows say, in the order of the file."""
    spec = CalibrationSpec(source=source, sequences=4, sequence_length=16, sampling="first")
    return as_text(calibration.build(spec, 1, 0, tiny.tokenizer(), 128).ids.reshape(-1))


def evaluated(source: str) -> str:
    return as_text(perplexity.windows(source, tiny.tokenizer(), 128, window=16).ids.reshape(-1)[:80])


def as_text(ids: Any) -> str:
    return "".join(tiny.tokenizer().convert_ids_to_tokens(ids.tolist()))


ROWS = [{"text": text} for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content", "between"),
    [
        ("mark.txt", MARK + TEXTS[0].encode(), None),
        ("ends.txt", TEXTS[0].replace("\n", "\r\n").encode(), None),
        ("no-suffix", TEXTS[0].encode(), None),
        ("notes.log", TEXTS[0].encode(), None),
        ("mark.jsonl", MARK + lines(*ROWS), "rows"),
        ("mark-in-text.jsonl", lines({"text": "\ufeff" + TEXTS[0]}, *ROWS[1:]), "rows"),
        ("two-files.jsonl", MARK + lines(ROWS[0]) + MARK + lines(*ROWS[1:]), "rows"),
        ("ends.jsonl", lines(*ROWS, end=b"\r\n"), "rows"),
        ("blank.jsonl", b"\n" + lines(ROWS[0]) + b" \n\n" + lines(*ROWS[1:]), "rows"),
        ("null.jsonl", lines({"text": None}, ROWS[0], {"text": ""}, *ROWS[1:]), "rows"),
        ("other.jsonl", lines(*({"content": text, "id": 3} for text in TEXTS)), "rows"),
        ("lines.ndjson", lines(*ROWS), "rows"),
    ],
)
def test_a_search_and_an_evaluation_read_the_same(
    name: str, content: bytes, between: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert searched(str(path)) == ("\n\n".join(TEXTS) if between else TEXTS[0])[:80]
    assert evaluated(str(path)) == (" ".join(TEXTS) if between else TEXTS[0])[:80]


def test_a_column_of_a_table_is_read_by_both(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "table.parquet"
    pd.DataFrame([{"text": "no", "body": text} for text in TEXTS]).to_parquet(path)
    assert searched(f"{path}:body") == "\n\n".join(TEXTS)[:80]
    assert evaluated(f"{path}:body") == " ".join(TEXTS)[:80]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", lines(*ROWS, {"body": "b"}), r"^Line 5 of .*a\.jsonl has no column 'text'; it has body\."),
        ("a.jsonl", lines(*ROWS, {"text": 3}), r"^Line 5 of .*: column 'text' of a\.jsonl holds int, not text\."),
        ("a.jsonl", lines({"text": [1, 2.5]}), r"Line 1 of .* holds lists of numbers \(token ids\?\), not text\."),
        ("a.jsonl", lines({"text": ["a"]}), "holds lists of strings, not text"),
        ("a.jsonl", lines({"text": [[1]]}), "holds lists of lists, not text"),
        ("a.jsonl", lines({"text": {"a": 1}}), "holds objects, not text"),
        ("a.jsonl", lines(*ROWS, {"text": [{"role": "user", "content": "a"}]}), r"^Line 5 .* holds conversations, not"),
        (
            "a.jsonl",
            lines(*ROWS)[:-4],
            r"^Line 4 of .* is not JSON .*; it is the last line, and may have been cut off\.",
        ),
        ("a.jsonl", lines(ROWS[0]) + b'{"text": "caf\xe9"}\n', r"^Line 2 of .* is not UTF-8 text"),
        ("a.jsonl", b"[\n", r"^Line 1 of .* begins a JSON list; write one object a line\."),
        ("a.jsonl", lines(ROWS), r"^Line 1 of .* is not a JSON object with columns; write one object a line\."),
        ("a.jsonl", lines(ROWS[0], {}), r"^Line 2 of .* has no column"),
        ("a.jsonl", lines(*ROWS).decode().encode("utf-16"), "is not UTF-8 text but UTF-16"),
        ("a.txt", TEXTS[0].encode("utf-16"), "is not UTF-8 text but UTF-16"),
        ("a.txt", TEXTS[0].encode("utf-16-le"), r"is not UTF-8 text \(character 1 is NUL\)"),
        ("a.json", lines(*ROWS), r"a\.json is one JSON value: write one object a line"),
        ("a.csv", b"a,b", r"a\.csv is a table"),
        ("a.jsonl.gz", b"x", "is compressed: unpack it first"),
    ],
)
def test_a_refusal_is_the_same_in_both_and_names_the_row(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    messages = []
    for read in (searched, evaluated):
        with pytest.raises(CalibrationError, match=words) as refused:
            read(str(tmp_path / name))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_lists_in_a_table_are_named_with_and_without_chat(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "ids.parquet"
    pd.DataFrame({"input_ids": [[1, 2, 3]], "words": [["a", "b"]], "raw": [b"bytes"]}).to_parquet(path)
    kinds = {"input_ids": r"lists of numbers \(token ids\?\)", "words": "lists of strings", "raw": "bytes"}
    for column, kind in kinds.items():
        for chat in (False, True) if column == "input_ids" else (True,):
            with pytest.raises(
                CalibrationError, match=rf"^Row 1 of .*: column '{column}' of .* holds {kind}, not text"
            ):
                text_files.documents(path, Wanted(column, chat))


@pytest.mark.parametrize("seed", range(3))
def test_the_default_column_does_not_depend_on_the_seed(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(lines({"content": "first", "n": 1}, *({"text": text, "content": text} for text in TEXTS)))
    documents = text_files.documents(path, Wanted(None, seed=seed))
    assert sorted(each.content for each in documents) == sorted(["first", *TEXTS])
    where = {each.content: each.where for each in documents}
    assert where[TEXTS[2]] == f"Line 4 of {path}"


def test_layouts_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"messages": turns, "text": "no"}, {"conversations": turns, "text": "no"},
        {"prompt": "a", "completion": "b", "text": "no"}, {"prompt": turns[:1], "completion": turns[1:]},
    ):  # fmt: skip
        path.write_bytes(lines(row | {"tools": [{"name": "f"}], "id": 3}))
        documents = text_files.documents(path, Wanted(None, chat=True))
        assert [each.content for each in documents] == [turns]
        assert documents[0].beside == {"tools": [{"name": "f"}]}
    for row, words in (
        ({"instruction": "a", "output": "b"}, "Known are messages and conversations, and prompt with completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "write other layouts as messages"),
        ({"prompt": "a", "completion": turns}, "holds objects, not text"),
        ({"conversations": turns, "image": "a.png"}, "^Line 1 of .* has image beside its conversation; only text"),
        ({"text": "a"}, r"`chat` needs .*; found text in column 'text' in line 1 of"),
    ):
        path.write_bytes(lines(row))
        with pytest.raises(CalibrationError, match=words):
            text_files.documents(path, Wanted(None, chat=True))


def test_a_field_that_only_other_rows_of_a_table_have_is_not_there(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "a.parquet"
    call = [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]
    other = [{"function": {"name": "g", "arguments": {"day": "Monday"}}}]
    rows = [[{"role": "assistant", "tool_calls": each}] for each in (call, other)]
    rows.append([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    pd.DataFrame({"messages": rows}).to_parquet(path)
    assert [each.content for each in text_files.documents(path, Wanted(None, chat=True))] == rows
