"""One token as text, or as the bytes that it stands for: a part of a character has no text. Knows a tokenizer only."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The text to which a part of a character decodes."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # as SentencePiece names its byte tokens
_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte outside of text


def token_text(tokenizer: Any, token: int) -> str:
    """One token as text, its leading space kept (some tokenizers drop it when they decode a token alone).

    Bytes without a character of their own stand by their names, such as `<0xE2>`: tokens that are different parts of
    characters would all decode to the same sign.
    """
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token)
    if UNFINISHED in text:
        raw = piece if isinstance(piece, bytes) else _bytes_of(piece)
        if raw is not None:
            return with_bytes(raw)
        return piece if isinstance(piece, str) and _BYTE.fullmatch(piece) else text
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        return " " + text
    return text


def with_bytes(raw: bytes) -> str:
    """Text, with names in place of bytes that are not text."""
    return _ESCAPED.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", raw.decode("utf-8", "surrogateescape"))


def without_bytes(text: str) -> str:
    """A token's text without the names of bytes."""
    return _BYTE.sub("", text)


def _bytes_of(piece: Any) -> bytes | None:
    """The bytes of a byte-level piece, which has a printable character for each; None for any other piece."""
    byte_of = _byte_level()
    if not isinstance(piece, str) or any(char not in byte_of for char in piece):
        return None
    return bytes(byte_of[char] for char in piece)


@cache
def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: bytes that are printable in Latin-1 stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    return {chr(each): each for each in printable} | {chr(0x100 + place): each for place, each in enumerate(others)}
