"""The README of an exported model: everything it must say, and nothing that a name could make it say."""

from __future__ import annotations

import pytest
import yaml

from sleb.formats.model_card import Relation, code, escaped, front_matter, model_card
from tests.support.builders import make_run, make_step


def test_the_card_carries_the_provenance() -> None:
    run = make_run((14, 23, 11))
    card = model_card(run, (14, 23))
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "example/model-1b",
        "base_model_relation": "finetune",
        "tags": ["sleb", "pruned", "depth-pruning"],
    }
    assert "the base model names none" in body
    for fact in (
        "0123abc",
        "feedbeef",
        "[14, 23]",
        "[0, 14)",
        "metric3",
        "385,000 words",
        "16 sequences",
        "torch 2.13.0",
    ):
        assert fact in body.replace("\\", ""), fact
    rows = [line for line in body.splitlines() if line.startswith("| ") and "step" not in line]
    assert len(rows) == 3  # the baseline and the two steps of this list, not the third
    assert all(row.count("|") == 7 for row in rows)
    assert "0.0017 ± 0.024" in rows[1]
    assert "5, 7" in rows[1]
    assert "from_pretrained" in body


def test_names_from_outside_cannot_break_the_card() -> None:
    evil = "x\n---\nlicense: stolen\n# <script>alert(1)</script> | [a](b) `c`"
    run = make_run(spec={"model": evil}, stack={"text": evil, "weights_hash": "`a` | b"})
    card = model_card(run, (14, 23, 11))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "\n---" not in body
    assert "\nlicense" not in body
    assert "<script>" not in body
    assert "``` `a` \\| b ```".replace("```", "``") in body
    assert escaped("a|b*c_d") == r"a\|b\*c\_d"
    assert code("x") == "`x`"


def test_the_card_does_not_say_where_a_folder_lies() -> None:
    card = model_card(make_run(spec={"model": "/home/somebody/models/mine"}), (14,))
    assert "somebody" not in card
    assert "# mine without" in card
    assert "base_model" not in card
    assert "which is not on the Hugging Face hub" in card
    named = model_card(make_run(spec={"model": "demo"}), (14,))
    assert yaml.safe_load(named.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("relation", ["finetune", "quantized", "adapter"])
def test_front_matter_says_how_a_model_follows_from_its_base(relation: Relation) -> None:
    lines = front_matter("org/real", relation, {"license": "mit"}, "healed", library="peft")
    matter = yaml.safe_load("\n".join(lines[1:-1]))
    assert matter["base_model_relation"] == relation
    assert (matter["library_name"], matter["license"]) == ("peft", "mit")
    assert matter["tags"] == ["sleb", "pruned", "depth-pruning", "healed"]
    assert "base_model_relation" not in "".join(front_matter("/models/mine", relation, {}))


def test_the_card_carries_the_licence_and_quotes_it() -> None:
    evil = '"\n---\nbase_model: stolen\n# <b>'
    named = {"license": "other", "license_name": "llama3", "license_link": evil}
    card = model_card(make_run(), (14,), licence=named)
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert {name: matter[name] for name in named} == named
    assert matter["base_model"] == "example/model-1b"
    assert "**Licence:** llama3 (" in body
    assert "\n---" not in body
    assert "<b>" not in body


def test_the_card_says_that_the_base_model_is_quantised() -> None:
    card = model_card(make_run(stack={"quantisation": "GGUF (Q8_0), dequantised while loading"}), (14,))
    assert r"quantised: GGUF \(Q8\_0\), dequantised while loading" in card


def test_best_chunk_cards_show_every_step() -> None:
    run = make_run(steps=(make_step(1, (7,)), make_step(2, (20, 21), (20, 21), restored=(7,))))
    assert "20, 21 (back: 7)" in model_card(run, (20, 21))
