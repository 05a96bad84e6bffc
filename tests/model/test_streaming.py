"""Models whose blocks stay on disk are scored, searched and exported like any other, within their budget."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from typer.testing import CliRunner

import sleb
from sleb import execution, specs
from sleb.cli.main import app
from sleb.errors import ModelError, OptionError, ScoringError
from sleb.model import streaming
from sleb.model.block_stack import BlockStack
from sleb.model.identity import weights_hash
from sleb.model.loading import LoadedModel, load_model
from sleb.model.streaming import StreamedBlocks, streamed_blocks
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import job_processes
from sleb.scoring.scorer import Scorer
from sleb.scoring.self_check import self_check
from tests.support import tiny
from tests.support.families import build, token_ids
from tests.support.paths import ROOT
from tests.support.streamed import saved, tight

NAMED_AS_ON_DISK = ["llama", "gemma3", "opt", "qwen3"]
CHANGED_WHILE_LOADING = ["mixtral", "qwen3-moe"]


class Alive:
    """The weights that were read from files, and which of them are still in memory, held by anything."""

    def __init__(self) -> None:
        self.peak = 0
        self._read: list[tuple[StorageWeakRef, int]] = []

    def read(self, tensor: torch.Tensor) -> None:
        self._read.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        self.look()

    def look(self) -> int:
        """Bytes in memory now."""
        self._read = [each for each in self._read if not each[0].expired()]
        now = sum(size for _, size in self._read)
        self.peak = max(self.peak, now)
        return now


PACES = ["as it comes", "reading is slow", "computing is slow"]


@contextlib.contextmanager
def paced(pace: str, blocks: StreamedBlocks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Alive]:
    """Within it reading begins once somebody waits for it, or computing waits until reading is done."""
    alive, requested = Alive(), threading.Event()
    fetch, put, forget = blocks._fetch, blocks._put, blocks.forget

    class File:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._opened = streaming_open(*args, **options)

        def __enter__(self) -> File:
            self._file = self._opened.__enter__()
            return self

        def __exit__(self, *why: object) -> None:
            self._opened.__exit__(*why)

        def get_tensor(self, key: str) -> torch.Tensor:
            if pace == "reading is slow" and threading.current_thread() is not threading.main_thread():
                assert requested.wait(60)
            tensor = self._file.get_tensor(key)
            alive.read(tensor)
            return tensor

    def while_asking(action: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            requested.set()
            try:
                return action(*args)
            finally:
                requested.clear()

        return ask

    def let_go(block: int, tensors: list[torch.Tensor] | None) -> None:
        if tensors is None and pace == "computing is slow" and blocks._coming is not None:
            wait([blocks._coming.done], 60)  # it has read as far ahead as it will
        alive.look()
        put(block, tensors)

    streaming_open = streaming.safe_open
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "safe_open", File)
        patched.setattr(blocks, "_fetch", while_asking(fetch))
        patched.setattr(blocks, "forget", while_asking(forget))
        patched.setattr(blocks, "_put", let_go)
        yield alive
        blocks.forget()


def opened(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    resident = load_model(str(folder), dtype="float32", device="cpu")
    streamed = load_model(str(folder), dtype="float32", device="cpu", memory_budget=tight(resident))
    assert streamed_blocks(streamed.model) is not None
    assert streamed_blocks(resident.model) is None
    return resident, streamed


def short(text_file: Path) -> dict[str, Any]:
    """Arguments of a search that takes a moment."""
    return dict(calibration=str(text_file), sequences=2, sequence_length=16, remove=1, dtype="float32")


@pytest.mark.parametrize("family", NAMED_AS_ON_DISK + CHANGED_WHILE_LOADING)
def test_streamed_blocks_score_as_resident_ones(family: str, tmp_path: Path) -> None:
    resident, streamed = opened(saved(tmp_path / "model", family))
    assert weights_hash(streamed.model) == weights_hash(resident.model)
    stacks = [BlockStack(each.model) for each in (resident, streamed)]
    ids = token_ids(resident.model, batch=5, length=12).numpy()
    check = self_check(stacks[1], range(1, 7), ids)
    assert check.scoring == "sweep", check.reason
    assert check.max_difference is not None
    assert check.max_difference < 1e-5
    skip_sets = [(), (1,), (3,), (1, 4), (6,)]
    result = [Scorer(stack, ids, batch_size=2).score(skip_sets, np.arange(5)) for stack in stacks]
    np.testing.assert_array_equal(*result)
    diverged = [Scorer(stack, ids, batch_size=2).diverge(skip_sets, np.arange(5)) for stack in stacks]
    np.testing.assert_array_equal(*diverged)


@pytest.mark.parametrize("pace", PACES)
def test_a_block_is_read_once_a_round_and_not_where_everybody_skips_it(
    pace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    stack = BlockStack(streamed.model)
    blocks = stack.streamed
    assert blocks is not None
    blocks.spare_bytes = 10**9  # all in one round
    scorer = Scorer(stack, token_ids(streamed.model, batch=6, length=12).numpy(), batch_size=2)
    with paced(pace, blocks, monkeypatch):
        scorer.score([(0, 2), (1, 2)], np.arange(6))  # so that block 0 is the one that was read ahead
        before = blocks.bytes_read
        scorer.score([(0, 2), (1, 2)], np.arange(6))
        assert blocks.bytes_read - before == sum(blocks.block_bytes(block) for block in range(12) if block != 2)
    assert all(parameter.is_meta for block in stack.blocks for parameter in block.parameters())


def test_a_forward_pass_does_not_read_blocks_that_it_skips(tmp_path: Path) -> None:
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    stack, blocks = BlockStack(streamed.model), streamed_blocks(streamed.model)
    assert blocks is not None
    for skipped in ((5, 6), (0, 11), tuple(range(1, 12))):
        blocks.forget()
        before = blocks.bytes_read
        with torch.inference_mode(), stack.skipping(skipped):
            stack.forward(token_ids(streamed.model, batch=2, length=12))
        left = [block for block in range(12) if block not in skipped]
        ahead = left[:1] if len(left) > 1 else []  # for the next pass
        blocks.forget()
        assert blocks.bytes_read - before == sum(blocks.block_bytes(block) for block in left + ahead)


def test_what_is_read_ahead_counts_once_somebody_has_it(tmp_path: Path) -> None:
    """However far the reader has come in the meantime."""
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    blocks = streamed_blocks(streamed.model)
    assert blocks is not None
    blocks.forget()
    before = blocks.bytes_read
    with blocks.resident(0, then=1):
        assert blocks._coming is not None
        wait([blocks._coming.done])
        assert blocks.bytes_read == before + blocks.block_bytes(0)
    with blocks.resident(1, then=2):
        assert blocks.bytes_read == before + blocks.block_bytes(0) + blocks.block_bytes(1)
    blocks.forget()
    assert blocks.bytes_read == before + sum(blocks.block_bytes(block) for block in range(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pace", PACES)
def test_two_blocks_and_a_copy_of_one_weight_are_in_memory_at_most_whoever_is_faster(
    pace: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    model = load_model(str(folder), dtype=dtype, device="cpu", memory_budget=budget if dtype == "float32" else 100_000)
    stack = BlockStack(model.model)
    blocks = stack.streamed
    assert blocks is not None
    ids = token_ids(model.model, batch=6, length=12)
    copied = max(each.shape.numel() for each in stack.blocks[0].parameters()) * 4 if dtype == "bfloat16" else 0
    most = 2 * max(blocks.block_bytes(block) for block in range(12)) + copied
    assert most <= int(blocks.budget * 0.8) - blocks.resident_bytes - blocks.spare_bytes, "what is set aside for them"
    converted = streaming._as
    with paced(pace, blocks, monkeypatch) as alive, monkeypatch.context() as patched:

        def as_(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            made = converted(tensor, dtype)
            if made is not tensor:
                alive.read(made)
            return made

        patched.setattr(streaming, "_as", as_)
        Scorer(stack, ids.numpy(), batch_size=2).score([(), (3,), (3, 4), (7,)], np.arange(6))
        with torch.inference_mode():
            stack.forward(ids)  # outside the sweep: block after block
            with stack.skipping((5, 6)):
                stack.forward(ids)
            with stack.resident(4):  # and with one that somebody holds all along
                stack.forward(ids)
    assert 2 * max(blocks.block_bytes(block) for block in range(12)) <= alive.peak + copied
    assert alive.peak <= most
    assert alive.look() == 0


def test_a_block_is_gone_at_once_although_the_readers_thread_was_not_run_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    blocks = streamed_blocks(streamed.model)
    assert blocks is not None
    blocks.forget()
    on, done = threading.Event(), Future.set_result

    def and_stay(self: Future[Any], result: Any) -> None:
        done(self, result)
        assert on.wait(60)

    with paced("as it comes", blocks, monkeypatch) as alive:
        monkeypatch.setattr(Future, "set_result", and_stay)
        with blocks.resident(3):
            assert alive.look() == blocks.block_bytes(3)
        assert alive.look() == 0
        on.set()


def test_a_third_block_is_refused_and_a_failed_read_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = opened(saved(tmp_path / "model", "llama"))
    blocks = streamed_blocks(streamed.model)
    assert blocks is not None
    with blocks.resident(1, then=2), blocks.resident(4, then=5):
        assert blocks._coming is None
        with pytest.raises(RuntimeError, match="Block 7 would be one more than the 2"), blocks.resident(7):
            pass
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "_as", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError), blocks.resident(6):
            pass
        before = blocks.bytes_read
        blocks._coming = blocks._send_for(8)
        blocks.forget()  # unused, it does not have to succeed
        assert blocks.bytes_read == before
    with blocks.resident(6):
        assert blocks.bytes_read == before + blocks.block_bytes(6)


def test_rounds_are_as_long_as_the_budget_allows(tmp_path: Path) -> None:
    resident, streamed = opened(saved(tmp_path / "model", "llama"))
    blocks = streamed_blocks(streamed.model)
    assert blocks is not None
    ids = token_ids(resident.model, batch=7, length=12).numpy()
    one = 12 * resident.model.config.hidden_size * 4
    blocks.spare_bytes = one * (3 + 2) * 3 + 1  # three skip sets are at most three streams, and two more are in work
    scorer = Scorer(BlockStack(streamed.model), ids, batch_size=1)
    assert scorer.round_size([(1,), (2,), (3,)]) == 3
    expected = Scorer(BlockStack(resident.model), ids, batch_size=1).score([(1,), (2,), (3,)], np.arange(7))
    np.testing.assert_array_equal(scorer.score([(1,), (2,), (3,)], np.arange(7)), expected)
    blocks.spare_bytes = one
    with pytest.raises(ScoringError, match="`memory_budget` leaves"):
        scorer.score([(1,), (2,)], np.arange(7))


def test_the_reference_for_all_candidates_at_once_is_the_plain_forward_pass() -> None:
    """The self-check of streamed models compares with it; here it is compared itself."""
    from sleb.scoring.self_check import _plain_reference, _streamed_reference

    for family in ("llama", "gemma3", "gpt2", "mixtral", "bloom"):
        model = build(family)
        stack, ids = BlockStack(model), token_ids(model, batch=2, length=12)
        with torch.inference_mode():
            (plain, _), (together, _) = (
                reference(stack, range(6), ids) for reference in (_plain_reference, _streamed_reference)
            )
        assert plain.keys() == together.keys()
        for skipped in plain:
            torch.testing.assert_close(plain[skipped], together[skipped], rtol=1e-5, atol=1e-4)


def test_a_model_whose_blocks_share_state_is_refused(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "gemma4-shared-kv", num_blocks=12)
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    with pytest.raises(ModelError, match="cannot be streamed block by block"):
        sleb.search(str(folder), **short(text_file), memory_budget=budget)


def test_what_does_not_fit_or_cannot_be_streamed_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(OptionError, match=r"too small .* in float32: .* `memory_budget=[\d.]+kB` or more") as refusal:
        load_model(str(folder), dtype="float32", device="cpu", memory_budget=20_000)
    enough = float(str(refusal.value).rpartition("kB`")[0].rpartition("=")[2]) * 1e3
    assert streamed_blocks(load_model(str(folder), dtype="float32", memory_budget=int(enough)).model) is not None
    assert streamed_blocks(load_model(str(folder), dtype="float32", memory_budget=10**9).model) is None
    for more in ({"processes": 2}, {"memory_budget": 10**9}):
        with pytest.raises(OptionError, match="`device=all` keeps one complete model"):
            sleb.search(str(folder), device="all", **more)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises((OptionError, ModelError)):
        load_model(str(tmp_path / "model.gguf"), memory_budget=10**9)


def test_a_shard_that_is_missing_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    sorted(folder.glob("model-*.safetensors"))[2].unlink()
    with pytest.raises(ModelError):
        load_model(str(folder), dtype="float32", device="cpu", memory_budget=budget)


def test_what_accelerate_dispatched_itself_is_scored_the_same(tmp_path: Path) -> None:
    """`device_map="auto"` with more than one device, here the CPU and the disk."""
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "model", "llama")
    resident = load_model(str(folder), dtype="float32", device="cpu")
    surroundings = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = dict.fromkeys(surroundings, "cpu")
    places |= {f"model.layers.{block}": "disk" if block % 3 == 1 else "cpu" for block in range(12)}
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    ids = token_ids(resident.model, batch=3, length=12).numpy()
    skip_sets = [(), (1,), (2, 4)]
    before, dispatched = (
        Scorer(BlockStack(each), ids, batch_size=2).score(skip_sets, np.arange(3))
        for each in (resident.model, model.eval())
    )
    np.testing.assert_array_equal(dispatched, before)


WITHIN = """
import json, resource, sys, threading, time
sys.path.insert(0, {root!r})
import accelerate, datasets, scipy.special, torch, sleb, sleb.worker
from sleb.model.block_stack import BlockStack
from transformers import LlamaForCausalLM

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

