"""Starting, stopping and watching the process that executes a run. No daemon: files, a lock and a pid.

Only the holder of a run's lock writes a job's status. `interrupted` is derived: the status says running, but its
process has ended (a pid means something on its own host only, and only with the time its process started).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout

from sleb.errors import RunBusy, RunError, SlebError, Stopped, StorageError
from sleb.records import ExportJob, Job, JobSpec, JobState, JobStatus, Permissions, Progress, QuestionJob, Run
from sleb.runtime import files, job_folder, origin, record_files, run_folder
from sleb.runtime.processes import device_queue

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
STARTING_SECONDS = 30.0
"""Seconds for which a job that was started may be without a process."""
SILENCE_SECONDS = 60.0
"""Seconds without a heartbeat after which a job on another host counts as interrupted."""


class Reporter:
    """Keeps a job's status file fresh from a thread of its own; the worker only says how far it is."""

    def __init__(self, job_dir: Path, status: JobStatus) -> None:
        self.job_dir = job_dir
        self._status = status
        self._progress: Progress | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @classmethod
    def started(cls, job_dir: Path) -> Reporter:
        """Write that this process waits with the job, and go on writing that it lives."""
        process, now = psutil.Process(), time.time()
        status = JobStatus(
            state=JobState.QUEUED,
            pid=process.pid,
            host=socket.gethostname(),
            process_started=process.create_time(),
            started=now,
            heartbeat=now,
        )
        reporter = cls(job_dir, status)
        job_folder.write_status(job_dir, status)
        reporter._thread.start()
        return reporter

    def begin(self) -> None:
        """Write that the waiting is over and the work begins."""
        self._status = self._status.model_copy(update={"state": JobState.RUNNING, "started": time.time()})
        self._progress = None
        job_folder.write_status(self.job_dir, self._now())

    def progress(self, progress: Progress) -> None:
        """Note how far the job is; it is written with the next heartbeat."""
        self._progress = progress

    def close(self, state: JobState, message: str = "") -> None:
        """Write how the job ended, and no more after that."""
        self._done.set()
        self._thread.join()
        job_folder.write_status(self.job_dir, self._now().model_copy(update={"state": state, "message": message}))

    def _now(self) -> JobStatus:
        return self._status.model_copy(update={"heartbeat": time.time(), "progress": self._progress})

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                job_folder.write_status(self.job_dir, self._now())
            except StorageError as error:  # the job itself will meet the full disk, and say so
                log.debug("No heartbeat: %s", error)


@contextlib.contextmanager
def executing(
    job_dir: Path,
    watch: Callable[[Progress], None] = lambda progress: None,
    processes: int | None = None,
    require: Callable[[], None] = lambda: None,
) -> Iterator[Reporter]:
    """Hold the run's lock, wait for the device, keep the status, and write how it ended.

    Raises `RunBusy` if another process holds the run. SIGTERM is turned into `Stopped`, raised wherever the main
    thread is. `watch` is told of the waiting. `processes` on this host, if not as many as the job says. What `require`
    refuses is refused before the waiting.
    """
    run_dir = job_dir.parent.parent
    lock = lock_of(run_dir)
    with files.writing(run_dir):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:  # an OSError, but no refusal of the disk's
            raise RunBusy(_busy(run_dir)) from error
    try:
        run_folder.tidy(run_dir)
        reporter = Reporter.started(job_dir)
        with _ending_recorded(reporter), stopping_on_sigterm(), contextlib.ExitStack() as stack:
            spec = job_folder.load_job(job_dir).spec
            require()
            for device in device_queue.devices(spec.device, processes or spec.processes):  # all in the same order
                waiting = partial(_report_waiting, reporter, watch, device)
                stack.enter_context(device_queue.holding(run_folder.home(), device, waiting))
            reporter.begin()
            yield reporter
    finally:
        lock.release()


def _report_waiting(reporter: Reporter, watch: Callable[[Progress], None], device: str, before: int) -> None:
    ahead = f"{before} job{'s' if before > 1 else ''} before this one"
    progress = Progress(phase=f"Waiting for {device}", message=ahead)
    reporter.progress(progress)
    watch(progress)


