"""What is fuzzed: the options of every command, the files of a run folder, models, tokenizers, GGUF headers, tasks.

A target makes one example of hypothesis' data, and runs it in a sandbox.
"""

from __future__ import annotations

import inspect
import json
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import typer.main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sleb.cli.main import app
from sleb.evaluation import request
from sleb.formats.list_formats import FORMATS
from sleb.records import BenchmarkSpec, EvaluateSpec, GenerateSpec, HealSpec, QuantizeSpec
from sleb.specs import job_spec, run_spec
from tests.fuzz import values
from tests.fuzz.harness import Breach, Sandbox, watch_files
from tests.support import gguf_files, tiny
from tests.support.runs import judged
from tests.support.runs.stores import write_run

Target = Callable[[values.Draws, "Bench"], None]


class Bench:
    """A sandbox with what examples begin from: a run with every kind of finding, a model, a GGUF file, places."""

    def __init__(self, root: Path) -> None:
        self.sandbox = Sandbox(root)
        self.places = values.make_places(self.sandbox.places)
        self.runs = self.sandbox.home / "runs"
        self.original = root / "original"
        run = write_run(self.original, 6, 2)
        judged.keep(run, judged.everything(run))
        shutil.copytree(self.original, self.runs / "whole")
        self.text = root / "text.txt"
        self.text.write_text(tiny.text(3000))

    @cached_property
    def model(self) -> Path:
        """A random Llama of four blocks."""
        return tiny.save(self.sandbox.root / "model", num_blocks=4)

    @cached_property
    def gguf(self) -> Path:
        """A random GGUF file of two blocks."""
        return gguf_files.write(self.sandbox.root / "original.gguf", num_blocks=2)

    def fresh_model(self) -> Path:
        """A copy of the model's folder, to be damaged; the one of the example before was removed."""
        folder = self.sandbox.root / "changed-model"
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(self.model, folder)


