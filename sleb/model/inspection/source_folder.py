"""The folder that a model's files lie in: which are weights, which are settings, what else. Reads names. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.errors import excerpt
from sleb.model.inspection import model_files
from sleb.model.inspection.presence import is_path
from sleb.records import is_gguf

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST = 256 << 20
"""Size in bytes above which a file beside the weights is not taken along; the largest vocabularies take 40 MB."""
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".mlmodel", ".npz", ".pkl", ".pickle", ".joblib", ".nemo", ".engine", ".mar"),
)
"""How names of files end that hold weights, or pickles."""


@dataclass(frozen=True)
class SourceFolder:
    """The folder of a model, as it was loaded."""

    folder: Path
    weights: tuple[Path, ...]
    """The safetensors files that hold its weights; none where these are a pickle."""
    elsewhere: tuple[str, ...] = ()
    """Files of the model's repository on the hub that are not in the folder."""
    complete: bool = True
    """Whether all files of the model are known: not where its hub did not answer."""

    def config(self) -> dict[str, Any]:
        """Its config.json as it is. Raises `ModelError`."""
        return model_files.read_config(self.folder)


def source_folder(name: str, revision: str | None) -> SourceFolder | None:
    """The folder of a model in the Hugging Face layout, all its small files fetched; None for one that has none."""
    if name == "demo" or is_gguf(name):
        return None
    if is_path(name):
        folder = Path(name).expanduser()
        return SourceFolder(folder, tuple(_weights(folder)))
    return _of_hub(name, revision)


def _weights(folder: Path) -> Iterator[Path]:
    """In the order in which transformers looks for them."""
    if (folder / SINGLE).is_file():
        yield folder / SINGLE
    elif (folder / INDEX).is_file():
        listing = json.loads((folder / INDEX).read_bytes())
        yield from (folder / shard for shard in sorted(set(listing["weight_map"].values())))


def _of_hub(name: str, revision: str | None) -> SourceFolder | None:
    """The snapshot in the cache. Where the hub answers, the further files that it lists are fetched."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(cached, str):
        return None
    folder = Path(cached).parent
    elsewhere, complete = [], True
    try:
        siblings = HfApi().model_info(name, revision=folder.name, files_metadata=True).siblings or ()
        for each in siblings:
            file = each.rfilename
            if (folder / file).exists():
                continue
            wanted = "/" not in file and Path(file).suffix.lower() not in WEIGHTS and (each.size or 0) <= LARGEST
            if wanted and not file.endswith(".index.json"):
                hf_hub_download(name, file, revision=folder.name)
            else:
                elsewhere.append(file)
    except Exception as error:  # no answer: what the cache has is all there is
        complete = False
        log.warning("The hub did not say which further files %s has (%s).", name, excerpt(error))
    return SourceFolder(folder, tuple(_weights(folder)), tuple(elsewhere), complete)
