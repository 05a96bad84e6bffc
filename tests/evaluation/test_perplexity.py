"""Perplexity by the published protocols: what a text is, how it is cut, and that the sum is the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sleb.errors import CalibrationError, OptionError
from sleb.evaluation import perplexity
from sleb.methods.statistics import measured
from sleb.model.block_stack import BlockStack
from sleb.model.loading import load_model
from sleb.scoring.scorer import Scorer
from tests.support import tiny
from tests.support.paths import SHARED


def plain_nats(folder: str, ids: np.ndarray, removed: tuple[int, ...]) -> np.ndarray:
    """Per window, by plain transformers with the blocks taken out of the list; float64."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = [block for index, block in enumerate(model.model.layers) if index not in removed]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    nats = []
    with torch.inference_mode():
        for window in torch.from_numpy(ids):
            logits = model(window[None], use_cache=False).logits[0, :-1].double()
            nats.append(-logits.log_softmax(-1).gather(1, window[1:, None]).sum().item())
    return np.array(nats)


def test_rows_of_a_raw_file_are_joined_as_the_data_set_has_them(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(" \n = A = \n\n one two \n")
    tokenizer = tiny.tokenizer()
    windows = perplexity.windows(str(tmp_path / "wiki.raw"), tokenizer, 128, window=4)
    text = "\n\n".join(["", " = A = \n", "", " one two \n"])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert windows.ids.ravel().tolist() == ids[: len(ids) // 4 * 4]
    assert windows.text.is_whole
    assert not windows.text.bos


def test_other_files_are_one_text_and_documents_are_joined_by_spaces(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    (tmp_path / "one.txt").write_text("abc\n\ndef\n")
    assert tokenizer.decode(perplexity.windows(str(tmp_path / "one.txt"), tokenizer, 128, window=3).ids[0]) == "a b c"
    lines = [json.dumps({"text": "abc"}), "", json.dumps({"text": "def", "url": "x"})]
    (tmp_path / "c4.jsonl").write_text("\n".join(lines))
    windows = perplexity.windows(str(tmp_path / "c4.jsonl"), tokenizer, 128, window=7)
    assert windows.ids[0].tolist() == tokenizer("abc def", add_special_tokens=False).input_ids


def test_a_limit_takes_windows_evenly_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(tiny.text(1000))
    whole = perplexity.windows(str(tmp_path / "t.txt"), tiny.tokenizer(), 128, window=10)
    some = perplexity.windows(str(tmp_path / "t.txt"), tiny.tokenizer(), 128, window=10, limit=3)
    assert np.array_equal(some.ids, whole.ids[[0, round((len(whole.ids) - 1) / 2), -1]])
    assert (some.text.windows, some.text.of_windows) == (3, len(whole.ids))
    assert "evenly spread" in some.text.description
    assert some.text.tokens_hash != whole.text.tokens_hash


def test_windows_that_repeat_others_stay_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 7 + "klmnopqrst")
    windows = perplexity.windows(str(tmp_path / "t.txt"), tiny.tokenizer(), 128, window=10)
    assert len(windows.ids) == 8
    assert windows.text.description == "t.txt: 8 windows of 10 tokens, 2 of them distinct"


def test_bos_is_added_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(tiny.text(500))
    adds = tiny.tokenizer(adds_bos=True)
    assert not perplexity.windows(str(tmp_path / "t.txt"), adds, 128, window=10).text.bos  # published: none
    windows = perplexity.windows(str(tmp_path / "t.txt"), adds, 128, window=10, bos="auto")
    assert windows.text.bos
    assert set(windows.ids[:, 0]) == {1}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.txt", "short", "gives no window of 64 tokens"),
        ("t.txt", "", "is empty"),
        ("t.jsonl", '{"text": 1}', "Line 1 of"),
        ("t.jsonl", "{", "is not JSON"),
        ("t.txt", b"\xff\xfe", "not UTF-8"),
        ("t.parquet", "x", "cannot be read as parquet"),
        ("t.json", "[]", "one JSON value"),
        ("t.csv", "a,b", "is a table"),
    ],
)
def test_bad_texts_are_a_sentence(name: str, content: str | bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((CalibrationError, OptionError), match=sentence):
        perplexity.windows(str(tmp_path / name), tiny.tokenizer(), 128, window=64)


def test_the_sum_is_that_of_a_plain_forward_pass(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(tiny.text(2000))
    loaded = load_model(str(tiny_model), dtype="float32")
    windows = perplexity.windows(str(tmp_path / "t.txt"), loaded.tokenizer, 128, window=50)
    lists = [(), (2,), (1, 4)]
    nats = perplexity.score(Scorer(BlockStack(loaded.model), windows.ids), lists)
    for each in lists:
        plain = plain_nats(str(tiny_model), windows.ids, each)
        assert nats[each] == pytest.approx(plain, rel=1e-6)
        total = measured(nats[each], windows.token_counts)
        assert total.perplexity == pytest.approx(np.exp(plain.sum() / (len(plain) * 49)), rel=1e-6)


@pytest.mark.demo
@pytest.mark.usefixtures("demo_cache")
def test_on_the_real_text_and_model_it_is_the_plain_one_to_five_digits() -> None:
    raw, c4 = SHARED / "data" / "wikitext2" / "wiki.test.raw", SHARED / "data" / "c4_sample.jsonl"
    if not (raw.is_file() and c4.is_file()):
        pytest.skip("needs WikiText-2 raw and the C4 sample in ../shared/data, which are not there")
    from sleb.model import demo
    from sleb.model.loading import convert_gguf

    folder = str(demo.model_folder(convert_gguf))
    loaded = load_model("demo", dtype="float32")
    stack = BlockStack(loaded.model)
    for path, count in ((raw, 148), (c4, 81)):
        windows = perplexity.windows(str(path), loaded.tokenizer, stack.config.vocab_size, limit=1)
        assert windows.text.of_windows == count
        nats = perplexity.score(Scorer(stack, windows.ids), [(), (14, 23)])
        for each, row in nats.items():
            assert row.sum() / 2047 == pytest.approx(plain_nats(folder, windows.ids, each).sum() / 2047, abs=1e-5)


def test_a_stopped_scoring_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(tiny.text(3000))
    loaded = load_model(str(tiny_model), dtype="float32")
    windows = perplexity.windows(str(tmp_path / "t.txt"), loaded.tokenizer, 128, window=50)
    stack, lists = BlockStack(loaded.model), [(), (2,), (2, 3)]
    whole = perplexity.score(Scorer(stack, windows.ids, batch_size=2), lists)
    saved: list[dict[tuple[int, ...], np.ndarray]] = []

    class Killed(Exception):
        pass

    def save(nats: dict[tuple[int, ...], np.ndarray]) -> None:
        saved.append({each: row.copy() for each, row in nats.items()})
        if len(saved) == 3:
            raise Killed

    with pytest.raises(Killed):
        perplexity.score(Scorer(stack, windows.ids, batch_size=2), lists, None, save)
    done = int(np.isfinite(saved[-1][()]).sum())
    assert 0 < done < len(windows.ids)
    rest = Scorer(stack, windows.ids, batch_size=2)
    again = perplexity.score(rest, lists, saved[-1])
    assert all(np.array_equal(again[each], whole[each]) for each in lists)
    assert rest.head_evaluations == len(lists) * (len(windows.ids) - done)
    later = Scorer(stack, windows.ids, batch_size=2)
    perplexity.score(later, [*lists, (4,)], again)  # one more list costs only itself
    assert later.head_evaluations == len(windows.ids)


def test_all_lists_share_one_sweep(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(tiny.text(500))
    loaded = load_model(str(tiny_model), dtype="float32")
    windows = perplexity.windows(str(tmp_path / "t.txt"), loaded.tokenizer, 128, window=50)
    stack, lists = BlockStack(loaded.model), [(), (4,), (3, 4), (2, 3, 4)]
    together = Scorer(stack, windows.ids)
    perplexity.score(together, lists)
    alone = 0
    for each in lists:
        scorer = Scorer(stack, windows.ids)
        perplexity.score(scorer, [each])
        alone += scorer.block_evaluations
    assert together.block_evaluations < 0.75 * alone
