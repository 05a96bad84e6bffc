"""Files from anywhere are bounded before they take memory, and hold data only."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sleb.errors import StorageError
from sleb.runtime import array_files, files, run_folder
from tests.support.runs.stores import write_run


def huge(path: Path) -> Path:
    """A file of a tebibyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    return path


def test_a_record_or_text_longer_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for read in (files.read_json, files.read_regular, array_files.read_arrays):
        with pytest.raises(ValueError, match="it is longer than"):
            read(huge(tmp_path / "huge"))


def test_a_run_that_does_not_fit_is_not_begun_to_be_copied(tmp_path: Path, home: Path) -> None:
    made = write_run(tmp_path / "run", 4, 1)
    huge(made.run_dir / "jobs" / "1-search" / "log.txt")
    with pytest.raises(StorageError, match=r"takes 1099\.5 GB and"):
        run_folder.bring_in(made.run_dir)
    assert list((home / "runs").iterdir()) == []


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            files.read_regular(place)
        with pytest.raises(ValueError, match="not a regular file"):
            array_files.read_arrays(place)
    with pytest.raises(FileNotFoundError):
        array_files.read_arrays(tmp_path / "missing")


def header(shape: str) -> bytes:
    """An array's file that says to have a shape, and holds nothing."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "member",
    [
        header("(1099511627776,)"),
        header("(-1,)"),
        header("(" * 40 + ")" * 40),
        header("(9999999999999999999999,)"),
        b"\x93NUMPY",
        b"",
        pickle.dumps("code"),
    ],
)
def test_arrays_made_to_do_damage_are_a_value_error(member: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as packed:
        packed.writestr("nats.npy", member)
    with pytest.raises(ValueError, match=r"."):
        array_files.read_arrays(tmp_path / "arrays.npz")


def test_arrays_that_unpack_to_more_than_they_may_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, nats=np.zeros(1_000_000))
    (tmp_path / "bomb.npz").write_bytes(buffer.getvalue())
    assert array_files.read_arrays(tmp_path / "bomb.npz")["nats"].shape == (1_000_000,)
    with pytest.raises(ValueError, match="its arrays are longer than"):
        array_files.read_arrays(tmp_path / "bomb.npz", most=4_000_000)
