"""A name of the hub is never a folder that happens to be here: that one's code would run in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sleb import specs
from sleb.errors import ModelError
from sleb.model.inspection.presence import is_path
from sleb.model.loading import load_model

CODE = "from pathlib import Path\nPath('ran').write_text('')\nfrom transformers import LlamaConfig as OwnConfig\n"


def here(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Starts in `folder`, in which a model with code of its own has the name of one on the hub."""
    folder_here = Path(shutil.copytree(model, folder / "owner" / "name"))
    config = json.loads((folder_here / "config.json").read_text())
    (folder_here / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (folder_here / "own.py").write_text(CODE)
    monkeypatch.chdir(folder)
    return folder_here


def test_a_folder_here_does_not_stand_for_a_model_of_the_hub(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_here = here(tmp_path, tiny_model, monkeypatch)
    with pytest.raises(
        ModelError, match=f"owner/name names a model on the hub, and {folder_here} would be read"
    ) as caught:
        load_model("owner/name", trust_remote_code=True)
    assert "absolute path" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_folder_here_does_not_stand_for_code_of_the_hub(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(tmp_path, tiny_model, monkeypatch)
    for name, entry in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        model = Path(shutil.copytree(tiny_model, tmp_path / entry))
        settings = json.loads((model / name).read_text())
        reference = "owner/name--own.OwnConfig"
        settings["auto_map"] = {entry: reference if name == "config.json" else [reference, reference]}
        (model / name).write_text(json.dumps(settings))
        with pytest.raises(ModelError, match="owner/name names a model on the hub"):
            load_model(str(model), dtype="float32", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_typed_is_that_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_here = here(tmp_path, tiny_model, monkeypatch)
    for typed in ("owner/name", "./owner/name", "owner/../owner/name"):
        assert Path(specs.run_spec(typed).model).resolve() == folder_here
    assert is_path(str(folder_here))
    assert not is_path("owner/other")