@contextlib.contextmanager
def _ending_recorded(reporter: Reporter) -> Iterator[None]:
    """Write whatever ends the job as the last word in its status."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        with _deaf():
            reporter.close(JobState.STOPPED, "Stopped on request.")
        raise
    except SlebError as error:
        _close_failed(reporter, str(error))
        raise
    except BaseException as error:
        _close_failed(reporter, f"A bug: {type(error).__name__}: {error}")
        raise
    reporter.close(JobState.FINISHED)


def _close_failed(reporter: Reporter, message: str) -> None:
    with contextlib.suppress(StorageError):  # a full disk may be why it failed
        reporter.close(JobState.FAILED, message)


def lock_of(run_dir: Path) -> FileLock:
    """The lock whose holder executes the run."""
    return FileLock(files.inside(run_dir, run_folder.LOCK))


def watched(run: Run) -> Run:
    """The run with the state of jobs whose process has ended derived."""
    return run.model_copy(update={"jobs": tuple(derived(job) for job in run.jobs)})


def own_job(run: Run) -> Job | None:
    """The job whose state is the run's: its newest search or analysis, or of a run that searches nothing any job."""
    own = [job for job in watched(run).jobs if job.is_own(run.spec)]
    return own[-1] if own else None


def state_of(run: Run) -> JobState:
    """The state of the run's own job."""
    own = own_job(run)
    return own.status.state if own else JobState.QUEUED


def last_word(job: Job) -> str:
    """Why an ended job gave no result, or only a part of one; `job` is as `derived` gives it."""
    never_began = "No process has taken it up." if job.status.state is JobState.QUEUED else "It ended without a word."
    return job.status.message or never_began


def unanswered(run: Run) -> Job | None:
    """The newest job that did not finish its question about lists: asked again, it goes on where it was.

    A failed one counts only if it is the last of all: the question itself may be why it failed.
    """
    own = [job for job in watched(run).jobs if job.ask is not None]
    answered = [job.ask for job in own if job.status.state is JobState.FINISHED]
    for job in reversed(own):
        broken_off = job.status.state in (JobState.STOPPED, JobState.INTERRUPTED) or (
            job.status.state is JobState.QUEUED and not is_active(job)
        )
        if job.ask not in answered and (broken_off or (job is own[-1] and job.status.state is JobState.FAILED)):
            return job
    return None


def active(run: Run) -> Job | None:
    """The job that a process executes, waits with, or is about to take up, if any."""
    return next((job for job in watched(run).jobs if is_active(job)), None)


def is_active(job: Job) -> bool:
    """Whether a process executes it, waits with it, or is about to take it up; `job` is as `derived` gives it."""
    if job.status.state is JobState.QUEUED and job.status.pid is None:
        return _silence(job.status) < STARTING_SECONDS
    return job.status.state in (JobState.QUEUED, JobState.RUNNING)


def require_idle(run: Run) -> None:
    """Raises `RunBusy` while a process executes the run."""
    if active(run) is not None:
        raise RunBusy(_busy(run.run_dir))


def require_allowed(job: Job, permissions: Permissions) -> None:
    """Raises `NotPermitted` where a job needs more permissions, `UnconfirmedNames` where it is from elsewhere.

    Raises `RunError` for a search in a run that searches nothing: it would read what no user confirmed.
    """
    run_dir = job.directory.parent.parent
    permissions.granted(job.spec)
    if not isinstance(job.spec, ExportJob | QuestionJob) and job.spec.kind != record_files.read_spec(run_dir).kind:
        raise RunError(f"Job {job.name} of {run_dir} is of another kind than its run; it is damaged. Delete it.")
    if not permissions.trust_paths:
        origin.require_confirmed(run_dir, job.name)


def own_command(*words: str) -> list[str]:
    """This program as a process of its own: the one that is running here, whatever files the current folder holds."""
    return [sys.executable, "-P", "-m", "sleb", *words]


def permission_options(permissions: Mapping[str, str | bool]) -> list[str]:
    """Options of `sleb work` and `sleb resume` that give these permissions, by their names."""
    options: list[str] = []
    for name, value in permissions.items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value is True else [option, str(value)]
    return options


def work_command(job_dir: Path, permissions: Permissions) -> list[str]:
    """This program as a process that executes a job with these permissions."""
    return own_command("work", *permission_options(permissions.given), "--", str(job_dir))


