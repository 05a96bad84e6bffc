"""Records the dashboard's sample runs again: `make sample ARGS="--text wiki.test.raw"` (some 25 minutes on two cores).

One search per method on the demo model, into `assets/sample/`, and what the lists of Metric3 cost and buy; what names
the machine is taken out. `--findings` keeps the searches and records only that.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import sleb
from sleb.records import Method, Timing
from sleb.runtime import findings_folder

SAMPLES = Path(__file__).resolve().parent.parent / "assets" / "sample"
RATIO = 0.4  # twelve steps: enough to watch, small enough to keep
PROMPTS = ("The capital of France is", "Water boils when")


def main() -> None:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="wikitext2", help="of the findings: wikitext2, or wiki.test.raw as a file")
    parser.add_argument("--findings", action="store_true", help="keep the searches")
    settings = parser.parse_args()
    for each in [] if settings.findings else Method:
        print(f"Recording {each.value}", flush=True)
        record(each)
    target = folder(Method.METRIC3)
    copy = partial_of(target)  # a sample in its place is only read
    shutil.copytree(target, copy)
    judge(copy, settings.text)
    put(copy, target)


def folder(method: Method) -> Path:
    """The folder of a method's sample."""
    return SAMPLES / f"sample-smollm2-135m-{method.value}"


def record(method: Method) -> None:
    """One run; what was there is replaced once the new one is whole."""
    target = folder(method)
    partial = partial_of(target)
    whole = method is Method.METRIC3  # the analyses are the same for all
    sleb.search("demo", ratio=RATIO, method=method, analysis=whole, run_dir=partial)
    put(partial, target)


def partial_of(target: Path) -> Path:
    """The folder where one is being made, without what an earlier try left there."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def put(partial: Path, target: Path) -> None:
    """In its place, tidied."""
    tidy(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def judge(run_dir: Path, text: str) -> None:
    """Perplexity, time, quantisation and two continuations: estimates, small enough for two cores."""
    shutil.rmtree(run_dir / findings_folder.FOLDER, ignore_errors=True)
    for job in (run_dir / "jobs").iterdir():
        if not job.name.endswith("-search"):
            shutil.rmtree(job)
    sleb.evaluate(run_dir, all_steps=True, perplexity=[text], limit=8)
    shapes: dict[str, Any] = dict(prompt=(1, 512), generation=(8, 32), prompt_repetitions=7, generation_repetitions=5)
    sleb.benchmark(run_dir, all_steps=True, **shapes)
    sleb.quantize(run_dir, steps=3, schemes=("int8", "int4"), perplexity=[text], limit=8)
    for prompt in PROMPTS:
        sleb.generate(run_dir, prompt, steps=3, tokens=32)


def tidy(run_dir: Path) -> None:
    """Without the lock, the log, the machine's name and processes, and where texts lie."""
    (run_dir / ".lock").unlink(missing_ok=True)
    for job in (run_dir / "jobs").iterdir():
        (job / "log.txt").unlink(missing_ok=True)
        for name, fields in (("status.json", {"host": None, "pid": None}), ("attempt.json", {"host": "recorded"})):
            path = job / name
            path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=1))
        spec = json.loads((job / "spec.json").read_text())
        if spec.get("ask") and "texts" in spec["ask"]:
            spec["ask"]["texts"] = [Path(text).name for text in spec["ask"]["texts"]]
            (job / "spec.json").write_text(json.dumps(spec, indent=1))
    for result in findings_folder.of_kind(findings_folder.findings(run_dir), Timing):
        (run_dir / findings_folder.FOLDER / f"{result.question}.json").unlink()
        findings_folder.keep(run_dir, result.model_copy(update={"host": "recorded"}))


if __name__ == "__main__":
    main()
