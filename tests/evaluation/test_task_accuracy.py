"""Accuracy on tasks: what lm-eval says about the live model is what plain log-likelihoods say, and is asked once."""

from __future__ import annotations

import ast
import copy
import json
import logging
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleb import api
from sleb.cli.findings_output import print_findings
from sleb.errors import OptionError, SlebError, Stopped
from sleb.evaluation import lm_eval_tasks, task_accuracy
from sleb.formats.findings_tables import tables_of
from sleb.model.block_stack import BlockStack
from sleb.model.identity import weights_hash
from sleb.model.loading import load_model
from sleb.records import EvaluateSpec, TaskAccuracy
from sleb.runtime.findings_folder import of_kind
from tests.support import tiny
from tests.support.command import run as sleb_run
from tests.support.families import build
from tests.support.paths import DATA, ROOT
from tests.support.recorded.questions import multiple_choice
from tests.support.streamed import saved, tight

BLOCKS = [1, 4]

QUESTIONS = multiple_choice(DATA / "questions-train.jsonl", DATA / "questions.jsonl") | {"tag": "general"}
SHORT = {"include": "questions.yaml", "task": "short", "doc_to_text": "{{question}}"}
BOTH = {
    "group": "both",
    "task": ["questions", "short"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    "metadata": {"version": 2},
}
SAYS = QUESTIONS | {
    "task": "says",
    "tag": None,
    "output_type": "generate_until",
    "doc_to_target": "{{choices.text[0]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
}


@pytest.fixture(autouse=True)
def _data_sets_of_the_test_alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "data-sets"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks in lm-eval's own YAML."""
    where = tmp_path / "tasks"
    where.mkdir()
    for config in (QUESTIONS, SHORT, BOTH, SAYS):
        write(where, config)
    return where


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / f"{config.get('group') or config['task']}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def ask(*names: str, folder: Path | None = None, **settings: Any) -> EvaluateSpec:
    return EvaluateSpec(texts=(), tasks=names, task_folder=None if folder is None else str(folder), **settings)


def evaluated(model: Path, *names: str, folder: Path, blocks: list[int] = BLOCKS, **settings: Any) -> dict[Any, Any]:
    """(task, removal list) -> finding."""
    findings = api.evaluate(
        model, removal_list=blocks, perplexity=(), tasks=names, task_folder=folder, dtype="float32", **settings
    )
    return {(each.task, each.removal_list): each for each in of_kind(findings, TaskAccuracy)}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any]]]:
    """What was computed: the task, and the model's answers to its requests."""
    seen: list[tuple[str, list[Any]]] = []
    own = task_accuracy._evaluated

    def watched(lm: Any, leaf: lm_eval_tasks.Leaf, tell: Callable[[float], None]) -> Any:
        findings = own(lm, leaf, tell)
        seen.append((leaf.name, [each.resps[0] for each in leaf.task.instances]))
        return findings

    monkeypatch.setattr(task_accuracy, "_evaluated", watched)
    return seen


def questions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]


