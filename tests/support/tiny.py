"""Tiny models on disk with a tokenizer of their own: one token a character, 128 tokens in all."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tests.support.families import VOCAB, build

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3, as the family table has them
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tokenizer(*, adds_bos: bool = False) -> Any:
    """A character tokenizer; with `adds_bos` its habit is to begin with BOS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c not in "\r\x0b\x0c"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters][:VOCAB])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(folder: Path, family: str = "llama", num_blocks: int = 6, *, adds_bos: bool = False, seed: int = 0) -> Path:
    """A random model of a family and the tokenizer, as a Hugging Face folder."""
    build(family, num_blocks, seed).save_pretrained(str(folder))
    tokenizer(adds_bos=adds_bos).save_pretrained(str(folder))
    return folder


def text(characters: int = 6000, seed: int = 0) -> str:
    """Words with some pattern, different everywhere."""
    import random

    draw = random.Random(seed)
    words = ["block", "stack", "token", "text", "model", "skip", "the", "a", "of", "removal", "list", "nats"]
    out: list[str] = []
    length = 0
    while length < characters:
        out.append(draw.choice(words) + (".\n" if draw.random() < 0.1 else ""))
        length += len(out[-1]) + 1
    return " ".join(out)


def overflowing(folder: Path, num_blocks: int = 6, *, without: int | None = None) -> Path:
    """A Llama whose float16 predictions are not numbers: always, or only without one block (a middle one).

    In bfloat16 and float32 they are. `without`: that block drowns a dimension which the head reads with huge weights.
    """
    import torch

    model = build("llama", num_blocks)
    blocks: Any = model.model.layers
    with torch.no_grad():
        if without is None:
            blocks[0].mlp.up_proj.weight.mul_(3e3)
            blocks[0].mlp.down_proj.weight.mul_(1e3)
        else:
            blocks[without].mlp.down_proj.weight.mul_(300.0)
            for block in blocks:
                block.mlp.down_proj.weight[0] = 0.0
                block.self_attn.o_proj.weight[0] = 0.0
            model.model.embed_tokens.weight[:, 0] = 3.0
            model.lm_head.weight[:, 0] *= 6e4 / model.lm_head.weight[:, 0].abs().max()
    model.save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder
