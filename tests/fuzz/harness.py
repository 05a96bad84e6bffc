"""What no input may do, checked while one example runs in this process: a traceback, a hang, a write elsewhere.

Files that are opened for writing are seen by an audit hook; a new process is not started, and ends the example.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleb.cli.main import main
from sleb.errors import MOST_CHARACTERS, SlebError

SECONDS = 60
"""Of a clock on the wall, for one example: a hang, on however busy a machine."""
MEMORY = 3 << 30
"""Address space that one example may take in addition."""
EXIT_CODES = {0, 1, 2, 130}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Breach(AssertionError):
    """An example did what no input may do."""


class _Hang(BaseException):
    """Nobody catches it by accident."""


@dataclass
class Sandbox:
    """Where examples live: a home of their own, a current folder that stays empty, and hostile places."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    """Examples by how they ended."""

    def __post_init__(self) -> None:
        self.home, self.here, self.places = (self.root / name for name in ("home", "here", "places"))
        for folder in (self.home, self.here, self.places):
            folder.mkdir()

    def command(self, words: Sequence[str], may_write: Sequence[Path] = ()) -> None:
        """One command, as its user would give it, with its own streams as a terminal that nobody answers at."""
        out, err = _Terminal(), _Terminal()
        with self._guarded(may_write), _streams(out, err, ["sleb", *words]):
            try:
                main()
                code: Any = 0
            except SystemExit as ended:
                code = ended.code or 0
        self.judge(code, out.getvalue(), err.getvalue())
        self.counts[f"exit code {code}"] += 1

    def call(self, function: Callable[..., object], *arguments: object, **options: object) -> None:
        """One call of a loader: it answers, or refuses in one sentence."""
        out, err = _Terminal(), _Terminal()
        with self._guarded(()), _streams(out, err, ["sleb"]):
            try:
                function(*arguments, **options)
                refusal = ""
            except SlebError as error:
                refusal = str(error)
        self.judge(1 if refusal else 0, "", f"sleb: {refusal}\n" if refusal else "")  # the streams are main's to keep
        self.counts["refused" if refusal else "accepted"] += 1

    @staticmethod
    def judge(code: object, out: str, err: str) -> None:
        """Raises `Breach` for what a command must not end with, or say."""
        shown = out + err
        if code not in EXIT_CODES:
            raise Breach(f"exit code {code!r}: {shown[-500:]}")
        if "Traceback (most recent call last)" in shown:
            raise Breach(f"a traceback: {shown[-3000:]}")
        steering = sorted({each for each in shown if not each.isprintable() and each != "\n"})
        if steering:
            raise Breach(f"control characters {steering} in {shown[-500:]!r}")
        if code and not err.strip():
            raise Breach(f"exit code {code} without a sentence")
        for line in err.splitlines():
            if len(line) > MOST_CHARACTERS + 20 and line.startswith(("sleb: ", "WARNING: ")):
                raise Breach(f"a sentence of {len(line)} characters: {line[:300]}")

    @contextlib.contextmanager
    def _guarded(self, may_write: Sequence[Path]) -> Iterator[None]:
        elsewhere: list[str] = []
        settings = {"SLEB_HOME": str(self.home), "HOME": str(self.root), "TERM": "dumb"}
        _Guard.allowed = [str(self.home), *(os.path.abspath(each) for each in may_write)]
        _Guard.elsewhere = elsewhere
        with contextlib.chdir(self.here), _environment(settings), _limits(), _alarm():
            _Guard.active = True
            try:
                yield
            except (SystemExit, KeyboardInterrupt, SlebError):
                raise
            except _Hang as error:
                raise Breach(f"no end after {SECONDS} s") from error
            except Exception as error:
                raise Breach(f"{type(error).__name__}: {str(error)[:300]}") from error
            finally:
                _Guard.active = False
        if elsewhere:
            raise Breach(f"written elsewhere: {elsewhere[:3]}")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Guard:
    """What the audit hook, which can never be taken out again, has to look at."""

    active = False
    installed = False
    allowed: Sequence[str] = ()
    elsewhere: list[str]


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _Guard.active:
        return
    if event in ("os.exec", "os.posix_spawn", "subprocess.Popen"):
        raise SystemExit(0)  # what it would have started does not belong to the example
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING:
            _note(path)
    elif event in _CHANGES:
        directory = next((each for each in arguments[1:] if isinstance(each, int) and each >= 0), None)
        for path in arguments[:2] if event == "os.rename" else arguments[1:2] if "link" in event else arguments[:1]:
            if directory is None:  # else within a folder whose removal was seen
                _note(path)


def _note(path: object) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return
    text = os.path.abspath(os.fsdecode(path))
    if "__pycache__" in text or text.startswith(("/dev/", "/proc/")):
        return
    for place in _Guard.allowed:
        folder, name = os.path.split(place)
        # What has its name, or is made beside it to become it when it is whole, is meant; and so are new folders above.
        if text == place or text.startswith((place + os.sep, os.path.join(folder, f".{name}."))):
            return
    if not any(place.startswith(text + os.sep) for place in _Guard.allowed):
        _Guard.elsewhere.append(text)


def watch_files() -> None:
    """Installs the audit hook, once a process."""
    if not _Guard.installed:
        _Guard.installed = True
        sys.addaudithook(_audit)


@contextlib.contextmanager
def _streams(out: _Terminal, err: _Terminal, words: list[str]) -> Iterator[None]:
    root, before, stdin = logging.getLogger(), sys.argv, sys.stdin
    handlers, root.handlers[:] = root.handlers[:], []
    sys.argv, sys.stdin = words, io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        sys.argv, sys.stdin = before, stdin
        root.handlers[:] = handlers


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Memory is refused long before the machine has none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(_number: int, _frame: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
