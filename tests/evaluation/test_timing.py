"""`sleb benchmark`: what is timed, in which order, what is kept; never how long it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sleb
from sleb import api, execution
from sleb.errors import ModelError, OptionError, ScoringError
from sleb.evaluation import request
from sleb.model.block_stack import find_stack
from sleb.records import BenchmarkSpec, Progress, RemovalList, Timing
from sleb.runtime import findings_folder
from sleb.runtime.processes.progress import Watcher
from tests.support import tiny
from tests.support.command import run
from tests.support.families import HEADS, HIDDEN, KV_HEADS, MIXED, POSITIONS, WINDOW, build

HEAD_DIM, FLOAT = HIDDEN // HEADS, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model on disk, made once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(tmp_path_factory.mktemp("model") / family, family)
        return made[family]

    return of


def ask(
    model: Path, *lists: RemovalList, watcher: Watcher | None = None, **settings: Any
) -> tuple[list[Timing], sleb.Run]:
    """Time these lists; the same run for the same model."""
    run = request.subject_run(str(model), [], dtype="float32")
    shapes: dict[str, Any] = dict(prompt=(2, 16), generation=(3, 4), generation_prompt=5)
    counts = dict(prompt_repetitions=2, generation_repetitions=1)
    job = request.job_of(request.ask_of(BenchmarkSpec, lists=lists, **(shapes | counts | settings)), device="cpu")
    done = execution.execute(run, job, watcher)
    return findings_folder.of_kind(request.answers(done), Timing), done


@contextmanager
def watched_forwards() -> Iterator[list[tuple[int, ...]]]:
    """Blocks in the order they ran, a tuple for each pass through a model; a block is known by its first weight."""
    passes: list[list[int]] = []

    def begins(module: nn.Module, _args: Any) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            passes.append([])
            alive.append(module)  # so that no later one is taken for it
            current[:] = find_stack(module)[1]
        elif any(module is block for block in current):
            passes[-1].append(next(module.parameters()).data_ptr())

    alive: list[nn.Module] = []
    current: list[nn.Module] = []
    named: list[tuple[int, ...]] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(begins)
    try:
        yield named
    finally:
        handle.remove()
        whole = next(each for each in passes if len(each) == 6)  # the first pass is of the baseline
        named.extend(tuple(whole.index(block) for block in each) for each in passes)


ALL = tuple(range(6))


@pytest.mark.parametrize(
    ("family", "removal_list"),
    [("llama", (1, 3)), ("gemma3", (0, 4)), ("mamba", (2,)), ("jamba", (0, 3)), ("mixtral", (5,))],
)
def test_what_is_timed_is_the_list_with_its_blocks_really_gone(
    family: str, removal_list: RemovalList, folder: Callable[[str], Path]
) -> None:
    with watched_forwards() as passes:
        timings, _ = ask(folder(family), removal_list, generation=None)
    kept = tuple(block for block in ALL if block not in removal_list)
    # One dummy each, then two rounds, the second in the opposite order of the first.
    assert passes[-6:] == [ALL, kept, kept, ALL, ALL, kept]
    (timing,) = timings
    assert timing.removal_list == removal_list
    assert timing.gone
    assert (timing.shape, timing.sequences, timing.tokens, timing.prompt_tokens) == ("prompt", 2, 16, 0)
    assert len(timing.times) == len(timing.baseline_times) == 2
    assert min(*timing.times, *timing.baseline_times) > 0
    assert timing.proportional == 6 / len(kept)
    model = build(family)
    _, blocks = find_stack(model)
    removed = sum(each.numel() for block in removal_list for each in blocks[block].parameters())
    assert timing.baseline_parameters == sum(each.numel() for each in model.parameters())
    assert timing.parameters == timing.baseline_parameters - removed
    assert timing.peak_memory is None  # a CPU's is unknown


def test_all_lists_take_turns_within_each_round_and_share_the_baseline(folder: Callable[[str], Path]) -> None:
    with watched_forwards() as passes:
        timings, _ = ask(folder("llama"), (1,), (1, 3), generation=None, prompt_repetitions=3)
    one, two = (0, 2, 3, 4, 5), (0, 2, 4, 5)
    forth = [ALL, one, two]
    assert passes[-12:] == [*forth, *reversed(forth), *forth, *reversed(forth)]
    assert [each.removal_list for each in timings] == [(1,), (1, 3)]
    assert timings[0].baseline_times == timings[1].baseline_times
    assert timings[0].times != timings[1].times


def test_generation_has_as_many_tokens_as_asked_whatever_ends_a_sentence(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = list(range(128))  # every token would be the last one
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(str(tmp_path / "model"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "model"))
    with watched_forwards() as passes:
        (timing,), _ = ask(tmp_path / "model", (1, 3), prompt=None, generation=(3, 7), generation_prompt=5)
    kept = (0, 2, 4, 5)
    assert passes[-28:] == [ALL] * 7 + [kept] * 7 + [kept] * 7 + [ALL] * 7
    assert (timing.shape, timing.sequences, timing.tokens, timing.prompt_tokens) == ("generation", 3, 7, 5)


def attention_bytes(sequences: int, tokens: int, blocks: int) -> int:
    return 2 * blocks * KV_HEADS * HEAD_DIM * sequences * tokens * FLOAT  # keys and values


def test_cache_bytes_are_those_that_the_shapes_give(folder: Callable[[str], Path]) -> None:
    (prompt, generation), _ = ask(folder("llama"), (1, 3))
    assert prompt.baseline_cache_bytes == attention_bytes(2, 16, 6)
    assert prompt.cache_bytes == attention_bytes(2, 16, 4)
    read = 5 + 4 - 1  # the last token that is generated is not read any more
    assert generation.baseline_cache_bytes == attention_bytes(3, read, 6)
    assert generation.cache_bytes == attention_bytes(3, read, 4)

    (prompt, generation), _ = ask(folder("gemma3"), (1, 3))
    sliding = [kind == "sliding_attention" for kind in MIXED]
    for timings, tokens in ((prompt, 16), (generation, read)):
        each = [
            attention_bytes(timings.sequences, min(tokens, WINDOW - 1) if short else tokens, 1) for short in sliding
        ]
        assert timings.baseline_cache_bytes == sum(each)
        assert timings.cache_bytes == sum(size for block, size in enumerate(each) if block not in (1, 3))

    (prompt, generation), _ = ask(folder("mamba"), (2,))
    for timings in (prompt, generation):  # a state of convolution and one of recurrence, however long the text
        state = timings.sequences * 2 * HIDDEN * (4 + 8) * FLOAT
        assert (timings.baseline_cache_bytes, timings.cache_bytes) == (6 * state, 5 * state)


def test_where_a_family_cannot_lose_a_block_it_is_skipped_and_the_finding_says_so(
    folder: Callable[[str], Path],
) -> None:
    timings, run = ask(folder("jamba"), (2,), (0,))
    removed = {(each.removal_list, each.shape): each.gone for each in timings}
    assert removed == {((2,), "prompt"): False, ((2,), "generation"): False, ((0,), "prompt"): True} | {
        ((0,), "generation"): True
    }
    for each in timings:
        assert (each.parameters == each.baseline_parameters) is not each.gone
        assert each.cache_bytes < each.baseline_cache_bytes  # a block that does not run writes nothing
    assert {each.question for each in findings_folder.findings(run.run_dir)} == {each.question for each in timings}


def test_the_unmodified_model_alone(folder: Callable[[str], Path]) -> None:
    (prompt, generation), _ = ask(folder("llama"))
    for each in (prompt, generation):
        assert each.removal_list == ()
        assert each.times == each.baseline_times
        assert (each.speedup, each.proportional) == (1.0, 1.0)


def test_what_is_known_is_not_measured_again(folder: Callable[[str], Path]) -> None:
    first, _ = ask(folder("llama"), (1, 3), prompt_repetitions=3)
    with watched_forwards() as passes:
        again, _ = ask(folder("llama"), (1, 3), prompt_repetitions=2)
    assert again == first
    assert not any(len(each) == 4 for each in passes)  # the model was opened, and nothing else
    more, run = ask(folder("llama"), (1, 3), prompt_repetitions=4)
    assert [len(each.times) for each in more] == [4, 1]
    assert more[1] == first[1]
    assert len(findings_folder.findings(run.run_dir)) == 2  # in place of what there was
    with watched_forwards() as passes:
        both, _ = ask(folder("llama"), (1, 3), (2,), prompt_repetitions=4)
    assert both[0] == more[0]
    assert {len(each) for each in passes} == {5, 6}
    longer, run = ask(folder("llama"), (1, 3), generation=(3, 4), generation_prompt=6, prompt=None)
    assert longer[0].question != first[1].question  # after another prompt
    assert len(findings_folder.findings(run.run_dir)) == 5


class Stopping(Watcher):
    """Ctrl-C when generation has begun."""

    def progress(self, progress: Progress) -> None:
        if progress.phase.startswith("Generating"):
            raise KeyboardInterrupt


def test_a_stopped_benchmark_keeps_the_shape_that_was_done_and_begins_the_other_anew(
    folder: Callable[[str], Path],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(folder("llama"), (1, 3), watcher=Stopping())
    run = request.subject_run(str(folder("llama")), [], dtype="float32")
    (prompt,) = findings_folder.of_kind(findings_folder.findings(run.run_dir), Timing)
    assert prompt.shape == "prompt"
    timings, _ = ask(folder("llama"), (1, 3))
    assert timings[0] == prompt
    assert [each.shape for each in timings] == ["prompt", "generation"]


def test_out_of_memory_is_a_sentence_and_what_was_done_stays(folder: Callable[[str], Path]) -> None:
    sentence = r"Out of memory with `generation=100000000000000x4`; lower it, to 50000000000000x4 for one"
    with pytest.raises(ScoringError, match=sentence):
        ask(folder("llama"), (1, 3), generation=(10**14, 4))  # more than a processor can address
    run = request.subject_run(str(folder("llama")), [], dtype="float32")
    assert [each.shape for each in findings_folder.of_kind(findings_folder.findings(run.run_dir), Timing)] == ["prompt"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"prompt": (1, POSITIONS + 1)},
            r"`prompt=1x129`: the model has 128 positions, fewer .*give `prompt=1x128` or",
        ),
        (
            {"generation": (2, 100), "generation_prompt": 40},
            r"`generation=2x100` after a prompt of 40 tokens: the model has 128 positions; give `generation=2x89` or",
        ),
        ({"generation_prompt": 129}, r"after a prompt of 129 tokens: .* lower `generation_prompt`"),
        ({"prompt": None, "generation": None}, r"Nothing to measure: give `prompt` or `generation`"),
        ({"prompt": (0, 16)}, r"prompt.*found 0"),
        ({"generation": (1, -1)}, r"generation.*found -1"),
        ({"generation_repetitions": 0}, r"generation.repetitions.*found 0"),
    ],
)
def test_bad_input_is_one_sentence(settings: dict[str, Any], sentence: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(OptionError, match=sentence):
        ask(folder("llama"), (1, 3), **settings)


def test_every_position_may_be_used(folder: Callable[[str], Path]) -> None:
    timings, _ = ask(
        folder("llama"), (1,), prompt=(1, POSITIONS), generation=(1, 4), generation_prompt=POSITIONS - 3,
        prompt_repetitions=1,
    )  # fmt: skip
    assert [each.baseline_cache_bytes for each in timings] == [attention_bytes(1, POSITIONS, 6)] * 2


def test_a_model_that_stays_on_disk_is_not_timed(tmp_path: Path) -> None:
    from sleb.model.loading import load_model
    from tests.support.streamed import saved, tight

    model = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(model), dtype="float32", device="cpu"))
    with pytest.raises(OptionError, match=r"read from disk block by block .*Leave .*memory.budget"):
        api.benchmark(str(model), removal_list=[1], dtype="float32", device="cpu", memory_budget=budget)


def test_a_family_that_cannot_generate_with_the_blocks_skipped_is_said(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "rwkv", "rwkv")
    with pytest.raises(
        ModelError, match=r"^1 of 6 blocks removed: Rwkv.* cannot generate .*`generation=none` times the"
    ):
        ask(model, (0,), prompt=None)


def test_the_speedup_is_of_what_ran_at_the_same_time() -> None:
    facts: dict[str, Any] = dict(removal_list=(1,), dtype="float32", device="cpu", seconds=1.0, finished=0.0, host="h")
    counts: dict[str, Any] = dict(baseline_cache_bytes=2, cache_bytes=1, baseline_parameters=2, parameters=1, threads=1)
    shape: dict[str, Any] = dict(shape="prompt", sequences=1, tokens=8, proportional=1.2)
    busy = Timing(**facts, **counts, **shape, baseline_times=(2.0, 6.0, 2.4, 2.2), times=(1.0, 3.0, 1.0, 4.4))
    assert busy.ratios == [2.0, 2.0, 2.4, 0.5]
    assert busy.speedup == 2.0  # of the medians: 2.3 / 2.0
    low, high = busy.spread
    assert (low, high) == (1.625, 2.1)
    once = busy.model_copy(update={"baseline_times": (3.0,), "times": (2.0,)})
    assert (once.speedup, once.spread) == (1.5, (1.5, 1.5))


def command(*words: object) -> str:
    return run("benchmark", *words)[0]


def test_on_the_command_line(folder: Callable[[str], Path]) -> None:
    words = [folder("llama"), "--removal-list", "[3, 1]", "--dtype", "float32", "--device", "cpu", "--prompt", "1x16"]
    words += ["--generation", "2x4", "--generation-prompt", 6, "--prompt-repetitions", 2, "--generation-repetitions", 2]
    timings = json.loads(command(*words, "--json"))["findings"]
    assert [(each["shape"], each["sequences"], each["tokens"], each["prompt_tokens"]) for each in timings] == [
        ("prompt", 1, 16, 0),
        ("generation", 2, 4, 6),
    ]
    printed = command(*words)
    assert "Reading a prompt: 1 x 16 tokens on cpu (1 thread), float32, median of 2 repetitions" in printed
    assert "Generating: 2 x 4 tokens after prompts of 6 on cpu" in printed
    assert "2: 1, 3" in printed
    assert "1.50x" in printed  # by blocks: six of which four stay
    alone = command(words[0], *words[3:], "--removal-list", "[]")
    assert "none" in alone
    assert "→" not in alone
    refused = run("benchmark", folder("llama"), "--removal-list", "[1]", "--prompt", "long", code=2)[1]
    assert "--prompt takes sequences x tokens such as 1x2048, or none; found 'long'" in refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_list_is_without_the_baselines_weights(folder: Callable[[str], Path]) -> None:
    run = request.subject_run(str(folder("llama")), [], dtype="float32")
    spec = request.ask_of(BenchmarkSpec, lists=((1, 3),), prompt=(2, 16), generation=None, prompt_repetitions=2)
    done = execution.execute(run, request.job_of(spec, device="cuda:0"))
    (timing,) = findings_folder.of_kind(request.answers(done), Timing)
    assert timing.threads is None
    assert timing.device == torch.cuda.get_device_name(0)
    assert timing.peak_memory is not None
    assert timing.baseline_peak_memory is not None
    removed = (timing.baseline_parameters - timing.parameters) * FLOAT
    assert timing.baseline_peak_memory - timing.peak_memory >= removed
