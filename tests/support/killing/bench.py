"""Commands that are killed: at the k-th operation on a file, or after some time. What stands then, and after the next.

A process that has imported everything once forks one for each command. A forked one counts what it does to files below
the watched folder (an audit hook hears of it before it is done), and kills itself; or a timer does, at any moment, also
in the middle of writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleb.runtime.unfinished.names import is_unfinished

EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "os.link",
    "os.symlink",
}  # fmt: skip
VOLATILE = {"seconds", "finished", "started", "heartbeat", "created", "xxh3", "age", "process_started", "cached"}
"""Keys of JSON files that differ from one run of a command to the next."""
PASSING = {".lock", "jobs", "queue", "log.txt"}
"""Names that say how something was executed, not what was found."""


@dataclass(frozen=True)
class Case:
    """A command, what is there before it, and what it can change."""

    name: str
    setup: Sequence[Sequence[str]]
    """Commands that make what stands before; `{}` is the watched folder."""
    command: Sequence[str]
    units: Sequence[str] = ()
    """What is replaced or removed, each at once: after a kill it is as before, or as after the whole command."""
    own: Sequence[str] = ()
    """Folders in which the command writes: what is there stays, or grows, and more comes."""
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    again: Callable[[Path], Sequence[str] | None] = field(default=lambda folder: None)
    """The next command, where that is not the same one."""
    measured: bool = False
    """What it finds is time: no two are equal."""


@dataclass
class Count:
    """What came of the kills."""

    operations: int = 0
    """Of the undisturbed command, on files."""
    kills: int = 0
    finished: int = 0
    """Commands that were done before their time had come."""
    wrong: list[str] = field(default_factory=list)


class Bench:
    """One case below a folder: made once, killed as often as wanted."""

    def __init__(self, case: Case, folder: Path, base: Callable[[Path], None]) -> None:
        self.case, self.work, self.template = case, folder / "work", folder / "template"
        self.work.mkdir(parents=True)
        base(self.work)
        for command in case.setup:
            self._must(self._filled(command))
        case.prepare(self.work)
        shutil.copytree(self.work, self.template, symlinks=True)
        self.before = snapshot(self.work)
        self.unit_before = {unit: digest(self.work / unit) for unit in case.units}
        began = time.perf_counter()
        status, message = run(self._filled(case.command), self.work, count=True)
        self.seconds = time.perf_counter() - began
        if status:
            raise RuntimeError(f"{case.name} failed: {message}")
        self.operations = int(message)
        self.after = digest(self.work, measured=case.measured)
        self.unit_after = {unit: digest(self.work / unit) for unit in case.units}

    def kill(self, count: Count, *, operation: int | None = None, seconds: float | None = None) -> None:
        """Kill the command once, look, give the next command, and look again."""
        self._begin()
        status, _ = run(self._filled(self.case.command), self.work, operation=operation, seconds=seconds)
        killed = status < 0
        count.kills += killed
        count.finished += not killed
        where = f"{self.case.name}, " + (f"operation {operation}" if operation else f"after {seconds:.3f} s")
        count.wrong += [f"{where}: {each}" for each in self._changed()]
        following = self.case.again(self.work) or (self.case.command if killed else None)
        if following is not None:
            status, message = run(self._filled(following), self.work)
            if status:
                count.wrong.append(f"{where}: the next command failed: {message}")
                return
        left = [str(path) for path in self.work.rglob("*") if is_unfinished(path.name.removesuffix(".json"))]
        count.wrong += [f"{where}: {path} is left" for path in left]
        now = digest(self.work, measured=self.case.measured)
        differ = sorted(path for path in now.keys() | self.after.keys() if now.get(path) != self.after.get(path))
        count.wrong += [f"{where}: {path} is not as it should be afterwards" for path in differ[:3]]

    def _begin(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work, symlinks=True)

    def _changed(self) -> list[str]:
        """What stood before and is neither as it was nor as it should be afterwards."""
        wrong = []
        for unit, before in self.unit_before.items():
            if digest(self.work / unit) not in (before, self.unit_after[unit]):
                wrong.append(f"{unit} is neither the old nor the new one")
        for path, content in self.before.items():
            if any(within(path, unit) for unit in self.case.units) or set(Path(path).parts) & PASSING:
                continue
            now = self.work / path
            same = now.is_file() and (
                now.read_bytes().startswith(content) if path.endswith(".jsonl") else now.read_bytes() == content
            )
            redone = any(within(path, own) for own in self.case.own) and now.is_file() and whole(now)
            if not same and not redone:
                wrong.append(f"{path} was changed")
        return wrong

    def _filled(self, command: Sequence[str]) -> list[str]:
        return [word.replace("{}", str(self.work)) for word in command]

    def _must(self, command: Sequence[str]) -> None:
        status, message = run(command, self.work)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed: {message}")


def kill_some(case: Case, folder: Path, kills: int, draw: random.Random, base: Callable[[Path], None]) -> Count:
    """Half of the kills at operations, evenly over all of them, half at random moments."""
    bench = Bench(case, folder, base)
    count = Count(operations=bench.operations)
    at_operations = min(bench.operations, kills - kills // 2)
    for index in range(at_operations):
        bench.kill(count, operation=1 + index * bench.operations // at_operations)
    for _ in range(3 * kills):  # those that come too late are not counted
        if count.kills >= kills:
            break
        bench.kill(count, seconds=draw.uniform(0.005, bench.seconds))
    return count


def within(path: str, folder: str) -> bool:
    """Whether a path is the folder or below it."""
    return path == folder or path.startswith(f"{folder}/")


def run(
    command: Sequence[str],
    watched: Path,
    *,
    operation: int | None = None,
    seconds: float | None = None,
    count: bool = False,
) -> tuple[int, str]:
    """A command in a forked process: its exit code (negative where it was killed), and its errors or operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code, message = 1, ""
        try:
            code, message = _in_child(command, watched, operation, seconds, count)
        finally:
            os.write(writer, message.encode()[-4000:])
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        message = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), message


