"""Smaller GGUF files: what is cut, what stays byte for byte, what is refused, and the proof."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import sleb
from app import data
from sleb.errors import ExportError, ModelError, OptionError, StorageError
from sleb.export import finished_exports, gguf_file, gguf_plan, proof_process, proven_folder
from sleb.export.gguf_file import export_gguf, write_cut
from sleb.export.gguf_plan import destination_of, plan_cut
from sleb.model.loading import convert_gguf, load_model
from sleb.records import ExportJob, Job, JobState, Proof
from sleb.report.summaries import exported_model
from sleb.runtime import job_folder
from sleb.runtime.processes import job_processes
from tests.pages.test_export import WRITE
from tests.support import gguf_files
from tests.support.command import run as command
from tests.support.dashboard import open_page, press, words
from tests.support.exports import export_job
from tests.support.exports import proof as some_proof
from tests.support.paths import ROOT
from tests.support.runs.stores import write_run

SEARCH = ["--sequences", 4, "--sequence-length", 24, "--dtype", "float32", "--no-analysis", "--remove", 2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of six blocks."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def prove_here(folder: Path, *_: Any) -> Proof:
    """The same proof in this process: a fresh one takes seconds, and other tests start it."""
    proof = Proof.model_validate(proof_process.prove(folder))
    if not proof.passed:
        raise ExportError("; ".join(proof.reasons))
    return proof


@pytest.fixture
def proved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven_folder, "run_proof", prove_here)


def settings(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def raw(path: Path) -> dict[str, tuple[Any, ...]]:
    """Of each tensor: type, shape, and its bytes as they lie in the file."""
    content = path.read_bytes()
    return {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(tensor.shape.tolist()),
            content[tensor.data_offset : tensor.data_offset + tensor.n_bytes],
        )
        for tensor in GGUFReader(path).tensors
    }


# --- what is written --------------------------------------------------------------------------------------------------


def test_blocks_go_and_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.linspace(1, 2, 4, dtype=np.float32), "odd.weight": np.ones(7, dtype=np.float16)}
    source = gguf_files.write(tmp_path / "in.gguf", alignment=64, extra=extra)
    out = tmp_path / "out.gguf"
    write_cut(plan_cut(source, (4, 1)), out, (4, 1), "the-run")
    before, after = raw(source), raw(out)
    assert {kind for kind, _, _ in after.values()} == {"Q8_0", "F32", "F16"}
    renumbered = {0: 0, 2: 1, 3: 2, 5: 3}
    expected = {
        name if part[0] != "blk" else f"blk.{renumbered[int(part[1])]}.{part[2]}": result
        for name, result in before.items()
        if (part := name.split(".", 2))[0] != "blk" or int(part[1]) in renumbered
    }
    assert after == expected
    assert list(after) == list(expected)  # in the order of the source
    assert all(tensor.data_offset % 64 == 0 for tensor in GGUFReader(out).tensors)

    was, becomes = settings(source), settings(out)
    assert becomes.pop("llama.block_count") == was.pop("llama.block_count") - 2 == 4
    assert becomes.pop("general.name") == was.pop("general.name") + " without 2 of 6 blocks"
    assert becomes.pop("sleb.removal_list") == [4, 1]
    assert becomes.pop("sleb.blocks_before") == 6
    assert becomes.pop("sleb.run") == "the-run"
    assert becomes.pop("sleb.file_bytes") == out.stat().st_size < source.stat().st_size
    assert becomes == was  # tokenizer, tags (as many as blocks) and rotary settings among them
    kinds = [{key: field.types for key, field in GGUFReader(path).fields.items()} for path in (source, out)]
    assert kinds[0].items() <= kinds[1].items()


def test_settings_per_block_follow(tmp_path: Path) -> None:
    own = {
        "attention.head_count_kv": [1, 2, 4, 1, 2, 4],
        "feed_forward_length": [64, 64, 32, 64, 64, 16],
        "attention.sliding_window_pattern": [True, True, False, True, True, False],
        "attention.recurrent_layers": [True, False, True, True, False, True],
        "swiglu_clamp_exp": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
        "rope.dimension_sections": [11, 11, 10, 0, 0, 7],  # as many as blocks, and not of them
        "leading_dense_block_count": 3,
        "expert_count": 6,
    }
    source = gguf_files.write(tmp_path / "in.gguf", settings=own)
    write_cut(plan_cut(source, (1, 4)), tmp_path / "out.gguf", (1, 4))
    result = settings(tmp_path / "out.gguf")
    assert result["llama.attention.head_count_kv"] == [1, 4, 1, 4]
    assert result["llama.feed_forward_length"] == [64, 32, 64, 16]
    assert result["llama.attention.sliding_window_pattern"] == [True, False, True, False]
    assert result["llama.attention.recurrent_layers"] == [True, True, True, True]
    assert result["llama.swiglu_clamp_exp"] == [0.5, 2.5, 3.5, 5.5]
    assert result["llama.rope.dimension_sections"] == own["rope.dimension_sections"]
    assert result["llama.leading_dense_block_count"] == 2
    assert result["llama.expert_count"] == 6


def test_blocks_that_predict_further_tokens_stay_behind_the_stack(tmp_path: Path) -> None:
    own = {
        "nextn_predict_layers": 1,
        "attention.head_count_kv": [1, 2, 4, 1, 2, 4],
        "xielu.eps": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
    source = gguf_files.write(tmp_path / "in.gguf", settings=own)
    cut = plan_cut(source, (4,))
    assert (cut.num_blocks, cut.kept) == (5, (0, 1, 2, 3, 5))
    write_cut(cut, tmp_path / "out.gguf", (4,))
    result = settings(tmp_path / "out.gguf")
    assert (result["llama.block_count"], result["llama.nextn_predict_layers"]) == (5, 1)
    assert result["llama.attention.head_count_kv"] == [1, 2, 4, 1, 4]
    assert result["llama.xielu.eps"] == [1.0, 2.0, 3.0, 4.0]
    assert raw(tmp_path / "out.gguf")["blk.4.ffn_up.weight"] == raw(source)["blk.5.ffn_up.weight"]
    with pytest.raises(OptionError, match="blocks 0 to 4"):
        plan_cut(source, (5,))


def test_a_file_that_was_cut_already_tells_of_the_first(source: Path, tmp_path: Path) -> None:
    write_cut(plan_cut(source, (1, 3)), tmp_path / "once.gguf", (1, 3))
    write_cut(plan_cut(tmp_path / "once.gguf", (2,)), tmp_path / "twice.gguf", (2,))
    result = settings(tmp_path / "twice.gguf")
    assert (result["sleb.removal_list"], result["sleb.blocks_before"]) == ([1, 3, 4], 6)
    assert result["general.name"] == "Tiny without 3 of 6 blocks"
    assert result["llama.block_count"] == 3
    assert raw(tmp_path / "twice.gguf")["blk.2.ffn_up.weight"] == raw(source)["blk.5.ffn_up.weight"]


# --- what is refused --------------------------------------------------------------------------------------------------

WINDOWS = {"attention.sliding_window": 16}


@pytest.mark.parametrize(
    ("architecture", "own", "removal_list", "reason"),
    [
        ("qwen35", {"full_attention_interval": 3}, (1,), r"period \(qwen35.full_attention_interval = 3\), and block 2"),
        ("qwen35", {"full_attention_interval": 3}, (0, 1, 2), None),
        ("qwen35", {"full_attention_interval": 3}, (4, 5), None),
        ("qwen35", {"full_attention_interval": 1}, (1,), None),
        ("gemma2", {}, (1,), "every 2 blocks, known by the name gemma2"),
        ("gemma2", {}, (2, 3), None),
        ("gemma2", {"attention.sliding_window_pattern": [True, False] * 3}, (1,), None),
        ("gemma3", {}, (1,), None),  # no window at all
        ("gemma3", WINDOWS, (1,), "every 6 blocks"),
        ("gemma3", WINDOWS | {"attention.sliding_window_pattern": 2}, (1,), r"sliding_window_pattern = 2"),
        ("gemma3", WINDOWS | {"attention.sliding_window_pattern": 2}, (2, 3), None),
        ("gpt-oss", WINDOWS, (3,), "every 2 blocks"),
        ("unheard", WINDOWS | {"attention.sliding_window_pattern": 4}, (0,), "block 1, number 2 of its period"),
        ("llama4", {"interleave_moe_layer_step": 2}, (1,), "interleave_moe_layer_step = 2"),
        ("gemma4", {"attention.shared_kv_layers": 2}, (1,), "last 2 blocks use keys and values of others"),
        ("gemma4", {"embedding_length_per_layer_input": 8}, (1,), "a slice for each block"),
        ("rwkv6", {"rescale_every_n_layers": 3}, (1,), "rescale_every_n_layers = 3 may count blocks"),
        ("granite", {"deepstack_layer_indices": [0, 2, 4]}, (1,), "has 3 entries, and which blocks they mean"),
        ("eagle", {"target_layers": [0, 2, 4, 5, 1, 3]}, (1,), "has 6 entries"),
        ("unheard", {"window_pattern": [True, False]}, (1,), "has 2 entries"),
        ("llama", {"general.tensor_extra.name": ["blk.0.attn_q.weight"]}, (1,), "names tensors of blocks"),
        ("llama", {"deepstack_layers": 0}, (1,), None),
    ],
)
def test_what_follows_from_a_blocks_index_is_refused_where_it_would_change(
    architecture: str, own: dict[str, Any], removal_list: tuple[int, ...], reason: str | None, tmp_path: Path
) -> None:
    source = gguf_files.write(tmp_path / "in.gguf", architecture, settings=own)
    if reason is None:
        assert len(plan_cut(source, removal_list).kept) == 6 - len(removal_list)
        return
    with pytest.raises(ExportError, match=reason) as raised:
        plan_cut(source, removal_list)
    assert str(raised.value).startswith(f"in.gguf cannot be written without blocks {list(removal_list)}: ")


@pytest.mark.parametrize(("heads", "refused"), [(8, True), (gguf_files.HEADS, False)])
def test_a_model_that_is_known_by_its_number_of_blocks(heads: int, refused: bool, tmp_path: Path) -> None:
    """llama.cpp scales the attention of the 46 blocks of Gemma 2 27B by width / heads, and all others by head."""
    source = gguf_files.write(tmp_path / "in.gguf", "gemma2", 46, settings={"attention.head_count": heads})
    if refused:
        with pytest.raises(ExportError, match="by another number where there are 46 blocks"):
            plan_cut(source, (44, 45))
    else:
        assert len(plan_cut(source, (44, 45)).kept) == 44


def test_what_is_no_whole_model_is_refused(source: Path, tmp_path: Path) -> None:
    def refused(path: Path, sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence):
            plan_cut(path, (1,))

    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(source.read_bytes())
    refused(part, r"one of several parts; merge them into one file first: llama-gguf-split --merge")
    refused(gguf_files.write(tmp_path / "renamed.gguf", settings={"split.count": 3}), "one of several parts")
    cut_off = tmp_path / "cut.gguf"
    cut_off.write_bytes(source.read_bytes()[:9000])
    refused(cut_off, "cannot be read as GGUF|is damaged or truncated")
    (tmp_path / "text.gguf").write_text("Once upon a time")
    refused(tmp_path / "text.gguf", "is not a GGUF file")
    refused(gguf_files.write(tmp_path / "adapter.gguf", type="adapter"), "not a model but a file of type 'adapter'")
    refused(gguf_files.write(tmp_path / "7.gguf", settings={"block_count": 7}), "lacks tensors of block 6")
    refused(gguf_files.write(tmp_path / "5.gguf", settings={"block_count": 5}), "has tensors of block 5")
    refused(gguf_files.write(tmp_path / "0.gguf", settings={"block_count": None}), "how many blocks")
    for removal_list in ((), (6,), (1, 1), tuple(range(6))):
        with pytest.raises(OptionError, match="removal list"):
            plan_cut(source, removal_list)


def test_only_an_earlier_export_is_replaced(source: Path, tmp_path: Path) -> None:
    def refused(out: Path, sentence: str, allow_existing: bool = True) -> None:
        with pytest.raises(OptionError, match=sentence):
            destination_of(out, allow_existing, source).require_free()

    out = tmp_path / "out.gguf"
    destination_of(out, False, source).require_free()
    write_cut(plan_cut(source, (1,)), out, (1,))
    refused(out, "already exists", allow_existing=False)
    destination_of(out, True, source).require_free()
    with pytest.raises(OptionError, match="is the model itself"):
        destination_of(out, True, out).require_free()
    with open(out, "ab") as file:  # as another tool leaves it that carries the settings over
        file.write(b"\0" * 32)
    refused(out, "other than an earlier export")
    other = tmp_path / "mine.gguf"
    other.write_bytes(source.read_bytes())
    refused(other, "other than an earlier export")
    (tmp_path / "text.gguf").write_text("mine")
    refused(tmp_path / "text.gguf", "other than an earlier export")
    (tmp_path / "link.gguf").symlink_to(out)
    refused(tmp_path / "link.gguf", "is a link")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "model.safetensors", r"does not end in \.gguf")


# --- the proof --------------------------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    return load_model(str(path), dtype="checkpoint", device="cpu")


@pytest.mark.usefixtures("proved_here")
def test_a_mixture_of_kinds_is_proved(tmp_path: Path) -> None:
    """LFM2 says by a list of head counts which blocks are convolutions: cut wrongly, nothing would load."""
    source = gguf_files.write(tmp_path / "in.gguf", "lfm2", conv=(0, 1, 3, 5))
    loaded = load(source)
    before = sum(parameter.numel() for parameter in loaded.model.parameters())
    messages: list[str] = []
    out = tmp_path / "deep" / "out.gguf"
    proof = export_gguf(loaded.model, loaded.tokenizer, source, (4, 1), out, progress=messages.append)
    assert proof.passed
    assert proof.max_logit_difference == 0.0
    assert proof.kept_blocks == (0, 2, 3, 5)
    assert proof.generated_with_cache == proof.generated_without_cache == proof.generated_by_skipping
    assert proof.parameters_after < proof.parameters_before == before
    assert (proof.bytes_before, proof.bytes_after) == (source.stat().st_size, out.stat().st_size)
    assert settings(out)["lfm2.attention.head_count_kv"] == [0, 2, 0, 0]
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]
    assert len(messages) == 3
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.usefixtures("proved_here")
def test_the_proof_catches_blocks_in_another_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchanged(path: Path, removal_list: tuple[int, ...]) -> gguf_plan.Cut:
        cut = plan_cut(path, removal_list)
        order = {"blk.0.": "blk.1.", "blk.1.": "blk.0."}
        tensors = tuple((order.get(name[:6], name[:6]) + name[6:], tensor) for name, tensor in cut.tensors)
        return replace(cut, tensors=tensors)

    monkeypatch.setattr(gguf_file, "plan_cut", exchanged)
    loaded = load(source)
    with pytest.raises(ExportError, match="logits differ by up to"):
        export_gguf(loaded.model, loaded.tokenizer, source, (3,), tmp_path / "out.gguf")
    assert not any(tmp_path.iterdir())


def test_kinds_are_compared_also_where_the_proofs_text_is_shorter_than_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2's window of 4096 tokens hides a wrong kind of block from a proof of 128 positions."""
    source = gguf_files.write(tmp_path / "in.gguf", "gemma2")
    monkeypatch.setattr(gguf_plan, "_PERIODS", {})  # as if this architecture were new
    loaded = load(source)
    with pytest.raises(ExportError, match="A GGUF file cannot say what the kept blocks are: block 3 would change"):
        export_gguf(loaded.model, loaded.tokenizer, source, (2,), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_full_disk_and_bytes_that_do_not_arrive(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = plan_cut(source, (1,))
    target = tmp_path / "out.gguf"
    write_cut(cut, target, (1,))
    content = bytearray(target.read_bytes())
    content[-40] ^= 1
    target.write_bytes(content)
    with pytest.raises(StorageError, match=r"output_norm.weight has not arrived as it was"):
        gguf_file._require_copied(cut, GGUFReader(target))
    with pytest.raises(StorageError, match="could not be written"):
        write_cut(plan_cut(source, (1,)), Path("/dev/full"), (1,))
    loaded = load(source)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"has 0\.0 GB left"):
        export_gguf(loaded.model, loaded.tokenizer, source, (1,), tmp_path / "more" / "out.gguf")
    assert not (tmp_path / "more").exists()


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_the_command_line_writes_proves_and_replaces(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search of a GGUF file, export, reload in a process of its own."""
    result = json.loads(command("search", source, "--calibration", text_file, *SEARCH, "--json")[0])
    out = tmp_path / "smaller.gguf"
    export = ["export", result["run_id"], "--format", "gguf", "--out", out]
    proof = json.loads(command(*export, "--json")[0])
    assert proof["passed"]
    assert proof["max_logit_difference"] == 0.0
    assert proof["kept_blocks"] == result["kept_blocks"]
    assert settings(out)["sleb.removal_list"] == result["removal_list"]
    assert settings(out)["sleb.run"] == result["run_id"]
    assert len(load(out).model.model.layers) == 4
    assert "--replace" in command(*export, code=2)[1]
    monkeypatch.setattr(proven_folder, "run_proof", prove_here)
    shown = command(*export, "--steps", 1, "--replace")[0]
    assert "Wrote and proved" in shown
    assert "megabytes" in shown
    assert settings(out)["sleb.removal_list"] == result["removal_list"][:1]
    assert [path.name for path in tmp_path.iterdir()] == ["smaller.gguf"]
    assert [each.proof.blocks_after for each in finished_exports.read_exports(sleb.load(result["run_id"]))] == [4, 5]
    with pytest.raises(OptionError, match="is the model itself"):
        sleb.export_model(result["run_id"], source, format="gguf", replace=True)
    assert "name a file that ends in .gguf" in " ".join(command(*export[:-1], tmp_path, code=2)[1].split())
    assert "--out" in command(*export[:-2], code=2)[1]
    assert "--format gguf" in command("export", result["run_id"], "--gguf", source, code=2)[1]


@pytest.mark.usefixtures("proved_here")
def test_a_folder_needs_a_gguf_file_of_the_same_model(source: Path, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert_gguf(source, folder)
    run = sleb.search(
        str(folder), calibration=str(text_file), sequences=4, sequence_length=24, remove=2, analysis=False
    )
    out = tmp_path / "out.gguf"
    with pytest.raises(OptionError, match=r"`format=hf`.*convert_hf_to_gguf\.py; or name a GGUF file .* with `gguf`"):
        sleb.export_model(run, out, format="gguf")
    seven = gguf_files.write(tmp_path / "seven.gguf", num_blocks=7)
    with pytest.raises(OptionError, match="it has 7 blocks, and the model has 6"):
        sleb.export_model(run, out, format="gguf", gguf=seven)
    with pytest.raises(ModelError, match="There is no file"):
        sleb.export_model(run, out, format="gguf", gguf=tmp_path / "nothing.gguf")
    with pytest.raises(OptionError, match="`gguf` names the file"):
        sleb.export_model(run, tmp_path / "out", gguf=source)
    other = gguf_files.write(tmp_path / "other.gguf", seed=1)  # as another quantisation of the model would be
    proof = sleb.export_model(run, out, format="gguf", gguf=other)
    assert proof.passed
    assert raw(out)["token_embd.weight"] == raw(other)["token_embd.weight"]
    with pytest.raises(OptionError, match="`memory_budget` needs a safetensors folder"):
        sleb.export_model(run, tmp_path / "2.gguf", format="gguf", gguf=other, memory_budget=10**9)


@pytest.mark.parametrize(
    ("model_class", "beware"),
    [
        ("LlamaForCausalLM", False),
        ("Gemma2ForCausalLM", True),
        ("Gemma3ForCausalLM", True),
        ("GptOssForCausalLM", True),
    ],
)
def test_where_the_converter_would_lose_the_windows_it_says_so(model_class: str, beware: bool, home: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 2)
    assert run.stack is not None
    run = run.model_copy(update={"stack": run.stack.model_copy(update={"model_class": model_class})})
    with pytest.raises(OptionError, match="`format=hf`") as raised:
        gguf_plan.source_of(run, ExportJob(format="gguf"))
    assert ("Beware of the converter" in str(raised.value)) is beware


SLOW_PROOF = """
import sys, time
import sleb
from sleb.export import proven_folder

def slow(folder, *_):
    print([path.name for path in folder.iterdir()], flush=True)
    time.sleep(600)

proven_folder.run_proof = slow
sleb.export_model(sys.argv[1], sys.argv[2], format="gguf")
"""


def test_killing_it_leaves_nothing(source: Path, text_file: Path, tmp_path: Path) -> None:
    run = sleb.search(
        str(source), calibration=str(text_file), sequences=4, sequence_length=24, remove=1, analysis=False
    )
    out = tmp_path / "out" / "smaller.gguf"
    command = [sys.executable, "-c", SLOW_PROOF, str(run.run_dir), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert "model.gguf" in process.stdout.readline()
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) != 0
    assert not any(out.parent.iterdir())
    assert sleb.load(run.run_id).jobs[-1].status.state is JobState.STOPPED


# --- the dashboard ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that would have been started: their process is tested elsewhere."""
    result: list[Job] = []
    monkeypatch.setattr(job_processes, "start", lambda job, permissions: result.append(job))
    return result


def test_the_page_offers_the_file_where_the_model_is_one(home: Path, started: list[Job], tmp_path: Path) -> None:
    write_run(home / "runs" / "folder", 12, 4)
    assert not [each for each in open_page("export", run="folder").segmented_control if each.key == "kind"]
    write_run(home / "runs" / "file", 12, 4, model="/models/some.gguf")
    app = open_page("export", run="file", steps="3")
    assert app.text_input[0].value == "~/sleb-exports/file-3-removed"
    app.segmented_control(key="kind").set_value("gguf").run()
    assert not app.exception
    assert (app.text_input[0].label, app.text_input[0].value) == ("File", "~/sleb-exports/file-3-removed.gguf")
    for name, sentence in [
        ("", "Name a file"),
        (f"{tmp_path}/out", "does not end in .gguf"),
        (f"{tmp_path}", "is a folder"),
        (f"{tmp_path}/there.gguf", "already exists"),
        (f"{tmp_path}/there.gguf/below.gguf", "Nothing can be written in"),
        (f"{tmp_path}/a\0b.gguf", "characters"),
    ]:
        (tmp_path / "there.gguf").write_text("mine")
        app.text_input[0].set_value(name).run()
        press(app, WRITE)
        assert [sentence in each.value.replace("\\", "") for each in app.error] == [True], name
    assert started == []
    app.text_input[0].set_value(f"{tmp_path}/out.gguf").run()
    press(app, WRITE)
    (job,) = started
    assert (job.spec.format, job.spec.out, job.spec.steps) == ("gguf", f"{tmp_path}/out.gguf", 3)


def test_the_card_of_a_file(home: Path, tmp_path: Path) -> None:
    run = write_run(home / "runs" / "one", 12, 4, model="demo")
    out = tmp_path / "out.gguf"
    out.touch()
    job = export_job(run, JobState.FINISHED, out=str(out), format="gguf")
    result = some_proof(bytes_before=400_000_000)
    job_folder.write_result(job.directory, {"out": str(out), "proof": result.model_dump(mode="json")})
    app = open_page("export", run="one")
    assert not app.exception
    facts = {each.label: each.value for each in app.metric}
    assert facts["Weights on disk"] == "400 → 300 MB"
    assert "it was moved or deleted" not in words(app)
    assert "gguf_file='out.gguf'" in exported_model.snippet(out)
    assert exported_model.snippet(out).strip() in [each.value for each in app.code]
    out.unlink()
    assert "The file is missing: it was moved or deleted" in words(app.run())


def test_the_sample_is_cut_from_a_copy(home: Path, started: list[Job], tmp_path: Path) -> None:
    app = open_page("export", run=data.SAMPLE)
    app.segmented_control(key="kind").set_value("gguf").run()
    app.text_input[0].set_value(str(tmp_path / "out.gguf")).run()
    press(app, WRITE)
    assert not app.exception
    assert started[0].directory.is_relative_to(home / "runs" / data.SAMPLE)
    assert started[0].spec.format == "gguf"
