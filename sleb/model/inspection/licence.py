"""The licence of a model, for the card of what is made of it. Reads the head of a card or of a licence file.

What is not named there is not guessed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from sleb.errors import ModelError
from sleb.model import demo
from sleb.model.inspection import gguf_header
from sleb.records import is_gguf

_HEAD_BYTES = 1 << 16
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_FIELD = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*(?:\n[ \t]*-[ \t]*)?(['\"]?)([^\n'\"#]{1,200})\2[ \t]*$", re.MULTILINE
)
_ID = re.compile(r"[\w.+-]{1,64}")
_TITLES = (
    (re.compile(r"apache license\s+version 2\.0"), "apache-2.0"),
    (re.compile(r"\bmit license\b"), "mit"),
    (re.compile(r"\bbsd 3-clause\b"), "bsd-3-clause"),
)
"""Beginnings of the texts of licences, and their names on the hub."""


def of_model(model: str, revision: str | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as a card has them; empty where the model names none."""
    if model == "demo" or is_gguf(model):
        with suppress(ModelError, OSError):
            path = demo.model_file() if model == "demo" else Path(model).expanduser()
            named = gguf_header.settings(path).get("general.license")
            if isinstance(named, str) and _ID.fullmatch(named):
                return {"license": named}
        return {}
    named_in_card = _of_card(_head(model, "README.md", revision))
    return named_in_card or _of_files(model, revision)


def _of_card(text: str) -> dict[str, str]:
    """The fields of the front matter, those left out that no hub would take."""
    front_matter = re.match(r"---\n(.*?\n)---\s", text.removeprefix("\ufeff").replace("\r\n", "\n"), re.DOTALL)
    if front_matter is None:
        return {}
    fields = {name: value.strip() for name, _, value in _FIELD.findall(front_matter[1])}
    if not _ID.fullmatch(fields.get("license", "")):
        return {}
    return {name: value for name, value in fields.items() if name == "license_link" or _ID.fullmatch(value)}


def _of_files(model: str, revision: str | None) -> dict[str, str]:
    for name in _FILES if Path(model).expanduser().is_dir() else _FILES[:1]:
        head = " ".join(_head(model, name, revision)[:2000].lower().split())
        if head:
            known = next((licence for title, licence in _TITLES if title.search(head)), None)
            return {"license": known} if known else {"license": "other", "license_link": name}
    return {}


def _head(model: str, name: str, revision: str | None) -> str:
    """The beginning of a file of the model; empty where it has none."""
    from transformers.utils.hub import cached_file

    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    with suppress(OSError, ValueError):
        path = cached_file(str(Path(model).expanduser()), name, revision=revision, **quiet)
        if path is not None and Path(path).is_file():
            with open(path, "rb") as file:
                return file.read(_HEAD_BYTES).decode("utf-8", "replace")
    return ""
