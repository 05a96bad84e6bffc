"""Task files are data: none of the ways to code in them is taken without `trust_remote_code`, and all of them end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import pytest
import yaml
from lm_eval import utils

from sleb.errors import OptionError, WorkEnded
from sleb.evaluation import lm_eval_tasks
from sleb.evaluation.lm_eval_tasks import Tasks
from sleb.evaluation.task_folder import task_files, task_limits, task_yaml
from sleb.records import EvaluateSpec
from tests.support.paths import DATA

HOSTILE = "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}"
FLAG = "`trust_remote_code`"
LM_EVALS = Path(lm_eval.tasks.__file__).parent
TASK: dict[str, Any] = {
    "task": "questions",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(DATA / "questions.jsonl")}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(autouse=True)
def _data_sets_of_the_test_alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "data-sets"))


@pytest.fixture(autouse=True)
def _without_lm_evals_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of them takes four seconds."""
    real = lm_eval_tasks._manager
    monkeypatch.setattr(
        lm_eval_tasks, "_manager", lambda names, folder: real((), folder) if folder else real(names, folder)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "tasks"
    where.mkdir()
    return where


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Hostile code writes it. Everything starts in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(sys.modules)
    yield tmp_path / "marker"
    for name in set(sys.modules) - before:
        if str(tmp_path) in name:
            del sys.modules[name]


def load(folder: Path, *names: str, trust: bool = False, limit: int | None = 3, shots: int | None = None) -> Tasks:
    request = EvaluateSpec(texts=(), tasks=names, task_folder=str(folder), limit=limit, shots=shots)
    return lm_eval_tasks.load(request, trust_remote_code=trust)


def write(folder: Path, **changes: Any) -> None:
    config = {key: value for key, value in (TASK | changes).items() if value is not None}
    (folder / "questions.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def refused(folder: Path, *names: str, match: str, **settings: Any) -> str:
    with pytest.raises(OptionError, match=match) as caught:
        load(folder, *(names or ("questions",)), **settings)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 1_500
    return sentence


# ---- code


def function(key: str, before: str = "") -> Callable[[Path, Path], None]:
    def made(folder: Path, marker: Path) -> None:
        (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(*args, **kwargs):\n    return args[0]\n")
        config = {name: value for name, value in TASK.items() if name != key}
        (folder / "questions.yaml").write_text(yaml.safe_dump(config) + f"{before}{key}: !function code.run\n")

    return made


def in_a_list(key: str, text: str) -> Callable[[Path, Path], None]:
    def made(folder: Path, marker: Path) -> None:
        function("process_docs")(folder, marker)
        config = {name: value for name, value in TASK.items() if name != key}
        (folder / "questions.yaml").write_text(yaml.safe_dump(config) + f"{key}: {text}\n")

    return made


def importable(folder: Path, marker: Path) -> None:
    """A function of any library will do."""
    (folder / "questions.yaml").write_text(yaml.safe_dump(TASK) + "process_docs: !function os.mkdir\n")


def template(key: str, expression: str, **changes: Any) -> Callable[[Path, Path], None]:
    def made(folder: Path, marker: Path) -> None:
        write(folder, **changes, **{key: expression.replace("MARKER", str(marker))})

    return made


def metric(name: str, **settings: Any) -> Callable[[Path, Path], None]:
    """A folder of that name where the command starts: `evaluate` prefers it to the hub."""

    def made(folder: Path, marker: Path) -> None:
        script = Path(name)
        script.mkdir()
        (script / f"{name}.py").write_text(
            f"import evaluate\nopen({str(marker)!r}, 'w')\nclass Own(evaluate.Metric):\n    pass\n"
        )
        write(folder, metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} | settings])

    return made


def included(folder: Path, marker: Path) -> None:
    """A file beside the folder, with code of its own."""
    outside = folder.parent / "outside"
    outside.mkdir()
    function("process_docs")(outside, marker)
    (folder / "questions.yaml").write_text(f"include: {outside / 'questions.yaml'}\ntask: questions\n")


def included_inside(folder: Path, marker: Path) -> None:
    function("process_docs")(folder, marker)
    (folder / "questions.yaml").rename(folder / "base")
    (folder / "questions.yaml").write_text("include: base\ntask: questions\n")


def linked(folder: Path, marker: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    function("process_docs")(outside, marker)
    (folder / "questions.yaml").symlink_to(outside / "questions.yaml")


def as_lm_evals(folder: Path, marker: Path) -> None:
    """A path that looks like lm-eval's, whose module would take the place of lm-eval's own."""
    inside = folder / "lm_eval" / "tasks" / "boolq"
    inside.mkdir(parents=True)
    function("process_docs")(inside, marker)


def in_a_group(folder: Path, marker: Path) -> None:
    function("process_docs")(folder, marker)
    (folder / "all.yaml").write_text("group: all\ntask: [questions]\n")
    (folder / "questions.yaml").rename(folder / "inner.yaml")
    (folder / "questions.yaml").write_text("group: outer\ntask:\n  - group: inner\n    task: [questions]\n")


WAYS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    **{
        f"function {key}": (function(key), rf"questions\.yaml runs code \(!function code.run\).*{FLAG}")
        for key in (
            "process_docs", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "custom_dataset",
            "class", "doc_to_decontamination_query", "task_alias",
        )
    },
    "function sampler": (in_a_list("fewshot_config", "{sampler: !function code.run}"), rf"runs code.*{FLAG}"),
    "function samples": (in_a_list("fewshot_config", "{samples: !function code.run}"), rf"runs code.*{FLAG}"),
    "function metric": (in_a_list("metric_list", "[{metric: !function code.run}]"), rf"runs code.*{FLAG}"),
    "function aggregation": (
        in_a_list("metric_list", "[{metric: acc, aggregation: !function code.run}]"), rf"runs code.*{FLAG}"
    ),
    "function filter": (
        in_a_list("filter_list", "[{name: a, filter: [{function: !function code.run}]}]"), rf"runs code.*{FLAG}"
    ),
    "function custom filter": (
        in_a_list("filter_list", "[{name: a, filter: [{function: custom, filter_fn: !function code.run}]}]"),
        rf"runs code.*{FLAG}",
    ),
    "function of a library": (importable, rf"runs code \(!function os.mkdir\).*{FLAG}"),
    "include outside": (included, rf"questions\.yaml includes .* outside its folder.*{FLAG}"),
    "include inside": (included_inside, rf"base runs code.*{FLAG}"),
    "link": (linked, rf"outside/questions\.yaml runs code.*{FLAG}"),
    "as lm-eval's": (as_lm_evals, rf"boolq/questions\.yaml runs code.*{FLAG}"),
    "in a group": (in_a_group, rf"inner\.yaml runs code.*{FLAG}"),
    **{
        f"template {key}": (
            template(key, HOSTILE, **changes),
            rf"template of task 'questions' of .*tasks reaches for Python itself.*{FLAG}",
        )
        for key, changes in {
            "doc_to_text": {}, "doc_to_target": {}, "doc_to_choice": {}, "description": {}, "gen_prefix": {},
        }.items()
    },
    "template by attr": (
        template("doc_to_text", "{{ (cycler|attr('__init__')).__globals__.os.popen('touch MARKER').read() }}"),
        rf"reaches for Python.*{FLAG}",
    ),
    "template by format": (
        template("doc_to_text", "{{ '{0.__class__.__mro__}'.format(question) }}"), rf"reaches for Python.*{FLAG}"
    ),
    "template by map": (
        template("doc_to_text", "{{ [cycler]|map(attribute='__init__.__globals__')|list }}"),
        rf"reaches for Python.*{FLAG}",
    ),
    "template of examples": (
        lambda folder, marker: write(
            folder, num_fewshot=1,
            fewshot_config={"split": "test", "doc_to_text": HOSTILE.replace("MARKER", str(marker))},
        ),
        rf"reaches for Python.*{FLAG}",
    ),
    "metric of the folder": (metric("own_metric"), rf"questions\.yaml has the program of metric 'own_metric'.*{FLAG}"),
    "metric by evaluate": (metric("acc", hf_evaluate=True), rf"has the program of metric 'acc'.*{FLAG}"),
    "prompts of a library": (
        lambda folder, marker: write(folder, use_prompt="promptsource:a"),
        rf"questions\.yaml takes prompts from 'promptsource'.*{FLAG}",
    ),
    "prompts of a file": (
        lambda folder, marker: write(folder, use_prompt="prompts.yaml:a"), rf"takes prompts from 'prompts.yaml'.*{FLAG}"
    ),
    "a reader of pickles": (
        lambda folder, marker: write(folder, dataset_path="pandas"), rf"has its examples opened by 'pandas'.*{FLAG}"
    ),
    "a reader that names classes": (
        lambda folder, marker: write(folder, dataset_path="iceberg"), rf"has its examples opened by 'iceberg'.*{FLAG}"
    ),
    "a strange file system": (
        lambda folder, marker: write(folder, dataset_kwargs={"data_files": "reference://a::memory://b"}),
        rf"opens 'reference://a::memory://b' as .*{FLAG}",
    ),
    "a cache elsewhere": (
        lambda folder, marker: write(folder, dataset_kwargs=TASK["dataset_kwargs"] | {"cache_dir": str(marker)}),
        rf"sets 'cache_dir' in dataset_kwargs.*{FLAG}",
    ),
    "a program that generates": (
        lambda folder, marker: write(
            folder, output_type="generate_until", doc_to_choice=None, metric_list=[{"metric": "exact_match"}],
            generation_kwargs={"until": ["a"], "custom_generate": "./own", "trust_remote_code": True},
        ),
        rf"sets 'custom_generate' in generation_kwargs.*{FLAG}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_code_is_taken(way: str, folder: Path, marker: Path) -> None:
    made, sentence = WAYS[way]
    made(folder, marker)
    names = ("outer",) if way == "in a group" else ("questions",)
    refused(folder, *names, match=sentence)
    assert not marker.exists()


TRUSTED = [
    "function process_docs", "include outside", "include inside", "link", "as lm-eval's", "in a group",
    "template doc_to_text",
]  # fmt: skip


@pytest.mark.parametrize("way", TRUSTED)
def test_with_trust_it_is_taken(way: str, folder: Path, marker: Path) -> None:
    """As lm-eval does: each of them writes the marker, so that the refusals above are of something."""
    WAYS[way][0](folder, marker)
    tasks = load(folder, *(("outer",) if way == "in a group" else ("questions",)), trust=True)
    assert [leaf.count for leaf in tasks.leaves.values()] == [3]
    assert marker.exists()


def test_yaml_of_python_itself_is_no_yaml(folder: Path, marker: Path) -> None:
    text = yaml.safe_dump(TASK).replace("'{{question}}'", "!!python/name:os.system")
    (folder / "questions.yaml").write_text(text)
    refused(folder, match=r"questions\.yaml is not YAML that it could read \(could not determine a constructor")


def test_a_script_of_examples_is_not_run(folder: Path, marker: Path) -> None:
    """By no version of datasets that is supported, trusted or not."""
    script = folder / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')\n")
    write(folder, dataset_path=str(script), dataset_kwargs={"trust_remote_code": True})
    for trust in (False, True):
        refused(folder, match="'questions' cannot be loaded", trust=trust)
    assert not marker.exists()


def test_a_task_beside_one_with_code_is_loaded(folder: Path, marker: Path) -> None:
    function("process_docs")(folder, marker)
    (folder / "questions.yaml").rename(folder / "other.yaml")
    (folder / "other.yaml").write_text((folder / "other.yaml").read_text().replace("task: questions", "task: other"))
    write(folder)
    assert list(load(folder, "questions").leaves) == ["questions"]
    refused(folder, "other", match=rf"other\.yaml runs code.*{FLAG}")
    assert not marker.exists()


# ---- lm-eval's own tasks


def own_index(*folders: str) -> dict[str, Any]:
    """Some of lm-eval's own tasks: reading all takes four seconds."""
    paths = [LM_EVALS / name for name in folders]
    return dict(lm_eval.tasks.TaskManager(include_path=list(paths), include_defaults=False).task_index)


def test_a_group_reaches_lm_evals_own_functions_only_as_they_are(folder: Path, marker: Path) -> None:
    """Some load a tokenizer with its code, or run what examples hold: what a stranger says must not reach them."""
    index = own_index("mmlu", "ruler", "humaneval", "hellaswag", "piqa")

    def walk(member: Any, **group: Any) -> None:
        files = task_files.TaskFiles(folder)
        config = {"group": "all", "task": [member]} | group
        (folder / "all.yaml").write_text(yaml.safe_dump(config))
        entry = type(index["mmlu"])(name="all", kind=index["mmlu"].kind, yaml_path=folder / "all.yaml", cfg=config)
        files.require_loadable(index | {"all": entry}, "all")

    walk("niah_single_1")
    walk("mmlu")
    walk({"task": "hellaswag", "num_fewshot": 2, "task_alias": "mine"})
    walk({"task": "piqa", "metric_list": [{"metric": "acc"}], "dataset_path": "json"})  # it has no functions
    for member, group in (
        ({"task": "niah_single_1", "metadata": {"pretrained": "./own"}}, {}),
        ({"task": "humaneval", "unsafe_code": False}, {}),
        ("hellaswag", {"dataset_path": "json"}),
        ({"group": "inner", "task": ["hellaswag"], "dataset_path": "json"}, {}),
        ({"group": "mmlu_stem", "metadata": {"a": 1}, "process_docs": "a"}, {"test_split": "a"}),
    ):
        if member == {"group": "mmlu_stem", "metadata": {"a": 1}, "process_docs": "a"}:
            walk(member, **group)  # no functions either
            continue
        with pytest.raises(OptionError, match=rf"changes .* of lm-eval's task .*{FLAG}"):
            walk(member, **group)


def test_lm_evals_own_functions_are_not_included(folder: Path, marker: Path) -> None:
    (folder / "questions.yaml").write_text(
        f"include: {LM_EVALS / 'hellaswag' / 'hellaswag.yaml'}\ntask: questions\ndataset_path: json\n"
    )
    refused(folder, match=rf"hellaswag\.yaml runs code \(!function utils.process_docs\).*{FLAG}")


def test_lm_evals_own_task_without_functions_can_be_included(folder: Path) -> None:
    rows = [{"goal": "boil", "sol1": "heat", "sol2": "cool", "label": 0}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "include": str(LM_EVALS / "piqa" / "piqa.yaml"), "task": "questions", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "rows.jsonl")}}, "training_split": None,
    }  # fmt: skip
    (folder / "questions.yaml").write_text(yaml.safe_dump(changes))
    leaf = load(folder, "questions").leaves["questions"]
    assert leaf.task.doc_to_text(rows[0]) == "Question: boil\nAnswer:"