def _in_child(
    command: Sequence[str], watched: Path, operation: int | None, seconds: float | None, count: bool
) -> tuple[int, str]:
    from sleb.cli.main import main

    os.environ["SLEB_HOME"] = str(watched / "home")
    sys.argv = ["sleb", *command]
    done = [0]
    if operation is not None or count:
        sys.addaudithook(_counting(str(watched), done, operation))
    if seconds is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    errors = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    return int(code), str(done[0]) if count and not code else errors.getvalue()


def _counting(watched: str, done: list[int], operation: int | None) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not any(path.startswith(watched) for path in _paths(event, arguments)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        done[0] += 1
        if done[0] == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Absolute paths of what is done; names that are relative to an open folder (as `shutil.rmtree` has them) too."""
    paths = [os.fsdecode(each) for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
    folders = [each for each in arguments[1:] if isinstance(each, int) and each >= 0] if event != "open" else []
    if folders and not any(map(os.path.isabs, paths)):
        with contextlib.suppress(OSError):
            return [os.path.join(os.readlink(f"/proc/self/fd/{folders[-1]}"), path) for path in paths]
    return paths


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(path: Path, *, measured: bool = False) -> dict[str, str]:
    """What every file below says, without what differs from one time to the next."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    result = {}
    for each in files:
        name = str(each.relative_to(path)) if each != path else each.name
        parts = Path(name).parts
        if not each.is_file() or set(parts) & PASSING or each.name.endswith(".lock") or any(map(is_unfinished, parts)):
            continue
        result[name] = "there" if measured and each.suffix == ".json" else _content(each)
    return result


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        with contextlib.suppress(ValueError):
            data = json.dumps([_lasting(json.loads(line)) for line in lines], sort_keys=True).encode()
    if path.suffix == ".safetensors":  # what is said of the tensors besides, such as seconds, stands in the header
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        data = json.dumps(header, sort_keys=True).encode() + data[8 + length :]
    if path.suffix == ".html":  # figures have names of their own each time
        data = b"whole" if data.rstrip().endswith(b"</html>") else b"torn"
    return hashlib.sha256(data).hexdigest()[:16]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(each) for name, each in value.items() if name not in VOLATILE}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def whole(path: Path) -> bool:
    """Whether a file that a command wrote again can be read."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    return path.stat().st_size > 0
