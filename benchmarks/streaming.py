"""A model streamed from disk, beside the same model in memory, and beside what the disk and the bus can do.

    python benchmarks/streaming.py [--gb 1] [--sequences 4] [--sequence-length 256] [--candidates 4] [--device cpu]

Writes a Llama with random weights into a temporary folder (times do not depend on the values), opens it within a third
of its size, and scores some candidates. The files are dropped from the page cache before each pass, where the system
allows it, so that reads are the disk's; "cached" is the same from memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sleb.model.block_stack import BlockStack
from sleb.model.streamed_loading import load_within
from sleb.model.streaming import streamed_blocks
from sleb.scoring.scorer import Scorer

CHUNK = 16 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write the model, on the disk that is to be measured")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        config = write(Path(folder) / "model", args.gb, args.hidden_size)
        files = sorted((Path(folder) / "model").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{config.num_hidden_layers} blocks, {size / 1e9:.2f} GB in bfloat16, budget {size / 3e9:.2f} GB")
        cold, cached = read_rate(files, drop=True), read_rate(files, drop=False)
        print(f"{'the disk alone':<34}{cold:8.2f} GB/s   cached {cached:6.2f} GB/s")
        if device.type == "cuda":
            print(f"{'the bus alone, pinned':<34}{bus_rate(device):8.2f} GB/s")

        def load(**kwargs: object) -> tuple[object, dict[str, object]]:
            model = AutoModelForCausalLM.from_pretrained(str(files[0].parent), dtype=torch.bfloat16, **kwargs)
            return model.eval(), {}

        ids = np.random.default_rng(0).integers(0, config.vocab_size, (args.sequences, args.sequence_length))
        skip_sets = [(block,) for block in range(1, 1 + args.candidates)]
        options = {"trust_remote_code": False, "revision": None}
        model, _ = load_within(
            size // 3, str(files[0].parent), config, torch.bfloat16, device, Path(folder) / "scratch", options, load
        )
        model.eval()
        streamed = streamed_blocks(model)
        assert streamed is not None
        scorer = Scorer(BlockStack(model), ids)
        rounds = -(-args.sequences // scorer.round_size(skip_sets))
        results = {}
        for name, drop in (("streamed, from disk", True), ("streamed, cached", False)):
            if drop:
                forget(files)
            streamed.seconds_read = streamed.seconds_waited = 0.0
            streamed.bytes_read = 0
            start = time.perf_counter()
            results[name] = scorer.score(skip_sets, np.arange(args.sequences))
            seconds = time.perf_counter() - start
            rate = streamed.bytes_read / streamed.seconds_read / 1e9
            print(
                f"{name:<34}{seconds:8.1f} s      read at {rate:6.2f} GB/s, waited {streamed.seconds_waited:.1f} s, "
                f"{rounds} round{'s' if rounds > 1 else ''}"
            )
        del model, scorer
        resident: object = load()[0]
        scorer = Scorer(BlockStack(resident.to(device)), ids)  # type: ignore[attr-defined]
        start = time.perf_counter()
        in_memory = scorer.score(skip_sets, np.arange(args.sequences))
        print(f"{'in memory':<34}{time.perf_counter() - start:8.1f} s")
        print(f"largest difference: {max(float(np.abs(each - in_memory).max()) for each in results.values()):g} nats")


def write(folder: Path, gb: float, hidden: int) -> LlamaConfig:
    """A Llama of about so many gigabytes, in shards of a block or two."""
    per_block = 2 * (4 * hidden * hidden + 3 * hidden * (hidden * 11 // 4))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=max(6, round(gb * 1e9 / per_block)),
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder), max_shard_size=f"{max(1, per_block * 2 // 10**6)}MB")
    return config


def read_rate(files: list[Path], *, drop: bool) -> float:
    """GB/s of reading the files from one end to the other into the same memory."""
    if drop:
        forget(files)
    buffer, start, total = bytearray(CHUNK), time.perf_counter(), 0
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start) / 1e9


def forget(files: list[Path]) -> None:
    """Drop them from the page cache, where the system can."""
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bus_rate(device: torch.device) -> float:
    """GB/s from pinned host memory to the device."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(4):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    return 4 * host.numel() / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()
