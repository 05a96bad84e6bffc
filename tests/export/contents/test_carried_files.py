"""What else lies in a source's folder is carried over, or named as left behind with the reason."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sleb.export.contents.carried_files import SOURCE_CARD, carry_over
from sleb.model.inspection.source_folder import SourceFolder
from tests.support.source_folders import with_odd_files

CARRIED = {
    "LICENSE": "LICENSE",
    "licence.txt": "LICENSE",
    "README.md": SOURCE_CARD,
    "vocab.json": "vocab.json",
    "notes.json": "notes.json",  # another number of blocks than the model's
    "additional_chat_templates/tools.jinja": "additional_chat_templates/tools.jinja",
}
LEFT_BEHIND = {
    ".gitattributes": "it is hidden",
    "additional_chat_templates/tools.sh": "it is not a chat template",
    "link.txt": "it is a link out of the folder, or to nothing",
    "lost.txt": "it is a link out of the folder, or to nothing",
    "round.txt": "it is a link out of the folder, or to nothing",
    "imatrix.dat": "it describes the blocks of the baseline",
    "long.txt": "it has more than 256 MiB",
    "onnx": "it is a folder",
    "other.safetensors": "it holds weights of the baseline",
    "own.py": "it is code, which only `trust_remote_code` carries over",
    "params.json": "it describes the blocks of the baseline",
    "pipe.txt": "it is not a regular file",
    "proof.json": "an earlier export wrote it",
    "pytorch_model.bin": "it holds weights of the baseline",
    "recipe.yaml": "it describes the blocks of the baseline",
    "run.sh": "it is a program",
    "two lines.txt": "its name cannot be shown",
    "onnx/model.onnx": "it was not fetched from the hub",
}


@pytest.fixture
def source(tmp_path: Path) -> SourceFolder:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).write_text("{}")
    with_odd_files(folder, tmp_path / "outside")
    return SourceFolder(folder, (folder / "model.safetensors",), ("onnx/model.onnx",))


@pytest.mark.parametrize("with_code", [False, True])
def test_every_file_is_carried_over_or_named(source: SourceFolder, tmp_path: Path, with_code: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = carry_over(source, out, 6, with_code=with_code)
    copies = {target: source.folder / name for name, target in CARRIED.items() if name != "licence.txt"}
    copies |= {"licence.txt": source.folder / "LICENSE", "generation_config.json": source.folder / "config.json"}
    copies |= {"own.py": source.folder / "own.py"} if with_code else {}
    assert set(result.files) == {*copies, "preprocessor.json"}
    for target, original in copies.items():
        assert (out / target).read_bytes() == original.read_bytes()
        assert result.files[target] == hashlib.sha256(original.read_bytes()).hexdigest()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    left = {name: why for name, why in LEFT_BEHIND.items() if not (with_code and name == "own.py")}
    assert {each.name: each.why for each in result.left_behind} == left
    assert len(result.left_behind) == len(left)
    named = json.loads((out / "preprocessor.json").read_text())
    assert named == {"size": 3} | ({"auto_map": {"AutoProcessor": "own.P"}} if with_code else {})


def test_a_snapshot_in_the_hub_s_cache_is_links_to_its_blobs(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1234").write_text("pieces")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("c0ffee")
    (snapshot / "tokenizer.model").symlink_to("../../blobs/1234")
    (snapshot / "stolen.txt").symlink_to("../../refs/main")
    out = tmp_path / "out"
    out.mkdir()
    result = carry_over(SourceFolder(snapshot, (), complete=False), out, 6, with_code=False)
    assert (out / "tokenizer.model").read_text() == "pieces"
    assert list(result.files) == ["tokenizer.model"]
    assert [(each.name, each.why) for each in result.left_behind] == [
        ("further files of its repository, if any", "the hub did not answer"),
        ("stolen.txt", "it is a link out of the folder, or to nothing"),
    ]
