"""What killed writers leave is recognised by its name, shown and removed; nothing else ever is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleb.errors import StorageError
from sleb.runtime.files import replace_file
from sleb.runtime.unfinished import in_place, names, workspaces
from sleb.runtime.unfinished.workspaces import NEW, abandoned, sweep, sweep_below, workspace
from tests.support.command import run as command

KILLED = """
import os, signal, sys
from pathlib import Path
from sleb.runtime.unfinished import in_place, names
from sleb.runtime.unfinished.workspaces import workspace
home, target = map(Path, sys.argv[1:3])
with workspace(home, target) as own:
    (own / "new").mkdir()
    (own / "new" / "file").write_text("new")
    {}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(home: Path, target: Path, line: str = "pass") -> None:
    """A process that is killed in its workspace, after it has done `line`."""
    subprocess.run([sys.executable, "-c", KILLED.format(line), str(home), str(target)], check=False)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_workspace_is_gone_afterwards_whatever_happens(home: Path, tmp_path: Path) -> None:
    def interrupted() -> None:
        with workspace(home, tmp_path / "out") as own:
            assert own.parent == tmp_path
            assert names.is_unfinished(own.name)
            assert not names.is_abandoned(own)
            assert abandoned(home) == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert everything(tmp_path) == []
    assert everything(home) == ["partial"]


def test_what_a_killed_process_left_is_shown_and_cleared(home: Path, tmp_path: Path) -> None:
    killed(home, tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert abandoned(home) == [left]
    assert str(left) in [entry["name"] for entry in json.loads(command("cache", "--json")[0])["entries"]]
    assert json.loads(command("cache", "--clear", "partial", "--json")[0])["cleared"] == [str(left)]
    assert everything(tmp_path) == []
    assert everything(home / "partial") == []


def test_the_next_workspace_removes_it_even_where_nothing_is_registered(home: Path, tmp_path: Path) -> None:
    killed(tmp_path / "another home", tmp_path / "place" / "out")
    assert len(everything(tmp_path / "place")) > 1
    assert abandoned(home) == []
    with workspace(home, tmp_path / "place" / "something else") as own:
        assert list((tmp_path / "place").iterdir()) == [own]


def test_a_forged_register_deletes_nothing(home: Path, tmp_path: Path) -> None:
    killed(home, tmp_path / "out")
    (entry,) = (home / "partial").iterdir()
    own = entry.name.removesuffix(".json")
    (tmp_path / "precious").mkdir()
    link = tmp_path / "elsewhere" / own
    link.parent.mkdir()
    link.symlink_to(tmp_path / "precious")
    alive = names.temporary(tmp_path / "alive")
    alive.mkdir()
    entries = {
        entry.name: str(link),
        own.replace("out", "other") + ".json": str(tmp_path / "precious"),
        f"{alive.name}.json": str(alive),
        own.replace("out", "deep") + ".json": "[" * 1000,
        "x.json": str(tmp_path / "precious"),
    }
    for name, path in entries.items():
        (home / "partial" / name).write_text(json.dumps({"path": path}))
    sweep(home)
    assert (tmp_path / "precious").is_dir()
    assert link.is_symlink()
    assert alive.is_dir()


def test_swapping_leaves_one_of_both_at_every_moment(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "file").touch()
    second.write_text("text")
    if not in_place.exchange(first, second):
        pytest.skip("this file system cannot swap two names")
    assert first.read_text() == "text"
    assert (second / "file").exists()
    with pytest.raises(FileNotFoundError):
        in_place.exchange(first, tmp_path / "nothing")


SLOWLY = "in_place.exchange = lambda *_: False; os.rename = {}; in_place.put_in_place(own / 'new', target)"


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_where_names_cannot_be_swapped_a_half_done_replacement_is_undone(
    moves: int, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    counting = (
        f"(lambda real, left: lambda *a: real(*a) if left and (left.pop() or True) else "
        f"os.kill(os.getpid(), signal.SIGKILL))(os.rename, {[0] * moves})"
    )
    killed(home, out, SLOWLY.format(counting))
    assert out.exists() is (moves != 1)
    sweep(home, tmp_path)
    assert (out / "file").read_text() == ("new" if moves == 2 else "old")
    assert everything(tmp_path) == ["out", "out/file"]


def test_a_failed_replacement_puts_the_old_one_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    monkeypatch.setattr(in_place, "exchange", lambda *_: False)
    with pytest.raises(FileNotFoundError), workspace(home, out) as own:
        in_place.put_in_place(own / NEW, out)  # which is not there
    assert everything(tmp_path) == ["out", "out/file"]


def test_temporary_files_of_the_dead_are_removed_below_a_folder(tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    mine = names.temporary(tmp_path / "deep" / "status.json")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{done.pid}-"))
    foreign = mine.with_name(mine.name.replace(names._host(), "another-host", 1))
    old = foreign.with_name(foreign.name.replace("status", "spec"))
    for path in (mine, dead, foreign, old):
        replace_file(path, "")
    os.utime(old, (0, time.time() - 2 * names.FOREIGN_SECONDS))
    (tmp_path / "deep" / ".mine.partial").touch()
    sweep_below(tmp_path)
    assert set((tmp_path / "deep").iterdir()) == {mine, foreign, tmp_path / "deep" / ".mine.partial"}


def test_a_writer_is_not_dead_because_the_clock_was_set(tmp_path: Path) -> None:
    mine = names.temporary(tmp_path / "out").name
    head, _, rest = mine.rpartition("-")
    started, _, tail = rest.partition(".")
    for seconds, is_dead in ((-300, False), (300, False), (-7200, True)):  # two hours: another one has its number
        path = tmp_path / f"{head}-{int(started) + 100 * seconds}.{tail}"
        assert names.is_abandoned(path) is is_dead


def test_names_of_any_length_and_script_can_be_written(home: Path, tmp_path: Path) -> None:
    for name in ("x" * 250, "Ж" * 120, "a.b", ".hidden", "with\nline"):
        replace_file(tmp_path / name, "text")
        with workspace(home, tmp_path / name) as own:
            assert names.is_unfinished(own.name)
            assert names.becomes(own.name, name)
        assert (tmp_path / name).read_text() == "text"


def test_a_place_that_cannot_be_written_is_a_sentence(home: Path) -> None:
    with pytest.raises(StorageError, match="/proc/sleb"), workspace(home, Path("/proc/sleb/out")):
        pass
    assert workspaces.abandoned(home) == []
