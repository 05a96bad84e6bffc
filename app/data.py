"""Cached readers of run folders, through which pages reach the backend. Draws nothing and never imports torch.

Everything cached is keyed by times and sizes of its files, shared by all sessions, never changed, and limited in
number, which bounds the server's memory.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import streamlit as st

from app import access
from sleb import specs
from sleb.analysis import block_output_cache, prediction_alignment, similarity, token_sample
from sleb.analysis.similarity import TokenSimilarity
from sleb.analysis.token_sample import Tokens
from sleb.errors import RunError, quoted
from sleb.methods import step_evidence as evidence_of_step
from sleb.methods.statistics import Comparison
from sleb.model.inspection import block_count
from sleb.records import ExitStatistics, Finding, JobKind, JobSpec, Method, Permissions, Run, StackDescription, Step
from sleb.runtime import findings_folder, job_folder, record_files, run_folder
from sleb.runtime import run_index as outlines_of
from sleb.runtime.dashboard_files import SAMPLES
from sleb.runtime.listing import run_list
from sleb.runtime.listing.run_list import RunList
from sleb.runtime.processes import job_processes
from sleb.runtime.run_index import Outline

LOOKED_AT = 1000
"""Idle runs that are read again each time, which takes some milliseconds."""
SAMPLE = "sample-smollm2-135m-metric3"
"""The sample that is shown first."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


class TokenChoice(NamedTuple):
    """A choice of calibration tokens: positions start <= p < stop of some sequences (None: of all)."""

    sequences: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None
    without_first: bool = False


def outlines(first: str | None = None) -> list[Outline | RunError]:
    """All runs, newest first, then the recorded samples; an unreadable run is its error.

    Of thousands, idle ones are read again by turns, within some seconds; `first` always.
    """
    own = _runs_of(str(run_folder.home())).outlines(first, LOOKED_AT)
    copied = {each.run_id for each in own if isinstance(each, Outline)}
    samples = _samples(str(SAMPLES)).outlines()
    samples.sort(key=lambda each: _rank_of_sample(each) if isinstance(each, Outline) else (0, ""))
    # Pages show the copy of a sample that was made for a job.
    rest = (each for each in samples if isinstance(each, RunError) or each.run_id not in copied)
    return [*own, *access.refused_links(run_folder.runs_folder()), *rest]


def _rank_of_sample(sample: Outline) -> tuple[int, str]:
    """A key that sorts samples by their methods, those with swaps last."""
    is_plain = sample.spec.kind == "search" and sample.spec.refine == "none"
    return list(Method).index(sample.spec.method) if is_plain else len(Method), sample.run_id


def is_sample(run: Run | Outline) -> bool:
    """Whether it is a recorded sample, which is never changed."""
    return run.run_id in _sample_ids() and run.run_dir.parent == SAMPLES  # as `folder_of` finds it: thousands ask


def folder_of(run_id: str) -> Path:
    """The folder of a run by its id, which may come from anywhere. Raises `RunError` for an unknown one."""
    if _RUN_ID.fullmatch(run_id):
        for folder in (run_folder.runs_folder(), SAMPLES):
            if (folder / run_id / "spec.json").is_file():
                access.require_run(folder / run_id)
                return folder / run_id
    raise RunError(f"Run {quoted(run_id)} is not in {run_folder.runs_folder()}: it may have been deleted or moved.")


def load(run_id: str) -> Run:
    """A run with the present state of its jobs. Raises `RunError`."""
    directory = folder_of(run_id)
    return job_processes.watched(_run(str(directory), outlines_of.signature(directory)))


def findings_of(run: Run) -> tuple[Finding, ...]:
    """All findings about the run's lists, the oldest first."""
    return _findings(str(run.run_dir), outlines_of.findings_signature(run.run_dir))


def rivals_of(run: Run) -> list[Outline]:
    """Searches of the same weights whose blocks were chosen on another text, the newest first."""
    if run.stack is None:
        return []
    rivals = []
    for each in outlines():
        if (
            isinstance(each, Outline)
            and each.run_id != run.run_id
            and each.last
            and each.num_blocks == run.stack.num_blocks
        ):
            other = _stack(str(each.run_dir), _file_time(each.run_dir / "stack.json"))
            if other and other.is_of_same_model(run.stack) and other.tokens_hash != run.stack.tokens_hash:
                rivals.append(each)
    return rivals


def tokens_of(run: Run) -> Tokens | None:
    """Similarity and predictions token by token: all analysed ones from the cache, or those in the run folder."""
    if run.analysis is None or run.stack is None:
        return None
    return _tokens(str(run.run_dir), str(run_folder.home()), run.analysis.description.cache_key, run.stack.num_blocks)


def similarity_over(run: Run, choice: TokenChoice) -> TokenSimilarity | None:
    """Mean similarity over a choice of tokens; None for an empty choice."""
    tokens = tokens_of(run)
    assert run.analysis is not None
    return None if tokens is None else _similarity(_key(run), choice, tokens)