def options(data: values.Draws, bench: Bench) -> None:
    """Any command with any values for some of its options and arguments."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = data.draw(st.sampled_from(sorted(commands)), label="command")
    value = st.one_of(values.option_values, st.sampled_from(bench.places), st.sampled_from(("whole", str(bench.runs))))
    words, written = [name], []
    for each in commands[name].params:
        if each.name == "help" or (each.param_type_name == "option" and data.draw(st.integers(0, 3)) != 0):
            continue
        given = None if getattr(each, "is_flag", False) else data.draw(value, label=each.name)
        if each.param_type_name == "argument":
            words += [] if given in ("demo", None) else [given]
        else:
            words.append(each.opts[0] if given is None else f"{each.opts[0]}={given}")
        if given is not None and each.name in ("out", "run_dir"):
            written.append((bench.sandbox.here / given).absolute())
    bench.sandbox.command(words, written)
    shutil.rmtree(bench.runs / "whole", ignore_errors=True)  # `delete` and `resume` may have changed it
    shutil.copytree(bench.original, bench.runs / "whole")


_READING: tuple[tuple[str, ...], ...] = (
    ("show", "RUN"), ("show", "RUN", "--json"), ("runs",), ("runs", "--json"), ("report", "RUN", "--out", "OUT"),
    *(("export", "RUN", "--format", each) for each in FORMATS), ("export", "RUN", "--format", "hf", "--out", "OUT"),
    ("export", "RUN", "--format", "csv", "--json"), ("resume", "RUN", "--prepare"), ("resume", "RUN"), ("stop", "RUN"),
    ("import", "ELSEWHERE"), ("delete", "RUN", "--yes"), ("delete", "RUN"), ("work", "FOLDER"),
    ("evaluate", "RUN", "--perplexity", "PLACE"), ("evaluate", "RUN", "--all-steps"), ("cache",),
    ("generate", "RUN", "--prompt", "x"), ("heal", "RUN"), ("quantize", "RUN", "--steps", "1"), ("benchmark", "RUN"),
)  # fmt: skip


def run_folders(data: values.Draws, bench: Bench) -> None:
    """Any command on a run folder of which some files were changed."""
    elsewhere = data.draw(st.booleans(), label="elsewhere")
    out = bench.sandbox.root / "out"
    for each in (out, bench.sandbox.root / "elsewhere", *bench.runs.iterdir()):
        if each.name != "whole":
            shutil.rmtree(each, ignore_errors=True)
            each.unlink(missing_ok=True)
    folder = (bench.sandbox.root if elsewhere else bench.runs) / ("elsewhere" if elsewhere else "fuzzed")
    shutil.copytree(bench.original, folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files += 4 * [path for path in files if path.parts[0] not in ("evaluation", "scores")]  # what all commands read
    for name in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True), label="files"):
        values.change_file(data, folder / name, bench.sandbox.places)
    names = {"RUN": str(folder) if elsewhere else "fuzzed", "FOLDER": str(folder), "OUT": str(out)}
    names |= {"ELSEWHERE": str(folder), "PLACE": str(bench.sandbox.places / "file")}
    words = data.draw(st.sampled_from(_READING), label="command")
    bench.sandbox.command([names.get(word, word) for word in words], [out, folder])


def specs(data: values.Draws, bench: Bench) -> None:
    """What a notebook can give: any values for any arguments of the functions that make specs."""
    made: Any = data.draw(st.sampled_from((run_spec, job_spec, EvaluateSpec, BenchmarkSpec, QuantizeSpec, HealSpec,
                                           GenerateSpec)), label="spec")  # fmt: skip
    if made is run_spec or made is job_spec:
        names = [name for name in inspect.signature(made).parameters if name != "own"]
        call = made
    else:
        names, call = list(made.model_fields), request.ask_of
    given = data.draw(st.dictionaries(st.sampled_from(names), values.json_values, max_size=3), label="given")
    if made is run_spec:
        bench.sandbox.call(call, given.pop("model", "x"), **given)
    elif made is job_spec:
        bench.sandbox.call(call, given.pop("kind", "search"), **given)
    else:
        bench.sandbox.call(call, made, **given)


_SMALL: dict[str, tuple[str, ...]] = {
    "search": ("--calibration", "TEXT", "--remove", "1", "--sequences", "2", "--sequence-length", "16",
               "--no-analysis"),
    "analyze": ("--calibration", "TEXT", "--sequences", "2", "--sequence-length", "16"),
    "evaluate": ("--removal-list", "[1]", "--perplexity", "TEXT", "--limit", "1", "--window", "16"),
    "benchmark": ("--removal-list", "[1]", "--prompt", "1x4", "--generation", "1x2", "--generation-prompt", "2",
                  "--prompt-repetitions", "1", "--generation-repetitions", "1"),
    "quantize": ("--removal-list", "[1]", "--perplexity", "TEXT", "--limit", "1", "--window", "16"),
    "heal": ("--removal-list", "[1]", "--perplexity", "TEXT", "--limit", "1", "--window", "16", "--source", "TEXT",
             "--sequences", "2", "--sequence-length", "16", "--batch-sequences", "1"),
    "generate": ("--removal-list", "[1]", "--prompt", "ab", "--tokens", "2"),
}  # fmt: skip
_AMOUNTS = {"epochs", "prompt_repetitions", "generation_repetitions", "processes", "tasks", "help"}
"""Options by which a user may ask for years of work, and gets them; lm-eval's index, which takes half a minute to read,
is another target's."""


def work(data: values.Draws, bench: Bench) -> None:
    """A command that works on a real model, with any value for one of its options; the others are small."""
    name = data.draw(st.sampled_from(sorted(_SMALL)), label="command")
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known = [each for each in command.params if each.param_type_name == "option" and each.name not in _AMOUNTS]
    option = data.draw(st.sampled_from(known), label="option")
    value = st.one_of(values.option_values, st.sampled_from(bench.places))
    given = None if getattr(option, "is_flag", False) else data.draw(value, label="value")
    words = [str(bench.text) if word == "TEXT" else word for word in _SMALL[name]]
    words += ["--dtype", "float32", "--device", "cpu", option.opts[0] if given is None else f"{option.opts[0]}={given}"]
    written = [] if given is None else [(bench.sandbox.here / given).absolute()]
    bench.sandbox.command([name, str(bench.model), *words], written)
    for each in bench.runs.iterdir():
        if each.name != "whole":
            shutil.rmtree(each)


