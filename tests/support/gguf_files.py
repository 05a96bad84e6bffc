"""Tiny random GGUF files as llama.cpp's converter writes them: settings, byte-level vocabulary, quantised tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, INNER, POSITIONS = 32, 4, 2, 64, 128
HEAD = HIDDEN // HEADS
SPECIAL = ["<unk>", "<s>", "</s>"]


def characters() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


TOKENS = [*SPECIAL, *characters(), "th", "the"]
VOCAB = len(TOKENS)


def write(
    path: Path,
    architecture: str = "llama",
    num_blocks: int = 6,
    *,
    seed: int = 0,
    conv: Sequence[int] = (),
    settings: dict[str, Any] | None = None,
    alignment: int | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    type: str | None = "model",
) -> Path:
    """A random model of `architecture` (llama, lfm2 or gemma2); of lfm2, blocks in `conv` are convolutions.

    Matrices are Q8_0, vectors float32. `settings` come on top; a key without a dot is the architecture's own. None
    leaves one out.
    """
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    if type is not None:
        writer.add_type(type)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    own: dict[str, Any] = {
        "general.name": "Tiny",
        "general.tags": ["a", "b", "c", "d", "e", "f"],  # as long as the stack, and none of its business
        "block_count": num_blocks,
        "context_length": POSITIONS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD,
        "vocab_size": VOCAB,
    }
    if architecture == "lfm2":
        own["attention.head_count_kv"] = [0 if block in conv else KV_HEADS for block in range(num_blocks)]
        own["shortconv.l_cache"] = 3
    if architecture == "gemma2":
        own |= {"attention.key_length": HEAD, "attention.value_length": HEAD, "attention.sliding_window": 4096}
    own |= settings or {}
    for key, value in own.items():
        name = key if key.startswith(("general.", "split.")) else f"{architecture}.{key}"
        _add(writer, name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.standard_normal((rows, columns)).astype(np.float32) * 0.7 / np.sqrt(columns)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, size: int = HIDDEN) -> None:
        writer.add_tensor(name, (1 + 0.1 * draw.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for block in range(num_blocks):
        at = f"blk.{block}"
        vector(f"{at}.attn_norm.weight")
        vector(f"{at}.ffn_norm.weight")
        if block in conv:
            matrix(f"{at}.shortconv.in_proj.weight", 3 * HIDDEN, HIDDEN)
            matrix(f"{at}.shortconv.out_proj.weight", HIDDEN, HIDDEN)
            kernel = draw.standard_normal((HIDDEN, 3)).astype(np.float32)
            writer.add_tensor(f"{at}.shortconv.conv.weight", kernel)
        else:
            matrix(f"{at}.attn_q.weight", HIDDEN, HIDDEN)
            matrix(f"{at}.attn_k.weight", KV_HEADS * HEAD, HIDDEN)
            matrix(f"{at}.attn_v.weight", KV_HEADS * HEAD, HIDDEN)
            matrix(f"{at}.attn_output.weight", HIDDEN, HIDDEN)
            if architecture == "lfm2":
                vector(f"{at}.attn_q_norm.weight", HEAD)
                vector(f"{at}.attn_k_norm.weight", HEAD)
        if architecture == "gemma2":
            vector(f"{at}.post_attention_norm.weight")
            vector(f"{at}.post_ffw_norm.weight")
        matrix(f"{at}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"{at}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"{at}.ffn_down.weight", HIDDEN, INNER)
    vector("token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight")
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