def exits_over(run: Run, choice: TokenChoice) -> ExitStatistics | None:
    """Prediction alignment over a choice of tokens; None for an empty choice."""
    tokens = tokens_of(run)
    return None if tokens is None else _exits(_key(run), choice, tokens)


def evidence(run: Run, step: Step) -> Comparison | None:
    """Comparison of each candidate of a step with the chosen one; None without the scores of its sequences."""
    changed = _file_time(run.run_dir / "scores" / f"step-{step.number:04d}.npz")
    return _evidence(str(run.run_dir), step.number, changed, run)


def permissions() -> dict[str, bool]:
    """Permissions that the server was started with; nothing in a browser changes them."""
    names = {"allow_pickle": "SLEB_DASHBOARD_ALLOW_PICKLE", "trust_remote_code": "SLEB_DASHBOARD_TRUST_REMOTE_CODE"}
    return {name: os.environ.get(variable) == "1" for name, variable in names.items()}


def permissions_for(job: JobSpec, *, trust_paths: bool = False) -> Permissions:
    """Permissions of a job from this server: to write where it says, and to run the code that the server allows."""
    return Permissions.of(job, trust_paths=trust_paths).model_copy(update=permissions())


def job_spec(kind: JobKind, device: str = "auto", batch_size: int | None = None, **own: Any) -> JobSpec:
    """The spec of a job with the server's permissions. Raises `OptionError` out of range."""
    allowed = permissions()
    return specs.job_spec(kind, device, batch_size, allowed["allow_pickle"], allowed["trust_remote_code"], **own)


def num_blocks_of(model: str) -> int | None:
    """Number of blocks of a model, from its files or an earlier run; None where neither is known."""
    num_blocks = _num_blocks(model) if access.may_inspect(model) else None
    if num_blocks is not None:
        return num_blocks
    known = (each.num_blocks for each in outlines() if isinstance(each, Outline) and each.spec.model == model)
    return next((each for each in known if each is not None), None)


def log_of(run: Run, lines: int = 200) -> str:
    """The end of the newest job's log."""
    return "\n".join(job_folder.log_end(run.jobs[-1].directory).splitlines()[-lines:]) if run.jobs else ""


def _key(run: Run) -> tuple[str, str, bool]:
    assert run.analysis is not None
    return (str(run.run_dir), run.analysis.description.cache_key, len(tokens_of(run) or ()) > 0)


def _file_time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4)
def _runs_of(home: str) -> RunList:
    return run_list.of_home(Path(home), follows=access.allows)


@cache
def _samples(folder: str) -> RunList:
    return RunList(Path(folder))


@cache
def _sample_ids() -> frozenset[str]:
    return frozenset(each.name for each in run_folder.run_dirs(SAMPLES))


@st.cache_resource(max_entries=32, show_spinner=False)
def _run(directory: str, signature: object) -> Run:
    return run_folder.load(directory)


@st.cache_resource(max_entries=64, show_spinner=False)
def _findings(directory: str, signature: object) -> tuple[Finding, ...]:
    return tuple(findings_folder.findings(Path(directory)))


@st.cache_resource(max_entries=2000, show_spinner=False)
def _stack(directory: str, changed: int) -> StackDescription | None:
    """The description of a run's model; None where it cannot be read."""
    with suppress(RunError, OSError):
        return record_files.read_record(StackDescription, Path(directory), "stack.json")
    return None


@st.cache_data(max_entries=64, ttl=60, show_spinner=False)
def _num_blocks(model: str) -> int | None:
    return block_count.num_blocks(model)


@st.cache_resource(max_entries=4, show_spinner=False)
def _tokens(directory: str, home: str, cache_key: str, num_blocks: int) -> Tokens | None:
    outputs = block_output_cache.read(Path(home), cache_key, verify=False)
    if outputs is not None and outputs.cosine.shape[1] == num_blocks + 1:
        return token_sample.of(outputs)
    return token_sample.read(Path(directory), num_blocks)


@st.cache_resource(max_entries=64, show_spinner=False)
def _similarity(key: object, choice: TokenChoice, _tokens: Tokens) -> TokenSimilarity | None:
    chosen = _chosen(_tokens, choice)
    return similarity.over_tokens(_tokens.cosine, chosen) if len(chosen) else None


@st.cache_resource(max_entries=64, show_spinner=False)
def _exits(key: object, choice: TokenChoice, _tokens: Tokens) -> ExitStatistics | None:
    chosen = _chosen(_tokens, choice)
    if not len(chosen):
        return None
    return prediction_alignment.exit_statistics(
        np.asarray(_tokens.predictions[:, chosen]), f"{len(chosen):,} chosen tokens"
    )


@st.cache_resource(max_entries=128, show_spinner=False)
def _evidence(directory: str, number: int, changed: int, _run: Run) -> Comparison | None:
    step = _run.trace.steps[number - 1] if _run.trace else None
    return None if step is None else evidence_of_step.of(_run, step)


def _chosen(tokens: Tokens, choice: TokenChoice) -> np.ndarray:
    return similarity.choose_tokens(
        tokens.sequence,
        tokens.position,
        sequences=choice.sequences,
        start=choice.start,
        stop=choice.stop,
        without_first=choice.without_first,
    )
