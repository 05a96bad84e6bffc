"""Check that code and papers use the field's terms and plain English: `make lint` runs it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    r"\b(?:unmodified|intact)\b|\b(?:original|whole) models?\b": "baseline",
    r"\bread-?outs?\b|\bread_out": "LM head, logits",
    r"\btells? (?:\w+ ){0,3}apart\b|\btold (?:\w+ ){0,3}apart\b": "significantly different, distinguishes",
    r"\bmend(?:s|ed|ing)?\b|\bremed(?:y|ies)\b|\bfitted anew\b": "repair; least-squares refit, refit",
    r"\bsped up\b|\bworth trying\b": "optimizations",
    r"(?<!\.)\bgone\b(?![=:])": "removed, missing",
    r"\btwins?\b": "reference implementation",
    r"\btickets?\b|\bwhose turn\b|\b(?:its|their) turn\b|\bturn has come\b": "device queue",
    r"\bpeek(?:s|ed|ing)?\b|(?<!timing )(?<!timing_)\bprob(?:e|es|ing)\b": "inspect; timing probe",
    r"(?<!there )\b(?:is|are) no (?!(?:longer|more|less|better|worse|faster|slower|larger|smaller)\b)": "is not a",
    r"\bthere already\b|\balready there\b": "already exists",
    r"\bmay go\b": "can be removed",
    r"\banew\b": "again",
    r"\bwhoever\b": "anyone who",
    r"\bnobody knows\b": "unknown",
    r"\bfor want of\b": "without",
}
"""What is not said in this project, and what is said instead."""
NAMES = {
    "how": "options, settings",
    "what": "spec, kind, subject",
    "asked": "request",
    "found": "result, the thing that was found",
    "said": "answer, text",
    "told": "message",
    "gone": "removed",
    "twin": "reference",
    "reach": "half_width",
}
"""Names of variables, parameters, functions and fields that say too little, and what they might be instead."""
FRAGMENT = re.compile(r"(?:Of|From|By|As|Per|And|Or|Else|With|Than|So|To) |\w+(?: \w+)?\.$")
"""How the docstring of a function or class begins that does not stand alone: "Of a training.", "Bytes."."""
ALLOWED = {
    ("scripts/check_words.py", ""),  # the list itself
    ("docs/decisions/", ""),  # what was decided, in the words of its time
    ("CHANGELOG.md", ""),
    ("sleb/records/findings.py", "gone: bool"),  # names on disk
    ("sleb/records/requests.py", "how: Literal"),
    ("sleb/evaluation/healing/healing_job.py", "mended.safetensors"),
}
"""Beginnings of paths, and parts of lines there, where a word stands for a reason."""


def main(paths: list[str]) -> int:
    """Check the given files or folders, or everything that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *(paths or ["*.py", "*.md"])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    places = [place for name in listed if name.endswith((".py", ".md")) for place in problems(name)]
    print(*places, sep="\n", end="\n" if places else "")
    return 1 if places else 0


def problems(name: str) -> Iterator[str]:
    """Each place in one file, as `file:line: what stands there; say what instead`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if any(name.startswith(path) and part in line for path, part in ALLOWED):
            continue
        for pattern, instead in WORDS.items():
            if match := re.search(pattern, line, re.IGNORECASE):
                yield f"{name}:{number}: {match[0].strip()!r}; say: {instead}"
    if name.endswith(".py") and not name.startswith("tests/data/"):
        tree = ast.parse(text)
        if not name.startswith("tests/"):
            yield from (f"{name}:{number}: {line!r} does not stand alone" for number, line in fragments(tree))
        for number, bound in names_bound(tree):
            instead = NAMES.get(bound.strip("_").lower())
            if instead and not any(name.startswith(path) and part in lines[number - 1] for path, part in ALLOWED):
                yield f"{name}:{number}: the name {bound!r}; perhaps: {instead}"


def names_bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a module gives to something, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def fragments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """First lines of docstrings that are not sentences, with their lines in the file."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str) and FRAGMENT.match(text.split("\n")[0]):
                    yield statement.lineno, text.split("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
