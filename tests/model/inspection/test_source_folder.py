"""The folder of a model: a local one, one in a cache of the hub's that does not answer, and none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleb.model.inspection.source_folder import source_folder
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / ("c0ffee" + 34 * "0")
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(folder.name)
    (folder / "config.json").write_text('{"num_hidden_layers": 6}')
    (folder / "tokenizer.model").write_text("pieces")
    return folder


def test_the_weights_are_those_that_transformers_loads(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        (folder / name).touch()
    listing = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    source = source_folder(str(folder), None)
    assert source is not None
    assert [path.name for path in source.weights] == ["a.safetensors", "b.safetensors"]
    (folder / "model.safetensors").touch()
    source = source_folder(str(folder), None)
    assert source is not None
    assert [path.name for path in source.weights] == ["model.safetensors"]
    assert source.config() == {"num_hidden_layers": 6}


def test_what_is_no_folder_has_none() -> None:
    assert source_folder("demo", None) is None
    assert source_folder("/somewhere/model.gguf", None) is None


def test_a_hub_name_is_the_snapshot_in_the_cache(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the libraries read where the cache is once, when they are imported."""
    code = (
        "from sleb.model.inspection.source_folder import source_folder\n"
        "found = source_folder('some/model', None)\n"
        "print(found.folder, found.elsewhere, found.complete)\n"
        "print(source_folder('some/other', None))\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{folder} () False", "None"]
    assert "did not say which further files some/model has" in done.stderr
