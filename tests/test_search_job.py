"""Whole runs on tiny models, in process: what the worker writes, resumes, refuses and warns of."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sleb
from sleb.errors import BadInput, CalibrationError, ModelError, NotNumbers, OptionError, RunBusy, RunError
from sleb.formats.run_json import summary
from sleb.model.block_stack import BlockStack
from sleb.records import JobState, SearchJob, Step
from sleb.runtime import job_folder, origin, trace_file
from sleb.runtime.processes import job_processes
from sleb.runtime.processes.progress import Meter, Watcher
from sleb.scoring.plain_pass import plain_nll
from sleb.text import calibration
from tests.support import tiny
from tests.support.families import build


def options(text_file: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        calibration=str(text_file), sequences=4, sequence_length=24, remove=2, dtype="float32", analysis=False
    )
    return settings | more


@pytest.fixture
def run(tiny_model: Path, text_file: Path) -> sleb.Run:
    return sleb.search(str(tiny_model), **options(text_file))


def test_a_search_finds_what_an_independent_plain_loop_finds(run: sleb.Run, tiny_model: Path, text_file: Path) -> None:
    """The whole path against forty lines that share nothing with it but the model."""
    assert run.trace is not None
    assert run.stack is not None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = np.array(tokenizer(text_file.read_text()).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    drawn = torch.from_numpy(windows[np.random.default_rng(0).permutation(len(windows))[:5]])
    calibration, held_out = drawn[:4], drawn[4:]
    layers = list(model.model.layers)

    def nats(removed: list[int], batch: torch.Tensor) -> float:
        model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in removed)
        with torch.no_grad():
            logits = model(batch, use_cache=False).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))

    removed: list[int] = []
    for step in run.trace.steps:
        scores = {b: nats([*removed, b], calibration) for b in range(1, 5) if b not in removed}
        for candidate in step.candidates:
            assert candidate.nll_sum == pytest.approx(scores[candidate.block], rel=1e-6)
        removed.append(min(scores, key=scores.__getitem__))
        assert step.removal_list == tuple(removed)
        assert step.calibration.nll_sum == pytest.approx(scores[removed[-1]], rel=1e-6)
        assert step.held_out.nll_sum == pytest.approx(nats(removed, held_out), rel=1e-6)
        assert step.held_out.token_count == 23
    assert run.trace.baseline.calibration.nll_sum == pytest.approx(nats([], calibration), rel=1e-6)


def test_everything_is_in_the_run_folder(run: sleb.Run) -> None:
    names = {str(path.relative_to(run.run_dir)) for path in run.run_dir.rglob("*") if path.is_file()}
    assert {"spec.json", "stack.json", "trace.jsonl", "scores/baseline.npz", "scores/step-0001.npz"} <= names
    assert {"jobs/1-search/spec.json", "jobs/1-search/status.json", "jobs/1-search/attempt.json"} <= names
    assert run.jobs[0].status.state is JobState.FINISHED
    assert run.jobs[0].attempt is not None
    assert run.jobs[0].attempt.versions["torch"] == torch.__version__
    scores = trace_file.read_scores(run.run_dir, "step-0001")
    first = run.trace.steps[0]  # type: ignore[union-attr]
    assert scores["nats"].shape == (4, 4)
    np.testing.assert_allclose(scores["nats"].sum(axis=1), [c.nll_sum for c in first.candidates])
    assert scores["blocks"].tolist() == [c.block for c in first.candidates]
    json.dumps(summary(run), allow_nan=False)


def test_evaluations_are_counted_and_stay_under_the_bound(run: sleb.Run) -> None:
    assert run.trace is not None
    for alive, step in zip((6, 5), run.trace.steps, strict=True):
        assert step.block_evaluations <= (alive**2 + alive) / 2 * 4
        assert step.head_evaluations == (alive - 2) * 4 + 1  # and the held-out sequence
    assert run.trace.block_evaluations == 6 * 5 + sum(step.block_evaluations for step in run.trace.steps)


def test_progress_ends_at_the_whole_with_a_time_left(tiny_model: Path, text_file: Path) -> None:
    heard: list[Any] = []

    class Listening(Watcher):
        def progress(self, progress: Any) -> None:
            heard.append(progress)

        def step(self, step: Step, baseline: Any) -> None:
            heard.append(step)

    from sleb import worker

    counted = worker.Meter
    total = 0.0

    class Counting(counted):  # type: ignore[misc,valid-type]
        def advance(self, units: float, where: str) -> None:
            nonlocal total
            total += units
            super().advance(units, where)

    worker.Meter = Counting  # type: ignore[misc]
    try:
        sleb.search(str(tiny_model), **options(text_file), watcher=Listening())
    finally:
        worker.Meter = counted  # type: ignore[misc]
    steps = [item for item in heard if isinstance(item, Step)]
    assert len(steps) == 2
    assert {item.phase for item in heard if not isinstance(item, Step)} >= {"Loading the model", "Searching"}
    assert total > 0


@pytest.mark.parametrize("method", ["metric3", "metric2", "metric1", "early-exit", "best-chunk"])
def test_the_forecast_of_work_is_what_is_done(method: str, tiny_model: Path, text_file: Path) -> None:
    """What the ETA is made of: forecast units against units really advanced."""
    seen: dict[str, float] = {"done": 0.0}
    original_expect, original_advance = Meter.expect, Meter.advance

    def expect(self: Any, units: float, *rest: int) -> None:
        seen["total"] = units
        original_expect(self, units, *rest)

    def advance(self: Any, units: float, where: str) -> None:
        seen["done"] += units
        original_advance(self, units, where)

    Meter.expect, Meter.advance = expect, advance  # type: ignore[method-assign]
    try:
        sleb.search(str(tiny_model), **options(text_file, method=method, remove=3))
    finally:
        Meter.expect, Meter.advance = original_expect, original_advance  # type: ignore[method-assign]
    assert seen["done"] == pytest.approx(seen["total"], rel=0.15)


def test_methods_differ_only_in_how_they_choose(tiny_model: Path, text_file: Path) -> None:
    model = build("llama")
    stack = BlockStack(model)
    for method in ("metric3", "metric2", "metric1", "early-exit", "best-chunk"):
        run = sleb.search(str(tiny_model), **options(text_file, method=method))
        assert run.trace is not None
        assert [len(step.removal_list) for step in run.trace.steps] == [1, 2]
        if method in ("early-exit", "best-chunk"):
            assert run.stack is not None
            assert run.stack.protected == ()
        ids = _ids(run)
        for step in run.trace.steps:
            with torch.inference_mode():
                plain = float(plain_nll(stack, step.removal_list, ids[:4]).sum())
            assert step.calibration.nll_sum == pytest.approx(plain, rel=1e-6), method


def _ids(run: sleb.Run) -> torch.Tensor:
    from sleb.text.calibration import build

    text = build(run.spec.calibration, run.spec.held_out, run.spec.seed, tiny.tokenizer(), 128)
    return torch.from_numpy(text.ids)


def test_resuming_a_finished_run_returns_it(run: sleb.Run) -> None:
    before = (run.run_dir / "trace.jsonl").read_bytes()
    again = sleb.resume(run)
    assert again.trace == run.trace
    assert len(again.jobs) == 1
    assert (run.run_dir / "trace.jsonl").read_bytes() == before


def test_a_stopped_search_resumes_where_it_was(
    tiny_model: Path, text_file: Path, run: sleb.Run, tmp_path: Path
) -> None:
    class Stopping(Watcher):
        def step(self, step: Step, baseline: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sleb.search(str(tiny_model), **options(text_file), run_dir=tmp_path / "run", watcher=Stopping())
    stopped = sleb.load(tmp_path / "run")
    assert len(stopped.trace.steps) == 1  # type: ignore[union-attr]
    assert stopped.jobs[-1].status.state is JobState.STOPPED
    line = (tmp_path / "run" / "trace.jsonl").read_bytes()
    done = sleb.resume(stopped)
    assert (tmp_path / "run" / "trace.jsonl").read_bytes().startswith(line)
    _assert_same(done, run)


def test_a_run_whose_weights_or_text_changed_is_not_continued(
    tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_model, model)
    shutil.copy(text_file, text)

    class Stopping(Watcher):
        def baseline(self, baseline: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sleb.search(str(model), **options(text), run_dir=tmp_path / "run", watcher=Stopping())
    text.write_text(tiny.text(seed=9))
    with pytest.raises(RunError, match="calibration text"):
        sleb.resume(tmp_path / "run")
    shutil.copy(text_file, text)
    tiny.save(model, seed=5)
    with pytest.raises(RunError, match="weights"):
        sleb.resume(tmp_path / "run")
    shutil.rmtree(model)
    shutil.copytree(tiny_model, model)
    assert len(sleb.resume(tmp_path / "run").trace.steps) == 2  # type: ignore[union-attr]


def test_a_run_of_another_process_is_not_touched(run: sleb.Run) -> None:
    job = job_folder.create_job(run.run_dir, SearchJob())
    with job_processes.executing(job.directory), pytest.raises(RunBusy):
        sleb.export_model(run, "anywhere")


def test_ratio_until_and_protection(tiny_model: Path, text_file: Path) -> None:
    run = sleb.search(str(tiny_model), **options(text_file, remove=None, ratio=0.2))
    assert len(run.removal_list) == 2  # 0.2 of 6, rounded up
    assert run.stack.protected == (0, 5)  # type: ignore[union-attr]
    run = sleb.search(str(tiny_model), **options(text_file, remove=1, protect=[1, 2, 3, 4]))
    assert run.removal_list[0] in (0, 5)
    run = sleb.search(str(tiny_model), **options(text_file, remove=None, until_perplexity=1e6))
    assert len(run.removal_list) == 4
    run = sleb.search(str(tiny_model), **options(text_file, remove=None, until_perplexity=0.0))
    assert run.trace is not None
    for step in run.trace.steps:
        assert (step.held_out.perplexity or 0) <= (run.trace.baseline.held_out.perplexity or 0)
    assert "would raise" in (run.trace.finished or "") or len(run.trace.steps) == 4


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(remove=7), OptionError, "Lower `remove`"),
        (dict(remove=5), OptionError, "2 protected"),
        (dict(remove=None, ratio=1.5), OptionError, "ratio"),
        (dict(remove=0), OptionError, "remove"),
        (dict(remove=2, ratio=0.5), OptionError, "not both"),
        (dict(protect=list(range(6))), OptionError, "All 6 blocks are protected"),
        (dict(protect=[0, 6]), OptionError, "block 6"),
        (dict(protect=[0, 0]), OptionError, "twice"),
        (dict(protect=[-1]), OptionError, "block -1"),
        (dict(method="metric4"), OptionError, "metric3"),
        (dict(device="tpu"), OptionError, "device"),
        (dict(device="cuda:99"), OptionError, "CUDA devices"),
        (dict(sequences=100_000), CalibrationError, "Lower `sequences`"),
        (dict(sequence_length=4096), CalibrationError, "128 positions"),
        (dict(sequence_length=1), OptionError, "sequence.length"),
        (dict(sequences=0), OptionError, "sequences"),
        (dict(batch_size=0), OptionError, "batch.size"),
        (dict(confidence=1.0), OptionError, "confidence"),
        (dict(until_perplexity=0.1, held_out=0), OptionError, "held.out"),
        (dict(calibration="no/such.txt"), CalibrationError, "no file"),
        (dict(calibration="no-such-set-anywhere"), CalibrationError, "could not be loaded"),
        (dict(calibration="wikitext2"), CalibrationError, "network"),
        (dict(chat=True), CalibrationError, "`chat`"),
    ],
)
def test_bad_options_are_sentences(
    changes: dict[str, Any], error: type[BadInput], words: str, tiny_model: Path, text_file: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        sleb.search(str(tiny_model), **options(text_file, **changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_predictions_that_are_not_numbers_end_the_search_early(tmp_path: Path, text_file: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    _change_weights(folder, "model.layers.2.mlp.down_proj.weight", float("nan"))
    with pytest.raises(NotNumbers, match=r"^The baseline .*not numbers in float32\. Check the weights\.$"):
        sleb.search(str(folder), **options(text_file))


def test_weights_that_the_checkpoint_lacks_are_not_made_up(tmp_path: Path, text_file: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*layers.3.mlp.up_proj"):
        sleb.search(str(folder), **options(text_file))


def test_a_list_is_not_exported_on_other_weights(tmp_path: Path, text_file: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    run = sleb.search(str(folder), **options(text_file, dtype="bfloat16"))
    _change_weights(folder, "model.layers.2.mlp.down_proj.weight", 9.0)
    with pytest.raises(RunError, match=r"is not the model that run .* the weights are others"):
        sleb.export_model(run, tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_what_appears_at_the_target_meanwhile_is_kept(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sleb.export import proven_folder

    run = sleb.search(str(tiny_model), **options(text_file, remove=1))
    proving = proven_folder.prove

    def slow_proof(*arguments: Any) -> Any:
        proof = proving(*arguments)
        (tmp_path / "smaller").mkdir()
        (tmp_path / "smaller" / "precious.txt").write_text("mine")
        return proof

    monkeypatch.setattr(proven_folder, "prove", slow_proof)
    with pytest.raises(OptionError, match="not empty"):
        sleb.export_model(run, tmp_path / "smaller")
    assert [path.name for path in (tmp_path / "smaller").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "changes", [dict(remove=True), dict(sequences="4"), dict(protect="0,1"), dict(protect=5), dict(seed=-1)]
)
def test_wrong_types_in_a_notebook_are_sentences(changes: dict[str, Any], tiny_model: Path, text_file: Path) -> None:
    with pytest.raises(OptionError):
        sleb.search(str(tiny_model), **options(text_file, **changes))


def test_paths_are_names_too(tiny_model: Path, text_file: Path) -> None:
    made = sleb.search(tiny_model, **options(text_file, remove=1) | {"calibration": text_file})  # type: ignore[arg-type]
    assert len(made.removal_list) == 1
    with pytest.raises(OptionError):
        sleb.export_model(made, "anywhere", steps=1.5)  # type: ignore[arg-type]
    assert sleb.load(made.run_id).jobs[0].status.state is JobState.FINISHED


def _change_weights(folder: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_absurd_baseline_is_warned_of_with_its_likely_cause(
    tiny_model: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = sleb.search(str(tiny_model), **options(text_file, remove=1))
    assert run.trace is not None
    assert "no better than guessing" in run.trace.baseline.warnings[-1]
    assert "no better than guessing" in caplog.text
    assert (run.run_dir / "jobs" / "1-search" / "log.txt").read_text().count("guessing") == 1


def test_a_missing_bos_is_noticed_by_measuring(tmp_path: Path, text_file: Path) -> None:
    """A model that only predicts well behind BOS, as Gemma: the run says so, with both perplexities."""
    from sleb.scoring.scorer import Scorer

    folder = tiny.save(tmp_path / "model")
    honest = Scorer.score

    def as_gemma(self: Scorer, skip_sets: Any, sequences: np.ndarray) -> np.ndarray:
        nats = honest(self, skip_sets, sequences)
        with_bos = self.ids[torch.from_numpy(np.asarray(sequences)), 0].numpy() == 1
        return np.where(with_bos, nats * 0.5, nats)

    Scorer.score = as_gemma  # type: ignore[method-assign]
    try:
        run = sleb.search(str(folder), **options(text_file, remove=1))
    finally:
        Scorer.score = honest  # type: ignore[method-assign]
    assert any("`bos=yes`" in warning and "instead of" in warning for warning in run.trace.baseline.warnings)  # type: ignore[union-attr]


def test_plain_fallback_finishes_and_says_why(tmp_path: Path, text_file: Path) -> None:
    folder = tiny.save(tmp_path / "model", "glm-moe-dsa")
    run = sleb.search(str(folder), **options(text_file))
    assert run.stack is not None
    assert run.stack.self_check.scoring == "plain"
    assert run.stack.self_check.reason
    assert set(run.stack.self_check.protected) <= set(run.stack.protected)
    assert len(run.removal_list) == 2


def test_a_search_includes_both_analyses(tiny_model: Path, text_file: Path) -> None:
    run = sleb.search(str(tiny_model), **options(text_file, analysis=True))
    assert run.analysis is not None
    assert len(run.analysis.similarity.mean) == 7
    assert len(run.analysis.alignment.calibration.agreement) == 6
    alone = sleb.analyze(str(tiny_model), calibration=str(text_file), sequences=4, sequence_length=24, dtype="float32")
    assert alone.trace is None
    assert alone.analysis is not None
    assert alone.analysis.description.cached  # the same model and text: no second pass
    assert alone.analysis.similarity == run.analysis.similarity


def test_models_that_cannot_be_searched(tmp_path: Path, text_file: Path) -> None:
    import transformers as t

    small: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=128)
    cases = {
        "encoder": (t.BertLMHeadModel(t.BertConfig(num_hidden_layers=4, **small)), "causal"),
        "encoder-decoder": (
            t.T5ForConditionalGeneration(
                t.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=128)
            ),
            "encoder-decoder",
        ),
        "one block": (build("llama", num_blocks=1), "1 block"),
        "no language model": (
            t.ViTModel(t.ViTConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)),
            "causal language model",
        ),
    }
    for name, (model, words) in cases.items():
        folder = tmp_path / name
        model.save_pretrained(str(folder))
        tiny.tokenizer().save_pretrained(str(folder))
        with pytest.raises(ModelError, match=words):
            sleb.search(str(folder), **options(text_file))


def test_the_text_part_of_a_multimodal_model_is_searched(tmp_path: Path, text_file: Path) -> None:
    """A vision tower as deep as the language model: the blocks are those a text runs through."""
    import transformers as t

    text = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=128, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    config = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127)
    torch.manual_seed(0)
    model = t.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(str(tmp_path / "model"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "model"))
    run = sleb.search(str(tmp_path / "model"), **options(text_file, remove=1))
    assert run.stack is not None
    assert "language_model" in run.stack.path
    assert run.stack.block_class == "Gemma3DecoderLayer"
    assert len(run.removal_list) == 1
    proof = sleb.export_model(run, tmp_path / "smaller")
    assert proof.passed
    assert proof.blocks_after == 3
    config = t.AutoConfig.from_pretrained(tmp_path / "smaller")
    assert config.text_config.num_hidden_layers == 3
    assert config.vision_config.num_hidden_layers == 4  # as deep as the text was, and untouched


def _assert_same(result: sleb.Run, expected: sleb.Run) -> None:
    assert result.trace is not None
    assert expected.trace is not None
    free = {"seconds": 0.0, "block_evaluations": 0, "head_evaluations": 0}
    assert [s.model_copy(update=free) for s in result.trace.steps] == [
        s.model_copy(update=free) for s in expected.trace.steps
    ]


def test_a_search_by_divergence_removes_what_changes_the_predictions_least(tiny_model: Path, text_file: Path) -> None:
    run = sleb.search(str(tiny_model), **options(text_file, objective="kl", remove=2))
    assert run.trace is not None
    stack = BlockStack(build("llama"))
    ids = _ids(run)[:4]
    for step in run.trace.steps:
        assert {each.objective for each in step.candidates} == {"kl"}
        lowest = min(step.candidates, key=lambda each: each.score_sum or 0.0)
        assert step.removal_list == lowest.skipped
        with torch.inference_mode():
            base = stack.forward(ids)[:, :-1].double().log_softmax(-1)
            with stack.skipping(step.removal_list):
                own = stack.forward(ids)[:, :-1].double().log_softmax(-1)
            plain = float(plain_nll(stack, step.removal_list, ids).sum())
        reference = float(torch.nn.functional.kl_div(own, base, log_target=True, reduction="sum"))
        assert lowest.score_sum == pytest.approx(reference, rel=1e-4)
        assert step.calibration.nll_sum == pytest.approx(plain, rel=1e-6)  # what it costs is a perplexity all the same
    with pytest.raises(OptionError, match="Metric1 compares hidden states"):
        sleb.search(str(tiny_model), **options(text_file, objective="kl", method="metric1"))


@pytest.mark.parametrize("method", ["metric1", "metric2"])
def test_what_is_measured_once_is_counted_once_by_a_search_that_is_resumed(
    method: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    whole = sleb.search(
        str(tiny_model), method=method, remove=3, calibration=str(text_file), sequences=4, sequence_length=24,
        dtype="float32", analysis=False, run_dir=tmp_path / "whole",
    )  # fmt: skip
    shutil.copytree(whole.run_dir, tmp_path / "cut off")
    trace = tmp_path / "cut off" / "trace.jsonl"
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:2]))  # the baseline and a step
    resumed = sleb.resume(tmp_path / "cut off")
    assert whole.trace is not None
    assert resumed.trace is not None
    assert resumed.removal_list == whole.removal_list
    assert resumed.trace.block_evaluations == whole.trace.block_evaluations
    assert resumed.trace.head_evaluations == whole.trace.head_evaluations


def test_a_run_of_an_earlier_version_finds_its_text_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text repeats itself, and its `stack.json` says nothing of how it was drawn."""
    text = tmp_path / "repeats.txt"
    text.write_text(tiny.text(120, 3)[:120] * 40)
    with monkeypatch.context() as then:
        then.setattr(calibration, "DRAWING", 1)
        run = sleb.search(str(tiny_model), **options(text, sequences=8, sequence_length=12))
    assert run.stack is not None
    path = run.run_dir / "stack.json"
    stack = json.loads(path.read_text())
    assert stack.pop("drawing") == 1
    path.write_text(json.dumps(stack))
    trace = run.run_dir / "trace.jsonl"
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:2]))
    origin.sign(run.run_dir)
    resumed = sleb.resume(run.run_dir)
    assert resumed.stack is not None
    assert (resumed.stack.drawing, resumed.stack.tokens_hash) == (1, run.stack.tokens_hash)
    assert resumed.removal_list == run.removal_list
    now = sleb.search(str(tiny_model), **options(text, sequences=8, sequence_length=12))
    assert now.stack is not None
    assert now.stack.drawing == 2
    assert now.stack.tokens_hash != run.stack.tokens_hash
    assert ", 10 of them distinct" in now.stack.text
