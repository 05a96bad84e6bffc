"""Writing the smaller checkpoint from the browser: start and stop the job, watch it, show its proof.

Everything shown is read from the run folder, so a reload loses nothing; no browser owns the process.
"""

from __future__ import annotations

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
from sleb.records import ExportJob, Job, JobState, Proof, Run, is_gguf
from sleb.report.summaries import exported_model
from sleb.runtime import files, job_folder
from sleb.runtime.processes import job_processes

FOLDER, GGUF = "hf", "gguf"  # as `ExportJob.format` has them
_ABOUT = {
    FOLDER: "Writes safetensors without the blocks, reloads them in a fresh process with plain transformers, and "
    "compares them with the baseline that skips the same blocks. The folder appears only when this proof has passed.",
    GGUF: "Copies the GGUF file without the blocks: kept weights are the same byte for byte, quantised ones included. "
    "The new file is reloaded in a fresh process with plain transformers and compared with the baseline that skips the "
    "same blocks; it appears only when this proof has passed.",
}


def checkpoint(run: Run, steps: int) -> None:
    """Draw the form, the job while it runs, how the last one ended, and the proof of the newest export."""
    st.subheader("The smaller checkpoint", anchor=False)
    active = job_processes.active(run)
    if access.rule().read_only:
        st.caption(plain(access.SHOWS_ONLY))
    else:
        _form(run, steps, active is not None)
    if active is not None and active.spec.kind == "export":
        _watch(run)
    elif active is not None:
        st.info("A process is executing this run: export when it has finished, or stop it on the **Runs** page.")
    exports = [job for job in run.jobs if job.spec.kind == "export"]
    if exports and active is None:
        _how_it_ended(run, exports[-1])
    done = read_exports(run)
    if done:
        _proof_card(done[-1])
    if len(exports) > 1:
        _all_exports(run, exports)


def _form(run: Run, steps: int, busy: bool) -> None:
    """Draw what to write, where, and the button."""
    kind = _kind(run, busy)
    st.markdown(_ABOUT[kind])
    ending = ".gguf" if kind == GGUF else ""
    place = access.folder_for_exports()
    off = busy or place is None
    out = st.text_input(
        "File" if kind == GGUF else "Folder", f"{place}/{name_of(run, steps)}{ending}" if place else "",
        key=f"out-{run.run_id}-{steps}{ending}", disabled=off,
        help="A path on the machine that runs this dashboard; missing folders are created." + plain(access.explained()),
    )  # fmt: skip
    replace = st.toggle(
        "Replace an earlier export", key="replace", disabled=off,
        help="Replaces only an earlier export, never anything else.",
    )  # fmt: skip
    pressed = st.button(
        "Write the smaller model", type="primary", icon=":material/save:", disabled=off,
        help="Starts a process of its own: you may leave this page. Needs memory for all weights of the baseline.",
    )  # fmt: skip
    if place is None:
        st.caption(plain(access.explained().strip()))
    if pressed:
        _start(run, steps, out or "", replace, kind)


def name_of(run: Run, steps: int) -> str:
    """A file name for the list after so many steps, with its numbers of removals and swaps."""
    removed = len(run.removal_list_after(steps))
    return f"{run.run_id}-{removed}-removed" + (f"-{steps - removed}-swapped" if steps > removed else "")


def _kind(run: Run, disabled: bool) -> str:
    """Draw the choice of a folder or a GGUF file, which only a run of a GGUF file has."""
    if run.spec.model != "demo" and not is_gguf(run.spec.model):
        return FOLDER
    return st.segmented_control(
        "Written as", [FOLDER, GGUF], default=FOLDER, required=True, key="kind", bind="query-params",
        format_func=lambda kind: {FOLDER: "Folder", GGUF: "GGUF file"}[kind], disabled=disabled,
        help="This run's model is a GGUF file, so the smaller model can be one, too.",
    )  # fmt: skip


def _start(run: Run, steps: int, out: str, replace: bool, kind: str) -> None:
    """Start an export, or show the sentence that says why not."""
    try:
        path = str(_checked(out, replace, kind))
        job = data.job_spec("export", "cpu", steps=steps, out=path, replace=replace, format=kind)
        foreign_names.go_on(run, job)
    except SlebError as error:
        st.error(plain(in_fields(error)))
        return
    choose(run.run_id)
    st.rerun()


