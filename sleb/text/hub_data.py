"""Data sets of the hub, and never files of this machine that are named like one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from sleb.errors import CalibrationError, excerpt, quoted

_REMOTE, _ARCHIVES = {"hf", "https", "http"}, {"zip", "tar", "gzip", "bz2", "xz", "zstd"}


def hub_parts(source: str) -> tuple[str, str | None, str | None, str | None]:
    """Name, configuration, split and column of `name:config:split:column`. Raises `CalibrationError`."""
    parts = [part or None for part in source.split(":")]
    if len(parts) > 4 or not parts[0]:
        raise CalibrationError(f"{quoted(source)} is not a data set; write name:config:split:column, or a local file.")
    name, config, split, column = (*parts, None, None, None)[:4]
    assert name is not None
    return name, config, split, column


def load_dataset(name: str, *args: Any, split: str, streaming: bool = False, **kwargs: Any) -> Any:
    """A data set of the hub, or of its cache; never files of this machine. Raises `CalibrationError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        _require_not_here(name)
        builder = datasets.load_dataset_builder(name, *args, **kwargs)
        _require_remote(name, builder.config.data_files or {})
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = excerpt((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise CalibrationError(
            f"The data set {quoted(name)} could not be loaded ({first}). Check its name and the network, or name a "
            "local .txt or .jsonl file instead, or demo."
        ) from error


def _require_not_here(name: str) -> None:
    """Raises `CalibrationError` for a local folder, which `datasets` prefers to the hub, and for readers of files."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise CalibrationError(f"{quoted(name)} is a reader of files, not a data set; name the file itself.")
    if os.path.lexists(name):
        raise CalibrationError(
            f"{quoted(name)} lies in the current folder and would be taken for the hub's data set; start elsewhere."
        )


def _require_remote(name: str, files: Mapping[str, Iterable[Any]]) -> None:
    """Raises `CalibrationError` for a data set that names files of this machine as its own."""
    for each in (str(each) for of_split in files.values() for each in of_split):
        *archives, file = (hop.partition("://")[0] if "://" in hop else "" for hop in each.split("::"))
        if file not in _REMOTE or not _ARCHIVES.issuperset(archives):
            raise CalibrationError(
                f"The data set {quoted(name)} has {quoted(each)} of this machine among its files; choose another one."
            )