@torch.inference_mode()
def plainly(model: Path, blocks: list[int]) -> np.ndarray:
    """Log-likelihood of every choice, float64 (questions, choices), from the logits with these blocks left out."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for block in blocks:
        network.model.layers[block].forward = lambda hidden_states, *args, **kwargs: hidden_states
    rows = []
    for each in questions():
        text = f"Question: {each['question']}\nAnswer:"
        start = len(tokenizer.encode(text))
        row = []
        for choice in each["choices"]["text"]:
            ids = torch.tensor([tokenizer.encode(f"{text} {choice}")])
            logs = network(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
            row.append(float(logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
        rows.append(row)
    return np.array(rows)


def right(nats: np.ndarray, *, normalised: bool) -> np.ndarray:
    """1.0 where the likeliest choice is the right one."""
    lengths = np.array([[len(choice) for choice in each["choices"]["text"]] for each in questions()])
    target = np.array(["ABCD".index(each["answerKey"]) for each in questions()])
    return ((nats / lengths if normalised else nats).argmax(axis=1) == target).astype(float)


@pytest.mark.parametrize(("family", "adds_bos"), [("llama", False), ("gemma3", True)])
def test_accuracy_is_what_plain_log_likelihoods_say(
    family: str, adds_bos: bool, tmp_path: Path, folder: Path, answers: list[tuple[str, list[Any]]]
) -> None:
    model = tiny.save(tmp_path / "model", family, adds_bos=adds_bos)
    findings = evaluated(model, "questions", folder=folder)
    nats = {blocks: plainly(model, list(blocks)) for blocks in ((), tuple(BLOCKS))}
    for (name, given), expected in zip(answers, nats.values(), strict=True):
        assert name == "questions"
        np.testing.assert_allclose(np.array([each[0] for each in given]).reshape(30, 4), expected, atol=1e-3)
    assert np.abs(nats[()] - nats[1, 4]).min() > 0.01  # these blocks matter to every choice
    for blocks, own in nats.items():
        finding = findings["questions", blocks]
        assert (finding.examples, finding.shots, finding.limit) == (30, 0, None)
        assert finding.higher_is_better == {"acc": True, "acc_norm": True}
        assert finding.version.startswith("1.0, lm-eval 0.")
        for metric in ("acc", "acc_norm"):
            hits = right(own, normalised=metric == "acc_norm")
            assert finding.metrics[metric] == pytest.approx(hits.mean())
            assert finding.standard_errors[metric] == pytest.approx(hits.std(ddof=1) / 30**0.5)
            if blocks:
                change = hits - right(nats[()], normalised=metric == "acc_norm")
                assert finding.changes[metric] == pytest.approx(change.mean())
                assert finding.change_standard_errors[metric] == pytest.approx(change.std(ddof=1) / 30**0.5)
    assert not findings["questions", ()].changes


@pytest.mark.parametrize("family", ["rwkv", "gpt2-inverse-index"])
def test_blocks_that_cannot_be_gone_are_skipped(
    family: str, tmp_path: Path, folder: Path, answers: list[tuple[str, list[Any]]]
) -> None:
    model = tiny.save(tmp_path / "model", family)
    evaluated(model, "short", folder=folder, blocks=[0, 3], limit=2)
    loaded = load_model(str(model), dtype="float32", device="cpu")
    stack, expected = BlockStack(loaded.model), []
    for each in questions()[:2]:
        start = len(loaded.tokenizer.encode(each["question"]))
        for choice in each["choices"]["text"]:
            ids = torch.tensor([loaded.tokenizer.encode(f"{each['question']} {choice}")])
            with stack.skipping((0, 3)), torch.inference_mode():
                logs = stack.forward(ids)[0].double().log_softmax(dim=-1)
            expected.append(float(logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
    np.testing.assert_allclose([each[0] for each in answers[1][1]], expected, atol=1e-3)
    with pytest.raises(OptionError, match="can only be skipped"):
        evaluated(model, "says", folder=folder, blocks=[0, 3], limit=2)


def test_a_question_is_answered_once(
    tiny_model: Path, tmp_path: Path, folder: Path, answers: list[tuple[str, list[Any]]]
) -> None:
    def computed(*names: str, where: Path = folder, blocks: list[int] = BLOCKS, **settings: Any) -> int:
        before = len(answers)
        evaluated(tiny_model, *names, folder=where, blocks=blocks, **settings)
        return len(answers) - before

    assert computed("questions") == 2
    assert computed("questions", "general", limit=30, shots=0, batch_size=3) == 2  # short is general as well
    assert computed("both") == 0
    assert computed("short", limit=29) == 2
    assert computed("questions", shots=2) == 2
    moved = folder.rename(tmp_path / "elsewhere")
    local = moved / "questions.jsonl"
    shutil.copy(DATA / "questions.jsonl", local)
    files = {"train": str(DATA / "questions-train.jsonl"), "test": str(local)}
    write(moved, QUESTIONS | {"dataset_kwargs": {"data_files": files}})
    assert computed("questions", where=moved) == 0  # the same questions, wherever they lie
    local.write_text(local.read_text().replace("Berlin", "Vienna"))
    assert computed("questions", where=moved) == 2
    write(moved, QUESTIONS | {"doc_to_text": "{{question}}"})
    assert computed("questions", where=moved) == 2


def test_a_function_of_a_task_is_part_of_the_question(folder: Path) -> None:
    (folder / "utils.py").write_text("def text(doc):\n    return doc['question']\n")
    config = yaml.safe_dump(QUESTIONS).replace("'Question: {{question}}", "'").splitlines()
    put = [line for line in config if not line.startswith(("doc_to_text", "  Answer", "\\"))]
    (folder / "questions.yaml").write_text("\n".join([*put, "doc_to_text: !function utils.text"]))
    request = ask("questions", folder=folder)
    first = lm_eval_tasks.load(request, trust_remote_code=True).leaves["questions"]
    assert first.digest == lm_eval_tasks.load(request, trust_remote_code=True).leaves["questions"].digest
    (folder / "utils.py").write_text("def text(doc):\n    return 'Q: ' + doc['question']\n")
    assert first.digest != lm_eval_tasks.load(request, trust_remote_code=True).leaves["questions"].digest


def test_a_stopped_evaluation_goes_on_after_the_last_task(
    tiny_model: Path, folder: Path, answers: list[tuple[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = task_accuracy._evaluated

    def stopping(*args: Any) -> Any:
        if len(answers) == 3:
            raise Stopped("Stopped on request.")
        return watched(*args)

    monkeypatch.setattr(task_accuracy, "_evaluated", stopping)
    with pytest.raises(Stopped):
        evaluated(tiny_model, "both", folder=folder)
    monkeypatch.setattr(task_accuracy, "_evaluated", watched)
    findings = evaluated(tiny_model, "both", folder=folder)
    assert [name for name, _ in answers] == ["questions", "short", "questions", "short"]
    assert list(findings) == [(name, blocks) for blocks in ((), (1, 4)) for name in ("questions", "short", "both")]


def test_groups_shots_and_limits_are_lm_evals_own(tiny_model: Path, folder: Path) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    findings = evaluated(tiny_model, "both", folder=folder, blocks=[], shots=2, limit=12)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(["both"])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 2)
        task.set_fewshot_seed(1234)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer=tiny.tokenizer(), batch_size=5)
    theirs = evaluate(lm, loaded, limit=12)
    for name in ("questions", "short", "both"):
        finding = findings[name, ()]
        expected = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
        for metric, value in finding.metrics.items():
            assert value == pytest.approx(expected[metric])
            assert finding.standard_errors[metric] == pytest.approx(expected[f"{metric}_stderr"])
        assert (finding.shots, finding.limit) == (2, 12)
    group = findings["both", ()]
    assert list(group.metrics) == ["acc"]
    assert (group.examples, group.subtasks, group.version.split(",")[0]) == (24, ("questions", "short"), "2")


def test_a_task_that_says_zero_examples_gets_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, QUESTIONS | {"num_fewshot": 0})
    with caplog.at_level(logging.WARNING, "sleb"):
        leaf = lm_eval_tasks.load(ask("questions", folder=folder, shots=3)).leaves["questions"]
    assert leaf.shots == 0
    assert "`shots` does not change it" in caplog.text


def test_model_tokenizer_and_process_are_left_as_they_were(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, answers: list[tuple[str, list[Any]]]
) -> None:
    from tqdm import tqdm

    network = build("llama")
    network.config.tie_word_embeddings = True  # and yet it has a head of its own: transformers then ties nothing
    network.save_pretrained(str(tmp_path / "model"))
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path / "model"))
    own, seen = task_accuracy.work, []

    def state(subject: Any) -> list[Any]:
        model = subject.model
        return [
            weights_hash(model), copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict(),
            [each.training for each in model.modules()], dict(vars(model)).keys(), subject.tokenizer.pad_token,
            subject.tokenizer.padding_side, len(subject.tokenizer), random.getstate()[1],
            np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), tqdm.__init__, sys.stdout,
            [(each.handlers, each.propagate) for each in map(logging.getLogger, ("lm_eval", "transformers"))],
        ]  # fmt: skip

    def watched(subject: Any, spec: EvaluateSpec, tasks: Any) -> None:
        before = state(subject)
        own(subject, spec, tasks)
        seen.append((before, state(subject)))

    monkeypatch.setattr(task_accuracy, "work", watched)
    evaluated(tmp_path / "model", "questions", "says", folder=folder)
    assert len(seen) == 1
    assert seen[0][0] == seen[0][1]
    given = np.array([each[0] for each in dict(answers[:1])["questions"]]).reshape(30, 4)
    np.testing.assert_allclose(given, plainly(tmp_path / "model", []), atol=1e-3)  # by its own head


def test_generated_answers_are_drawn_the_same_twice(
    tmp_path: Path, tiny_model: Path, folder: Path, answers: Any
) -> None:
    for number in range(2):
        findings = evaluated(tiny_model, "says", folder=folder, limit=6, run_dir=tmp_path / str(number))
    assert list(findings["says", (1, 4)].metrics) == ["exact_match,first"]
    given = [each for _, each in answers]
    assert given[:2] == given[2:]
    assert given[0] != given[1]
    assert len(set(given[0])) > 1


def test_streamed_blocks_are_skipped(tmp_path: Path, folder: Path, answers: list[tuple[str, list[Any]]]) -> None:
    model = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(model), dtype="float32", device="cpu"))
    resident = evaluated(model, "questions", folder=folder, limit=10, run_dir=tmp_path / "resident")
    streamed = evaluated(
        model, "questions", folder=folder, limit=10, memory_budget=budget, run_dir=tmp_path / "streamed"
    )
    assert [each.metrics for each in resident.values()] == [each.metrics for each in streamed.values()]
    for (_, before), (_, after) in zip(answers[:2], answers[2:], strict=True):
        np.testing.assert_allclose([each[0] for each in before], [each[0] for each in after], atol=1e-4)
    with pytest.raises(OptionError, match="can only be skipped"):
        evaluated(model, "says", folder=folder, limit=2, memory_budget=budget, run_dir=tmp_path / "says")


def test_json_is_alone_on_stdout_and_the_table_groups(tiny_model: Path, folder: Path) -> None:
    command = ["evaluate", tiny_model, "--removal-list", "[1, 4]", "--perplexity", "none", "--tasks", "both"]
    out, err = sleb_run(*command, "--task-folder", folder, "--dtype", "float32", "--json")
    findings = json.loads(out)["findings"]
    assert [each["task"] for each in findings] == ["questions", "short", "both"] * 2
    assert not [noise for noise in ("it/s", "requests", "warning", "pretrained") if noise in err.lower()]
    out, _ = sleb_run(*command, "--task-folder", folder, "--dtype", "float32")
    table = [line.split("  ") for line in out.splitlines()]
    assert ["Accuracy by lm-eval, float32, no examples in the prompt"] in table
    heads = [row[0] for row in table[table.index(["Accuracy by lm-eval, float32, no examples in the prompt"]) + 1 :]]
    assert [head for head in heads if head] == ["task", "questions", "short", "both (2 tasks)"]
    value, error = findings[3]["metrics"]["acc"], findings[3]["standard_errors"]["acc"]
    change, of_change = findings[3]["changes"]["acc"], findings[3]["change_standard_errors"]["acc"]
    assert f"2: 1, 4  {value:.4f} ± {error:.4f}  {change:+.4f} ± {of_change:.4f}  30" in out


def test_nearest_names_and_a_hub_out_of_reach_are_one_sentence(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"No task is called 'arc_eazy'.*arc_easy.*List all with: lm-eval ls tasks$"):
        lm_eval_tasks.load(ask("arc_eazy"))
    with pytest.raises(OptionError, match=r"examples of task 'piqa' could not be fetched .*hub") as refused:
        lm_eval_tasks.load(ask("piqa"))
    assert "\n" not in str(refused.value)


def refusals() -> list[tuple[str, Callable[[Path], EvaluateSpec], str]]:
    def with_task(config: dict[str, Any], *names: str) -> Callable[[Path], EvaluateSpec]:
        def made(folder: Path) -> EvaluateSpec:
            write(folder, QUESTIONS | config)
            return ask(*names, folder=folder)

        return made

    return [
        ("folder", lambda folder: ask("questions", folder=folder / "none"), "task folder .*none does not exist"),
        ("twice", lambda folder: ask("questions", "both", folder=folder), "'questions' is asked for twice.*'both'"),
        ("files", with_task({"dataset_kwargs": {"data_files": {"test": "/no/x.json"}}}, "questions"), "no/x.json"),
        ("split", with_task({"test_split": "tests"}, "questions"), "'questions' cannot be loaded"),
        ("prompt", with_task({"doc_to_text": "{{question"}, "questions"), "'questions' cannot be loaded"),
        ("code", with_task({"unsafe_code": True}, "questions"), "runs code that the model has written"),
        ("images", with_task({"doc_to_image": "question"}, "questions"), "more than text"),
        ("format", with_task({"output_type": "chosen"}, "questions"), "'questions' cannot be loaded"),
    ]


@pytest.mark.parametrize(("made", "sentence"), [each[1:] for each in refusals()], ids=[each[0] for each in refusals()])
def test_what_cannot_be_loaded_is_refused_in_a_sentence(
    made: Callable[[Path], EvaluateSpec], sentence: str, folder: Path
) -> None:
    with pytest.raises(OptionError, match=sentence) as refused:
        lm_eval_tasks.load(made(folder))
    assert "\n" not in str(refused.value)


def test_a_file_that_lm_eval_passes_over_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "questions.yaml").write_text("task: questions\n  dataset_path: [json\n")
    alone = lm_eval_tasks._manager(("says",), folder)
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda *_: alone)  # lm-eval's own tasks take four seconds
    with pytest.raises(OptionError, match=r"No task is called 'questions'.*questions\.yaml is not YAML"):
        lm_eval_tasks.load(ask("questions", folder=folder))


def test_a_task_that_the_model_cannot_answer_is_a_sentence(tiny_model: Path, folder: Path) -> None:
    (folder / "utils.py").write_text("def results(doc, found):\n    return {'acc': doc['no such column']}\n")
    text = yaml.safe_dump(QUESTIONS) + "process_results: !function utils.results\n"
    (folder / "questions.yaml").write_text(text)
    with pytest.raises(SlebError, match="'questions' cannot be evaluated with this model \\(KeyError"):
        evaluated(tiny_model, "questions", folder=folder, trust_remote_code=True)


def test_without_lm_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(OptionError, match=r"needs lm-eval: pip install 'sleb\[tasks\]'"):
        lm_eval_tasks.load(ask("questions", folder=folder))


def test_lm_eval_is_imported_where_it_is_used() -> None:
    """Importing it takes a second, and it is an extra."""
    files = [*(ROOT / "sleb").rglob("*.py"), *(ROOT / "app").rglob("*.py")]
    assert len(files) > 100
    users = set()
    for path in files:
        tree = ast.parse(path.read_text())
        imports = {node: name for node in ast.walk(tree) for name in imported(node) if name.split(".")[0] == "lm_eval"}
        assert not set(imports) & set(tree.body), path
        users |= {path.stem} if imports else set()
    assert users == {"lm_eval_library", "lm_eval_tasks", "task_accuracy", "task_files"}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("kind", ["questions", "says"])
def test_prompts_that_are_longer_than_the_model_are_counted(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token is one character; a model reads 128, and answers take some of them."""
    rows = [
        {"question": "q" * length, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
        for length in (20, 126, 127, 300)
    ]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = (QUESTIONS if kind == "questions" else SAYS) | {
        "task": "long", "tag": None, "doc_to_text": "{{question}}", "training_split": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
    }  # fmt: skip
    write(folder, own)
    findings = evaluated(tiny.save(tmp_path / "model"), "long", folder=folder)
    # A choice of " yes" after 126 characters is 130 tokens, of which the last is not read: 129 are too many by one. Six
    # tokens that are generated leave room for 122.
    assert {each.truncated for each in findings.values()} == {3}
    (table,) = tables_of(findings.values())
    assert table.notes == (
        "3 of 4 examples of long are longer than the model: the beginning of their prompts was cut off.",
    )
    print_findings(list(findings.values()))
    assert table.notes[0] in " ".join(capsys.readouterr().out.split())


def test_findings_of_earlier_versions_say_nothing_of_cut_prompts(folder: Path, tmp_path: Path) -> None:
    findings = evaluated(tiny.save(tmp_path / "model"), "questions", folder=folder)[("questions", ())]
    assert findings.truncated == 0
    earlier = json.loads(findings.model_dump_json())
    del earlier["truncated"], earlier["not_numbers"]
    read = TaskAccuracy.model_validate(earlier)
    assert (read.truncated, read.not_numbers, read.question) == (None, False, findings.question)
    assert tables_of([read])[0].notes == ()
