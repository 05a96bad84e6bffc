"""A list of runs says the same with its index, without one and with a damaged one, and follows each change."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from sleb.errors import RunError
from sleb.formats import run_json
from sleb.records import JobState, JobStatus, Run, SearchJob
from sleb.runtime import job_folder, run_folder, run_index
from sleb.runtime.listing import index_file, run_list
from sleb.runtime.run_index import Outline
from tests.support.command import run as command
from tests.support.paths import DATA
from tests.support.runs.stores import write_run

KINDS = ("metric3", "swap", "evaluation", "metric3-interrupted", "metric3-queued", "failed")
RECORDED = DATA / "compatibility" / "0.1.0" / "home" / "runs"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run can be kept once its files are older than a tick: here at once, but for files of the future."""
    monkeypatch.setattr(run_index, "TICK_NS", -(10**9))


@pytest.fixture
def runs(home: Path) -> Path:
    """Runs that an earlier version left in several states, and one that cannot be read."""
    for kind in KINDS:
        shutil.copytree(RECORDED / kind, home / "runs" / kind)
    shutil.copytree(RECORDED / "metric3", home / "runs" / "damaged")
    (home / "runs" / "damaged" / "spec.json").write_text("{")
    return home / "runs"


def index_of(home: Path) -> Path:
    """Where the index lies."""
    return home / "cache" / "run-index.sqlite"


def shown(rows: list[Outline | RunError]) -> list[object]:
    """As values that can be compared."""
    return [str(each) if isinstance(each, RunError) else each for each in rows]


