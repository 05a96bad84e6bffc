"""What a run will take: counted exactly, timed by a timing probe; and what a model's files say without loading it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sleb
from sleb import execution, forecast, search_job, specs
from sleb.analysis import token_sample
from sleb.cli import search
from sleb.cli.main import app
from sleb.errors import OptionError, RunError
from sleb.formats import command_line
from sleb.methods.cost_forecast import cost_of_spec
from sleb.model.block_stack import BlockInputs, BlockStack, Stream
from sleb.model.inspection import block_count
from sleb.records import JobState, Method, RunSpec
from sleb.runtime import run_folder, run_index, trace_file
from sleb.runtime.listing import run_list
from sleb.scoring.scorer import head_weight
from tests.support.runs.stores import write_run


def options(text_file: Path, **changes: object) -> dict[str, object]:
    return dict(calibration=str(text_file), sequences=4, sequence_length=32, held_out=2, dtype="float32") | changes


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        *((method, "nll") for method in Method),
        (Method.METRIC3, "kl"),
        (Method.METRIC2, "kl"),
        (Method.BEST_CHUNK, "kl"),
    ],
)
def test_evaluations_are_counted_exactly_before_a_search(
    method: Method, objective: str, tiny_model: Path, text_file: Path
) -> None:
    settings = options(text_file, method=method, objective=objective, remove=3, analysis=False)
    spec = specs.run_spec(str(tiny_model), **settings)  # type: ignore[arg-type]
    cost, removing = cost_of_spec(spec, 6)
    run = sleb.search(str(tiny_model), **settings)  # type: ignore[arg-type]
    assert run.trace is not None
    assert removing == len(run.trace.steps) == 3
    assert (cost.block_evaluations, cost.head_evaluations) == (
        run.trace.block_evaluations,
        run.trace.head_evaluations,
    )


def test_a_list_that_cannot_be_is_said_before_anything_is_counted() -> None:
    with pytest.raises(OptionError, match="Asked to remove 11 of 12"):
        cost_of_spec(RunSpec(model="x", num_remove=11), 12)


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tiny_model: Path, text_file: Path, home: Path) -> None:
    arguments = ["search", str(tiny_model), "--calibration", str(text_file), "--sequences=4", "--sequence-length=32"]
    done = CliRunner().invoke(app, [*arguments, "--remove=2", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    cost, _ = cost_of_spec(RunSpec(model="x", num_remove=2, calibration={"sequences": 4}), 6)  # type: ignore[arg-type]
    assert (result["num_blocks"], result["num_remove"]) == (6, 2)
    assert result["block_evaluations"] == cost.block_evaluations
    assert (
        0
        < result["search_seconds"]
        == pytest.approx(
            (cost.block_evaluations + result["head_weight"] * cost.head_evaluations) * result["seconds_per_unit"]
        )
    )
    assert result["loading_seconds"] > 0
    assert result["analysis_seconds"] > 0
    assert not (home / "runs").exists()
    shown = CliRunner().invoke(app, [*arguments, "--remove=2", "--dry-run"])
    assert "2 of 6 removed" in shown.stdout


def test_the_number_of_blocks_is_read_from_files(tmp_path: Path, tiny_model: Path) -> None:
    assert block_count.num_blocks(str(tiny_model)) == 6
    assert block_count.num_blocks("demo") == 30
    assert block_count.num_blocks("meta-llama/Llama-2-7b-hf") is None
    for config, expected in (
        ({"text_config": {"num_hidden_layers": 7}, "num_hidden_layers": 3}, 7),
        ({"n_layer": 4}, 4),
        ({"num_layers": True}, None),
        ([1], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert block_count.num_blocks(str(tmp_path)) == expected
    (tmp_path / "config.json").write_text("{")
    assert block_count.num_blocks(str(tmp_path)) is None
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    assert block_count.num_blocks(str(tmp_path / "x.gguf")) is None


@pytest.mark.parametrize(
    "settings",
    [
        dict(model="demo"),
        dict(model="org/x", remove=3, method="best-chunk", protect=(), calibration="c4", chat=True, bos="no"),
        dict(
            model="-odd name", until_perplexity=0.125, protect=(0, 5), confidence=0.9, seed=3, held_out=0, search="full"
        ),
        dict(model="org/x", objective="kl", method="metric2"),
        dict(model="org/x", ratio=0.3, analysis=False, dtype="float32", revision="main", sampling="first"),
        dict(model="org/x", kind="analyze", sequences=7, sequence_length=99),
    ],
)
def test_a_spec_as_a_command_line_asks_for_the_same(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specs.run_spec(**settings)  # type: ignore[arg-type]
    job = specs.job_spec(spec.kind, "cpu", 3)
    heard: list[object] = []
    monkeypatch.setattr(search, "_start", lambda *given: heard.extend(given))
    line = command_line.command_line(spec, job)
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    held_out = {"held_out": 0} if spec.kind == "analyze" else {}
    assert heard[:2] == [spec.model_copy(update=held_out), job]


def test_an_outline_says_what_the_whole_run_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "whole", 12, 4)
    result = run_index.outline(run.run_dir)
    assert run.trace is not None
    last = run.trace.steps[-1]
    assert result.last is not None
    assert result.baseline is not None
    for shown, whole in ((result.last, last), (result.baseline, run.trace.baseline)):
        assert (shown.calibration, shown.held_out) == (whole.calibration, whole.held_out)
    assert result.last.removal_list == result.removal_list == last.removal_list
    assert result.last.held_out_standard_error == last.held_out_standard_error
    assert (result.num_blocks, result.finished, result.state) == (12, True, JobState.FINISHED)
    assert result.seconds == pytest.approx(2.0 + 4 * 1.5)
    stopped = run_index.outline(write_run(tmp_path / "part", 12, 4, done=2, state=JobState.STOPPED).run_dir)
    assert (len(stopped.removal_list), stopped.finished) == (2, False)


def test_outlines_are_newest_first_and_name_what_cannot_be_read(home: Path) -> None:
    new = run_folder.create(RunSpec(model="demo"))
    broken = run_folder.create(RunSpec(model="demo"))
    (broken.run_dir / "spec.json").write_text("{")
    result = run_list.list_outlines()
    assert {type(each) for each in result} == {RunError, run_index.Outline}
    assert [each.run_id for each in result if isinstance(each, run_index.Outline)] == [new.run_id]


def test_a_signature_changes_with_every_file_that_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12, 2)
    before = run_index.signature(run.run_dir)
    assert before == run_index.signature(run.run_dir)
    with open(run.run_dir / "trace.jsonl", "a") as file:
        file.write(" ")
    after = run_index.signature(run.run_dir)
    assert after != before
    (run.run_dir / "jobs" / "1-search" / "status.json").write_text("{}")
    assert run_index.signature(run.run_dir) != after


def test_tokens_travel_with_a_run_to_five_decimals(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    cosine = draw.uniform(-1, 1, (300, 7, 7)).astype(np.float32)
    cosine = (cosine + cosine.swapaxes(1, 2)) / 2
    cosine[:, np.arange(7), np.arange(7)] = 1
    whole = token_sample.Tokens(
        cosine,
        draw.integers(0, 9, (6, 300)).astype(np.int32),
        np.repeat(np.arange(3, dtype=np.int32), 100),
        np.tile(np.arange(100, dtype=np.int32), 3),
    )
    assert len(token_sample.sample(whole)) == 300
    few = token_sample.sample(whole, size=100 * (7 * 6 + 4 * 7))
    assert len(few) == 100
    np.testing.assert_allclose(few.position.mean(), 49.5, atol=9)  # a fair sample: no position is favoured
    for index in (0, 57, 99):
        where = (whole.sequence == few.sequence[index]) & (whole.position == few.position[index])
        np.testing.assert_array_equal(few.cosine[index], whole.cosine[where][0])
    token_sample.write(tmp_path, few)
    again = token_sample.read(tmp_path, 6)
    assert again is not None
    np.testing.assert_allclose(again.cosine, few.cosine, atol=2e-5)
    np.testing.assert_array_equal(again.predictions, few.predictions)
    assert token_sample.read(tmp_path, 7) is None
    (tmp_path / "analysis" / token_sample.FILE).write_bytes(b"PK damaged")
    assert token_sample.read(tmp_path, 6) is None


def test_the_held_out_rise_has_a_standard_error(tiny_model: Path, text_file: Path) -> None:
    settings = options(text_file, remove=2, analysis=False, held_out=3)
    run = sleb.search(str(tiny_model), **settings)  # type: ignore[arg-type]
    before = trace_file.read_scores(run.run_dir, "baseline")["nats"][4:]
    assert run.trace is not None
    for step in run.trace.steps:
        now = trace_file.read_scores(run.run_dir, f"step-{step.number:04d}")["held_out"]
        assert now.sum() == pytest.approx(step.held_out.nll_sum)
        per_token = (now - before) / 31
        assert step.held_out_standard_error == pytest.approx(per_token.std(ddof=1) / np.sqrt(3))
    alone = sleb.search(str(tiny_model), **(settings | {"held_out": 1}))  # type: ignore[arg-type]
    assert alone.trace is not None
    assert alone.trace.steps[0].held_out_standard_error is None


def test_a_run_keeps_tokens_of_its_own(tiny_model: Path, text_file: Path) -> None:
    run = sleb.search(str(tiny_model), **options(text_file, remove=1))  # type: ignore[arg-type]
    kept = token_sample.read(run.run_dir, 6)
    assert kept is not None
    assert run.analysis is not None
    mean = np.asarray(kept.cosine, dtype=np.float64).mean(axis=0)
    np.testing.assert_allclose(mean, run.analysis.similarity.mean, atol=1e-4)


def test_the_forecast_is_what_the_search_takes(
    tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is one that only work moves on; benchmarks/search.py measures by one on the wall."""
    settings: dict[str, Any] = options(text_file, sequence_length=64, remove=2, analysis=False)
    now = 0.0
    advance, logits = BlockStack.advance, BlockStack.logits

    def advanced(stack: BlockStack, block: int, inputs: BlockInputs, stream: Stream) -> None:
        nonlocal now
        advance(stack, block, inputs, stream)
        now += 0.04 * len(stream.hidden)

    def read(stack: BlockStack, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 0.04 * head_weight(stack) * ids.numel() / settings["sequence_length"]
        return logits(stack, hidden, ids)

    monkeypatch.setattr(BlockStack, "advance", advanced)
    monkeypatch.setattr(BlockStack, "logits", read)
    for measuring in (forecast, search_job):
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    promised = execution.forecast(specs.run_spec(str(tiny_model), **settings))
    run = sleb.search(str(tiny_model), **settings)
    assert run.trace is not None
    assert run.trace.block_evaluations == promised.block_evaluations
    searched = run.trace.baseline.seconds + sum(step.seconds for step in run.trace.steps)
    assert promised.seconds_per_unit == pytest.approx(0.04, rel=0.01)
    assert promised.search_seconds == pytest.approx(searched, rel=0.01)
