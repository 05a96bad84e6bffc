"""Giving a finished file or folder the name that was asked for. Knows names only; at no moment is the old one lost."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
OLD = "old"
"""The name, in a workspace, of what stood at the destination, where two names cannot be swapped at once."""


def put_in_place(new: Path, target: Path) -> None:
    """Give `new`, which lies in a workspace beside it, the name `target`.

    What stood there is in the workspace afterwards. Where a file system cannot swap two names it is moved there first;
    if the second move fails or never comes, the end of the workspace or `workspaces.sweep` moves it back. Raises
    `OSError`.
    """
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not exchange(new, target):
        os.rename(target, new.parent / OLD)
        os.rename(new, target)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names at once; False where the system or the file system cannot. Raises `OSError`."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    sys.audit("os.rename", str(first), str(second), -1, -1)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, ctypes.c_uint(_SWAP))
        else:
            failed = library.renameat2(_HERE, names[0], _HERE, names[1], ctypes.c_uint(_SWAP))
    except AttributeError:  # another system, or an older C library
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(second))
