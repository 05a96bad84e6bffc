"""Whether this machine wrote what a run folder asks for, or somebody here confirmed it.

Whoever creates a run or a job here signs its `spec.json` with a key that lies under `SLEB_HOME`, never in a run folder:
`spec.signature` is the HMAC of the file. A folder from elsewhere has no such signature, and neither has one whose
`spec.json` was changed since. The model and the texts that such a folder names are not read before they were confirmed.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sleb.errors import RunError, StorageError, UnconfirmedNames
from sleb.records import NAMED_TEXTS, JobSpec, RunSpec
from sleb.runtime import places
from sleb.runtime.files import inside, read_regular, replace_file
from sleb.runtime.record_files import read_record

log = logging.getLogger(__name__)

SIGNATURE = "spec.signature"
_TEXTS_BY_NAME = {*NAMED_TEXTS, "wikitext2-rows"}
"""Names that mean the same text on every machine; the demo model is the only model of that kind."""


def sign(run_dir: Path, *parts: str) -> None:
    """Sign the `spec.json` of a run, or of the job folder at `parts`: it was written or confirmed here.

    Where no key or signature can be written, the names will have to be confirmed later.
    """
    folder = inside(run_dir, *parts)
    try:
        content = read_regular(inside(folder, "spec.json"))
        replace_file(inside(folder, SIGNATURE), _hmac(_key(), content), make_folder=False)
    except (OSError, ValueError, StorageError) as error:
        log.warning("%s was not signed as written here: %s", folder, error)


def unconfirmed(run_dir: Path, *jobs: str) -> tuple[str, ...]:
    """The model, texts and files that a run and these jobs of it (names of job folders) name, and nobody confirmed.

    Empty where this machine wrote all of it. Raises `RunError` where a spec cannot be read.
    """
    found: list[str] = []
    if not _is_signed(run_dir):
        found += _names_of_run(read_record(RunSpec, run_dir, "spec.json"))
    for job in jobs:
        if not _is_signed(inside(run_dir, "jobs", job)):
            found += _names_of_job(read_record(JobSpec, run_dir, "jobs", job, "spec.json"))
    return tuple(dict.fromkeys(found))


def require_confirmed(run_dir: Path, *jobs: str) -> None:
    """Raises `UnconfirmedNames` where a run, or one of these jobs, names what nobody here has confirmed."""
    if names := unconfirmed(run_dir, *jobs):
        raise UnconfirmedNames(str(run_dir), names)


def confirm(run_dir: Path, *jobs: str) -> None:
    """Sign a run and these jobs of it: somebody here has seen what they name, and agrees."""
    sign(run_dir)
    for job in jobs:
        sign(run_dir, "jobs", job)


def is_written_here(run_dir: Path, *parts: str) -> bool:
    """Whether the `spec.json` of a run, or of the job folder at `parts`, was written or confirmed here."""
    with contextlib.suppress(RunError):
        return _is_signed(inside(run_dir, *parts))
    return False


def _names_of_run(spec: RunSpec) -> Iterator[str]:
    if spec.model != "demo":
        yield spec.model if spec.revision is None else f"{spec.model} at revision {spec.revision}"
    if spec.kind != "evaluate" and spec.calibration.source not in _TEXTS_BY_NAME:  # an evaluation reads no such text
        yield spec.calibration.source


def _names_of_job(job: JobSpec) -> Iterator[str]:
    if job.gguf is not None:
        yield job.gguf
    texts = (*getattr(job.ask, "texts", ()), getattr(job.ask, "source", "demo"))
    yield from (each for each in texts if each not in _TEXTS_BY_NAME)


def _is_signed(folder: Path) -> bool:
    try:
        signature = read_regular(inside(folder, SIGNATURE), 1000).decode()
        content = read_regular(inside(folder, "spec.json"))
        return hmac.compare_digest(signature, _hmac(_key(), content))
    except (OSError, ValueError, StorageError):
        return False


def _hmac(key: bytes, content: bytes) -> str:
    return hmac.new(key, content, "sha256").hexdigest()


def _key() -> bytes:
    """The key of this `SLEB_HOME`, made at its first use and readable by its owner only."""
    path = places.home() / "signing-key"
    with contextlib.suppress(FileNotFoundError):
        return _checked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster: its key is the one
            os.link(draft, path)
    finally:
        draft.unlink()
    return _checked(path)


def _checked(path: Path) -> bytes:
    key = read_regular(path, 1000).strip()
    if len(key) != 64:
        raise ValueError(f"{path} is not a key; delete it, and runs will have to be confirmed again")
    return key
