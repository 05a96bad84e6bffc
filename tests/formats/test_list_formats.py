"""Every format is read back by a parser of its own and must give the blocks that the run decided on."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shlex
from collections.abc import Iterable
from itertools import pairwise

import pytest
import yaml

from sleb.errors import OptionError, RunError
from sleb.formats.list_formats import FORMATS, in_words, is_hub_id, kept_ranges, remarks, render, yaml_string
from sleb.records import CalibrationSpec, Method, Run
from tests.support.builders import make_run, make_step, measured

LISTS = [((14, 23, 11), 30), ((0,), 4), ((3,), 4), ((1, 2), 4), ((29, 0, 15, 16), 30), ((2, 0, 1), 4)]
AWKWARD = """it's "a" #model: \\ [x] {y} \u00e9 \u2028 \U0001f600 \x7f `z` $(boom)\n- evil: 1"""


def kept(removal_list: Iterable[int], num_blocks: int) -> list[int]:
    return [block for block in range(num_blocks) if block not in set(removal_list)]


def blocks_of_mergekit(text: str) -> list[int]:
    """What mergekit makes of it: the layers of every slice in turn, the end of a range left out."""
    plan = yaml.safe_load(text)
    assert plan["merge_method"] == "passthrough"
    blocks: list[int] = []
    for part in plan["slices"]:
        (source,) = part["sources"]
        start, end = source["layer_range"]
        blocks += range(start, end)
    return blocks


