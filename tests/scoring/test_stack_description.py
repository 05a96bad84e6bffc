"""What a run keeps of the model it met, for other tools and for readers of the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sleb
from sleb.cli.terminal import describe
from sleb.errors import OptionError
from sleb.export import export_job
from sleb.formats.list_formats import remarks, render
from sleb.model.block_stack import BlockStack
from sleb.model.loading import load_model
from sleb.records import ExportJob
from sleb.scoring.stack_description import facts_of
from tests.support import gguf_files, quantised, tiny
from tests.support.command import run as command


@pytest.mark.parametrize(("family", "lists"), [("llama", ()), ("qwen2", ("layer_types",)), ("qwen3", ("layer_types",))])
def test_lists_with_an_entry_for_each_block_are_kept(tmp_path: Path, family: str, lists: tuple[str, ...]) -> None:
    loaded = load_model(str(tiny.save(tmp_path, family)), dtype="bfloat16")
    facts = facts_of(BlockStack(loaded.model), loaded)
    assert facts["per_block_lists"] == lists
    assert (facts["dtype"], facts["checkpoint_dtype"], facts["quantisation"]) == ("bfloat16", "float32", None)


def searched(model: Path) -> sleb.Run:
    text = model.parent / "text.txt"
    text.write_text(tiny.text(2000))
    return sleb.search(
        str(model), calibration=str(text), sequences=2, sequence_length=16, held_out=1, remove=1, dtype="float32",
        analysis=False, speedups="off",
    )  # fmt: skip


def test_a_quantised_checkpoint_is_said_to_be_one_and_exported_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    run = searched(quantised.fp8(tiny_model, tmp_path / "packed"))
    assert run.stack is not None
    assert run.stack.quantisation == "fp8, dequantised while loading"
    assert run.stack.checkpoint_dtype is None
    assert "quantised: fp8, dequantised while loading" in describe(run.stack)
    sleb.export_model(run, tmp_path / "out", device="cpu")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.dtype for name, each in written.items() if name.endswith("q_proj.weight")} == {torch.float8_e4m3fn}
    assert load_model(str(tmp_path / "out")).quantisation == run.stack.quantisation
    with pytest.raises(OptionError, match="mergekit reads plain weights only"):
        render(run, "mergekit")
    screen, remarks = command("export", run.run_id, "--format", "sleb")
    assert screen.startswith("python -m eval")
    assert "removes nothing from any other" in " ".join(remarks.split())


def test_a_gguf_file_may_become_a_folder_that_says_so(tmp_path: Path) -> None:
    run = searched(gguf_files.write(tmp_path / "model.gguf"))
    assert run.stack is not None
    assert run.stack.quantisation == "GGUF (Q8_0), dequantised while loading"
    assert export_job.plan_of(run, ExportJob(out=str(tmp_path / "out"), format="hf")).gguf is None
    assert remarks(run, "llama-quantize") == ()
