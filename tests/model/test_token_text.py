"""One token as text: leading spaces kept, and bytes without text by their names."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sleb.model.token_text import token_text, with_bytes, without_bytes


class Pieces:
    """A tokenizer that drops leading spaces when it decodes a token alone, like SentencePiece ones."""

    pieces = ("<s>", "\u2581the", "ing", "\u2581", "<script>")

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]

    def decode(self, ids: list[int], **_: object) -> str:
        return self.pieces[ids[0]].replace("\u2581", " ").removeprefix(" ")


def byte_level() -> Any:
    """A token for each byte, as in GPT-2's vocabulary; its id is the byte's rank in the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sentencepiece() -> Any:
    """Characters, and bytes where there is none."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    inner = Tokenizer(
        models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_token_text_keeps_the_leading_space() -> None:
    assert [token_text(Pieces(), token) for token in range(5)] == ["<s>", " the", "ing", " ", "<script>"]


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()])
def test_parts_of_a_character_are_their_bytes(tokenizer: Any) -> None:
    ids = tokenizer("a€", add_special_tokens=False)["input_ids"]
    assert [token_text(tokenizer, token) for token in ids] == ["a", "<0xE2>", "<0x82>", "<0xAC>"]


def test_every_byte_of_a_byte_level_vocabulary_is_told_from_all_others() -> None:
    tokenizer = byte_level()
    texts = [token_text(tokenizer, token) for token in range(256)]
    assert len(set(texts)) == 256
    assert sorted(each for each in texts if each.startswith("<0x")) == [f"<0x{byte:02X}>" for byte in range(0x80, 256)]


def test_text_around_a_broken_character_stays_text() -> None:
    assert with_bytes(" né".encode()[:-1]) == " n<0xC3>"
    assert with_bytes("\N{REPLACEMENT CHARACTER}".encode()) == "\N{REPLACEMENT CHARACTER}"  # one of the text's own
    assert without_bytes(" n<0xC3>") == " n"
