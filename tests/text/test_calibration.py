"""Text -> windows: cut as said, drawn as said, and refused in a sentence."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sleb.errors import CalibrationError
from sleb.records import CalibrationSpec
from sleb.text import calibration, hub_data, repetition, text_files
from tests.support import tiny


def build(source: str | Path, held_out: int | None = 2, seed: int = 0, *, adds_bos: bool = False, **more: Any):
    settings: dict[str, Any] = dict(source=str(source), sequences=5, sequence_length=16)
    tokenizer = tiny.tokenizer(adds_bos=adds_bos)
    if more.pop("chat_template", False):
        tokenizer.chat_template = tiny.CHAT
    drawing = more.pop("drawing", calibration.DRAWING)
    return calibration.build(CalibrationSpec(**(settings | more)), held_out, seed, tokenizer, 128, drawing=drawing)


def decoded(ids: np.ndarray) -> str:
    tokenizer = tiny.tokenizer()
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_first_takes_the_windows_in_order(text_file: Path) -> None:
    windows = build(text_file, sampling="first")
    assert windows.ids.shape == (7, 16)
    assert (windows.sequences, windows.held_out) == (5, 2)
    assert decoded(windows.ids.reshape(-1)) == text_file.read_text()[: 7 * 16]


def test_random_draws_without_overlap_and_by_the_seed(text_file: Path) -> None:
    one, same, other = build(text_file), build(text_file), build(text_file, seed=1)
    assert one.tokens_hash == same.tokens_hash != other.tokens_hash
    text = text_file.read_text()
    grid = [text[start : start + 16] for start in range(0, len(text) - 15, 16)]
    windows = [decoded(row) for row in one.ids]
    assert set(windows) <= set(grid)
    everything = build(text_file, held_out=len(set(grid)) - 5)
    assert sorted(decoded(row) for row in everything.ids) == sorted(set(grid))


def test_bos_follows_the_tokenizers_habit_and_can_be_overridden(text_file: Path) -> None:
    plain, with_habit = build(text_file, sampling="first"), build(text_file, sampling="first", adds_bos=True)
    assert not plain.bos
    assert with_habit.bos
    assert (with_habit.ids[:, 0] == 1).all()
    assert decoded(with_habit.ids[:, 1:].reshape(-1)) == text_file.read_text()[: 7 * 15]
    assert build(text_file, bos="yes").bos
    assert not build(text_file, bos="no", adds_bos=True).bos


def test_a_quarter_is_held_out_by_default(text_file: Path) -> None:
    assert build(text_file, held_out=None).held_out == 1
    assert build(text_file, held_out=None, sequences=16).held_out == 4
    assert build(text_file, held_out=0).held_out == 0


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_columns_of_jsonl_and_parquet(tmp_path: Path, sampling: str) -> None:
    import pandas as pd

    rows = [{"text": tiny.text(300, seed), "other": tiny.text(300, 50 + seed), "empty": ""} for seed in range(6)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = tmp_path / "rows.parquet"
    pd.DataFrame(rows).to_parquet(table)
    by_lines, by_table = build(lines, sampling=sampling), build(f"{table}:text", sampling=sampling)
    assert by_lines.tokens_hash == by_table.tokens_hash
    others = "\n\n".join(str(row["other"]) for row in rows)
    assert decoded(build(f"{lines}:other", sampling=sampling).ids[0]) in others
    if sampling == "first":
        joined = "\n\n".join(str(row["text"]) for row in rows)
        assert decoded(by_lines.ids.reshape(-1)) == joined[: 7 * 16]
    for path in (lines, table):
        with pytest.raises(CalibrationError, match="no column 'nothing'; it has empty, other, text"):
            build(f"{path}:nothing")
        with pytest.raises(CalibrationError, match="is empty"):
            build(f"{path}:empty")


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    texts = [tiny.text(80, seed) for seed in range(9)]
    turns = [[{"role": "user", "content": each}, {"role": "assistant", "content": "done"}] for each in texts]
    share = [[{"from": "human", "value": each}, {"from": "gpt", "value": "done"}] for each in texts]
    rows = zip(turns, share, strict=True)
    path.write_text("\n".join(json.dumps({"messages": one, "shared": two, "text": "no"}) for one, two in rows))
    chat = build(f"{path}:messages", chat=True, chat_template=True, sampling="first")
    rendered = [f"user: {each}\nassistant: done\n" for each in texts]
    assert decoded(chat.ids.reshape(-1)) == "".join(rendered)[: 7 * 16]  # one behind another, as the model reads them
    assert build(path, chat=True, chat_template=True, sampling="first").tokens_hash == chat.tokens_hash
    shared = build(f"{path}:shared", chat=True, chat_template=True, sampling="first")
    assert shared.tokens_hash == chat.tokens_hash
    before = build(f"{path}:messages", chat=True, chat_template=True, sampling="first", drawing=1)
    assert decoded(before.ids.reshape(-1)) == "\n\n".join(rendered)[: 7 * 16]
    with pytest.raises(CalibrationError, match="no chat template"):
        build(f"{path}:messages", chat=True)
    with pytest.raises(CalibrationError, match="`chat` needs"):
        build(f"{path}:text", chat=True, chat_template=True)
    with pytest.raises(CalibrationError, match="Use `chat` where"):
        build(f"{path}:messages")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("short.txt", b"too short", "gives 0"),
        ("latin.txt", "caf\xe9".encode("latin-1") * 99, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "Line 2"),
        ("list.jsonl", b"[1, 2]\n", "Line 1"),
        ("empty.jsonl", b"", "is empty"),
        ("numbers.jsonl", b'{"id": 3}\n', "no column 'text'"),
        ("typed.jsonl", b'{"text": 3}\n', "holds int, not text"),
        ("deep.jsonl", b"[" * 100_000, "Line 1"),
        ("broken.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("picture.png", b"\x89PNG", "not UTF-8"),
    ],
)
def test_bad_files_are_sentences(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        build(path)
    assert "\n" not in str(caught.value)


def test_a_table_of_few_bytes_that_holds_more_than_memory_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["a" * (4 << 20)])
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 100_000  # and 40 GB of text
    monkeypatch.setattr(text_files, "_PARQUET_BYTES", 600 << 20)
    with pytest.raises(CalibrationError, match=r"cannot be read as parquet: it needed more than 0\.6 GB of memory\."):
        build(path)


def test_conversations_in_a_table_are_those_in_lines(tmp_path: Path) -> None:
    import pandas as pd

    rows = [{"talk": [{"role": "user", "content": tiny.text(90, seed)}], "n": seed} for seed in range(9)]
    lines, table = tmp_path / "talk.jsonl", tmp_path / "talk.parquet"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    pd.DataFrame(rows).to_parquet(table)
    chats = [build(f"{path}:talk", chat=True, chat_template=True) for path in (lines, table)]
    assert chats[0].tokens_hash == chats[1].tokens_hash


def test_texts_and_lines_without_an_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.txt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CalibrationError, match=r"has 1099\.5 GB"):
        build(path)
    monkeypatch.setattr(text_files, "_LINE", 100)
    lines = tmp_path / "long.jsonl"
    lines.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "a" * 100}))
    with pytest.raises(CalibrationError, match=r"Line 2 of .* is longer than"):
        build(lines)


def test_the_buffer_of_a_shuffle_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": tiny.text(300, seed)}) for seed in range(20)))
    whole = build(path).tokens_hash
    monkeypatch.setattr(text_files, "_BUFFER_BYTES", 1 << 20)
    assert build(path).tokens_hash == whole
    monkeypatch.setattr(text_files, "_BUFFER_BYTES", 1000)
    assert build(path).tokens_hash != whole


@pytest.mark.parametrize("source", ["a:b:c:d:e", ":x", "no-such.txt", "no/such/set:config", "c4", "wikitext2-rows"])
def test_bad_names_are_sentences(source: str) -> None:
    with pytest.raises(CalibrationError):
        build(source)


def test_a_tokenizer_of_another_model_is_found_out(text_file: Path) -> None:
    with pytest.raises(CalibrationError, match="do not belong together"):
        calibration.build(CalibrationSpec(source=str(text_file)), None, 0, tiny.tokenizer(), 50)


def test_odd_text_is_text(tmp_path: Path, text_file: Path) -> None:
    surrogate = tmp_path / "odd.jsonl"
    surrogate.write_text(json.dumps({"text": "\ud800" + tiny.text(500)}))
    assert build(surrogate).ids.shape == (7, 16)
    with pytest.raises(CalibrationError, match="no columns"):
        build(f"{text_file}:text")
    beyond = tiny.tokenizer()
    with pytest.raises(CalibrationError, match="BOS token is 1"):
        calibration.build(CalibrationSpec(source=str(text_file), bos="yes"), None, 0, beyond, 1)


def test_hub_data_sets_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `datasets`, with real data set objects in place of the hub."""
    import datasets

    requests: list[tuple[Any, ...]] = []
    rows = [f"{tiny.text(200, seed)}\n" if seed % 3 else "" for seed in range(60)]

    class Builder:
        """Of a data set that is there."""

        def __init__(self, *args: Any, data_files: Any = None) -> None:
            self.asked = (*args, data_files)
            self.config = datasets.BuilderConfig()
            self.data = datasets.Dataset.from_dict({"text": rows, "other": rows})

        def download_and_prepare(self) -> None:
            requests.append(())

        def as_dataset(self, split: str) -> Any:
            assert requests.pop() == ()
            requests.append((*self.asked, split, False))
            return self.data

        def as_streaming_dataset(self, split: str) -> Any:
            requests.append((*self.asked, split, True))
            return self.data.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    windows = build("wikitext2", sampling="first")
    assert requests.pop() == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", False)
    assert decoded(windows.ids.reshape(-1)) == "\n\n".join(rows)[: 7 * 16]
    build("c4")
    assert requests.pop() == ("allenai/c4", {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", True)
    build("some/set:config:validation:other")
    assert requests.pop() == ("some/set", "config", None, "validation", True)
    build("some/set")
    assert requests.pop() == ("some/set", None, "train", True)
    reference = build("wikitext2-rows", sequences=12, seed=3)
    shuffled = datasets.Dataset.from_dict({"text": rows}).shuffle(seed=3)[:]["text"]
    joined = "\n\n".join(shuffled[:12])
    assert reference.sequences == len(joined) // 16
    assert decoded(reference.ids[: reference.sequences].reshape(-1)) == joined[: len(joined) // 16 * 16]
    assert reference.held_out == 2


@pytest.fixture
def data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything starts in an empty folder, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def diary(folder: Path, path: str) -> None:
    """A data set whose README names a file beside the current folder, with text enough."""
    Path("../diary.txt").write_text(tiny.text(3000))
    folder.mkdir(parents=True)
    config = f"config_name: wikitext-2-raw-v1\n  data_files:\n  - split: train\n    path: {path}"
    (folder / "README.md").write_text(f"---\nconfigs:\n- {config}\n---\n")


@pytest.mark.parametrize("source", ["wikitext2", "wikitext2-rows", "Salesforce/wikitext:wikitext-2-raw-v1"])
def test_a_folder_of_a_data_sets_name_is_not_taken_for_it(source: str, data_sets: Path) -> None:
    diary(Path("Salesforce/wikitext"), "../../../diary.txt")
    with pytest.raises(CalibrationError, match="'Salesforce/wikitext' lies in the current folder"):
        build(source, sequences=2)
    Path("allenai").symlink_to("Salesforce")
    Path("Salesforce/c4").symlink_to("wikitext")
    with pytest.raises(CalibrationError, match="'allenai/c4' lies in the current folder"):
        build("c4")


@pytest.mark.parametrize("reader", ["text", "json", "pandas"])
def test_a_reader_of_the_current_folder_is_no_data_set(reader: str, data_sets: Path) -> None:
    for name in ("train.txt", "train.jsonl", "train.pkl"):
        Path(name).write_text(json.dumps({"text": tiny.text(3000)}))
    with pytest.raises(CalibrationError, match=f"'{reader}' is a reader of files, not a data set"):
        build(f"{reader}:::text")


def test_a_data_set_cannot_have_files_of_this_machine(data_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its README names them. In place of the hub's answer stands that of a folder with the same README."""
    from datasets import load

    diary(Path("../strangers"), "../diary.txt")
    monkeypatch.setattr(
        load,
        "dataset_module_factory",
        lambda *args, **kwargs: load.LocalDatasetModuleFactory("../strangers").get_module(),
    )
    with pytest.raises(CalibrationError, match=r"'some/set' has '.*diary\.txt' of this machine among its files"):
        build("some/set")


@pytest.mark.parametrize(
    ("file", "remote"),
    [
        ("hf://datasets/some/set@main/a.txt", True), ("https://some.where/a.txt", True),
        ("zip://a.txt::hf://datasets/some/set@main/a.zip", True), ("/etc/hostname", False), ("a.txt", False),
        ("file:///etc/hostname", False), ("zip://hf://a.txt::/home/a.zip", False), ("hf://a::local:///a", False),
        ("file:///etc/hostname::hf://a", False), ("hf", False), ("reference://a::https://a", False),
    ],
)  # fmt: skip
def test_no_hop_leads_to_this_machine(file: str, remote: bool) -> None:
    with nullcontext() if remote else pytest.raises(CalibrationError, match="of this machine"):
        hub_data._require_remote("some/set", {"train": [file]})


def test_what_the_cache_has_needs_no_network(data_sets: Path) -> None:
    from datasets.packaged_modules.text.text import Text

    Path("a.txt").write_text(tiny.text(3000))
    Text(
        cache_dir=str(data_sets), dataset_name="set", repo_id=None, config_name="config", hash="0" * 16,
        data_files={"train": "a.txt"},
    ).download_and_prepare(str(data_sets / "some___set" / "config" / "0.0.0" / ("0" * 16)))  # fmt: skip
    assert build("some/set:config").ids.shape == (7, 16)


def test_real_text_by_the_published_reading(real_text: Path) -> None:
    windows = build(real_text, sequences=50, sequence_length=128)
    assert windows.ids.shape == (52, 128)
    assert "wiki.valid.raw" in windows.text


def test_a_folder_named_like_a_source_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in calibration.RESERVED:
        (tmp_path / name).mkdir()
        calibration.require_there(CalibrationSpec(source=name))


def rows_of(path: Path, *texts: str, name: str = "text") -> Path:
    path.write_text("".join(json.dumps({name: text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_windows_are_distinct_and_none_held_out_is_one_that_chose(tmp_path: Path, sampling: str) -> None:
    documents = [tiny.text(60, seed)[:30] for seed in range(12)]  # with the separator two windows each
    path = rows_of(tmp_path / "repeated.jsonl", *sorted(documents * 5))
    windows = build(path, sequences=18, held_out=6, sampling=sampling)
    assert len({row.tobytes() for row in windows.ids}) == 24
    assert "60 documents, 119 windows of 16 tokens, 24 of them distinct" in windows.text
    before = build(path, sequences=18, held_out=6, sampling=sampling, drawing=1)
    assert len({row.tobytes() for row in before.ids}) < 24
    with pytest.raises(CalibrationError, match=r"asks for 18 .* and 7 held out; .* gives 119, 24 of them distinct\."):
        build(path, sequences=18, held_out=7, sampling=sampling)


def test_a_text_without_repeats_is_drawn_as_ever(text_file: Path) -> None:
    for seed in range(4):
        now, before = (build(text_file, sequences=9, sequence_length=64, seed=seed, drawing=each) for each in (2, 1))
        assert now.tokens_hash == before.tokens_hash
    text = text_file.read_text()
    order = np.random.default_rng(3).permutation(len(text) // 64)[:11]
    assert [decoded(row) for row in now.ids] == [text[64 * place : 64 * place + 64] for place in order]


def test_more_is_read_where_a_text_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_STREAMED_CHARACTERS", 1000)
    path = rows_of(
        tmp_path / "long.jsonl", *["again and again " * 2] * 90, *[tiny.text(300, seed) for seed in range(9)]
    )
    windows = build(path, sequences=20, sampling="first")
    assert len({row.tobytes() for row in windows.ids}) == 22


def test_held_out_windows_that_repeat_at_another_place_are_counted(tmp_path: Path) -> None:
    text = tiny.text(80, 5)[:79]  # 80 with the separator: no window is equal, and all is said again
    path = tmp_path / "shifted.txt"
    path.write_text((text + "\n" + "x") * 2 + tiny.text(400, 9))
    windows = build(path, sequences=4, held_out=4, sequence_length=20, sampling="first")
    assert "4 of 4 held-out windows repeat half a window of those that choose" in windows.text
    assert "repeat" not in build(path, sequences=4, held_out=4, sequence_length=64, sampling="first").text
    ids = np.arange(40).reshape(2, 20)
    assert repetition.count_sharing(ids, ids[1:, 5:15].repeat(3, 0)) == 1
    assert repetition.count_sharing(ids, ids[:, ::-1]) == 0


@pytest.mark.parametrize("bos", ["auto", "yes"])
def test_bos_stands_where_the_template_writes_it_and_never_twice(tmp_path: Path, bos: str) -> None:
    turns = [[{"role": "user", "content": tiny.text(20, seed)[:20]}] for seed in range(9)]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    tokenizer = tiny.tokenizer(adds_bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tiny.CHAT
    requests = CalibrationSpec(
        source=str(path), sequences=6, sequence_length=14, chat=True, bos=bos, sampling="first"  # type: ignore[arg-type]
    )  # fmt: skip
    windows = calibration.build(requests, 2, 0, tokenizer, 128)
    rendered = f"<s>user: {turns[0][0]['content']}\n"  # 28 tokens: two windows, of 14 and of 13 with one in front
    assert decoded(windows.ids[0]) == rendered[: 14 + 2]
    assert decoded(windows.ids[1]) == "<s>" + rendered[14 + 2 :][:13]
    flat = windows.ids.reshape(-1)
    assert not ((flat[1:] == 1) & (flat[:-1] == 1)).any()
    assert (windows.ids[:, 0] == 1).all()


def test_a_conversation_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    good = [{"role": "user", "content": "hello"}]
    image = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in (good, image)))
    with pytest.raises(
        CalibrationError, match=r"^`chat`: Line 2 of .* message 1 has a part of type 'image'; only text"
    ):
        build(path, chat=True, chat_template=True)
    path.write_text("\n\n".join(json.dumps({"messages": each}) for each in (good, [{"role": "x", "content": ""}])))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ {'user': 1}[m.role] + 1 }}{% endfor %}"
    with pytest.raises(CalibrationError, match=r"chat template refuses Line 3 of .*chat\.jsonl \("):
        calibration.build(CalibrationSpec(source=str(path), chat=True), 1, 0, tokenizer, 128)
    with pytest.raises(CalibrationError, match=r"`chat` needs .* and demo is text"):
        build("demo", chat=True, chat_template=True)
