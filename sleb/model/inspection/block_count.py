"""The number of blocks of a model, from its files alone, without loading it. No torch, no network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sleb.errors import ModelError
from sleb.model.inspection import gguf_header, model_files
from sleb.records import is_gguf
from sleb.runtime import files

DEMO_BLOCKS = 30  # of SmolLM2-135M; a test asks the model itself
MOST_BLOCKS = 256
"""The most blocks that are believed unseen: counting the work of more would take minutes."""
_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def num_blocks(model: str) -> int | None:
    """Blocks of a model given as for a search; None where its files are not here, or do not say."""
    if model == "demo":
        return DEMO_BLOCKS
    count = None
    with suppress(OSError, ValueError, RuntimeError, ModelError):
        path = files.expanded(Path(model))
        if path.is_dir():
            count = _of_config(model_files.read_config(path))
        elif is_gguf(path.name) and path.is_file():
            count = _of_gguf(path)
    return count if count is not None and 0 < count <= MOST_BLOCKS else None


def _of_config(config: Any) -> int | None:
    """The text part of a model that sees images too keeps its own."""
    for part in (config.get("text_config"), config):
        for name in _NAMES:
            count = part.get(name) if isinstance(part, dict) else None
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return count
    return None


def _of_gguf(path: Path) -> int | None:
    counts = [value for key, value in gguf_header.settings(path).items() if key.endswith(".block_count")]
    return counts[0] if counts and type(counts[0]) is int else None
