"""Records the fixture of `tests/test_compatibility.py`: run folders of every kind, as this version writes them.

What lies in `tests/data/compatibility/0.1.0/` was recorded at commit 69051c0 and must never be recorded again over the
old one: it stands for the folders that users of that version have. A later format gets a folder of its own, named by
its version, beside it; this script refuses to write into one that is there.

    python scripts/record_compatibility.py

It works in `/compatibility`, a folder that it makes and takes away again: specs hold absolute paths, names of findings
and the cache's digests are hashes over some of them, and so no path has to be replaced afterwards. The test copies the
fixture and puts the copy's own path in the place of that one. Every number is the program's; the machine's name and
clock are others. Needs the extras (`make setup` brings them) and the right to write to `/`.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/compatibility")
HOME = ROOT / "home"
os.environ |= {
    "SLEB_HOME": str(HOME),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_CACHE": str(ROOT / "data-sets"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

import contextlib
import io
import json
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch
import yaml

import sleb
from sleb.cli.main import main as command_line
from sleb.errors import SlebError, Stopped
from sleb.records import Baseline, Progress, Step
from sleb.runtime.processes.progress import Watcher
from tests.support import gguf_files, tiny
from tests.support.recorded.questions import multiple_choice
from tests.support.recorded.steps import step_of

TARGET = REPOSITORY / "tests" / "data" / "compatibility" / sleb.__version__
HOST = "recorded"
"""In place of the machine's name: no machine has it, so that its processes count as ended after a minute."""
BEGINNING = 1_735_689_600.0
"""When the recording says that it began: in nobody's future, or what was interrupted would still count as running."""
RUNS = HOME / "runs"
MODEL, GGUF = ROOT / "tiny-llama", ROOT / "tiny.gguf"
TEXT, HELD, OTHER, TASKS = ROOT / "text.txt", ROOT / "held.txt", ROOT / "other.txt", ROOT / "tasks"
TEXT_FORMATS = ("json", "csv", "list", "sleb", "mergekit", "llama-quantize")

COMMON: dict[str, Any] = dict(
    calibration=str(TEXT), sequences=4, sequence_length=24, held_out=2, dtype="float32", device="cpu", analysis=False
)
SEARCHES: dict[str, dict[str, Any]] = {
    "metric3": dict(remove=3, analysis=True),
    "metric2": dict(method="metric2", remove=3, analysis=True),
    "metric1": dict(method="metric1", remove=3),
    "early-exit": dict(method="early-exit", remove=3),
    "best-chunk": dict(method="best-chunk", remove=3),
    "race": dict(search="race", sequences=48, sequence_length=16, held_out=4, remove=2),
    "swap": dict(refine="swap", remove=4, sequences=16, held_out=4, protect=[], seed=3),
    "kl": dict(objective="kl", remove=2, protect=[0, 1]),
    "until": dict(until_perplexity=0.05, sequences=16, held_out=4, protect=[], seed=3),
    "gguf": dict(model=str(GGUF), remove=2),
}
"""What each search is asked, beside what is common to all."""
TASK = multiple_choice(TASKS / "questions-train.jsonl", TASKS / "questions.jsonl")
EVALUATION: dict[str, Any] = dict(window=50, limit=8, device="cpu")


class Stop(Watcher):
    """Ends the job after a step (0 is the baseline), or in a phase, as a user would or as a crash does."""

    def __init__(self, *, step: int | None = None, phase: str | None = None, crash: bool = False) -> None:
        self.at_step, self.at_phase, self.crash = step, phase, crash

    def baseline(self, baseline: Baseline) -> None:
        """The baseline has been scored."""
        self._now(self.at_step == 0)

    def step(self, step: Step, baseline: Baseline) -> None:
        """A step has been written down."""
        self._now(self.at_step == step.number)

    def progress(self, progress: Progress) -> None:
        """A phase has begun."""
        self._now(self.at_phase is not None and self.at_phase in f"{progress.phase} {progress.message}")

    def _now(self, due: bool) -> None:
        if due and self.crash:
            os.kill(os.getpid(), signal.SIGKILL)
        if due:
            raise Stopped("Stopped on request.")


