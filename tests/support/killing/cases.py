"""Every command that writes, over tiny random models, and what it can change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import gguf_files, tiny
from tests.support.killing.bench import Case

OPTIONS = ("--calibration", "{}/text.txt", "--sequences", "4", "--sequence-length", "24", "--dtype", "float32")
SEARCH = ("search", "{}/model", *OPTIONS, "--no-analysis", "--remove", "2", "--device", "cpu")
NEW = (*SEARCH, "--run-dir", "{}/new")
ANALYZE = ("analyze", "{}/model", *OPTIONS, "--device", "cpu", "--run-dir", "{}/new")
SEARCHED = (*SEARCH, "--run-dir", "{}/run")
TEXT = ("--perplexity", "{}/text.txt", "--window", "32", "--limit", "4", "--device", "cpu")
LISTED = ("--steps", "2")
HEAL = (
    "heal", "{}/run", "--source", "{}/text.txt", "--sequences", "8", "--sequence-length", "24",
    "--batch-sequences", "4", "--rank", "2", *TEXT,
)  # fmt: skip
QUANTIZE = ("quantize", "{}/run", *TEXT)
EXPORT = ("export", "{}/run", "--format")
CUT = ("export", "{}/run-gguf", "--format", "gguf", "--out", "{}/out/smaller.gguf")


def base(folder: Path) -> None:
    """A model, the same kind as a GGUF file, and a text."""
    tiny.save(folder / "model")
    gguf_files.write(folder / "model.gguf")
    (folder / "text.txt").write_text(tiny.text(3000))
    (folder / "home").mkdir()
    (folder / "home" / "signing-key").write_text("5e" * 32)  # else each command would make another one
    (folder / "out").mkdir()
    (folder / "out" / "somebody's own").write_text("stays")


def prove_here() -> None:
    """Have models proven in the process that wrote them: loading the libraries again takes seconds each time."""
    from sleb.export import proof_process, proven_folder
    from sleb.records import Proof

    def prove(folder: Path, device: str = "cpu", *_: Any) -> Proof:
        return Proof.model_validate(proof_process.prove(folder, device))

    proven_folder.run_proof = prove  # type: ignore[assignment]


def preload(*, everything: bool = True) -> None:
    """Import what commands need, so that forked processes have it; `everything`: healing and quantising as well."""
    import torch

    torch.set_num_threads(1)
    if everything:
        import peft  # noqa: F401
        import torchao.quantization  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import sleb.cli.main
    import sleb.worker  # noqa: F401

    prove_here()


def _half(folder: Path) -> None:
    """As if the search had been stopped after its first step."""
    path = folder / "run" / "trace.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])
    (folder / "run" / "scores" / "step-0002.npz").unlink()


def _new_or_resumed(name: str, command: tuple[str, ...]) -> Callable[[Path], list[str] | None]:
    def again(folder: Path) -> list[str] | None:
        there = (folder / name / "spec.json").is_file()
        return ["resume", str(folder / name)] if there else [each.replace("{}", str(folder)) for each in command]

    return again


def _foreign(folder: Path) -> None:
    shutil.move(folder / "run", folder / "elsewhere")
    path = folder / "elsewhere" / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def _imported(folder: Path) -> list[str] | None:
    return ["show", "elsewhere"] if (folder / "home" / "runs" / "elsewhere").exists() else None


def _deleted(folder: Path) -> list[str] | None:
    """A delete that had its way before it was killed leaves nothing to name; any command that writes then tidies up."""
    return ["delete", str(folder / "run"), "--yes"] if (folder / "run").exists() else ["cache", "--clear", "partial"]


FINDING = ("run/evaluation", "run/healing", "run/stack.json")

CASES = [
    Case(
        "search", (), (*SEARCH, "--run-dir", "{}/new"), again=_new_or_resumed("new", (*SEARCH, "--run-dir", "{}/new"))
    ),
    Case("resume", (SEARCHED,), ("resume", "{}/run"), own=("run",), prepare=_half),
    Case("analyze", (), ANALYZE, again=_new_or_resumed("new", ANALYZE)),
    Case("evaluate", (SEARCHED,), ("evaluate", "{}/run", *LISTED, *TEXT), own=FINDING),
    Case(
        "benchmark",
        (SEARCHED,),
        (
            "benchmark",
            "{}/run",
            *LISTED,
            "--prompt",
            "1x16",
            "--generation",
            "1x2",
            "--generation-prompt",
            "4",
            "--prompt-repetitions",
            "1",
            "--generation-repetitions",
            "1",
            "--device",
            "cpu",
        ),
        own=FINDING,
        measured=True,
    ),
    Case(
        "quantize --out --replace",
        (SEARCHED, (*QUANTIZE, "--steps", "1", "--out", "{}/out/int8")),
        (*QUANTIZE, *LISTED, "--out", "{}/out/int8", "--replace"),
        units=("out/int8",),
        own=FINDING,
    ),
    Case(
        "heal --out --replace",
        (SEARCHED, (*EXPORT, "hf", "--steps", "1", "--out", "{}/out/healed")),
        (*HEAL, *LISTED, "--how", "both", "--out", "{}/out/healed", "--replace"),
        units=("out/healed",),
        own=FINDING,
    ),
    Case(
        "export hf --replace",
        (SEARCHED, (*EXPORT, "hf", "--steps", "1", "--out", "{}/out/smaller")),
        (*EXPORT, "hf", "--out", "{}/out/smaller", "--replace"),
        units=("out/smaller",),
    ),
    Case(
        "export gguf --replace",
        (
            ("search", "{}/model.gguf", *SEARCH[2:], "--run-dir", "{}/run-gguf"),
            (*CUT, "--steps", "1"),
        ),
        (*CUT, "--replace"),
        units=("out/smaller.gguf",),
    ),
    Case(
        "export json --replace",
        (SEARCHED, (*EXPORT, "json", "--steps", "1", "--out", "{}/out/list.json")),
        (*EXPORT, "json", "--out", "{}/out/list.json", "--replace"),
        units=("out/list.json",),
    ),
    Case(
        "report --replace",
        (SEARCHED, ("report", "{}/run", "--out", "{}/out/report.html")),
        ("report", "{}/run", "--out", "{}/out/report.html", "--replace"),
        units=("out/report.html",),
    ),
    Case("import", (SEARCHED,), ("import", "{}/elsewhere"), prepare=_foreign, again=_imported),
    Case("delete", (SEARCHED,), ("delete", "{}/run", "--yes"), units=("run",), again=_deleted),
    Case(
        "cache --clear",
        (("analyze", "{}/model", *OPTIONS, "--device", "cpu", "--run-dir", "{}/run"),),
        ("cache", "--clear", "all"),
        units=("home/cache/block-outputs",),
    ),
]
