"""The destination that a user names: what can be replaced there, and how it is written. No torch.

Nothing there is lost at any moment: everything is written into a workspace beside the destination and moved there when
it is finished. A process that is killed leaves the old one in its place, or the new one, and a workspace that is
recognised and removed later.
"""

from __future__ import annotations

import os
import shutil
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

_SPARE_BYTES = 64 * 1024**2  # tokenizer, card and what the file system takes

PROOF = "proof.json"
"""The file by which an earlier export is recognised; `proof_process` writes it."""


def _has_proof(out: Path) -> bool:
    return (out / PROOF).is_file()


@dataclass(frozen=True)
class Destination:
    """The folder that a model is written to, or the file of that name, and what can be replaced there."""

    out: Path
    replace: bool = False
    """Whether an earlier export there can be removed; nothing else ever is."""
    file: str = ""
    """The name of the file in the workspace, where a file is written; empty for a folder."""
    suffix: str = ""
    """How the name of the file must end, so that programs know its format."""
    source: Path | None = None
    """The file that the model is read from, which is never replaced."""
    is_export: Callable[[Path], bool] = _has_proof
    """Whether what is there was left by an earlier export."""

    def require_free(self, *, look_inside: bool = True) -> None:
        """Require that nothing is there, an empty folder, or an earlier export that can be removed.

        Without `look_inside` anything counts as an earlier export, for a quick answer that another one follows. Raises
        `OptionError`.
        """
        try:
            self._require_name()
            self._require_replaceable(look_inside)
            above = next((each for each in self._absolute.parents if each.exists()), self._absolute)
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise OptionError(f"Nothing can be written in {above}; name another {self._kind}.")
        except (OSError, ValueError) as error:  # no permission to look, or no name for a file
            raise OptionError(f"{self.out} cannot be used ({getattr(error, 'strerror', None) or error}).") from error

    @property
    def _kind(self) -> str:
        return "file" if self.file else "folder"

    @property
    def _absolute(self) -> Path:
        return Path(os.path.abspath(self.out))

    def _require_name(self) -> None:
        out = self.out
        if out.is_symlink():
            raise OptionError(f"{out} is a link; name the {self._kind} itself.")
        if out.exists() and out.is_dir() == bool(self.file):
            advice = (
                f"name a file that ends in {self.suffix}" if self.suffix else "name a folder that does not exist yet"
            )
            raise OptionError(f"{out} is a {'folder' if self.file else 'file'}; {advice}.")
        if self.suffix and out.suffix.lower() != self.suffix:
            raise OptionError(
                f"{out} does not end in {self.suffix}, by which programs know such files; name one that does."
            )
        if self.source is not None and out.exists() and self.source.exists() and out.samefile(self.source):
            raise OptionError(f"{out} is the model itself; name another file.")

    def _require_replaceable(self, look_inside: bool) -> None:
        out = self.out
        sweep(run_folder.home(), out.parent)  # what was being replaced is back where it was
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not self.replace:
            state = "already exists" if self.file else "is not empty"
            raise OptionError(f"{out} {state}; name another {self._kind}, or replace an earlier export with `replace`.")
        if look_inside and not self.is_export(out):
            raise OptionError(f"{out} is something other than an earlier export; name another {self._kind}.")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder to write into; it, or the file in it, has the destination's name afterwards.

        Where it ends by an exception, everything is as it was before. Raises `StorageError`.
        """
        out = self._absolute
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


@contextmanager
def saving(written: str = "model") -> Iterator[None]:
    """Turn an error of the disk while a model is written, by whichever library, into one sentence.

    Raises `StorageError`.
    """
    try:
        yield
    except Exception as error:
        # The tokenizers library raises nothing narrower than Exception itself.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise StorageError(
            f"The {written} could not be written ({error}); free some disk space, or name another folder."
        ) from error


def require_space(written: str, size: int, where: Path) -> None:
    """Require room for `size` bytes on the disk of a folder, which need not exist yet. Raises `StorageError`."""
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size + _SPARE_BYTES:
        raise StorageError(
            f"{written} takes {(size + _SPARE_BYTES) / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left; "
            "free some, or name another folder."
        )


def save_text(path: Path, text: str, *, replace: bool) -> None:
    """Write a file that somebody named. Raises `OptionError` where that would lose one that cannot be removed."""
    try:
        target = expanded(path)
        is_there = target.exists()
        resolved = target.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # no name for a file, or a link to itself
        raise OptionError(f"{path} cannot be used ({getattr(error, 'strerror', None) or error}).") from error
    if target.is_dir() or str(path).endswith(os.sep):
        raise OptionError(f"{path} is a folder; name a file.")
    if is_there and not target.is_file():  # a device or a pipe is written to, never replaced
        with writing(target), open(target, "w", encoding="utf-8") as file:
            file.write(text)
        return
    if is_there and not replace:
        raise OptionError(f"{path} already exists; name another file, or add `replace`.")
    target = resolved
    with workspace(run_folder.home(), target) as own:
        replace_file(own / NEW, text)
        with writing(target):
            os.replace(own / NEW, target)


def _open_to_others(folder: Path) -> None:
    """Give what was written the usual permissions: temporary folders, and some libraries' files, are private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)
