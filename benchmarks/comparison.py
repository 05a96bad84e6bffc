"""Other methods that make a model smaller, in one table with removal lists: SparseGPT 2:4, Wanda 2:4, AWQ int4.

    python benchmarks/comparison.py --text wiki.test.raw --calibration wiki.valid.raw [--limit 20] [MODEL]

The other methods are llm-compressor's. It needs other releases than the project, so the command makes an environment
for it (`.venv-comparison/`, some minutes the first time), writes the model there as a folder, has each method run in it
on the same calibration sequences that the search had, and loads the result here. Perplexity is that of the published
WikiText-2 protocol, by the same code as `sleb evaluate`; latency is the time to the first token of a prompt as `sleb
benchmark` takes it, baseline and method in turn. What a machine without the right kernels cannot show is said under the
table.

`--work DIR` keeps what was made (models, a search) and goes on from there the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import list_arguments
import numpy as np
import torch
from list_arguments import say
from torch import nn

import sleb
from sleb.errors import SlebError
from sleb.evaluation import perplexity
from sleb.export.removal import streamlined
from sleb.methods.problem import number_to_remove
from sleb.methods.statistics import measured
from sleb.model.block_stack import BlockStack
from sleb.model.generation import continued
from sleb.model.loading import LoadedModel, forget_quantisation, load_model
from sleb.records import CalibrationSpec
from sleb.scoring.scorer import Scorer
from sleb.text import calibration

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-comparison"
OWN = Path(__file__).resolve().parent / "comparison_env"
OTHERS = {"sparsegpt": "SparseGPT 2:4", "wanda": "Wanda 2:4", "awq": "AWQ int4"}
LARGEST_GROUP = 128  # weights that share a scale in AWQ's paper


@dataclass(frozen=True)
class Row:
    """A method in the table."""

    name: str
    nats: np.ndarray  # (windows,)
    ratios: list[float]
    """Time of the baseline over that of the method, of each repetition."""
    before: float
    """Median seconds of the baseline's prompts beside it."""
    after: float
    """Median seconds of the method's prompts."""
    made_in: float | None
    """Seconds that finding or making it took; None for the baseline."""
    remark: str


def main() -> None:
    """Search, compress, measure, print."""
    parser = list_arguments.parser(__doc__, ratios=[0.1, 0.2])
    parser.add_argument("--methods", nargs="+", choices=list(OTHERS), default=list(OTHERS))
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="keep models and search there, and go on from them")
    args = parser.parse_args()
    try:
        python = environment()
        with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="sleb-comparison.") as work:
            compare(args, Path(work).absolute(), python)
    except (SlebError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"comparison.py: {error}")


def environment() -> Path:
    """The Python of the other methods' environment, made or brought up to date where it is not as required."""
    requirements = OWN / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"Making {ENVIRONMENT.name}/ (llm-compressor and what it needs; some minutes)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "-r", str(requirements)], check=True)
    stamp.write_text(wanted)
    return python