def plain(runs: Path) -> list[object]:
    """The list without any index."""
    return shown(run_list.list_outlines(runs))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that are read from now on."""
    read: list[str] = []
    real = run_index.read

    def reading(directory: Path, now_ns: int) -> run_index.Reading:
        read.append(directory.name)
        return real(directory, now_ns)

    monkeypatch.setattr(run_index, "read", reading)
    return read


def test_the_index_answers_as_the_files_do_and_they_are_not_read_again(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(runs)
    assert len(expected) == len(list(runs.iterdir()))
    assert [type(each) for each in expected].count(str) == 1
    read = counted(monkeypatch)
    assert shown(run_list.list_outlines()) == expected
    assert len(read) == len(expected)
    read.clear()
    assert shown(run_list.list_outlines()) == expected
    assert read == ["damaged"]  # an error is never kept


def test_objects_of_the_index_are_those_of_whole_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [run for run in run_folder.list_runs() if isinstance(run, Run)]
    states = {each.run_id: each.state.value for each in run_list.list_outlines(runs) if isinstance(each, Outline)}
    expected = json.dumps({"runs": [run_json.summary(run) | {"state": states[run.run_id]} for run in whole]})
    first, errors = command("runs", "--json")
    assert first == expected + "\n"
    assert "damaged" in errors
    loaded: list[Path] = []
    load = run_folder.load
    monkeypatch.setattr(run_folder, "load", lambda run: loaded.append(run) or load(run))  # type: ignore[func-returns-value]
    assert command("runs", "--json") == (first, errors)
    assert [each.name for each in loaded] == ["damaged"]


def append(path: Path) -> None:
    """One line less, as a torn write leaves it."""
    path.write_bytes(path.read_bytes().rpartition(b'{"finished"')[0])


def rewrite(old: bytes, new: bytes) -> Callable[[Path], None]:
    """The same size, and the same time: what a stamp sees then is when the file itself was changed."""

    def change(path: Path) -> None:
        before = path.stat()
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("spec.json", rewrite(b"tiny-llama", b"tiny-LLAMA")),
        ("stack.json", Path.unlink),
        ("trace.jsonl", append),
        ("trace.jsonl", Path.unlink),
        ("jobs/1-search/status.json", rewrite(b"finished", b"stopped ")),
        ("jobs/1-search/spec.json", rewrite(b'"search"', b'"export"')),
        ("jobs/1-search/attempt.json", rewrite(b'"device"', b'"devise"')),
        ("jobs", shutil.rmtree),
    ],
)
def test_a_change_of_any_file_is_seen(file: str, change: Callable[[Path], None], runs: Path, home: Path) -> None:
    path = runs / "metric3" / file
    if file.endswith("status.json"):
        path.write_bytes(path.read_bytes().replace(b'"finished"', b'"finished" '))
    before = shown(run_list.list_outlines())
    kept = run_list.of_home(home)
    assert shown(kept.outlines()) == before == plain(runs)
    if file.endswith("status.json"):
        change = rewrite(b'"finished" ', b'"stopped"  ')
    change(path)
    after = plain(runs)
    assert after != before
    assert shown(run_list.list_outlines()) == shown(kept.outlines()) == after


def test_a_new_job_and_one_that_is_being_created_are_seen(home: Path) -> None:
    run = write_run(home / "runs" / "run", 12, 2)
    state = JobState.FINISHED
    assert [each.state for each in run_list.list_outlines() if isinstance(each, Outline)] == [state]
    (run.run_dir / "jobs" / "2-search").mkdir()  # a job without a spec is none yet
    assert [each.state for each in run_list.list_outlines() if isinstance(each, Outline)] == [state]
    (run.run_dir / "jobs" / "2-search" / "spec.json").write_text(SearchJob().model_dump_json())
    assert [each.state for each in run_list.list_outlines() if isinstance(each, Outline)] == [JobState.QUEUED]
    job = job_folder.create_job(run.run_dir, SearchJob())
    job_folder.write_status(job.directory, JobStatus(state=JobState.FAILED))
    assert [each.state for each in run_list.list_outlines() if isinstance(each, Outline)] == [JobState.FAILED]


def test_what_changed_a_moment_ago_is_read_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_index, "TICK_NS", 10**12)
    write_run(home / "runs" / "run", 12, 2)
    listed = run_list.of_home(home)
    read = counted(monkeypatch)
    listed.outlines()
    listed.outlines(None, 1)
    run_list.list_outlines()
    assert read == ["run"] * 3


def test_whether_a_process_is_there_is_never_kept(home: Path) -> None:
    run = write_run(home / "runs" / "run", 12, 2, done=1, state=JobState.STOPPED)
    host, own = os.uname().nodename, psutil.Process()
    status = JobStatus(
        state=JobState.RUNNING, pid=own.pid, host=host, process_started=own.create_time(), heartbeat=time.time()
    )
    job_folder.write_status(run.jobs[0].directory, status)
    listed = run_list.of_home(home)
    (result,) = listed.outlines()
    assert isinstance(result, Outline)
    assert result.state is JobState.RUNNING
    job_folder.write_status(run.jobs[0].directory, status.model_copy(update={"process_started": 1.0}))
    for _ in range(2):
        for each in (*listed.outlines(None, 1), *run_list.list_outlines()):
            assert isinstance(each, Outline)
            assert each.state is JobState.INTERRUPTED
    assert b"interrupted" not in index_of(home).read_bytes()


def test_deleted_runs_go_from_the_list_and_from_the_index(runs: Path, home: Path) -> None:
    command("runs", "--json")
    listed = run_list.of_home(home)
    listed.outlines()
    shutil.rmtree(runs / "metric3")
    (runs / "swap" / "spec.json").unlink()  # no run any more, though the folder is there
    for result in (listed.outlines(), run_list.list_outlines()):
        assert shown(result) == plain(runs)
    assert {"metric3", "swap"} & set(index_file.IndexFile(index_of(home)).outlines()) == set()
    with sqlite3.connect(index_of(home)) as index:
        assert index.execute("SELECT count(*) FROM summaries WHERE name IN ('metric3', 'swap')").fetchone() == (0,)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_bit_flipped(path: Path) -> None:
    """In the midst of what was kept: valid JSON that says something else."""
    flipped = path.read_bytes().replace(b'"num_blocks":6', b'"num_blocks":7')
    path.write_bytes(flipped.replace(b'"num_blocks": 6', b'"num_blocks": 7'))


def summaries_lost(path: Path) -> None:
    """The pages of the long texts alone: everything else can be read."""
    with sqlite3.connect(path) as index:
        (root,) = index.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'summaries'").fetchone()
        (size,) = index.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * size : root * size] = b"\xff" * size
    path.write_bytes(content)


def another_version(path: Path) -> None:
    with sqlite3.connect(path) as index:
        index.executescript("UPDATE outlines SET text = 'x'; PRAGMA user_version = 4711")


def without_tables(path: Path) -> None:
    with sqlite3.connect(path) as index:
        index.executescript("DROP TABLE outlines; DROP TABLE summaries; CREATE TABLE outlines (x)")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no database" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + os.urandom(path.stat().st_size - 4096)),
        a_bit_flipped,
        summaries_lost,
        another_version,
        without_tables,
    ],
    ids=["missing", "empty", "foreign", "cut", "noise", "flipped", "summaries", "version", "tables"],
)
def test_an_index_that_is_no_good_is_made_again_without_a_word(
    damage: Callable[[Path], object], runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, objects = command("runs"), command("runs", "--json")
    damage(index_of(home))
    assert command("runs", "--json") == objects
    assert command("runs") == screen
    assert command("runs", "--json") == objects
    read = counted(monkeypatch)
    assert shown(run_list.list_outlines()) == plain(runs)
    assert read[0] == "damaged"
    assert len(read) == 1 + len(list(runs.iterdir()))  # the one, and all by `plain`


@pytest.mark.parametrize("obstacle", ["folder", "locked", "no room"])
def test_without_an_index_everything_is_said_all_the_same(obstacle: str, runs: Path, home: Path) -> None:
    screen, objects = command("runs"), command("runs", "--json")
    path = index_of(home)
    if obstacle == "folder":
        a_folder(path)
    elif obstacle == "no room":
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("a file where the folder should be")
    other = sqlite3.connect(path if obstacle == "locked" else ":memory:", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert command("runs", "--json") == objects
    assert command("runs") == screen
    other.close()


def listing(home: str, number: int) -> int:
    """In a process of its own: list, and change a run in between."""
    os.environ["SLEB_HOME"] = home
    for turn in range(2):
        assert len(run_list.list_outlines()) == len(KINDS) + 1
        os.utime(Path(home) / "runs" / KINDS[number * 2 + turn] / "spec.json", (number, turn))
    return number


def test_several_processes_list_at_once(runs: Path, home: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert sorted(pool.map(listing, [str(home)] * 3, range(3))) == [0, 1, 2]
    assert shown(run_list.list_outlines()) == plain(runs)


def test_of_many_runs_a_few_are_looked_at_each_time_and_all_in_turn(
    runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = run_list.of_home(home)
    expected = shown(listed.outlines())
    read = counted(monkeypatch)
    os.utime(runs / "metric3" / "spec.json", (1, 1))
    os.utime(runs / "swap" / "spec.json", (2, 2))
    write_run(runs / "new", 12, 2)
    assert "new" in {each.run_id for each in listed.outlines("swap", 1) if isinstance(each, Outline)}
    assert {"new", "swap"} <= set(read)
    for _ in range(10):
        result = shown(listed.outlines(None, 1))
    assert result == plain(runs) != expected
    assert read.count("metric3") - 1 == 1  # once more by `plain`


def test_what_is_kept_has_a_number_that_goes_with_its_form(home: Path) -> None:
    """Any change of what a list or `--json` says of the same files raises `index_file.FORMAT`."""
    run = write_run(home / "runs" / "run", 12, 2)
    summary = run_json.summary(run)
    names = [*summary, *summary["baseline"], *summary["steps"][0], *summary["steps"][0]["candidates"][0]]
    names += [*run_index.Contents.model_fields, *run_index.Standing.model_fields]
    assert (index_file.FORMAT, len(names), hash_of(names)) == (1, 54, "3a595272")


def hash_of(names: list[str]) -> str:
    """Short, and the same everywhere."""
    return f"{zlib.crc32(','.join(names).encode()):08x}"
