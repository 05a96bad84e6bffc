"""The structure of the program: packages import what stands to their left only, and the light ones load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RULE = """
    errors < records bounded < runtime < formats model specs < text scoring analysis export < methods < evaluation
           < search_job forecast < worker < execution < api < sleb < report < cli < app < pages
"""
"""docs/architecture.md explains it. `sleb` is the `__init__` of the package: the public functions."""
FLOOR = {name: floor for floor, names in enumerate(RULE.split("<")) for name in names.split()}

WITHOUT_TORCH = (
    "errors",
    "records",
    "runtime",
    "formats",
    "methods",
    "specs",
    "execution",
    "api",
    "report",
    "cli",
    "app",
)
"""Packages of which every module loads without torch."""
TORCH_FREE_MODULES = (
    "sleb.model.inspection.block_count",
    "sleb.model.demo",
    "sleb.model.inspection.gguf_header",
    "sleb.model.inspection.model_files",
    "sleb.model.inspection.presence",
    "sleb.scoring.sweep_plan",
    "sleb.analysis.block_output_cache",
    "sleb.analysis.cache_folder",
    "sleb.analysis.prediction_alignment",
    "sleb.analysis.similarity",
    "sleb.analysis.token_sample",
    "sleb.export.destination",
    "sleb.export.finished_exports",
    "sleb.export.gguf_plan",
    "sleb.evaluation.request",
)
"""Modules of the other packages that pages, the command line and notebooks import."""
HEAVY = {"torch", "transformers", "datasets", "scipy"}
MOST_MODULES = 12
"""In a folder, its `__init__` aside: more are not found by looking."""


def files(folder: Path) -> Iterator[Path]:
    """The Python files below a folder."""
    return (path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts)


def modules(*folders: str) -> dict[str, Path]:
    """Dotted name -> file, of everything below some folders of the checkout."""
    result = {}
    for folder in folders:
        for path in files(ROOT / folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


MODULES = modules("sleb", "app", "pages")


def package_of(module: str) -> str:
    """The name by which the rule knows a module: its package, or itself where it stands at the root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sleb" and len(parts) > 1 else parts[0]


def imports_of(name: str, path: Path) -> set[str]:
    """Modules of the program that a module imports: absolute or relative, at the top or inside a function."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            within = {f"{source}.{alias.name}" for alias in node.names}
            result |= within & set(MODULES) or {source}
            if within - set(MODULES):  # a name that the package itself gives
                result.add(source)
    return {each for each in result & set(MODULES) if each != name}


GRAPH = {name: imports_of(name, path) for name, path in MODULES.items()}


def test_every_package_has_a_place_in_the_rule() -> None:
    assert {package_of(name) for name in MODULES} - {"__main__"} == set(FLOOR)


def test_packages_import_only_what_stands_to_their_left() -> None:
    wrong = [
        f"{name} imports {used}"
        for name, all_used in GRAPH.items()
        for used in all_used
        if "__main__" not in name
        and package_of(used) != package_of(name)
        and FLOOR[package_of(used)] >= FLOOR[package_of(name)]
    ]
    assert not wrong


def test_no_module_imports_itself_by_any_way_round() -> None:
    done: set[str] = set()

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in way:
            return (*way[way.index(name) :], name)
        if name in done:
            return None
        for used in sorted(GRAPH[name]):
            if result := circle(used, (*way, name)):
                return result
        done.add(name)
        return None

    assert [result for name in sorted(GRAPH) if (result := circle(name, ()))] == []


def test_no_module_is_imported_by_a_string() -> None:
    """A string hides an import from readers and from the rule; registries hold imported modules."""
    called = {"import_module", "__import__", "resolve_name", "run_module"}
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in called
    ]
    assert not wrong


def test_the_rule_sees_what_it_forbids(tmp_path: Path) -> None:
    """The test of the test: each kind of import is found."""
    path = tmp_path / "module.py"
    for line, result in (
        ("import sleb.worker", "sleb.worker"),
        ("from sleb import worker", "sleb.worker"),
        ("from sleb.worker import execute", "sleb.worker"),
        ("from .files import writing", "sleb.runtime.files"),
        ("from . import files", "sleb.runtime.files"),
        ("from ..model.loading import load_model", "sleb.model.loading"),
        ("def later():\n    from sleb.model import loading", "sleb.model.loading"),
        ("from sleb.records import Run", "sleb.records"),
    ):
        path.write_text(line)
        assert result in imports_of("sleb.runtime.made_up", path), line


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for top in ("sleb", "app", "pages", "tests") for path in files(ROOT / top)}
    crowded = {
        str(folder.relative_to(ROOT)): len(result)
        for folder in folders
        if len(result := [each for each in folder.glob("*.py") if not each.name.startswith("__")]) > MOST_MODULES
    }
    assert not crowded


def test_the_init_of_a_package_holds_nothing_but_its_sentence() -> None:
    """Else importing one torch-free module of it would load them all. `records` has no torch to load."""
    full = [
        name
        for name, path in MODULES.items()
        if path.name == "__init__.py" and name not in ("sleb", "sleb.records")
        if len(ast.parse(path.read_text()).body) > 1
    ]
    assert not full


@pytest.mark.parametrize("package", [*WITHOUT_TORCH, "others"])
def test_what_needs_no_torch_loads_none(package: str) -> None:
    names = [name for name in MODULES if package_of(name) == package and not name.endswith(("__main__", "app.main"))]
    code = f"import sys, {', '.join(names or TORCH_FREE_MODULES)}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["report", "cli"])
def test_what_needs_no_dashboard_loads_none(package: str) -> None:
    names = [name for name in MODULES if package_of(name) == package]
    code = f"import sys, {', '.join(names)}\nprint(sorted({{'streamlit', 'app', 'pages'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["-c", "import sleb"], ["-m", "sleb", "--help"], ["-m", "sleb", "runs"]])
def test_importing_and_helping_need_no_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not (HEAVY | {"pandas", "plotly"}) & loaded


def test_the_public_functions_survive_the_import_of_everything() -> None:
    """A module of the package must not be called like a function of it: importing it would replace the function."""
    code = (
        "import sleb, sleb.worker, sleb.cli.main, sleb.report.build\n"
        "assert all(callable(getattr(sleb, name)) or name == '__version__' for name in sleb.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
