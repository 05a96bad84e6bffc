"""The papers: links that lead somewhere, commands that exist, a README that can be read in one go."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from sleb.cli.main import app
from tests.support.paths import ROOT

PAPERS = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not name.startswith("tests/")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.skipif(not PAPERS, reason="needs a git checkout")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.relative_to(ROOT)))
def test_relative_links_lead_to_a_file_and_a_heading(paper):
    text = FENCE.sub("", paper.read_text())
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (paper.parent / path).resolve() if path else paper
        assert file.exists(), f"{target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{target} leads out of the project"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def anchors(file: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: str(paper.relative_to(ROOT)))
def test_commands_in_a_paper_are_understood(paper):
    """Every `sleb ...` line of a shell example names a command and options that exist, with values they take."""
    commands = typer.main.get_command(app).commands
    for language, block in FENCE.findall(paper.read_text()):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("sleb "):
                continue
            name, *arguments = shlex.split(line, comments=True)[1:]
            assert name in commands, f"{line}: no such command"
            commands[name].make_context(name, arguments)  # raises for what it does not take


def test_every_document_is_reached_from_the_readme():
    linked = {
        (paper.parent / target.partition("#")[0]).resolve()
        for paper in PAPERS
        for target in LINK.findall(paper.read_text())
        if not re.match(r"[a-z]+:", target)
    }
    unreached = [
        paper for paper in PAPERS if paper.parent == ROOT / "docs" and paper not in linked and paper.name != "README.md"
    ]
    assert not unreached