def compare(args: argparse.Namespace, work: Path, python: Path) -> None:
    """All of it. Raises a `SlebError` in one sentence."""
    work.mkdir(parents=True, exist_ok=True)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    stack = BlockStack(loaded.model)
    spec = CalibrationSpec(source=args.calibration, sequences=args.sequences, sequence_length=args.sequence_length)
    text = calibration.build(spec, 0, args.seed, loaded.tokenizer, stack.config.vocab_size)
    windows = perplexity.windows(str(args.text), loaded.tokenizer, stack.config.vocab_size, limit=args.limit)
    prompt = torch.from_numpy(windows.ids[:1, : args.prompt].copy()).to(stack.device)
    threads = f", {torch.get_num_threads()} threads" if stack.device.type == "cpu" else ""
    print(f"{loaded.name}: {len(stack)} blocks, {loaded.dtype} on {loaded.device}{threads}")
    print(f"calibration: {text.text}; {text.sequences} sequences of {args.sequence_length} tokens, seed {args.seed}")
    print(f"test: {windows.text.description}; prompt of {prompt.shape[1]} tokens, {args.repetitions} times", flush=True)

    lists, found_in = searched(args, work, loaded)
    say("scoring the lists")
    nats = perplexity.score(Scorer(stack, windows.ids, batch_size=1), [(), *lists])
    own = in_turn(loaded.model, loaded.model, prompt, args.repetitions)
    rows = [Row("baseline", nats[()], *own, made_in=None, remark=f"{millions(loaded.model)} M parameters")]
    for each in lists:
        say(f"timing the list {list(each)}")
        smaller = streamlined(loaded.model, each)
        rows.append(
            Row(
                f"SLEB, {len(each)} of {len(stack)} blocks",
                nats[each],
                *in_turn(loaded.model, smaller, prompt, args.repetitions),
                made_in=found_in,
                remark=f"{millions(smaller)} M parameters; without {list(each)}",
            )
        )
        del smaller
    group = group_size(stack)
    wanted: list[tuple[str, tuple[int, ...]]] = [(method, ()) for method in args.methods]
    if "awq" in args.methods:
        wanted.append(("awq", lists[-1]))  # as in the paper (4.7): what is left of the model, quantised
    for method, each in wanted:
        name = OTHERS[method] if not each else f"SLEB, {len(each)} of {len(stack)} blocks, and {OTHERS[method]}"
        folder, facts = made(args, work, python, method, each, text.ids, group)
        other = load_model(str(folder), dtype=loaded.dtype, device=args.device)
        say(f"measuring {name}")
        own_nats = perplexity.score(Scorer(BlockStack(other.model), windows.ids, batch_size=1), [()])[()]
        rows.append(
            Row(
                name,
                own_nats,
                *in_turn(loaded.model, other.model, prompt, args.repetitions),
                made_in=facts["seconds"] + (found_in if each else 0),
                remark=f"weights as int4, groups of {group}" if method == "awq" else halved(facts),
            )
        )
        del other
        library = facts["library"]
    show(rows, windows.token_counts)
    notes(args, library if args.methods else None)


def searched(args: argparse.Namespace, work: Path, loaded: LoadedModel) -> tuple[list[tuple[int, ...]], float]:
    """Greedy lists for each ratio, in the order of the stack, and the seconds of the longest search: one serves all."""
    stack = BlockStack(loaded.model)
    counts = [number_to_remove(len(stack), len(stack) - 2, None, ratio) for ratio in sorted(args.ratios)]
    settings = [args.model, args.calibration, args.sequences, args.sequence_length, args.seed, max(counts)]
    folder = work / f"search-{fingerprint([*settings, loaded.dtype])}"
    if folder.is_dir():
        run = sleb.resume(folder)
    else:
        say(f"searching for {max(counts)} blocks")
        run = sleb.search(
            args.model,
            remove=max(counts),
            calibration=args.calibration,
            sequences=args.sequences,
            sequence_length=args.sequence_length,
            held_out=0,
            seed=args.seed,
            dtype=loaded.dtype,  # type: ignore[arg-type]
            device=args.device,
            analysis=False,
            run_dir=folder,
        )
    assert run.trace is not None
    seconds = run.trace.baseline.seconds + sum(step.seconds for step in run.trace.steps)
    return [tuple(sorted(run.trace.steps[count - 1].removal_list)) for count in dict.fromkeys(counts)], seconds


