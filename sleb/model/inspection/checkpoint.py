"""A model's safetensors files: which they are, what is stored in them, and whether all of it was used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sleb.errors import ModelError
from sleb.model.inspection import model_files, quantisation, stored_tensors
from sleb.model.inspection.quantisation import Scheme
from sleb.model.inspection.stored_tensors import StoredTensor, main_dtype
from sleb.model.stack_discovery import find_stack


class Checkpoint:
    """The tensors of a model's safetensors files, and whether all were used; empty without such files."""

    def __init__(self, name: str, source: str, config: Any, raw: dict[str, Any], options: dict[str, Any]) -> None:
        self.name, self.source, self.config, self.raw, self.options = name, source, config, raw, options
        self.stored: dict[str, StoredTensor] = {}
        self.scheme: Scheme | None = None

    @property
    def dtype(self) -> str | None:
        """The type that most weights have; None where they are packed."""
        return None if self.scheme is not None else main_dtype(self.stored)

    def inspect(self) -> None:
        """Raises `ModelError` where the files do not fit the config, or the loader cannot undo their quantisation."""
        beside = {} if quantisation.is_named(self.raw) else self._beside()
        self.scheme = quantisation.scheme_of(self.name, self.raw, self.config, beside)
        files = list(dict.fromkeys(files_by_key(self.source, self.options).values()))
        self.stored = stored_tensors.read_headers(map(Path, files))
        size = sum(Path(each).stat().st_size for each in files)
        model_files.require_stored(self.name, self.config, self.options, self.stored, size)
        quantisation.require_consistent(self.name, self.scheme, self.stored)

    def applied(self, model: Any, report: dict[str, Any]) -> str | None:
        """The quantisation of the loaded model. Raises `ModelError` where its scales were left out."""
        return quantisation.require_applied(self.name, self.scheme, model, self.stored, _unused(model, report))

    def require_every_block(self, model: Any, report: dict[str, Any]) -> None:
        """Raises `ModelError` where something that is stored for a block was left out of the model."""
        try:
            path, blocks = find_stack(model)
        except ModelError:  # raised again where it is used as a stack of blocks
            return
        unused = _unused(model, report)
        modules = {part for part, _ in model.named_modules()}
        model_files.require_every_block(self.name, path, len(blocks), self.raw, self.stored, unused, modules)

    def _beside(self) -> dict[str, Any]:
        from transformers.utils.hub import cached_file

        quiet = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        settings = {}
        for file in quantisation.BESIDE if Path(self.source).is_dir() else quantisation.BESIDE[:1]:
            path = cached_file(self.source, file, revision=self.options["revision"], **quiet)
            if path is not None:
                settings[file] = model_files.read_text_json(Path(path))
        return settings


def require_complete(name: str, report: dict[str, Any]) -> None:
    """Raises `ModelError` where a checkpoint lacks weights: while loading they are made up at random."""
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of the weights its config asks for ({missing[0]}, for one): the files are "
            "incomplete, or the config belongs to another model."
        )


def _unused(model: Any, report: dict[str, Any]) -> list[str]:
    """Stored tensors that the model did not take, those left out that its family always ignores."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = report.get("unexpected_keys") or ()
    return [key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)]


def files_by_key(source: str, options: dict[str, Any]) -> dict[str, str]:
    """The safetensors file of each tensor of a checkpoint, fetched from the hub if need be; empty without one."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    revision = options.get("revision")
    quiet: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, "model.safetensors", **quiet)
    if single is not None:
        files = [single]
    else:
        listing = cached_file(source, "model.safetensors.index.json", **quiet)
        if listing is None:
            return {}
        files, _ = get_checkpoint_shard_files(source, listing, revision=revision)
    file_of: dict[str, str] = {}
    for name in files:
        with safe_open(name, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), str(name))
    return file_of
