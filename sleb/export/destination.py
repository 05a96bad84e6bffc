"""Where something is written that somebody named: nothing there is lost, at any moment. No torch.

Everything is written into a workspace beside the destination and moved there when it is finished. A process that is
killed leaves the old one in its place, or the new one, and a workspace that is recognised and removed later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from sleb.errors import OptionError, StorageError
from sleb.runtime import run_folder
from sleb.runtime.files import expanded, replace_file, writing
from sleb.runtime.unfinished.in_place import put_in_place
from sleb.runtime.unfinished.workspaces import NEW, sweep, workspace

PROOF = "proof.json"
"""The file by which an earlier export is recognised; `proof_process` writes it."""


def _has_proof(out: Path) -> bool:
    return (out / PROOF).is_file()


@dataclass(frozen=True)
class Destination:
    """A folder to write a model to, or the file of that name, and what there can be removed for it."""

    out: Path
    replace: bool = False
    """Whether an earlier export there can be removed; nothing else ever is."""
    file: str = ""
    """Where a file is written: its name in the workspace."""
    is_export: Callable[[Path], bool] = _has_proof

    def require_free(self) -> None:
        """It is free, or an earlier export that can be removed. Raises `OptionError`."""
        out = self.out
        sweep(run_folder.home(), out.parent)  # what was being replaced is back where it was
        what, other = ("file", "folder") if self.file else ("folder", "file")
        if out.is_symlink():
            raise OptionError(f"{out} is a link; name the {what} itself.")
        if not out.exists():
            return
        if out.is_dir() == bool(self.file):
            raise OptionError(f"{out} is a {other}; name a {what} that does not exist yet.")
        if out.is_dir() and not any(out.iterdir()):
            return
        if not self.replace:
            found = "already exists" if self.file else "is not empty"
            raise OptionError(f"{out} {found}; name another {what}, or replace an earlier export with --replace.")
        if not self.is_export(out):
            raise OptionError(f"{out} is something other than an earlier export; name another {what}.")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder to write into; it, or the file in it, has the destination's name afterwards.

        Where it ends by an exception, everything is as it was before. Raises `StorageError`.
        """
        out = Path(os.path.abspath(self.out))
        with workspace(run_folder.home(), out) as own:
            folder = own / NEW
            with writing(out):
                folder.mkdir()
            yield folder
            self.require_free()  # again: writing took its time
            try:
                _open_to_others(folder)
                put_in_place(folder / self.file, out)
            except OSError as error:
                raise StorageError(f"The exported model could not be moved to {out} ({error.strerror}).") from error


def require_free(out: Path, allow_existing: bool) -> None:
    """Whether a model can be written to a folder. Raises `OptionError`."""
    Destination(out, allow_existing).require_free()


@contextmanager
def saving(what: str = "model") -> Iterator[None]:
    """Turns what a disk refuses while a model is written into one sentence, in whichever library's words it comes."""
    sentence = "The {} could not be written ({}); free some disk space, or name another folder."
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(sentence.format(what, error)) from error
    except Exception as error:
        if type(error) is not Exception:  # nothing narrower comes from the tokenizers library
            raise
        raise StorageError(sentence.format(what, error)) from error


def save_text(path: Path, text: str, *, replace: bool) -> None:
    """Write a file that somebody named. Raises `OptionError` where that would lose one that cannot be removed."""
    target = expanded(path)
    if target.is_dir() or str(path).endswith(os.sep):
        raise OptionError(f"{path} is a folder; name a file.")
    if target.exists() and not target.is_file():  # a device or a pipe is written to, never replaced
        with writing(target), open(target, "w", encoding="utf-8") as file:
            file.write(text)
        return
    if target.exists() and not replace:
        raise OptionError(f"{path} already exists; name another file, or add --replace.")
    target = target.resolve()
    with workspace(run_folder.home(), target) as own:
        replace_file(own / NEW, text)
        with writing(target):
            os.replace(own / NEW, target)


def _open_to_others(folder: Path) -> None:
    """A temporary folder is its owner's alone, and so are some libraries' files."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)
