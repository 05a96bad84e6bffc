"""A tokenizer is data: one that makes a text many times as long is refused before it is given one."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sleb.errors import ModelError
from sleb.model.inspection import tokenizer_growth
from sleb.model.loading import load_model

DOUBLED = {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LIGATURE = {"type": "Replace", "pattern": {"String": "q"}, "content": "\ufdfa"}  # which NFKC makes 18 characters


def charsmap(text: str) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + text.encode() + b"\0").decode()


def in_turn(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", kind: parts}


@pytest.mark.parametrize(
    "settings",
    [
        {"normalizer": in_turn("normalizers", [DOUBLED] * 40)},
        {"normalizer": in_turn("normalizers", [in_turn("normalizers", [DOUBLED] * 7)] * 2)},
        {"normalizer": in_turn("normalizers", [DOUBLED] * 5)},  # which a usual text tells
        {"normalizer": {"normalizers": [{"pattern": {"String": "q"}, "content": "q" * 100}] * 2}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
        {"normalizer": in_turn("normalizers", [LIGATURE, {"type": "NFKC"}] * 4)},
        {"normalizer": in_turn("normalizers", [{"type": "Lowercase"}] * 300)},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 9000)}},
        {"pre_tokenizer": in_turn("pretokenizers", [BYTES] * 30)},
        {"decoder": in_turn("decoders", [DOUBLED] * 40)},
    ],
)
def test_a_tokenizer_without_measure_is_refused(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(before | settings))
    with pytest.raises(ModelError, match=r"a tokenizer that can make a text .* times as long, and at most") as caught:
        load_model(str(model), dtype="float32")
    assert len(str(caught.value).replace(str(model), "")) < 200


def test_added_tokens_are_not_lengthened_without_measure(tiny_model: Path, tmp_path: Path) -> None:
    """The library does that while it reads the file."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["normalizer"] = in_turn("normalizers", [dict(DOUBLED, pattern={"String": "q"})] * 12)
    settings["added_tokens"].append(dict(settings["added_tokens"][0], id=200, content="q" * 4000, normalized=True))
    (model / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="4,096 times as long, and at most 2,0"):
        load_model(str(model), dtype="float32")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "decoder"),
    [
        (  # Llama 2
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            None,
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        ),
        (  # ALBERT, whose map has 18 characters for one, too
            normalizers.Sequence(
                [
                    *(normalizers.Replace(text, '"') for text in ("``", "''")),
                    *(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
                    normalizers.Replace(Regex(" {2,}"), " "),
                ]
            ),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()),
        (
            normalizers.NFC(),
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            decoders.ByteLevel(),
        ),
    ],
)
def test_tokenizers_of_real_families_are_not_refused(
    tmp_path: Path, normalizer: Any, pre_tokenizer: Any, decoder: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer, inner.decoder = normalizer, decoder
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer_growth.require_modest_files("model", str(tmp_path), None)
    tokenizer_growth.require_modest("model", PreTrainedTokenizerFast(tokenizer_object=inner))