def made(
    args: argparse.Namespace,
    work: Path,
    python: Path,
    method: str,
    removal_list: tuple[int, ...],
    ids: np.ndarray,
    group: int,
) -> tuple[Path, dict[str, Any]]:
    """The folder that a method wrote, and what it said. The model goes there in the type of its checkpoint."""
    name = [args.model, *removal_list]
    source = work / f"model-{fingerprint(name)}"
    if not source.is_dir():
        say("writing the model for the other methods")
        whole = load_model(args.model, dtype="checkpoint", device="cpu")
        forget_quantisation(whole.model)
        partial = source.with_suffix(".partial")
        model: Any = streamlined(whole.model, removal_list) if removal_list else whole.model
        model.save_pretrained(partial)
        whole.tokenizer.save_pretrained(partial)
        partial.rename(source)
        del whole, model
    tokens = source.parent / f"calibration-{hashlib.sha256(ids.tobytes()).hexdigest()[:12]}.npy"
    np.save(tokens, ids)
    out = work / f"{method}-{fingerprint([*name, tokens.name, group])}"
    facts = out / "comparison.json"
    if not facts.is_file():
        say(f"running {OTHERS[method]}" + (f" without {list(removal_list)}" if removal_list else ""))
        shutil.rmtree(out, ignore_errors=True)
        command = [str(python), "-P", str(OWN / "compress.py"), str(source), method, str(tokens), str(out)]
        done = subprocess.run(
            [*command, "--group-size", str(group)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"{OTHERS[method]} failed: {last}")
        facts.write_text(done.stdout.strip().splitlines()[-1])
    return out, json.loads(facts.read_text())


def in_turn(
    baseline: nn.Module, other: nn.Module, prompt: torch.Tensor, repetitions: int
) -> tuple[list[float], float, float]:
    """Ratios of the baseline's seconds to the other's, round by round after one to warm up, and both medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repetitions + 1):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            synchronise(prompt)
            began = time.perf_counter()
            continued((baseline, other)[which], prompt, 1, stop=False)
            synchronise(prompt)
            times[which].append(time.perf_counter() - began)
    before, after = times[0][1:], times[1][1:]
    ratios = [one / two for one, two in zip(before, after, strict=True)]
    return ratios, statistics.median(before), statistics.median(after)


def synchronise(tensor: torch.Tensor) -> None:
    """A GPU's work is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def group_size(stack: BlockStack) -> int:
    """The largest group of int4 weights, halved from the papers' 128, that divides every row in the blocks."""
    rows = {module.in_features for module in stack.blocks.modules() if isinstance(module, nn.Linear)}
    size = LARGEST_GROUP
    while any(row % size for row in rows):
        size //= 2
    return size


def halved(facts: dict[str, Any]) -> str:
    """What a 2:4 method left, as counted in its file."""
    held = "two of every four" if facts["pattern"] else "not two of every four"
    return f"{facts['zeros']:.0%} of the blocks' linear weights are zero, {held}"


def show(rows: Sequence[Row], token_counts: np.ndarray) -> None:
    """The table, in Markdown."""
    print("\n| method | perplexity | nats per token | prompt | speedup (quartiles) | made in | what is left |")
    print("|:---|---:|---:|---:|---:|---:|:---|")
    for row in rows:
        value = measured(row.nats, token_counts).perplexity
        mean, error = perplexity.rise(row.nats, rows[0].nats, token_counts)
        apart = "" if row is rows[0] or mean is None else f"{mean:+.3f} ± {error or 0:.3f}"
        low, middle, high = statistics.quantiles(row.ratios, n=4, method="inclusive")
        speed = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        clock = f"{row.before:.2f} → {row.after:.2f} s"
        took = "" if row.made_in is None else f"{row.made_in:.0f} s"
        shown = "no number" if value is None else f"{value:.2f}"
        print(f"| {row.name} | {shown} | {apart} | {clock} | {speed} | {took} | {row.remark} |")


def notes(args: argparse.Namespace, library: str | None) -> None:
    """Print what the numbers are, and what could not be run."""
    print("\n- Perplexity and its difference to the baseline's are of the same windows, ± one standard error in")
    print("  pairs. One search gave all of SLEB's lists: its seconds are in each of their rows.")
    print("- A prompt's seconds are medians of the baseline's and the method's, taken in turn: they compare only")
    print("  within a row. The baseline against itself shows the noise of the machine.")
    if library is None:
        return
    print(f"- The other methods: {library}, on the same calibration sequences; their papers take 128 of 2048 tokens.")
    if {"sparsegpt", "wanda"} & set(args.methods):
        print(
            "- 2:4: what is timed are dense weights of which half are zero. Zeros save time only in kernels for sparse"
        )
        print("  tensor cores (NVIDIA GPUs from Ampere on), which this command does not use: no speedup was run.")
    if "awq" in args.methods:
        print("- AWQ: perplexity is of the numbers that the int4 weights stand for; what is timed are those numbers in")
        print("  full width. Kernels for int4, which save time where memory is the limit, were not run.")


def millions(model: nn.Module) -> str:
    """Parameters, shared ones once."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}"


def fingerprint(settings: Sequence[object]) -> str:
    """For a name that changes with them."""
    return hashlib.sha256(json.dumps([str(each) for each in settings]).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
