"""Importing a module defines names, and nothing else: it registers, computes, reads and starts nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import MODULES, package_of

RUN = {"sleb.__main__", "app.__main__", "app.main", "app.serve"}
"""Modules that are run, not imported; so are the pages. The command line registers its commands in `cli`."""
VALUES = {
    *("dict", "enumerate", "frozenset", "object", "set", "str", "tuple", "dict.fromkeys"),
    *("re.compile", "re.escape", "logging.getLogger", "threading.local", "datetime", "timedelta"),
    *("field", "Field", "ConfigDict", "TypeAdapter", "TypeVar", "Path", "Path(__file__).resolve"),
}
"""Calls that only make a value. Constructors, which are named in capitals, are calls of that kind as well."""
DECORATORS = {
    *("cache", "lru_cache", "cached_property", "classmethod", "property", "staticmethod", "contextmanager"),
    *("contextlib.contextmanager", "dataclass", "field_validator", "model_validator", "runtime_checkable"),
    *(
        "torch.inference_mode",
        "torch.no_grad",
        "with_options",
        "st.cache_data",
        "st.cache_resource",
        "st.dialog",
        "st.fragment",
    ),
}
"""Decorators that only wrap what they decorate."""
EXCEPTIONS = {
    "sleb.runtime.dashboard_files": "whether this is a checkout or an installed package does not change",
}
"""Modules, or packages, that do something at import for a reason."""


def is_guard(statement: ast.If) -> bool:
    """Whether a statement holds what only type checkers see, or what only happens where the module is run."""
    return ast.unparse(statement.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def effects(tree: ast.Module) -> Iterator[str]:
    """What a module does at import besides defining names, with its lines."""
    statements: list[ast.stmt] = list(tree.body)
    while statements:
        each = statements.pop(0)
        if isinstance(each, ast.ClassDef):
            statements += each.body
            yield from decorated(each)
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from decorated(each)
            for default in (*each.args.defaults, *each.args.kw_defaults):
                yield from calls(default)
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            yield from calls(each.value)
        elif isinstance(each, ast.If) and is_guard(each):
            continue
        elif isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            continue  # a docstring
        elif not isinstance(each, ast.Import | ast.ImportFrom | ast.Pass):
            yield f"{each.lineno}: {ast.unparse(each)[:80]}"


def decorated(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Decorators that are not known to only wrap."""
    for each in node.decorator_list:
        name = ast.unparse(each.func if isinstance(each, ast.Call) else each)
        if name not in DECORATORS:
            yield f"{each.lineno}: @{name}"


def calls(value: ast.expr | None) -> Iterator[str]:
    """Calls in an expression that do more than make a value; a method of a literal makes one, too."""
    for each in ast.walk(value) if value is not None else ():
        if isinstance(each, ast.Call) and not makes_value(each):
            yield f"{each.lineno}: {ast.unparse(each)[:80]}"


def makes_value(call: ast.Call) -> bool:
    """Whether a call only makes a value, by its name."""
    name = ast.unparse(call.func)
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("join", "replace"):
        return True
    return name in VALUES or (isinstance(call.func, ast.Name) and name.lstrip("_")[:1].isupper())


@pytest.mark.parametrize("package", sorted({package_of(name) for name in MODULES} - {"cli", "pages"}))
def test_importing_a_module_only_defines_names(package: str) -> None:
    wrong = [
        f"{path}:{effect}"
        for name, path in MODULES.items()
        if package_of(name) == package and name not in RUN
        if not any(name == each or name.startswith(f"{each}.") for each in EXCEPTIONS)
        for effect in effects(ast.parse(path.read_text()))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "start()", "TABLE = computed()", "TABLE |= {}", "for each in (): pass", "@app.command()\ndef f(): ...",
        "class A:\n    table = computed()", "def f(value=computed()): ...", "if DEBUG:\n    A = 1",
        "TEXT = (HERE / 'page.css').read_text()", "OPERATORS = torch.library.Library('sleb', 'FRAGMENT')",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(line: str) -> None:
    """The test of the test: each kind of effect is found."""
    assert len(list(effects(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "A = 1", "import os", "LOG = logging.getLogger(__name__)", "A = tuple(each for each in B)",
        "if TYPE_CHECKING:\n    import torch", "@dataclass(frozen=True)\nclass A:\n    b: int = field(default=1)",
        "A = {'search': _Search(), 'analyze': _Search()}", "def f():\n    start()", "'''A docstring.'''",
    ],
)  # fmt: skip
def test_the_rule_allows_definitions(line: str) -> None:
    assert list(effects(ast.parse(line))) == []
