"""Predictions that are not numbers: no command finds anything out from them, and each says whose they are and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import sleb
from sleb import api, execution, forecast, specs
from sleb.errors import ExportError, NotNumbers, ScoringError, model_without, not_numbers
from sleb.evaluation import request
from sleb.formats.findings_tables import tables_of
from sleb.model.block_stack import BlockStack
from sleb.records import (
    BenchmarkSpec,
    Finding,
    GenerateSpec,
    Generation,
    Measured,
    Quantization,
    Run,
    TaskAccuracy,
    TextPerplexity,
    Timing,
)
from sleb.report.figures.evaluate import beyond
from sleb.report.summaries import gates, line_gates, list_curves
from sleb.runtime.findings_folder import of_kind
from sleb.scoring.self_check import self_check
from tests.support import tiny
from tests.support.command import run as sleb_run
from tests.support.runs import judged
from tests.support.runs.stores import write_run

BASELINE = rf"^{model_without(())} gives predictions that are not numbers in float16. Use .*dtype.bfloat16.* or "
WITHOUT = (
    r"^The model without blocks \[2\] gives predictions that are not numbers in float16. Use .*dtype.bfloat16.* or "
)
BOTH = [(2,), (3,)]
"""Lists without numbers, and with."""


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.overflowing(tmp_path_factory.mktemp("model") / "always")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without block 2."""
    return tiny.overflowing(tmp_path_factory.mktemp("model") / "once", without=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that compares choices, one that has text generated, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"{number}: a block of the model is", "c": ["text", "stack"], "y": number % 2} for number in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared: dict[str, Any] = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}", "metadata": {"version": 1.0},
    }  # fmt: skip
    chooses = shared | {
        "task": "chooses", "output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": "{{y}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    says = shared | {
        "task": "says", "output_type": "generate_until", "doc_to_target": "{{c[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    group = {"group": "both", "task": ["chooses", "says"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, config in (("chooses", chooses), ("says", says), ("both", group)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def search(model: Path, text: Path, **settings: Any) -> Run:
    own = dict(sequences=2, sequence_length=32, remove=1, held_out=1, analysis=False, dtype="float16")
    return sleb.search(str(model), calibration=str(text), **(own | settings))  # type: ignore[arg-type]


COMMANDS: dict[str, Callable[..., list[Finding]]] = {
    "perplexity": lambda model, text, **own: api.evaluate(model, perplexity=[str(text)], window=50, **own),
    "generate": lambda model, text, **own: api.generate(model, "the block", tokens=4, **own),
    "benchmark": lambda model, text, **own: api.benchmark(
        model, prompt=(1, 8), generation=(1, 3), generation_prompt=4, prompt_repetitions=1, generation_repetitions=1,
        **own,
    ),
    "quantize": lambda model, text, **own: api.quantize(model, perplexity=[str(text)], window=50, limit=3, **own),
    "heal": lambda model, text, **own: api.heal(
        model, perplexity=[str(text)], window=50, limit=3, source=str(text), sequences=4, sequence_length=32, **own
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unmodified_model_without_numbers_voids_everything(always: Path, text_file: Path, command: str) -> None:
    with pytest.raises(NotNumbers, match=BASELINE) as caught:
        COMMANDS[command](always, text_file, removal_list=[3], dtype="float16")
    assert caught.value.exit_code == 2
    (run,) = api.runs()
    assert api.findings_of(run) == []
    assert run.jobs[-1].status.message == str(caught.value)


@pytest.mark.parametrize("name", ["chooses", "says", "both"])
def test_accuracy_from_no_numbers_is_no_finding(always: Path, tasks: Path, name: str) -> None:
    with pytest.raises(NotNumbers, match=BASELINE):
        api.evaluate(always, removal_list=[3], perplexity=(), tasks=[name], task_folder=tasks, dtype="float16")
    assert api.findings_of(api.runs()[0]) == []


def test_neither_a_search_nor_a_forecast_begins(always: Path, text_file: Path) -> None:
    with pytest.raises(NotNumbers, match=BASELINE):
        search(always, text_file)
    spec = specs.run_spec(str(always), dtype="float16", sequences=2, sequence_length=32)
    with pytest.raises(NotNumbers, match=BASELINE):
        forecast.timing_probe(spec, specs.job_spec("search", device="cpu"))
    with pytest.raises(NotNumbers, match=r"^Block 0 gives outputs that are not numbers in float16"):
        sleb.analyze(str(always), calibration=str(text_file), sequences=2, sequence_length=32, dtype="float16")


def test_in_another_type_the_same_model_has_numbers(always: Path, once: Path, text_file: Path) -> None:
    for model in (always, once):
        findings = COMMANDS["perplexity"](model, text_file, removal_list=[2], dtype="bfloat16")
        assert all(each.measured.perplexity for each in of_kind(findings, TextPerplexity))


def test_a_list_without_numbers_is_a_result_with_its_cause(once: Path, text_file: Path, tasks: Path) -> None:
    findings: list[Finding] = []
    run = request.subject_run(str(once), [], dtype="float16")
    for blocks in BOTH:
        findings += api.evaluate(
            run, removal_list=blocks, perplexity=[str(text_file)], window=50, limit=4, tasks=["both"], task_folder=tasks
        )
    perplexities = {each.removal_list: each.measured.perplexity for each in of_kind(findings, TextPerplexity)}
    assert perplexities.keys() == {(), (2,), (3,)}
    assert [each for each, value in perplexities.items() if value is None] == [(2,)]
    accuracies = {(each.task, each.removal_list): each for each in of_kind(findings, TaskAccuracy)}
    assert {each for each, value in accuracies.items() if value.not_numbers} == {
        (name, (2,)) for name in ("chooses", "says", "both")
    }
    assert all(bool(each.metrics) is not each.not_numbers for each in accuracies.values())
    assert all(each.changes == {} for each in accuracies.values() if each.not_numbers)
    sentence = f"{model_without((2,))} gives predictions that are not numbers in float16."
    for table in tables_of(findings):
        assert any(note.startswith(sentence) for note in table.notes)
        assert all("no number" in row for row in table.rows if "1: 2" in row)

    own = [each for each in findings if each.removal_list in ((), (2,))]
    shown = list_curves.curves(api.load(run.run_dir), own)
    assert shown.notes[-1].startswith(sentence)
    assert [[point.removed for point in line.points] for line in shown.accuracy if line.kind == "task"] == [[0]]
    refused = gates.judge([line_gates.cost_gate(shown.cost[0], 0.1)], shown.lists).refusal
    assert "is at best no number, with 1 removed" in refused
    out, _ = sleb_run("show", run.run_id)
    assert sentence in " ".join(out.split())


def test_a_chart_does_not_take_a_missing_number_for_a_large_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    findings = [judged.perplexity(run, blocks, 0.5 if blocks else 0.0) for blocks in ((), *judged.lists_of(run))]
    nothing = {"measured": Measured(nll_sum=None, token_count=10), "rise": None, "rise_standard_error": None}
    missing = [*findings[:-1], findings[-1].model_copy(update=nothing)]
    far = [*findings[:-1], judged.perplexity(run, findings[-1].removal_list, 9.0)]
    shown = [beyond(list_curves.curves(run, each).cost) for each in (findings, missing, far)]
    assert shown == [[], [], ["wikitext2"]]
    assert list_curves.curves(run, missing).notes == (
        not_numbers(model_without(findings[-1].removal_list), "bfloat16"),
    )

    voided = [
        findings[0].model_copy(update={"measured": nothing["measured"]}),
        *findings[1:],
    ]  # as version 0.1.0 kept it
    assert [line.kind for line in list_curves.curves(run, voided).cost] == ["held-out", "calibration"]
    assert list_curves.curves(run, voided).notes[0].startswith(f"{model_without(())} gives predictions that are not")


@pytest.mark.parametrize(("command", "kind"), [("generate", Generation), ("benchmark", Timing)])
def test_other_lists_are_answered_before_one_without_numbers_is_named(
    once: Path, command: str, kind: type[Finding]
) -> None:
    run = request.subject_run(str(once), [], dtype="float16")
    names = {"generate": GenerateSpec, "benchmark": BenchmarkSpec}
    asks: dict[str, dict[str, Any]] = {
        "generate": dict(prompt="the block of a model", tokens=4),
        "benchmark": dict(
            prompt=(1, 40), generation=None, prompt_repetitions=1, generation_prompt=4, generation_repetitions=1
        ),
    }
    ask = request.ask_of(names[command], lists=BOTH, **asks[command])
    with pytest.raises(NotNumbers, match=WITHOUT):
        execution.execute(run, request.job_of(ask, device="cpu"))
    assert [each.removal_list for each in of_kind(api.findings_of(run), kind)] == [(3,)]


def test_quantised_weights_follow_their_list(once: Path, text_file: Path) -> None:
    findings = of_kind(COMMANDS["quantize"](once, text_file, removal_list=[2], dtype="float16"), Quantization)
    assert [(each.removal_list, each.measured.no_number, each.change is None) for each in findings] == [
        ((), False, False),
        ((2,), True, True),
    ]


@pytest.mark.parametrize("kind", ["lora", "linear", "both"])
def test_what_has_no_numbers_is_not_healed(once: Path, text_file: Path, kind: str) -> None:
    with pytest.raises(NotNumbers, match=WITHOUT):
        COMMANDS["heal"](once, text_file, removal_list=[2], dtype="float16", how=kind)
    assert not list(api.runs()[0].run_dir.glob("healing/*"))


@pytest.mark.parametrize("updates", [1, 4])  # seen by what comes out, or by the next loss
def test_a_training_that_diverged_keeps_nothing(once: Path, text_file: Path, tmp_path: Path, updates: int) -> None:
    with pytest.raises(ScoringError, match=r"^The training diverged in float16: .*Nothing was kept\. Lower `learn"):
        COMMANDS["heal"](
            once, text_file, removal_list=[3], dtype="float16", how="lora", learning_rate=1.0,
            batch_sequences=4 // updates, out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert not list(api.runs()[0].run_dir.glob("healing/*/healed.safetensors"))


def test_the_self_check_compares_nothing_where_nothing_is_a_number(always: Path, once: Path) -> None:
    ids = torch.arange(4, 36).view(2, 16).numpy()
    stacks = [BlockStack(AutoModelForCausalLM.from_pretrained(each, dtype=torch.float16)) for each in (always, once)]
    nothing, some = (self_check(stack, [1, 2, 3], ids) for stack in stacks)
    assert (nothing.max_difference, nothing.scoring) == (None, "sweep")
    assert some.max_difference is not None
    assert some.scoring == "sweep"


def test_a_model_without_numbers_is_not_written(once: Path, text_file: Path, tmp_path: Path) -> None:
    """An export has the checkpoint's type, whatever the search had."""
    half = tmp_path / "half"
    shutil.copytree(once, half)
    model = AutoModelForCausalLM.from_pretrained(once, dtype=torch.float16)
    model.save_pretrained(half)
    run = search(half, text_file, dtype="bfloat16", method="early-exit", remove=4, protect=())
    assert set(run.removal_list) == {2, 3, 4, 5}
    with pytest.raises(ExportError, match=r"^The model without blocks \[2, 3, 4, 5\] .* in float16, in which it would"):
        api.export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
