"""Whether this machine wrote what a run folder names, or somebody here confirmed it.

Whatever creates a run or a job here signs its `spec.json`, and later the run's `stack.json`, with a key that lies under
`SLEB_HOME`, never in a run folder: `spec.signature` is the HMAC of the file. A folder from elsewhere has no such
signature, and neither has one whose file was changed since. What it names is not read before it was confirmed.
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
from sleb.records import NAMED_TEXTS, EvaluateSpec, ExportJob, JobSpec, QuestionJob, StackDescription
from sleb.runtime import places
from sleb.runtime.files import inside, read_regular, replace_file
from sleb.runtime.record_files import read_job_spec, read_record, read_spec
from sleb.runtime.unfinished import names

log = logging.getLogger(__name__)

SIGNED = ("spec.json", "stack.json")
"""Files that say what a run or job reads: its spec, and the revision of the model that was opened."""
_TEXTS_BY_NAME = {*NAMED_TEXTS, "wikitext2-rows"}
"""Names that mean the same text on every machine; the demo model is the only model of that kind."""


SIGNATURE = "spec.signature"
"""The signature of the spec of a run or a job."""


def write_signed(folder: Path, name: str, content: str) -> None:
    """Write one of the files in `SIGNED`, signed: a file without its signature is never seen, even after a kill.

    Where no key or signature can be written, what it names will have to be confirmed later. Raises `StorageError`.
    """
    _sign(folder, name, content.encode())
    replace_file(inside(folder, name), content)


def write_stack(run_dir: Path, stack: StackDescription) -> None:
    """Write the description of a run's opened model; written once."""
    write_signed(run_dir, "stack.json", stack.model_dump_json(indent=1))


def sign(folder: Path) -> None:
    """Sign what a run or job folder says: somebody here wrote it, or has seen what it names and agrees."""
    for name in SIGNED:
        with contextlib.suppress(FileNotFoundError):
            _sign(folder, name, read_regular(inside(folder, name)))


def unconfirmed(run_dir: Path, *jobs: str) -> tuple[str, ...]:
    """Names of all that a run and these jobs of it would make this machine read or do, unless it was confirmed here.

    The model with its revision, texts, files, tasks, and more than one process. Empty where this machine wrote all of
    it. Raises `RunError` where a spec cannot be read.
    """
    unseen: list[str] = []
    if not is_written_here(run_dir):
        unseen += _names_of_run(run_dir)
    for job in jobs:
        if not is_written_here(run_dir, "jobs", job):
            unseen += _names_of_job(read_job_spec(run_dir, "jobs", job, "spec.json"))
    return tuple(dict.fromkeys(unseen))


def require_confirmed(run_dir: Path, *jobs: str) -> None:
    """Raises `UnconfirmedNames` where a run, or one of these jobs, names what nobody here has confirmed."""
    if names := unconfirmed(run_dir, *jobs):
        raise UnconfirmedNames(str(run_dir), names)


def confirm(run_dir: Path, *jobs: str) -> None:
    """Sign a run and these jobs of it: somebody here has seen what they name, and agrees."""
    sign(run_dir)
    for job in jobs:
        sign(inside(run_dir, "jobs", job))


def is_written_here(run_dir: Path, *parts: str) -> bool:
    """Whether what a run says, or the job folder at `parts`, was written or confirmed here, and not changed since."""
    with contextlib.suppress(RunError):
        folder = inside(run_dir, *parts)
        return all(_is_signed(folder, name) for name in SIGNED if name == "spec.json" or (folder / name).exists())
    return False


def _names_of_run(run_dir: Path) -> Iterator[str]:
    spec, revision = read_spec(run_dir), None
    if (run_dir / "stack.json").exists():  # the revision that was opened is the one that is loaded again
        revision = read_record(StackDescription, run_dir, "stack.json").revision
    revision = revision or spec.revision
    if spec.model != "demo":
        yield spec.model if revision is None else f"{spec.model} at revision {revision}"
    if spec.kind != "evaluate" and spec.calibration.source not in _TEXTS_BY_NAME:  # an evaluation reads no such text
        yield spec.calibration.source


def _names_of_job(job: JobSpec) -> Iterator[str]:
    if isinstance(job, ExportJob) and job.gguf is not None:
        yield job.gguf
    if isinstance(job, QuestionJob):
        yield from (each for each in job.ask.sources if each not in _TEXTS_BY_NAME)
        yield from (f"task {each}" for each in (job.ask.tasks if isinstance(job.ask, EvaluateSpec) else ()))
    if job.processes > 1:
        yield f"{job.processes} processes"


def _signature_of(name: str) -> str:
    return f"{name.removesuffix('.json')}.signature"


def _sign(folder: Path, name: str, content: bytes) -> None:
    try:
        replace_file(inside(folder, _signature_of(name)), _hmac(_key(), name, content), make_folder=False)
    except (OSError, ValueError, StorageError) as error:
        log.warning("%s/%s was not signed as written here: %s", folder, name, error)


def _is_signed(folder: Path, name: str) -> bool:
    try:
        signature = read_regular(inside(folder, _signature_of(name)), 1000).decode()
        key = _checked(_key_file())  # a look-up makes none: without a key nothing was signed here
        return hmac.compare_digest(signature, _hmac(key, name, read_regular(inside(folder, name))))
    except (OSError, ValueError, StorageError):
        return False


def _hmac(key: bytes, name: str, content: bytes) -> str:
    return hmac.new(key, name.encode() + b"\0" + content, "sha256").hexdigest()


def _key_file() -> Path:
    return places.home() / "signing-key"


def _key() -> bytes:
    """The key of this `SLEB_HOME`, made at its first use and readable by its owner only."""
    path = _key_file()
    with contextlib.suppress(FileNotFoundError):
        return _checked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = names.temporary(path)
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