def models(data: values.Draws, bench: Bench) -> None:
    """Loading a model folder of which config, tokenizer or weights were changed."""
    from sleb.model.loading import load_model

    folder = bench.fresh_model()
    files = sorted(path.relative_to(folder) for path in folder.iterdir())
    files += 3 * [Path("config.json")]
    values.change_file(data, folder / data.draw(st.sampled_from(files), label="file"), bench.sandbox.places)
    bench.sandbox.call(load_model, str(folder), dtype="float32", device="cpu")


def gguf_headers(data: values.Draws, bench: Bench) -> None:
    """Loading a GGUF file whose first bytes were changed, and planning a cut of it."""
    from sleb.model.loading import load_model

    content = bench.gguf.read_bytes()
    head = len(content) if data.draw(st.integers(0, 3)) == 0 else data.draw(st.sampled_from((24, 200, 3000)))
    path = bench.sandbox.root / "changed.gguf"
    path.write_bytes(values.changed_bytes(data, content[:head]) + content[head:])
    bench.sandbox.call(load_model, str(path), dtype="float32", device="cpu")


_TASK = {
    "task": "made_up", "dataset_path": "json", "dataset_kwargs": {"data_files": "questions.jsonl"},
    "output_type": "multiple_choice", "test_split": "train", "doc_to_text": "{{question}}", "doc_to_target": 0,
    "doc_to_choice": ["a", "b"], "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}  # fmt: skip


def task_files(data: values.Draws, bench: Bench) -> None:
    """Asking for a task whose file was changed: what is known before any model is opened."""
    from sleb.evaluation import lm_eval_tasks

    folder = bench.sandbox.root / "tasks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "questions.jsonl").write_text(json.dumps({"question": "q"}) + "\n")
    made = values.changed(data, json.loads(json.dumps(_TASK)))
    if isinstance(made, dict):  # else lm-eval reads the index of all its own tasks to find it, for seconds
        made["task"] = "made_up"
    text = json.dumps(made)  # JSON is YAML
    if data.draw(st.integers(0, 4), label="as bytes") == 0:
        (folder / "task.yaml").write_bytes(values.changed_bytes(data, text.encode()))
    else:
        (folder / "task.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    ask = EvaluateSpec(texts=(), tasks=("made_up",), task_folder=str(folder), limit=1)
    bench.sandbox.call(lm_eval_tasks.load, ask)


TARGETS: dict[str, Target] = {
    "options": options,
    "run folders": run_folders,
    "specs": specs,
    "work": work,
    "models": models,
    "gguf headers": gguf_headers,
    "task files": task_files,
}
"""By name, as `scripts/fuzz.py` counts them."""


def fuzz(
    name: str, bench: Bench, examples: int, *, counts: Counter[str] | None = None, repeatable: bool = True
) -> None:
    """So many examples of a target. Raises `Breach` at the first that does what none may, or counts it in `found`."""
    watch_files()

    @settings(
        max_examples=examples,
        deadline=None,  # the harness has one of its own
        database=None,
        derandomize=repeatable,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def example(data: st.DataObject) -> None:
        draws = values.Draws(data)
        try:
            TARGETS[name](draws, bench)
        except Breach as breach:
            if counts is None:
                raise Breach(f"{breach} <- {draws.story}") from breach
            key = str(breach).partition("\n")[0][:160]
            if not counts[key]:
                print(f"{name}: {breach}\n    {str(draws.story)[:1500]}", flush=True)
                _print_cause(breach)
            counts[key] += 1
            bench.sandbox.counts["breaches"] += 1

    example()


def _print_cause(breach: Breach) -> None:
    if breach.__cause__ is not None:
        print("".join(traceback.format_exception(breach.__cause__)[-8:]), flush=True)