def main() -> None:
    """All of it, into a folder that is not there yet."""
    for folder in (TARGET, ROOT):
        if folder.exists():
            sys.exit(f"{folder} already exists; what was recorded once is never recorded again.")
    machine = socket.gethostname()
    socket.gethostname = lambda: HOST
    clock, offset = time.time, time.time() - BEGINNING
    time.time = lambda: clock() - offset
    torch.set_num_threads(1)
    ROOT.mkdir()
    try:
        write_inputs()
        record_searches()
        record_findings()
        record_unfinished()
        write_expected()
        tidy()
        require_nameless(machine)
        for name in ("home", "expected", "tasks"):
            shutil.copytree(ROOT / name, TARGET / name)
        shutil.copytree(MODEL, TARGET / MODEL.name)
        for file in (GGUF, TEXT, HELD, OTHER):
            shutil.copy(file, TARGET / file.name)
    finally:
        shutil.rmtree(ROOT)
    size = sum(each.stat().st_size for each in TARGET.rglob("*") if each.is_file())
    print(f"{TARGET}: {size / 1e6:.2f} MB in {sum(1 for _ in TARGET.rglob('*'))} files and folders")


def write_inputs() -> None:
    """Models, texts and a task: resuming and exporting need the very same bytes."""
    tiny.save(MODEL)
    gguf_files.write(GGUF)
    for path, characters, seed in ((TEXT, 6000, 0), (HELD, 2500, 5), (OTHER, 1500, 6)):
        path.write_text(tiny.text(characters, seed))
    TASKS.mkdir()
    for name in ("questions-train.jsonl", "questions.jsonl"):
        shutil.copy(REPOSITORY / "tests" / "data" / name, TASKS / name)
    (TASKS / "questions.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False))


def search(name: str, like: str, watcher: Watcher | None = None) -> None:
    """A run `name` of the search `like`; one that is stopped stays as it is then."""
    settings = COMMON | {"model": str(MODEL)} | SEARCHES[like]
    with contextlib.suppress(Stopped):
        sleb.search(settings.pop("model"), run_dir=RUNS / name, watcher=watcher, **settings)


def record_searches() -> None:
    """Finished: every method and way of searching, the analyses alone, and two exports with their proof."""
    for name in SEARCHES:
        search(name, name)
    own = ("calibration", "sequences", "sequence_length", "dtype", "device")
    sleb.analyze(str(MODEL), run_dir=RUNS / "analysis", seed=1, **{key: COMMON[key] for key in own})
    sleb.export_model("metric3", ROOT / "smaller", steps=2)
    sleb.export_model("gguf", ROOT / "smaller.gguf", format="gguf")


def record_findings() -> None:
    """Findings of every kind, about a search and about a list from anywhere."""
    sleb.evaluate("metric3", all_steps=True, perplexity=[str(HELD)], **EVALUATION)
    tasks: dict[str, Any] = dict(tasks=["questions"], task_folder=TASKS)
    sleb.evaluate("metric3", steps=2, perplexity=[], **tasks, **EVALUATION)
    shapes: dict[str, Any] = dict(prompt=(1, 16), generation=(2, 4), generation_prompt=8)
    repetitions: dict[str, Any] = dict(prompt_repetitions=3, generation_repetitions=2)
    sleb.benchmark("metric3", steps=2, device="cpu", **shapes, **repetitions)
    sleb.generate("metric3", "the block of a model", steps=2, tokens=12, device="cpu")
    on_text: dict[str, Any] = dict(steps=2, perplexity=[str(HELD)], **EVALUATION)
    sleb.quantize("metric3", schemes=("int8", "int4"), group_size=32, **on_text)
    healing: dict[str, Any] = dict(source=str(TEXT), sequences=16, sequence_length=32, **on_text)
    sleb.heal("metric3", how="linear", **healing)
    sleb.heal("metric3", how="lora", rank=2, batch_sequences=4, learning_rate=1e-2, **healing)
    given: dict[str, Any] = dict(removal_list=[4, 2], perplexity=[str(HELD), str(OTHER)], dtype="float32")
    sleb.evaluate(str(MODEL), run_dir=RUNS / "evaluation", **given, **tasks, **EVALUATION)
    stopped: dict[str, Any] = dict(given, **EVALUATION)
    with contextlib.suppress(Stopped):
        watcher: Watcher = Stop(phase=f"Reading {OTHER}")
        sleb.evaluate(str(MODEL), run_dir=RUNS / "evaluation-stopped", watcher=watcher, **stopped)
    with contextlib.suppress(Stopped):
        watcher = Stop(phase="Accuracy on tasks")
        sleb.evaluate(str(MODEL), run_dir=RUNS / "tasks-stopped", watcher=watcher, **stopped, **tasks)


def record_unfinished() -> None:
    """Stopped after a step, before the first one and before the analyses; interrupted, waiting and failed."""
    for like in SEARCHES:
        search(f"{like}-stopped", like, Stop(step=1))
    with open(RUNS / "metric3-stopped" / "trace.jsonl", "a") as trace:
        trace.write('{"step":{"number":2,"removed":[')  # torn off by a power cut
    search("swap-stopped-later", "swap", Stop(step=5))
    search("metric3-stopped-early", "metric3", Stop(step=0))
    search("metric3-stopped-late", "metric3", Stop(phase="Analyses"))
    child = os.fork()
    if not child:
        search("metric3-interrupted", "metric3", Stop(step=2, crash=True))
        os._exit(1)
    os.waitpid(child, 0)
    settings = COMMON | SEARCHES["metric3"]
    named = ("sequences", "sequence_length", "held_out", "calibration", "dtype", "device", "remove")
    options = [word for key in named for word in (f"--{key.replace('_', '-')}", settings[key])]
    command("search", MODEL, *options, "--run-dir", RUNS / "metric3-queued", "--prepare")
    with contextlib.suppress(SlebError):
        sleb.search(str(MODEL), run_dir=RUNS / "failed", remove=2, **COMMON | {"sequences": 4000})


def command(*words: object) -> str:
    """What the command line prints."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["sleb", *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed):
            command_line()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv = before
    return printed.getvalue()


def write_expected() -> None:
    """What this version says of each run: its records, its states, its `--json` and its lists for other tools."""
    (ROOT / "expected").mkdir()
    listed = {each["run_id"]: each for each in json.loads(command("runs", "--json"))["runs"]}
    for folder in sorted(RUNS.iterdir()):
        run = sleb.load(folder.name)
        steps = run.trace.steps if run.trace else ()
        formats = TEXT_FORMATS if steps else ()
        expected = {
            "state": listed[folder.name]["state"],
            "jobs": {job.name: job.status.state.value for job in run.jobs},
            "removal_list": run.removal_list,
            "steps": [step_of(step) for step in steps],
            "finished": run.trace.finished if run.trace else None,
            "analysed": run.analysis is not None,
            "findings": Counter(each.kind for each in sleb.findings_of(run)),
            "listed": listed[folder.name],
            "shown": json.loads(command("show", folder.name, "--json")),
            "exported": {each: command("export", folder.name, "--format", each) for each in formats},
        }
        (ROOT / "expected" / f"{folder.name}.json").write_text(json.dumps(expected) + "\n")


def tidy() -> None:
    """Without locks and logs, and of the cache only block outputs."""
    keep: dict[str, Callable[[Path], bool]] = {
        ".": lambda path: path.name in ("runs", "cache"),
        "cache": lambda path: path.name == "block-outputs",
    }
    for where, wanted in keep.items():
        for each in (HOME / where).iterdir():
            if not wanted(each):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    for each in [*HOME.rglob(".lock"), *HOME.rglob("log.txt")]:
        each.unlink()


def require_nameless(machine: str) -> None:
    """Nothing in it may name the machine or a place on it."""
    words = [f'"{machine}"', str(REPOSITORY), str(Path.home()), sys.prefix, "/tmp/", "/home/"]
    for file in [*HOME.rglob("*"), *(ROOT / "expected").iterdir(), *TASKS.iterdir()]:
        content = file.read_bytes().replace(str(HOME).encode(), b"") if file.is_file() else b""
        result = [word for word in words if word.encode() in content]
        if result:
            sys.exit(f"{file} holds {result[0]}.")


if __name__ == "__main__":
    main()
