"""The growth of a text in a tokenizer, which a few lines of its file can double again and again. No torch."""

from __future__ import annotations

import base64
import json
import math
import string
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sleb.errors import ModelError
from sleb.model.inspection import model_files

_MOST_PARTS = 256
_MOST_EVER = 1 << 13
"""The largest growth of any text, in characters; that of ALBERT can be 1,300-fold, of most tokenizers 4-fold."""
_MOST_USUAL = 16
"""The largest growth of a usual text; three-fold where each byte of other scripts becomes a character."""
_TEXT = (
    string.printable
    + "It was a bright cold day, and the clocks were striking 13. Übergröße, naïve; 中文字符, العربية. "
)
_MOST_ADDED = 1 << 23
"""The limit for the characters of all added tokens; the library changes them as a text when it reads them, and takes a
hundred bytes for each character."""

_LISTS = ("normalizers", "pretokenizers", "decoders")
_GROWTH = {
    "NFKC": 18,
    "NFKD": 18,
    "NFD": 4,
    "NFC": 3,
    "Lowercase": 2,
    "BertNormalizer": 24,
    "ByteLevel": 4,
    "Metaspace": 2,
    "BPEDecoder": 2,
}
"""The most characters that one becomes, where no setting says it."""


def require_modest_files(name: str, source: str, revision: str | None) -> None:
    """Raises `ModelError` for files of a tokenizer, before a library reads them, that make texts far longer."""
    from transformers.utils.hub import cached_file

    paths = [path for path in Path(source).glob("tokenizer*.json") if path.is_file()]
    if not Path(source).is_dir():
        cached = cached_file(
            source,
            "tokenizer.json",
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        paths = [Path(cached)] if cached else []
    for path in paths:
        settings = model_files.read_text_json(path)
        if isinstance(settings, dict):
            growth = _require_bounded(name, settings)
            tokens = settings.get("added_tokens")
            tokens = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
            added = sum(len(str(token.get("content"))) for token in tokens if token.get("normalized") is not False)
            if added * growth > _MOST_ADDED:
                raise _too_long(name, growth, _MOST_ADDED // added)


def require_modest(name: str, tokenizer: Any) -> None:
    """Raises `ModelError` for a loaded tokenizer whose parts can make texts far longer, or do so with a usual one."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return
    parts = {kind: getattr(fast, kind, None) for kind in ("normalizer", "pre_tokenizer", "decoder")}
    states = {}
    for kind, part in parts.items():
        with suppress(Exception):  # one written in Python has no such state, and is the library's own
            states[kind] = json.loads(part.__getstate__()) if part is not None else None
    _require_bounded(name, states)
    for text in (_TEXT, 5 * _TEXT):  # a short one first, which cannot take much
        changed = parts["normalizer"].normalize_str(text) if parts["normalizer"] is not None else text
        if len(changed) <= _MOST_USUAL * len(text) and parts["pre_tokenizer"] is not None:
            changed = "".join(piece for piece, _ in parts["pre_tokenizer"].pre_tokenize_str(changed))
        if len(changed) > _MOST_USUAL * len(text):
            raise _too_long(name, len(changed) // len(text), _MOST_USUAL)


def _require_bounded(name: str, settings: Mapping[str, Any]) -> int:
    """The most characters that the parts of a tokenizer.json make of one. Raises `ModelError`."""
    most = 1
    for kinds in (("normalizer", "pre_tokenizer"), ("decoder",)):
        parts = [part for kind in kinds for part in _parts(settings.get(kind))]
        growth = math.prod(map(_growth, parts[:_MOST_PARTS]))
        if len(parts) > _MOST_PARTS or growth > _MOST_EVER:
            raise _too_long(name, max(growth, len(parts)), _MOST_EVER)
        most = max(most, growth)
    return most


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part, or what it is made of, however deep; kinds are known by their settings, as the library does."""
    left = [part]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, Mapping):
            inner = [part[name] for name in _LISTS if name in part]
            left += inner
            if not inner:
                yield part


def _growth(part: Mapping[str, Any]) -> int:
    """The most characters that a part makes of one."""
    if isinstance(part.get("content"), str):
        pattern = part.get("pattern")
        text = pattern.get("String") if isinstance(pattern, Mapping) else pattern
        between = 0 if text and isinstance(text, str) else 1  # a pattern can match nothing, beside each character
        return max(1, len(part["content"]) + between) if part["content"] else 1
    if isinstance(part.get("prepend"), str):
        return len(part["prepend"]) + 1
    if isinstance(part.get("precompiled_charsmap"), str):
        return _longest(part["precompiled_charsmap"])
    return _GROWTH.get(str(part.get("type")), 1)


def _longest(charsmap: str) -> int:
    """The longest text that a map of SentencePiece has for a character: a tree, and the texts after it."""
    with suppress(ValueError):
        data = base64.b64decode(charsmap)
        texts = data[4 + int.from_bytes(data[:4], "little") :]
        return max(1, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))
    return 1  # the library will not read it either


def _too_long(name: str, growth: int, most: int) -> ModelError:
    times = f"{growth:,}" if growth < 10**6 else "millions of"
    return ModelError(
        f"{name} has a tokenizer that can make a text {times} times as long, and at most {most:,} are allowed; take "
        "the tokenizer of its base model (tokenizer.json)."
    )
