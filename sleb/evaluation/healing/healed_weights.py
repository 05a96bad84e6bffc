"""The files in which healed weights are kept, with what is known of the healing. Knows tensors by name; no model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sleb.runtime.files import replace_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What is kept of a healing besides its weights."""

    trained_parameters: int
    trained_tokens: int
    losses: tuple[float, ...]
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    """Nats; None where predictions were not numbers."""
    held_out_tokens: int


def write(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write tensors by name, and facts beside them, whole or not at all. Raises `StorageError`."""
    whole = {name: each.cpu().contiguous() for name, each in tensors.items()}
    replace_file(path, save(whole, {"facts": json.dumps(facts)}))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `write` wrote; None where it is missing or damaged, and made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read, and is made again: %s", path, error)
        return None