def test_lm_evals_own_tasks_run_no_program_of_the_current_folder(marker: Path) -> None:
    """A metric that their functions fetch by name is looked for there first."""
    script = Path("code_eval")
    script.mkdir()
    (script / "code_eval.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with (
        task_files.TaskFiles(None).as_data(),
        pytest.raises(OptionError, match=r"'code_eval/code_eval\.py' is a program"),
    ):
        lm_eval.tasks._yaml_loader._load_module_with_cache(LM_EVALS / "humaneval" / "utils.py")
    with task_files.TaskFiles(None).as_data(), pytest.raises(OptionError, match="'code_eval' is a file of this folder"):
        lm_eval.api.task.get_metric("code_eval", True)
    assert not marker.exists()


@pytest.mark.parametrize(("where", "trust"), [("none", False), ("none", True), ("tasks", False), ("tasks", True)])
def test_nor_where_the_metric_is_fetched_by_a_module_of_a_module(
    where: str, trust: bool, folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mts_dialog_perplexity` names no metric; what its functions import does. Nobody has imported `evaluate`."""
    for name in [each for each in sys.modules if f"{each}.".startswith(("evaluate.", "lm_eval.tasks.mts_dialog."))]:
        monkeypatch.delitem(sys.modules, name)
    Path("bleu").mkdir()
    Path("bleu/bleu.py").write_text(f"open({str(marker)!r}, 'w')\n")
    files = task_files.TaskFiles(None if where == "none" else folder, trust)
    finders = list(sys.meta_path)
    with files.as_data(), pytest.raises(RuntimeError, match=r"Metric 'bleu/bleu\.py' is a program of this folder"):
        lm_eval.tasks._yaml_loader.load_yaml(LM_EVALS / "mts_dialog" / "mts_dialog_perplexity.yaml")
    assert sys.meta_path == finders
    with files.as_data(), pytest.raises(OptionError, match=r"'\./bleu/bleu\.py' is a program of this folder"):
        sys.modules["evaluate"].load("./bleu/bleu.py")
    assert not marker.exists()


def test_trusted_code_may_name_a_metric_by_its_whole_path(folder: Path, marker: Path) -> None:
    metric("own_metric")(folder, marker)
    refused(folder, match="'own_metric' is a file of this folder", trust=True)
    assert not marker.exists()
    path = Path("own_metric").resolve()
    with task_files.TaskFiles(folder, trusted=True).as_data():
        lm_eval.api.task.get_metric(str(path))
    assert marker.exists()


OWN_FOLDERS = (
    "hellaswag", "winogrande", "arc", "piqa", "mmlu", "lambada", "openbookqa", "super_glue", "gsm8k", "triviaqa",
    "sciq", "truthfulqa",
)  # fmt: skip
OWN_EXAMPLES: dict[str, dict[str, Any]] = {
    "hellaswag": {"query": " A man is [x]", "choices": ["a", "b"], "label": "1"},
    "winogrande": {"sentence": "A _ is", "option1": "x", "option2": "y", "answer": "2"},
    "arc_easy": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "boolq": {"passage": "p", "question": "q", "label": 1},
    "mmlu_anatomy": {"question": " q ", "choices": ["a", "b", "c", "d"], "answer": 2},
    "lambada_openai": {"text": "one two three"},
    "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "copa": {"premise": "P.", "question": "cause", "choice1": "X", "choice2": "Y", "label": 0},
    "gsm8k": {"question": "q", "answer": "so #### 5"},
    "triviaqa": {"question": "q", "answer": {"aliases": ["a"], "value": "b"}},
    "sciq": {"support": " s ", "question": "q", "distractor1": "a", "distractor2": "b", "distractor3": "c",
             "correct_answer": "d"},
    "truthfulqa_mc1": {"question": "q", "mc1_targets": {"choices": ["a", "b"]}},
}  # fmt: skip


def test_lm_evals_own_templates_give_the_same_in_the_sandbox(folder: Path) -> None:
    index, compared = own_index(*OWN_FOLDERS), 0
    for name, example in OWN_EXAMPLES.items():
        config = lm_eval.tasks._yaml_loader.load_yaml(index[name].yaml_path, resolve_func=False)
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description"):
            text = config.get(key)
            if not isinstance(text, str) or str(LM_EVALS) in text:
                continue
            plain = utils.apply_template(text, example)
            with task_files.TaskFiles(folder).as_data():
                assert utils.apply_template(text, example) == plain, (name, key)
            compared += 1
    assert compared > 20


def test_the_sandbox_has_lm_evals_own_settings(folder: Path) -> None:
    texts = ["a\n", "{{ x|regex_replace('a', 'b') }}", "{{ ' x '.strip() }}", "{% set y = x ~ 1 %}{{ y }}\n",
             "{{ '%03d' % 7 }}", "{{ '{:>4}'.format(x) }}", "{{ [1, 2]|sum }}", "{{ {'a': x}.a }}"]  # fmt: skip
    plain = [utils.apply_template(text, {"x": "abc"}) for text in texts]
    before = (utils.env, utils.apply_template, lm_eval.api.task.get_metric, lm_eval.tasks._factory.load_yaml)
    with task_files.TaskFiles(folder).as_data():
        assert [utils.apply_template(text, {"x": "abc"}) for text in texts] == plain
        with pytest.raises(Exception, match="'z' is undefined"):
            utils.apply_template("{{ z }}", {})
    assert before == (utils.env, utils.apply_template, lm_eval.api.task.get_metric, lm_eval.tasks._factory.load_yaml)


def test_lm_evals_own_prompts_can_be_used(folder: Path) -> None:
    write(folder, use_prompt="qa-basic:q-newline-a", doc_to_choice=None, output_type="generate_until",
          metric_list=[{"metric": "exact_match"}])  # fmt: skip
    leaf = load(folder, "questions").leaves["questions"]
    assert leaf.task.doc_to_text({"question": "Why?"}) == "Q: Why?\nA:"


# ---- bounds


def text(folder: Path, content: str | bytes) -> None:
    path = folder / "questions.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def nested(depth: int) -> str:
    return yaml.safe_dump(TASK) + "metadata: " + "[" * depth + "]" * depth + "\n"


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]" for number in range(1, 10)]
    return yaml.safe_dump(TASK) + "metadata:\n" + "".join(f"  {line}\n" for line in lines)


def merged() -> str:
    lines = ["m0: &m0 {a: 1}"] + [
        f"m{number}: &m{number} {{'<<': [{', '.join([f'*m{number - 1}'] * 10)}]}}" for number in range(1, 10)
    ]
    return yaml.safe_dump(TASK) + "metadata:\n" + "".join(f"  {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (nested(100_000), "becomes too much"),
        (bomb(), "becomes too much"),
        (merged(), "becomes too much"),
        (yaml.safe_dump(TASK) + "metadata: &m {a: *m}\n", "has an alias of itself"),
        ("# " + "a" * task_yaml.LARGEST, "has more than 4 MB"),
        (yaml.safe_dump(TASK) + "metadata: " + "1:" * 500_000 + "1\n", "has a number of 1,000,001 digits"),
        (b"task: questions\n\xff\xfe", "is not YAML"),
        ("include: questions.yaml\ntask: questions\n", "includes itself"),
        ("include: [7]\ntask: questions\n", "includes what is not a file name"),
    ],
    ids=["deep", "bomb", "merged", "circle", "huge", "digits", "bytes", "itself", "number"],
)
def test_a_file_that_becomes_too_much_is_named(content: str | bytes, sentence: str, folder: Path) -> None:
    text(folder, content)
    refused(folder, match=rf"No task is called 'questions'.*questions\.yaml {sentence}")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "questions.yaml")
    refused(folder, match="is not a regular file")


LETTERS = "abcdefghijklmnop"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": "group: a\ntask: [a]\n"}, "'a' contains itself: a > a"),
        ({"a": "group: a\ntask: [b]\n", "b": "group: b\ntask: [{group: a}]\n"}, "'a' contains itself: a > b > a"),
        ({"a": "group: a\ntask: [{group: x, task: [a]}]\n"}, "'a' contains itself: a > a::x > a"),
        ({"a": "group: a\ntask: [" + "questions," * 30_000 + "]\n"}, "'a' has more than 20,000 members"),
        ({a: f"group: {a}\ntask: [{b}, {b}]\n" for a, b in pairwise(LETTERS)}, "'a' has more than 20,000 members"),
        ({"a": "group: a\ntask: [[1, 2]]\n"}, "'a' has a member that is neither a name nor a task"),
        ({"a": "group: a\ntask: []\n"}, "'a' is a group without tasks"),
        ({"a": "group: a\ntask: [questions]\n", "b": "task: 7\n"}, "cannot be listed .*must be text"),
    ],
    ids=["itself", "mutual", "inline", "many", "doubling", "list", "empty", "number"],
)  # fmt: skip
def test_groups_end(files: dict[str, str], sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    refused(folder, "a", match=sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_fewshot": 10**9}, "num_fewshot: 1000000000; it must be a number from 0 to 1,000"),
        ({"num_fewshot": -1}, "num_fewshot: -1"),
        ({"num_fewshot": "many"}, "'questions' cannot be loaded"),
        ({"repeats": 10**9}, "repeats: 1000000000"),
        ({"generation_kwargs": {"max_gen_toks": 10**9}}, "max_gen_toks: 1000000000"),
        ({"generation_kwargs": {"num_beams": 10**6}}, "num_beams: 1000000"),
        ({"doc_to_text": "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}"}, "more than"),
        ({"doc_to_text": "{{ 'a' * 10**10 }}"}, "memory"),
        ({"doc_to_text": "{{ '%099999999d' % 1 }}"}, "characters of one example|memory|more than 0.5"),
        ({"doc_to_text": "{{ '{:>99999999}'.format(1) }}"}, "made 99,999,999 characters of one example"),
        ({"doc_to_text": "{{ range(10**9) }}"}, "Range too big"),
        ({"doc_to_text": "{{ ('a' * 99)|regex_replace('(a+)+b', '') }}"}, "more than"),
        ({"doc_to_choice": "{{ '[' * 200000 }}"}, "'questions' cannot be loaded"),
        ({"doc_to_text": "{{ question|random }}"}, "No filter named 'random'"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "regex", "regex_pattern": "("}]}]}, "cannot be"),
        ({"dataset_kwargs": {"data_files": {"test": "/dev/zero"}}}, "'questions' cannot be loaded"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, "'questions' cannot be loaded"),
        ({"dataset_kwargs": TASK["dataset_kwargs"] | {"field": "a" * 9999}}, "'questions' cannot be loaded"),
        ({"metadata": {"version": "v" * 10_000}}, ""),
    ],
)  # fmt: skip
def test_what_a_task_asks_for_ends(
    changes: dict[str, Any], sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_limits, "SECONDS_EACH", 0.5)
    if "generation_kwargs" in changes:
        changes |= {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}], "doc_to_choice": None}
    write(folder, **changes)
    if sentence:
        refused(folder, match=sentence)
    else:
        assert len(load(folder, "questions").leaves["questions"].question["version"]) < 300


def test_what_hears_no_signal_is_ended_by_the_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lists that hold themselves twice, fifty deep: comparing them is one call into C."""
    monkeypatch.setattr(task_limits, "SECONDS", 2)
    monkeypatch.setattr(task_limits, "SECONDS_EACH", 1)
    grown = "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(50) %}{% set n.a = [n.a, n.a] %}"
    grown += "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
    write(folder, doc_to_text=grown)
    start = time.monotonic()
    refused(folder, match=r"Tasks of .* cannot be loaded \(questions\): it took more than 2 seconds")
    assert time.monotonic() - start < 90


def test_examples_nested_too_deep_end_another_process(folder: Path) -> None:
    """The reader of JSON below datasets ends the process that it runs in."""
    (folder / "deep.jsonl").write_text('{"question":' + "[" * 100_000 + "]" * 100_000 + "}\n")
    write(folder, dataset_kwargs={"data_files": {"test": str(folder / "deep.jsonl")}})
    refused(folder, match=r"Tasks of .* cannot be loaded \(questions\)|'questions' cannot be loaded")


def test_examples_too_large_are_not_read(folder: Path) -> None:
    with (folder / "large.txt").open("wb") as file:
        file.truncate(20 << 30)
    write(folder, dataset_path="text", dataset_kwargs={"data_files": {"test": str(folder / "large.txt")}})
    refused(folder, match="has 21.5 GB of examples; at most 8.6 GB are read")


def test_filters_and_scores_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see what the model says, which no trial knows."""
    monkeypatch.setattr(task_limits, "SECONDS_EACH", 0.3)
    write(
        folder, output_type="generate_until", doc_to_choice=None, generation_kwargs={"until": ["\n"]},
        metric_list=[{"metric": "exact_match", "regexes_to_ignore": ["(a+)+b"]}],
        filter_list=[{"name": "a", "filter": [{"function": "regex", "regex_pattern": "(a+)+b"}]}],
    )  # fmt: skip
    tasks = load(folder, "questions")
    task = tasks.leaves["questions"].task
    with tasks.files.as_data():
        task.build_all_requests(limit=1)
        task.instances[0].resps = ["a" * 60]
        with pytest.raises(WorkEnded, match=r"more than 0\.3 seconds"):
            task.apply_filters()
        with pytest.raises(WorkEnded, match=r"more than 0\.3 seconds"):
            task.process_results(task.instances[0].doc, ["a" * 60])


def test_a_link_in_the_folder_is_followed(folder: Path) -> None:
    """The folder is named by who gives the command; it may hold what lies elsewhere."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere)
    (folder / "questions.yaml").symlink_to(elsewhere / "questions.yaml")
    assert load(folder, "questions").leaves["questions"].count == 3


def test_trust_changes_no_question(folder: Path) -> None:
    write(folder, num_fewshot=1)
    data, trusted = (load(folder, "questions", trust=trust).leaves["questions"].question for trust in (False, True))
    assert data == trusted
