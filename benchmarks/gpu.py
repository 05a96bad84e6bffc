"""A search with the shapes of LLaMA-2-7B or 13B on a GPU: seconds, share of the matrix-multiply rate, peak memory.

    python benchmarks/gpu.py                              # 7B, 5 x 2048 tokens, 20 % removed: the paper's setting
    python benchmarks/gpu.py --shape 13b
    python benchmarks/gpu.py --sequences 128 --race       # racing: one step is timed, the rest is counted
    python benchmarks/gpu.py --streamed --folder /big     # 7B within a third of its size, read from disk
    python benchmarks/gpu.py --shape tiny --device cpu    # the same path without a GPU

Weights are random: times do not depend on their values, but the winner does, and so does the length of a race.
Therefore a race's work is taken from the forecast (`sleb.methods.cost_forecast`), and its seconds from a step over as
many sequences as a round has.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from sleb.methods.cost_forecast import cost_of_search
from sleb.methods.problem import Problem, number_to_remove
from sleb.methods.race import looks_of
from sleb.methods.strategies import search
from sleb.model.block_stack import BlockStack
from sleb.model.streamed_loading import load_within
from sleb.model.streaming import streamed_blocks
from sleb.records import Baseline, Measured, Method
from sleb.scoring.scorer import Scorer

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 24, "num_attention_heads": 4},
}
RATIO = 0.2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--race", action="store_true", help="time one step, count the race")
    parser.add_argument("--streamed", action="store_true", help="within a third of the model's size")
    parser.add_argument("--folder", type=Path, help="where --streamed writes the model")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("CUDA is not available here; --shape tiny --device cpu runs the same path")
    vocabulary = 512 if args.shape == "tiny" else 32000
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, **SHAPES[args.shape])
    with model_of(config, device, args.streamed, args.folder) as model:
        measure(model, device, args)


@contextmanager
def model_of(config: LlamaConfig, device: torch.device, streamed: bool, folder: Path | None) -> Iterator[Any]:
    """Random weights in bfloat16: on the device, or on a disk and read from there."""
    torch.manual_seed(0)
    with torch.device("cpu" if streamed else device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not streamed:
        yield model.eval().requires_grad_(False)
        return
    size = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model.save_pretrained(f"{place}/model", max_shard_size="2GB")
        del model
        options = {"trust_remote_code": False, "revision": None}
        model, _ = load_within(
            size // 3, f"{place}/model", config, torch.bfloat16, device, Path(place) / "scratch", options, _refuse
        )
        yield model.eval()


def _refuse(**_: object) -> Any:
    raise SystemExit("the model was to be streamed, and would be loaded whole")


def measure(model: Any, device: torch.device, args: argparse.Namespace) -> None:
    """A search, or a step and the rest counted."""
    stack = BlockStack(model)
    count = len(stack)
    ids = np.random.default_rng(0).integers(0, stack.config.vocab_size, (args.sequences, args.sequence_length))
    scorer = Scorer(stack, ids, batch_size=args.batch_size)
    problem = Problem(
        num_blocks=count,
        num_remove=number_to_remove(count, count - 2, None, RATIO),
        protected=(0, count - 1),
        calibration=np.arange(args.sequences),
        held_out=np.arange(0),
        token_counts=scorer.token_counts,
        racing=args.race,
    )
    peak_rate = matmul_rate(device)
    per_block, per_head = flops(stack, scorer.ids[:1].to(device))
    scorer.score([()], np.arange(min(args.sequences, scorer.batch_size)))  # the first pass allocates
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    nothing = Measured(nll_sum=0.0, token_count=1)
    first = Baseline(calibration=nothing, held_out=nothing, block_evaluations=0, head_evaluations=0, seconds=0)
    blocks, heads = scorer.block_evaluations, scorer.head_evaluations
    settle(device)
    start = time.perf_counter()
    if args.race:
        size = min(looks_of(args.sequences)[0], args.sequences)
        scorer.score([(block,) for block in problem.candidates], np.arange(size))
        steps = 0
    else:
        steps = sum(1 for _ in search(Method.METRIC3, problem, scorer.score, first))
    settle(device)
    seconds = time.perf_counter() - start
    blocks, heads = scorer.block_evaluations - blocks, scorer.head_evaluations - heads
    work = blocks * per_block + heads * per_head
    print(f"{args.shape}, {args.sequences} x {args.sequence_length} tokens, {count} blocks, {torch_name(device)}")
    print(f"  {'best matrix-multiply rate':<30}{peak_rate / 1e12:10.2f} TFLOP/s")
    print(f"  {'steps':<30}{steps or 'first round of one':>10}")
    print(f"  {'block evaluations, logits':<30}{blocks:10,}, {heads:,}")
    print(f"  {'seconds':<30}{seconds:10.2f}")
    print(f"  {'rate':<30}{work / seconds / 1e12:10.2f} TFLOP/s, {work / seconds / peak_rate:.0%} of the best")
    if device.type == "cuda":
        print(f"  {'peak memory':<30}{torch.cuda.max_memory_allocated(device) / 1e9:10.1f} GB")
    streamed = streamed_blocks(model)
    if streamed is not None:
        rate = streamed.bytes_read / streamed.seconds_read / 1e9
        print(f"  {'read from disk':<30}{rate:10.2f} GB/s, waited {streamed.seconds_waited:.1f} s of {seconds:.1f}")
    if args.race:
        whole = cost_of_search(Method.METRIC3, problem)
        ahead = whole.block_evaluations * per_block + whole.head_evaluations * per_head
        counted = f"{ahead / (work / seconds):10.1f} s ({whole.block_evaluations:,} evaluations)"
        print(f"  {'whole race, counted':<30}{counted}")


def flops(stack: BlockStack, ids: torch.Tensor) -> tuple[float, float]:
    """Floating-point operations of one block evaluation and of the logits, of one sequence."""
    with torch.inference_mode():
        inputs = stack.capture(ids)
        stream = inputs.start()
        with stack.resident(0), FlopCounterMode(display=False) as block:
            stack.advance(0, inputs, stream)
        with FlopCounterMode(display=False) as head:
            stack.logits(stream.hidden, ids)
    return float(block.get_total_flops()), float(head.get_total_flops())


def matmul_rate(device: torch.device) -> float:
    """Best of some shapes, in operations a second, bfloat16."""
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            left @ right
        settle(device)
        start, repeats = time.perf_counter(), 20
        for _ in range(repeats):
            left @ right
        settle(device)
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - start))
    return best


def settle(device: torch.device) -> None:
    """Wait for what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def torch_name(device: torch.device) -> str:
    """The device in words, with the version that drives it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