def parse_llama_quantize(text: str) -> argparse.Namespace:
    """Its command line as llama.cpp documents it: options, input, output, type."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prune-layers", type=lambda words: [int(word) for word in words.split(",")])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("type", choices=["COPY"])
    program, *arguments = shlex.split(text)
    assert program == "llama-quantize"
    return parser.parse_args(arguments)


@pytest.mark.parametrize(("removal_list", "num_blocks"), LISTS)
def test_ranges_are_the_kept_blocks_and_touch_nowhere(removal_list: tuple[int, ...], num_blocks: int) -> None:
    ranges = kept_ranges(num_blocks, removal_list)
    assert [block for start, end in ranges for block in range(start, end)] == kept(removal_list, num_blocks)
    assert all(one[1] < other[0] for one, other in pairwise(ranges))


@pytest.mark.parametrize(("removal_list", "num_blocks"), LISTS)
def test_every_format_reads_back_to_the_same_blocks(removal_list: tuple[int, ...], num_blocks: int) -> None:
    run = make_run(removal_list, num_blocks)
    assert blocks_of_mergekit(render(run, "mergekit")) == kept(removal_list, num_blocks)
    assert parse_llama_quantize(render(run, "llama-quantize")).prune_layers == sorted(removal_list)
    assert json.loads(render(run, "list")) == list(removal_list)

    result = json.loads(render(run, "json"))
    assert result["removal_list"] == list(removal_list)
    assert result["kept_blocks"] == kept(removal_list, num_blocks)
    assert [block for start, end in result["kept_ranges"] for block in range(start, end)] == result["kept_blocks"]

    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name")
    parser.add_argument("--removal_list", type=json.loads)
    words = shlex.split(render(run, "sleb"))
    assert words[:3] == ["python", "-m", "eval"]
    options = parser.parse_args(words[3:])
    assert options.removal_list == list(removal_list)
    assert options.model_name == run.spec.model


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_give_the_list_as_it_was_then(steps: int) -> None:
    run = make_run((14, 23, 11))
    assert run.removal_list_after(steps) == (14, 23, 11)[:steps]
    assert json.loads(render(run, "list", steps)) == [14, 23, 11][:steps]
    assert blocks_of_mergekit(render(run, "mergekit", steps)) == kept((14, 23, 11)[:steps], 30)
    assert len(render(run, "csv", steps).splitlines()) == 2 + steps  # the names, the baseline, the steps


def test_best_chunks_are_not_nested() -> None:
    steps = (make_step(1, (7,)), make_step(2, (20, 21), (20, 21), restored=(7,)))
    run = make_run(steps=steps, spec={"method": Method.BEST_CHUNK})
    assert run.removal_list_after(1) == (7,)
    assert run.removal_list_after() == (20, 21)
    rows = list(csv.DictReader(io.StringIO(render(run, "csv"))))
    assert [json.loads(row["removed"]) for row in rows] == [[], [7], [20, 21]]


def test_csv_says_what_each_step_found() -> None:
    run = make_run(
        (14, 23), steps=(make_step(1, (14,)), make_step(2, (14, 23), margin=None, margin_standard_error=None))
    )
    rows = list(csv.DictReader(io.StringIO(render(run, "csv"))))
    columns = "number removed removal_list perplexity held_out_perplexity margin margin_standard_error tied"
    assert list(rows[0]) == [*columns.split(), "model", "revision", "weights_hash"]
    baseline, *rows = rows
    assert {(row["model"], row["revision"], row["weights_hash"]) for row in (baseline, *rows)} == {
        ("example/model-1b", "0123abc", "feedbeef")
    }
    assert (baseline["number"], baseline["removal_list"], baseline["tied"]) == ("0", "[]", "[]")
    assert float(baseline["perplexity"]) == pytest.approx(math.exp(3.0))
    assert [row["number"] for row in rows] == ["1", "2"]
    assert [json.loads(row["removal_list"]) for row in rows] == [[14], [14, 23]]
    assert float(rows[1]["perplexity"]) == pytest.approx(math.exp(3.2))
    assert float(rows[1]["held_out_perplexity"]) == pytest.approx(math.exp(3.3))
    assert float(rows[0]["margin"]) == 0.0017
    assert rows[1]["margin"] == rows[1]["margin_standard_error"] == ""
    assert json.loads(rows[0]["tied"]) == [5, 7]


def test_json_carries_the_provenance() -> None:
    result = json.loads(render(make_run(), "json"))
    assert (result["model"], result["revision"], result["num_blocks"]) == ("example/model-1b", "0123abc", 30)
    assert result["method"] == "metric3"
    assert result["calibration"]["source"] == "demo"
    assert result["perplexity"]["baseline"] == pytest.approx(math.exp(3.0))
    assert result["perplexity"]["streamlined_held_out"] == pytest.approx(math.exp(3.4))
    assert result["in_words"] == in_words(30, (14, 23, 11))


def test_json_stays_json_where_a_perplexity_is_no_number() -> None:
    step = make_step(1, (3,), calibration=measured(800.0), held_out=measured(None))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    result = json.loads(render(make_run((3,), steps=(step,)), "json"), parse_constant=refuse)
    assert result["perplexity"]["streamlined"] is None
    assert result["perplexity"]["streamlined_held_out"] is None


@pytest.mark.parametrize("name", [AWKWARD, "org/model name", "-rf", "null", "1.0", "C:\\models\\x"])
def test_names_from_outside_stay_names(name: str) -> None:
    run = make_run(spec={"model": name}, stack={"revision": None})
    plan = yaml.safe_load(render(run, "mergekit"))
    assert {source["model"] for part in plan["slices"] for source in part["sources"]} == {name}
    assert yaml.safe_load(yaml_string(name)) == name
    words = shlex.split(render(run, "sleb"))
    assert words[words.index("--model_name") + 1] == name
    assert json.loads(render(run, "json"))["model"] == name.removeprefix("C:\\models\\")


def test_another_name_can_stand_in() -> None:
    run = make_run(spec={"model": "demo"})
    plan = yaml.safe_load(render(run, "mergekit", model_name="org/real"))
    assert plan["slices"][0]["sources"][0]["model"] == "org/real"
    assert "dtype" not in plan  # the hub's own, not the dequantised file's


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
def test_mergekit_keeps_the_type_of_the_checkpoint(kind: str) -> None:
    run = make_run(stack={"dtype": "bfloat16", "checkpoint_dtype": kind})
    assert yaml.safe_load(render(run, "mergekit"))["dtype"] == kind
    unknown = make_run(stack={"dtype": "bfloat16"})  # as runs of earlier versions are
    assert "dtype" not in yaml.safe_load(render(unknown, "mergekit"))


def test_mergekit_is_told_the_revision() -> None:
    """As its ModelReference and ModelPath have it; in a plain name @ and + would mean something."""
    plan = yaml.safe_load(render(make_run(spec={"revision": "v2"}, stack={"revision": None}), "mergekit"))
    assert plan["slices"][0]["sources"][0]["model"] == {"model": {"path": "example/model-1b", "revision": "v2"}}
    plan = yaml.safe_load(render(make_run(), "mergekit"))
    assert plan["slices"][0]["sources"][0]["model"] == {"model": {"path": "example/model-1b", "revision": "0123abc"}}
    plan = yaml.safe_load(render(make_run(spec={"model": "/models/a@b+c"}), "mergekit"))
    assert plan["slices"][0]["sources"][0]["model"] == {"model": {"path": "/models/a@b+c"}}


def test_tools_that_cannot_read_the_model_are_refused() -> None:
    gguf = make_run(spec={"model": "/models/mine.GGUF"})
    for format in ("mergekit", "sleb"):
        with pytest.raises(OptionError, match=r"mine\.GGUF is a GGUF file.*`format=llama-quantize`"):
            render(gguf, format)
    packed = make_run(spec={"model": "/models/mine"}, stack={"quantisation": "compressed-tensors (pack-quantized)"})
    with pytest.raises(OptionError, match=r"mine is quantised .*Search the checkpoint that it was made from"):
        render(packed, "mergekit")
    assert "eval" in render(packed, "sleb")
    with pytest.raises(OptionError, match="revision v2 of example/model-1b, and the reference takes no revision"):
        render(make_run(spec={"revision": "v2"}), "sleb")
    assert "eval" in render(make_run(spec={"model": "/models/mine", "revision": "v2"}), "sleb")


@pytest.mark.parametrize(
    ("format", "changes", "sentence"),
    [
        ("mergekit", {"stack": {"per_block_lists": ("layer_types",)}}, "entry for each block in layer_types"),
        ("mergekit", {}, "such as the layer_types of Qwen2 and Qwen3"),
        ("mergekit", {"stack": {"per_block_lists": ()}}, None),
        ("llama-quantize", {}, "for revision 0123abc of the model"),
        ("llama-quantize", {"spec": {"model": "/models/mine.gguf"}}, None),
        ("sleb", {}, "neither opt nor llama"),
        ("sleb", {"spec": {"model": "meta-llama/Llama-2-7b-hf"}}, None),
        ("sleb", {"spec": {"model": "/opt/llama"}}, "in model.decoder.layers, and they are in model.layers"),
        ("sleb", {"spec": {"model": "facebook/opt-125m"}, "stack": {"path": "model.decoder.layers"}}, None),
        ("json", {}, None),
    ],
)
def test_what_to_beware_of_is_said(format: str, changes: dict[str, dict[str, object]], sentence: str | None) -> None:
    run = make_run(**changes)  # type: ignore[arg-type]
    sentences = remarks(run, format)
    assert len(sentences) == (sentence is not None)
    if sentence is not None:
        assert sentence in sentences[0]
    if format == "mergekit":
        assert all(f"# {each}\n" in render(run, format) for each in sentences)


@pytest.mark.parametrize("format", ["json", "csv", "list"])
def test_formats_that_travel_name_no_folder(format: str) -> None:
    run = make_run(
        spec={
            "model": "/home/somebody/models/mine",
            "calibration": CalibrationSpec(source="/home/somebody/notes.txt", sequences=16, sequence_length=256),
        }
    )
    text = render(run, format)
    assert "somebody" not in text
    if format == "json":
        result = json.loads(text)
        assert (result["model"], result["weights_hash"]) == ("mine", "feedbeef")
        assert result["calibration"]["source"] == "notes.txt"
    for other in ("mergekit", "sleb"):
        assert "/home/somebody/models/mine" in render(run, other)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/real", True),
        ("gpt2", True),
        ("demo", False),
        ("/models/mine", False),
        ("a/b/c", False),
        ("org/--x", False),
        ("org/model.gguf", False),
        ("org/\u0430", False),
    ],
)
def test_which_names_are_of_the_hub(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one


def test_llama_quantize_names_the_gguf_file_of_the_run() -> None:
    line = parse_llama_quantize(render(make_run(spec={"model": "/some where/model.gguf"}), "llama-quantize"))
    assert line.input == "/some where/model.gguf"
    assert line.output == "/some where/model-streamlined.gguf"
    line = parse_llama_quantize(render(make_run(spec={"model": "/models/MODEL.GGUF"}), "llama-quantize"))
    assert (line.input, line.output) == ("/models/MODEL.GGUF", "/models/MODEL-streamlined.gguf")
    line = parse_llama_quantize(render(make_run(), "llama-quantize"))
    assert line.input.endswith(".gguf")
    assert line.output not in (line.input, "")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_ends_with_a_newline(format: str) -> None:
    text = render(make_run(), format)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_in_words_says_both_conventions() -> None:
    assert in_words(30, (14, 23, 11)) == (
        "Removed (0-based, in this order): 14, 23, 11; kept: 27 of 30 blocks, 0 to 10, 12 to 13, 15 to 22 "
        "and 24 to 29, both ends included, i.e. [0, 11), [12, 14), [15, 23) and [24, 30)."
    )
    assert "1 of 2 blocks, 1, both" in in_words(2, (0,))


@pytest.mark.parametrize("steps", [0, -1, 4])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(OptionError, match=r"not among the finished steps of run .*; give 1 to 3\."):
        make_run().removal_list_after(steps)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (make_run(steps=()), "no finished step"),
        (make_run(trace=None), "no finished step"),
        (make_run().model_copy(update={"stack": None}), "no finished step"),
        (make_run(spec={"kind": "analyze"}), "is an analysis"),
    ],
    ids=["no step", "no trace", "never opened", "analysis"],
)
def test_runs_without_a_list_are_refused(run: Run, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        run.removal_list_after()
    with pytest.raises(RunError, match=sentence):
        render(run, "list")


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="choose one of json, csv, list, sleb, mergekit, llama-quantize, hf"):
        render(make_run(), "gguf")
