"""Where an export goes: nothing that somebody else put there is lost. No torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sleb.errors import OptionError, StorageError

PROOF = "proof.json"
"""The file by which an earlier export is recognised; `proof_process` writes it."""


def require_free(out: Path, allow_existing: bool) -> None:
    """Nothing that somebody else put at `out` is ever lost: it is free, or an earlier export that may go."""
    if out.is_symlink():
        raise OptionError(f"{out} is a link; name the folder itself.")
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"{out} is a file; name a folder that does not exist yet.")
    if not any(out.iterdir()):
        return
    if not allow_existing:
        raise OptionError(
            f"The folder {out} is not empty; name another one, or replace an earlier export with --replace."
        )
    if not (out / PROOF).is_file():
        raise OptionError(f"The folder {out} holds something other than an earlier export; name another one.")


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, on its file system; gone afterwards, whatever happens, unless it was moved."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise StorageError(f"{out.parent} cannot be written ({error}); name another folder.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, out: Path, allow_existing: bool) -> None:
    """Give a finished folder the name that was asked for."""
    require_free(out, allow_existing)  # again: the proof took its time
    mask = os.umask(0)
    os.umask(mask)
    try:
        folder.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone, and so are some libraries' files
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    except OSError as error:
        raise StorageError(f"The exported model could not be moved to {out} ({error.strerror}).") from error


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into one sentence, in whichever library's words it comes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_not_written(folder, error)) from error
    except Exception as error:
        if type(error) is not Exception:  # nothing narrower comes from the tokenizers library
            raise
        raise StorageError(_not_written(folder, error)) from error


def _not_written(folder: Path, error: Exception) -> str:
    return f"The model could not be written to {folder.parent} ({error}); free some disk space, or name another folder."