def start(job: Job, permissions: Permissions | None = None) -> subprocess.Popen[bytes]:
    """Execute a job in a process of its own that outlives this one; its output goes to the job's log.

    Without `permissions` it has none. Raises `NotPermitted` or `UnconfirmedNames` where it needs more.
    """
    permissions = permissions or Permissions()
    require_allowed(job, permissions)
    job_folder.write_status(job.directory, JobStatus(heartbeat=time.time()))  # nobody holds the run yet
    with files.writing(job.directory), job_folder.open_log(job.directory) as output:
        return subprocess.Popen(
            work_command(job.directory, permissions),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def stop(run: Run, *, patience: float = 20.0) -> Job:
    """Ask the active job to stop; kill it when it does not, and record that. Raises `RunError` if nothing runs."""
    job = active(run)
    limit = time.monotonic() + STARTING_SECONDS
    while job is not None and job.status.pid is None and time.monotonic() < limit:  # started a moment ago
        time.sleep(0.1)
        job = active(run_folder.load(run.run_dir))
    if job is None:
        raise RunError(f"Run {run.run_id} is {state_of(run).value}; there is nothing to stop.")
    if job.status.host != socket.gethostname() or job.status.pid is None:
        raise RunError(
            f"Run {run.run_id} is being executed on {job.status.host} (process {job.status.pid}); stop it there."
        )
    lock = lock_of(run.run_dir)
    _end(run, job.status.pid, lock, patience)
    try:
        now = job_folder.load_job(job.directory)
        if now.status.state in (JobState.RUNNING, JobState.QUEUED):  # it could not say so itself
            killed = now.status.model_copy(update={"state": JobState.STOPPED, "message": "Killed on request."})
            job_folder.write_status(job.directory, killed)
        return job_folder.load_job(job.directory)
    finally:
        lock.release()


def _end(run: Run, pid: int, lock: FileLock, patience: float) -> None:
    """Hold the run's lock, once the process that has it has ended. A folder from elsewhere can name any process."""
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)  # nobody executes the run: whatever its status says, no process is to be ended
        return
    try:
        with contextlib.suppress(psutil.NoSuchProcess):  # it came to its end meanwhile
            psutil.Process(pid).send_signal(signal.SIGTERM)
        lock.acquire(timeout=patience)
    except Timeout:
        psutil.Process(pid).kill()
        lock.acquire(timeout=patience)


def delete(directory: Path, *, keep_folder: bool = False) -> None:
    """Remove a run folder for good, readable or not; an empty folder stays if it is to be kept.

    Of a link in the runs folder only the link goes. Raises `RunBusy` while a process executes it, and `RunError` for a
    recorded sample.
    """
    if run_folder.is_link(directory):
        run_folder.delete(directory)
        return
    run_folder.refuse_sample(directory)
    with files.writing(directory):
        if (directory / run_folder.LOCK).is_symlink():  # a stranger's: no process of ours holds it
            (directory / run_folder.LOCK).unlink()
        lock = lock_of(directory)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunBusy(_busy(directory)) from error
    try:
        run_folder.delete(directory)
        if keep_folder:
            directory.mkdir()
    finally:
        lock.release()


def bring_in(folder: Path) -> Run:
    """Copy a run folder from elsewhere, or a recorded sample, into the runs folder.

    Raises `RunBusy` while a process executes it.
    """
    require_idle(run_folder.load(run_folder.elsewhere(folder)))
    return run_folder.bring_in(folder)


def next_job(run: Run, spec: JobSpec) -> Job:
    """Make a job folder, once nobody executes the run. Raises `RunError` for a recorded sample."""
    run_folder.refuse_sample(run.run_dir)
    require_idle(run)
    return job_folder.create_job(run.run_dir, spec)


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM within the context."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread; a notebook's worker thread is stopped by its caller
        return

    def stop_now(_number: int, _frame: FrameType | None) -> None:
        raise Stopped("Stopped on request.")

    before = signal.signal(signal.SIGTERM, stop_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore a second Ctrl-C while the final status is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def derived(job: Job) -> Job:
    """The job; interrupted, if its status says that it runs or waits and its process has ended."""
    status = derived_status(job.status)
    if status is job.status:
        return job
    if job.spec.kind == "export":  # which begins at its beginning
        status = status.model_copy(update={"message": "Its process has ended; export again."})
    return job.model_copy(update={"status": status})


def derived_status(status: JobStatus) -> JobStatus:
    """The status; interrupted, if it says that the job runs or waits and its process has ended."""
    waiting = status.state is JobState.QUEUED and status.pid is not None
    if not (waiting or status.state is JobState.RUNNING) or _alive(status):
        return status
    return status.model_copy(update={"state": JobState.INTERRUPTED, "message": "Its process has ended; resume it."})


def _alive(status: JobStatus) -> bool:
    if status.host != socket.gethostname():
        return _silence(status) < SILENCE_SECONDS
    return status.pid is not None and device_queue.alive(status.pid, status.process_started or 0.0)


def _silence(status: JobStatus) -> float:
    """Seconds from or to the last heartbeat: one that is far in the future says no more than one long ago."""
    return abs(time.time() - (status.heartbeat or 0.0))


def _busy(run_dir: Path) -> str:
    run = run_folder.load(run_dir)
    job = active(run)
    holder = f"process {job.status.pid} on {job.status.host}" if job else "another process"
    command = f"sleb stop {run_folder.reference(run)}"
    return f"Run {run.run_id} is being executed by {holder}. Wait for it, or stop it with: {command}"
