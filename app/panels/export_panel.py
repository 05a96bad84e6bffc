"""Writing the smaller checkpoint from the browser: start it, watch it, stop it, see it proven.

Everything shown is read from the run folder, so a reload loses nothing; the process belongs to no browser.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import streamlit as st

from app import access, data
from app.page import choose
from app.panels import foreign_names
from app.widgets import badge, log_of, stop_job
from app.wording import duration, in_fields, plain, state_word
from sleb.errors import OptionError, SlebError
from sleb.export import gguf_plan
from sleb.export.destination import Destination
from sleb.export.finished_exports import Export, read_exports
from sleb.records import ExportJob, Job, JobState, Run
from sleb.report import build
from sleb.runtime import files, job_folder
from sleb.runtime.processes import job_processes

FOLDER, GGUF = "hf", "gguf"  # as `JobSpec.format` has them
_ABOUT = {
    FOLDER: "Writes safetensors with the blocks really gone, reloads them in a fresh process with plain transformers, "
    "and compares with the original model skipping the same blocks. The folder appears only when the proof has passed.",
    GGUF: "Copies the GGUF file without the blocks: the weights that stay are the same byte for byte, quantised ones "
    "included. The new file is reloaded in a fresh process with plain transformers and compared with the original "
    "skipping the same blocks; it appears only when the proof has passed.",
}


def checkpoint(run: Run, steps: int) -> None:
    """Kind, folder or file, button, the job while it runs, how it ended, and the proof of what was written."""
    st.subheader("The smaller checkpoint", anchor=False)
    active = job_processes.active(run)
    if access.rule().read_only:
        st.caption(plain(access.SHOWS_ONLY))
    else:
        _form(run, steps, active is not None)
    if active is not None and active.spec.kind == "export":
        _watch(run)
    elif active is not None:
        st.info("A process is executing this run; export when it has finished, or stop it on the Runs page.")
    exports = [job for job in run.jobs if job.spec.kind == "export"]
    if exports and active is None:
        _how_it_ended(run, exports[-1])
    done = read_exports(run)
    if done:
        _proof_card(done[-1])
    if len(exports) > 1:
        _all_exports(run, exports)


def _form(run: Run, steps: int, busy: bool) -> None:
    """What to write, where, and the button."""
    kind = _kind(run, busy)
    st.markdown(_ABOUT[kind])
    ending = ".gguf" if kind == GGUF else ""
    place = access.folder_for_exports()
    off = busy or place is None
    out = st.text_input(
        "File" if kind == GGUF else "Folder", f"{place}/{name_of(run, steps)}{ending}" if place else "",
        key=f"out-{run.run_id}-{steps}{ending}", disabled=off,
        help="On the machine that runs this dashboard; made if it is not there." + plain(access.explained()),
    )  # fmt: skip
    replace = st.toggle(
        "Replace an earlier export", key="replace", disabled=off,
        help="Only what an earlier export wrote can be replaced, never anything else.",
    )  # fmt: skip
    pressed = st.button(
        "Write the smaller model", type="primary", icon=":material/save:", disabled=off,
        help="Starts a process of its own: you may leave this page meanwhile. Needs memory for the whole model.",
    )  # fmt: skip
    if place is None:
        st.caption(plain(access.explained().strip()))
    if pressed:
        _start(run, steps, out or "", replace, kind)


def name_of(run: Run, steps: int) -> str:
    """A name for files with the list after so many steps: how many blocks it removes, and after how many swaps."""
    removed = len(run.removal_list_after(steps))
    return f"{run.run_id}-{removed}-removed" + (f"-{steps - removed}-swapped" if steps > removed else "")


def _kind(run: Run, disabled: bool) -> str:
    """What is written: a run of a GGUF file can have one back."""
    if run.spec.model != "demo" and not run.spec.model.lower().endswith(".gguf"):
        return FOLDER
    return st.segmented_control(
        "Written as", [FOLDER, GGUF], default=FOLDER, required=True, key="kind", bind="query-params",
        format_func=lambda kind: {FOLDER: "Folder", GGUF: "GGUF file"}[kind], disabled=disabled,
        help="This run's model came as a GGUF file, so it can be cut as one.",
    )  # fmt: skip


def _start(run: Run, steps: int, out: str, replace: bool, kind: str) -> None:
    """A process that exports, or the sentence that says why not."""
    try:
        folder = _checked_file(out, replace) if kind == GGUF else _checked(out, replace)
        job = data.job_spec("export", "cpu", steps=steps, out=str(folder), replace=replace, format=kind)
        foreign_names.go_on(run, job)
    except SlebError as error:
        st.error(plain(error))
        return
    choose(run.run_id)
    st.rerun()


def _checked(out: str, replace: bool) -> Path:
    """The folder, absolute. What a look at the disk can refuse is refused before a model is loaded."""
    if not out.strip():
        raise OptionError("Name a folder to write.")
    if not out.isprintable():
        raise OptionError("The folder's name has characters that no file system takes; type it anew.")
    access.require_destination(out.strip())
    folder = files.expanded(Path(out.strip())).absolute()
    try:
        above = next((each for each in folder.parents if each.exists()), folder)
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OptionError(f"Nothing can be written in {above}; name another folder.")
        Destination(folder, replace).require_free()
    except (OSError, ValueError) as error:  # no permission to look, or no name for a file
        raise OptionError(f"{folder} cannot be used ({getattr(error, 'strerror', None) or error}).") from error
    return folder


def _checked_file(out: str, replace: bool) -> Path:
    """The file, absolute. Whether what is there is an earlier export is seen by the job, which reads it."""
    if not out.strip():
        raise OptionError("Name a file to write.")
    if not out.isprintable():
        raise OptionError("The file's name has characters that no file system takes; type it anew.")
    access.require_destination(out.strip())
    path = files.expanded(Path(out.strip())).absolute()
    try:
        above = next((each for each in path.parents if each.exists()), path)
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OptionError(f"Nothing can be written in {above}; name another file.")
        gguf_plan.require_name(path)
        Destination(path, replace, gguf_plan.FILE, lambda _: True).require_free()
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be used ({getattr(error, 'strerror', None) or error}).") from error
    return path


@st.fragment(run_every=1)
def _watch(run: Run) -> None:
    """The job as it is now, every second until it is over."""
    job = job_processes.active(run.model_copy(update={"jobs": job_folder.read_jobs(run.run_dir)}))
    if job is None:
        st.rerun()
    progress, started = job.status.progress, job.status.started
    phase = progress.phase if progress and progress.phase else "Starting"
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            badge(job.status.state)
            st.markdown(f"{plain(phase)} …")
            if started is not None:
                st.caption(duration(max(0.0, time.time() - started)))
        st.caption(f"{_removed(run, job)} blocks removed, into {plain(_out(job))}")
        if not access.rule().read_only and st.button(
            "Stop", icon=":material/stop:", help="Nothing is left behind: what is written appears at the end only."
        ):
            stop_job(run)


def _how_it_ended(run: Run, job: Job) -> None:
    """Why the newest export brought nothing, if so."""
    state = job.status.state
    if state is JobState.FINISHED:
        return
    message = plain(in_fields(job_processes.last_word(job)))
    if state is JobState.FAILED:
        st.error(message, icon=":material/error:")
    elif state is JobState.QUEUED:
        st.warning("The last export never began: its process did not start.", icon=":material/stop:")
    else:
        st.warning(f"The last export was {state_word(state).lower()}: {message}", icon=":material/stop:")
    log_of(run, job)


def _proof_card(export: Export) -> None:
    """What the fresh process found when it reloaded the smaller model."""
    proof = export.proof
    before = proof.bytes_before  # of a GGUF file
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.badge(
                "Proof passed" if proof.passed else "Proof failed",
                icon=":material/verified:" if proof.passed else ":material/error:",
                color="green" if proof.passed else "red",
            )
            removed = proof.blocks_before - proof.blocks_after
            st.caption(f"{removed} blocks removed; took {duration(proof.seconds)} to check")
        for reason in proof.reasons:
            st.error(plain(reason))
        with st.container(horizontal=True, gap="large"):
            st.metric("Blocks", f"{proof.blocks_before} → {proof.blocks_after}")
            st.metric(
                "Parameters",
                f"{proof.parameters_before / 1e6:,.1f} → {proof.parameters_after / 1e6:,.1f} M",
                f"−{1 - proof.parameters_after / proof.parameters_before:.1%}",
                delta_color="off",
                delta_arrow="off",
            )
            st.metric(
                "Weights on disk",
                f"{'' if before is None else f'{before / 1e6:,.0f} → '}{proof.bytes_after / 1e6:,.0f} MB",
                plain(proof.dtype) if before is None else "every tensor copied as it was",
                delta_color="off",
                delta_arrow="off",
            )
        versions = ", ".join(f"{name} {version}" for name, version in sorted(proof.versions.items()))
        apart = (
            f"differ by at most **{proof.max_logit_difference:.3g}** from those"
            if proof.max_logit_difference
            else ("are **exactly those**")
        )
        st.markdown(
            f"- Logits at {proof.tokens} positions {apart} of the original with these blocks skipped "
            f"({proof.tolerance:.3g} apart would pass).\n"
            f"- {build.generation(proof)}.\n"
            f"- Reloaded with {plain(versions)}." + "".join(f"\n- {plain(each)}." for each in proof.checked)
        )
        for note in proof.notes:
            st.info(plain(note))
        if proof.left_behind:
            st.markdown("**Left behind**")
            st.dataframe([{"What": each.name, "Since": each.why} for each in proof.left_behind], hide_index=True)
        st.code(str(export.out), language=None, wrap_lines=True)
        if access.allows(export.out) and not export.out.exists():
            st.caption(f"The {'folder' if before is None else 'file'} is no longer there: it was moved or deleted.")
        st.code(build.snippet(export.out), language="python", wrap_lines=True)


def _removed(run: Run, job: Job) -> int | None:
    """Blocks that an export takes away: a swap is a step, and removes no more of them."""
    try:
        return len(run.removal_list_after(job.spec.steps)) if isinstance(job.spec, ExportJob) else None
    except SlebError:  # the trace was cut since
        return None


def _out(job: Job) -> str | None:
    return job.spec.out if isinstance(job.spec, ExportJob) else None


def _all_exports(run: Run, exports: list[Job]) -> None:
    with st.expander(f"All {len(exports)} exports of this run"):
        st.dataframe(
            [
                {
                    "State": state_word(job.status.state),
                    "Removed": _removed(run, job),
                    "Folder": _out(job),
                    "Said": job.status.message,
                }
                for job in reversed(exports)
            ],
            hide_index=True,
        )