sleb.search({warm!r}, calibration={text!r}, sequences=2, sequence_length=16, remove=1, device="cpu", analysis=False)
before, peak, done = anonymous(), 0, False  # what libraries load when they are first used is not the model
def look():
    global peak
    peak = max(peak, anonymous())
def watch():
    while not done:
        look()
        time.sleep(0.002)
advance = BlockStack.advance
def watched(*args):  # at each block as well: how often a thread comes to look depends on the machine
    advance(*args)
    look()
BlockStack.advance = watched
thread = threading.Thread(target=watch)
thread.start()
run = sleb.search(
    {model!r}, calibration={text!r}, sequences=2, sequence_length=24, remove=1, dtype="bfloat16", device="cpu",
    batch_size=1, held_out=1, analysis=False, memory_budget={budget},
)
done = True
thread.join()
proof = sleb.export_model(run, {out!r}, memory_budget={budget}) if {out!r} else None
print(json.dumps({{"grown": peak - before, "list": run.trace.removal_list, "hash": run.stack.weights_hash,
    "sums": [step.calibration.nll_sum for step in run.trace.steps], "proved": bool(proof and proof.passed)}}))
"""


HEAP = """
import ctypes, gc, sys
sys.path.insert(0, {root!r})
import torch
from sleb.model.loading import load_model

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abcdefghi")]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
gc.disable()  # so that what is freed late is freed as late as can be
load_model({warm!r}, dtype="float32", device="cpu")
kept = [torch.empty(1 << 20) for _ in range(4)]
del kept  # from here on glibc takes memory of this size from the heap
before = library.mallinfo2().arena
model = load_model({model!r}, dtype="float32", device="cpu", memory_budget={budget})
print(library.mallinfo2().arena - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what its heap is like")
def test_a_model_that_is_streamed_leaves_no_holes_in_the_heap(tmp_path: Path, tiny_model: Path) -> None:
    """They would be filled by whatever comes later, here and there, until they are as much memory as the model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8
    )
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tiny.tokenizer().save_pretrained(str(folder))
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    code = HEAP.format(root=str(ROOT), warm=str(tiny_model), model=str(folder), budget=on_disk // 3)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < on_disk / 8, f"{int(done.stdout) / 1e6:.0f} MB of {on_disk / 1e6:.0f}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_a_model_three_times_the_budget_is_searched_and_exported_within_it(
    tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(str(folder), max_shard_size="40MB")
    tiny.tokenizer().save_pretrained(str(folder))
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    del model
    budget = on_disk // 3

    def within(budget: int | None, out: str) -> dict[str, Any]:
        code = WITHIN.format(
            root=str(ROOT), warm=str(tiny_model), model=str(folder), text=str(text_file), budget=budget, out=out
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    resident, streamed = within(None, ""), within(budget, str(tmp_path / "out"))
    assert {name: streamed[name] for name in ("list", "sums", "hash")} == {
        name: resident[name] for name in ("list", "sums", "hash")
    }
    # In memory, weights are pages of mapped files, and no anonymous memory: what is left are kernels' caches.
    libraries = resident["grown"]
    assert libraries < on_disk / 4
    assert streamed["grown"] - libraries <= budget, f"{streamed['grown'] / 1e6:.0f} MB of {budget / 1e6:.0f}"
    assert streamed["proved"]
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= budget / 2


def test_a_streamed_run_is_analysed_but_does_not_generate(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(folder), dtype="float32", device="cpu"))
    settings: dict[str, Any] = {"calibration": str(text_file), "sequences": 2, "sequence_length": 16}
    run = sleb.analyze(str(folder), memory_budget=budget, dtype="float32", **settings)
    assert run.analysis is not None
    assert run.analysis.alignment.generated is None
    assert "read from disk" in (run.analysis.alignment.generated_reason or "")
    assert run.jobs[-1].attempt is not None
    assert run.jobs[-1].attempt.memory_budget == budget


def test_a_resumed_run_keeps_the_budget_of_the_last_try(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    run = run_folder.create(specs.run_spec(str(folder), **short(text_file), analysis=False))
    job_processes.next_job(run, specs.job_spec("search", processes=2, memory_budget=300_000))
    run = run_folder.load(run.run_dir)
    assert execution.as_before(run, None, None) == (2, 300_000)
    assert execution.as_before(run, 1, 400_000) == (1, 400_000)
    done = CliRunner().invoke(app, ["resume", str(run.run_dir), "--processes=1", "--prepare"])
    assert done.exit_code == 0, done.output
    result = job_folder.load_job(Path(done.stdout.strip())).spec
    assert (result.processes, result.memory_budget) == (1, 300_000)
