"""The house: imports only go down, and what must not need torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "record": 0, "findings": 0, "records": 0, "files": 0, "published": 0,
    "dashboard_files": 0,
    "results": 0, "tables": 1, "store": 1, "turns": 1, "jobs": 1, "outline": 1, "peek": 1, "command": 1, "methods": 1,
    "costs": 1, "formats": 1, "summary": 1, "memory": 1, "meter": 1, "cache": 1, "card": 1,
    "distributed": 2, "streaming": 2, "offloading": 2,
    "decoding": 2, "demo": 2, "tokens": 2, "loading": 2, "blocks": 2, "calibration": 2, "configs": 2, "proof": 2,
    "tasks": 2,
    "scoring": 3, "similarity": 3, "alignment": 3, "surgery": 3, "analysis": 4, "export": 4, "speedups": 4,
    "adapters": 4, "remedies": 4,
    "perplexity": 4, "subject": 4, "evaluating": 5, "zeroshot": 5, "timing": 5, "packing": 5, "quantizing": 5,
    "healed": 5, "healing": 5,
    "generating": 5, "gguf_export": 5,
    "session": 5,
    "worker": 6, "probe": 6,
    "options": 6, "api": 7, "screen": 7, "judging": 8, "answers": 8, "judge": 9, "cli": 10,
    "__init__": 10, "__main__": 11,
}  # fmt: skip
LAZY_TORCH = {"distributed", "tokens", "similarity", "alignment"}  # pages compute with them


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found & set(FLOORS)


def test_every_file_has_a_floor_and_imports_only_go_down() -> None:
    files = {path.stem: path for path in (ROOT / "sleb").glob("*.py")}
    assert set(files) == set(FLOORS)
    for name, path in files.items():
        for used in imports(path):
            below = FLOORS[used] < FLOORS[name] or (FLOORS[used] == FLOORS[name] and not _mutual(used, name))
            assert below, f"{name} (floor {FLOORS[name]}) imports {used} (floor {FLOORS[used]})"


def _mutual(used: str, name: str) -> bool:
    """Neighbours may know each other in one direction only."""
    return name in imports(ROOT / "sleb" / f"{used}.py")


@pytest.mark.parametrize("name", sorted(n for n, floor in FLOORS.items() if floor <= 1) + sorted(LAZY_TORCH) + ["cli"])
def test_no_torch_below_the_second_floor_nor_at_the_edge(name: str) -> None:
    code = (
        f"import sys, sleb.{name}; print(sorted({{'torch', 'transformers', 'datasets', 'scipy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["-c", "import sleb"], ["-m", "sleb", "--help"], ["-m", "sleb", "runs"]])
def test_importing_and_helping_need_no_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers", "datasets", "scipy", "pandas"} & loaded


def test_the_public_functions_survive_the_import_of_everything() -> None:
    """A module of the package must not be called like a function of it: importing it would replace the function."""
    code = (
        "import sleb, sleb.worker, sleb.cli\n"
        "assert all(callable(getattr(sleb, name)) or name == '__version__' for name in sleb.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["charts/*.py", "report.py", "html_page.py", "evidence.py", "probes.py"])
def test_what_draws_figures_and_reports_knows_no_streamlit_and_no_page(name: str) -> None:
    for path in (ROOT / "app").glob(name):
        modules = {
            alias
            for node in ast.walk(ast.parse(path.read_text()))
            for alias in (
                [node.module or ""] if isinstance(node, ast.ImportFrom)
                else [each.name for each in node.names] if isinstance(node, ast.Import)
                else []
            )
        }  # fmt: skip
        assert not {each.split(".")[0] for each in modules} & {"streamlit", "pages", "torch"}, path
        assert not modules & {"app.data", "app.components"}, path