def _checked(out: str, replace: bool, kind: str) -> Path:
    """The absolute path of an export. Raises `OptionError` for what can be refused before a model is loaded.

    Whether an existing file is an earlier export is left to the job, which reads it.
    """
    thing = "file" if kind == GGUF else "folder"
    if not out.strip():
        raise OptionError(f"Name a {thing} to write.")
    if not out.isprintable():
        raise OptionError(f"The {thing}'s name has characters that no file system takes; type it again.")
    access.require_destination(out.strip())
    path = files.expanded(Path(out.strip())).absolute()
    destination = gguf_plan.destination_of(path, replace) if kind == GGUF else Destination(path, replace)
    destination.require_free(look_inside=kind != GGUF)  # a GGUF file takes seconds to read: its job does
    return path


@st.fragment(run_every=1)
def _watch(run: Run) -> None:
    """Draw the job every second until it has ended."""
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
            "Stop", icon=":material/stop:", help="Leaves nothing behind: the export appears only at its end."
        ):
            stop_job(run)


def _how_it_ended(run: Run, job: Job) -> None:
    """Say why the newest export wrote nothing, if so."""
    state = job.status.state
    if state is JobState.FINISHED:
        return
    message = plain(in_fields(job_processes.last_word(job)))
    if state is JobState.FAILED:
        st.error(message, icon=":material/error:")
    elif state is JobState.QUEUED:
        st.warning("The last export did not start: its process never ran.", icon=":material/stop:")
    else:
        st.warning(f"The last export was {state_word(state).lower()}: {message}", icon=":material/stop:")
    log_of(run, job)


def _proof_card(export: Export) -> None:
    """Draw what the fresh process found when it reloaded the smaller model."""
    proof = export.proof
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.badge(
                "Proof passed" if proof.passed else "Proof failed",
                icon=":material/verified:" if proof.passed else ":material/error:",
                color="green" if proof.passed else "red",
            )
            removed = proof.blocks_before - proof.blocks_after
            st.caption(
                f"{removed} {'block' if removed == 1 else 'blocks'} removed; checked in {duration(proof.seconds)}"
            )
        for reason in proof.reasons:
            st.error(plain(in_fields(reason)))
        with st.container(horizontal=True, gap="large"):
            _sizes(proof)
        st.markdown("\n".join(f"- {each[:1].upper()}{each[1:]}." for each in _checks(proof)))
        for note in proof.notes:
            st.info(plain(in_fields(note)))
        if proof.left_behind:
            st.markdown("**Left behind**")
            st.dataframe([{"File": each.name, "Reason": each.why} for each in proof.left_behind], hide_index=True)
        st.code(str(export.out), language=None, wrap_lines=True)
        if access.allows(export.out) and not export.out.exists():
            thing = "folder" if proof.bytes_before is None else "file"
            st.caption(f"The {thing} is missing: it was moved or deleted.")
        st.code(exported_model.snippet(export.out), language="python", wrap_lines=True)


def _sizes(proof: Proof) -> None:
    """Blocks, parameters and bytes before and after."""
    before = proof.bytes_before  # of a GGUF file
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
        plain(proof.dtype) if before is None else "every tensor copied unchanged",
        delta_color="off",
        delta_arrow="off",
    )


def _checks(proof: Proof) -> list[str]:
    """What was compared, as Markdown without full stops."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(proof.versions.items()))
    difference = (
        f"differ by at most **{proof.max_logit_difference:.3g}** from those"
        if proof.max_logit_difference
        else "are **exactly those**"
    )
    return [
        f"Logits at {proof.tokens} positions {difference} of the baseline that skips these blocks "
        f"(up to {proof.tolerance:.3g} passes)",
        exported_model.generation(proof),
        f"Reloaded with {plain(versions)}",
        *map(plain, proof.checked),
    ]


def _removed(run: Run, job: Job) -> int | None:
    """Number of blocks that an export removes; None where the trace no longer has the step."""
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
                    "Message": in_fields(job.status.message or ""),
                }
                for job in reversed(exports)
            ],
            hide_index=True,
        )
