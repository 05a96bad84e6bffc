"""Run folders on disk without a model: any number of blocks and steps, numbers that look like a search's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from sleb.analysis import prediction_alignment, similarity, token_sample
from sleb.methods.problem import Problem
from sleb.methods.strategies import baseline, search
from sleb.records import (
    Alignment,
    Analysis,
    AnalysisDescription,
    Attempt,
    Baseline,
    CalibrationSpec,
    JobState,
    JobStatus,
    Method,
    Passage,
    PassageToken,
    Run,
    RunSpec,
    SearchJob,
)
from sleb.runtime import job_folder, origin, record_files, run_folder, trace_file
from tests.support.builders import make_stack

SEQUENCES, HELD_OUT, LENGTH = 16, 4, 32


def write_run(
    folder: Path,
    num_blocks: int = 12,
    num_remove: int = 4,
    *,
    method: Method = Method.METRIC3,
    model: str = "example/model-1b",
    state: JobState = JobState.FINISHED,
    message: str = "",
    done: int | None = None,
    analysis: bool = True,
    words: tuple[str, ...] = ("The", " block", " is", "<script>alert(1)</script>", "<b>bold</b>", " $x$", " :red[x]"),
    seed: int = 0,
    swap: bool = False,
) -> Run:
    """A search of `num_remove` blocks of which `done` steps are finished (by default all), with its analyses.

    `swap`: refined, over scores by which one swap is better than greedy's list.
    """
    protected = (0, num_blocks - 1) if method.protects_ends else ()
    spec = RunSpec(
        model=model,
        num_remove=num_remove,
        method=method,
        seed=seed,
        calibration=CalibrationSpec(source="demo", sequences=SEQUENCES, sequence_length=LENGTH),
        refine="swap" if swap else "none",
    )
    run = run_folder.create(spec, folder)
    stack = make_stack(
        num_blocks, protected=protected, num_remove=num_remove, sequence_length=LENGTH, sequences=SEQUENCES
    )
    job = job_folder.create_job(folder, SearchJob())
    origin.write_stack(folder, stack)
    _write_trace(folder, spec, stack.protected, num_blocks, num_remove if done is None else done, state, seed)
    if analysis:
        write_analysis(folder, num_blocks, words, seed)
    job_folder.write_attempt(
        job.directory, Attempt(device="cpu", batch_size=4, threads=2, host="host", versions={"torch": "2.13.0"})
    )
    job_folder.write_status(job.directory, JobStatus(state=state, started=time.time(), message=message))
    (job.directory / "log.txt").write_text(f"INFO sleb: it began\nERROR sleb: {message}\n" if message else "INFO\n")
    return run_folder.load(run.run_dir)


def _write_trace(
    folder: Path, spec: RunSpec, protected: tuple[int, ...], num_blocks: int, done: int, state: JobState, seed: int
) -> None:
    """The real search over a made-up score: each block costs something, neighbours of removed ones cost more."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(3.0, 0.3, SEQUENCES + HELD_OUT)
    cost = 0.05 + 0.3 * np.abs(np.linspace(-1, 1, num_blocks)) ** 2 + draw.uniform(0, 0.05, num_blocks)
    own = draw.normal(0, 0.01, (num_blocks, SEQUENCES + HELD_OUT))
    counts = np.full(SEQUENCES + HELD_OUT, LENGTH - 1)
    trap = min((block for block in range(num_blocks) if block not in protected), key=lambda block: cost[block])

    def score(skip_sets, sequences):  # type: ignore[no-untyped-def]
        rows = []
        for skipped in skip_sets:
            blocks = np.array(sorted(skipped), dtype=int)
            near = float((np.diff(blocks) == 1).sum()) * 0.08
            if spec.refine == "swap" and trap in skipped:  # the cheapest alone, and the dearest in company
                near += 0.1 * (len(blocks) - 1)
            rows.append(hard + cost[blocks].sum() + near + own[blocks].sum(axis=0))
        return np.array(rows)[:, sequences] * (LENGTH - 1)

    problem = Problem(
        num_blocks=num_blocks,
        num_remove=done,
        protected=protected,
        calibration=np.arange(SEQUENCES),
        held_out=np.arange(SEQUENCES, SEQUENCES + HELD_OUT),
        token_counts=counts,
        refine=spec.refine,
    )
    calibration, held_out, nats = baseline(problem, score)
    first = Baseline(
        calibration=calibration, held_out=held_out, block_evaluations=480, head_evaluations=20, seconds=2.0
    )
    trace_file.write_scores(folder, "baseline", nats=nats, token_counts=counts)
    trace_file.append_baseline(folder, first)
    influence = np.repeat(cost[:, None], SEQUENCES, axis=1) * LENGTH
    for decision in search(spec.method, problem, score, first, (), lambda: influence) if done else ():
        step = decision.step.model_copy(update={"seconds": 1.5, "held_out_standard_error": 0.01})
        members = np.array([candidate.block for candidate in step.candidates])
        trace_file.write_scores(
            folder, f"step-{step.number:04d}", blocks=members, nats=decision.scores, held_out=decision.held_out
        )
        trace_file.append_step(folder, step)
    if state is JobState.FINISHED:
        trace_file.append_finished(folder, f"removed {done} blocks, as asked")


def write_analysis(folder: Path, num_blocks: int, words: tuple[str, ...], seed: int = 0) -> None:
    """Both analyses and the tokens a run takes along, over made-up block outputs; ids are places in `words`."""
    draw = np.random.default_rng(seed)
    count, points = 4 * LENGTH, num_blocks + 1
    walk = np.cumsum(draw.normal(0, 1, (points, count, 16)), axis=0) + draw.normal(0, 4, (1, count, 16))
    cosine = similarity.cosine_matrices(walk.astype(np.float32))
    final = draw.integers(0, 50, count)
    settled = draw.integers(num_blocks // 2, num_blocks, count)
    predictions = np.where(np.arange(num_blocks)[:, None] >= settled, final, draw.integers(0, 50, (num_blocks, count)))
    position = np.tile(np.arange(LENGTH), 4).astype(np.int32)
    sequence = np.repeat(np.arange(4), LENGTH).astype(np.int32)
    kept = token_sample.Tokens(cosine, predictions.astype(np.int32), sequence, position)
    first, last = prediction_alignment.exit_blocks(kept.predictions)
    shown = [
        PassageToken(
            token=words[index % len(words)],
            top=tuple(
                tuple((words[(index + rank + block) % len(words)], 0.5 / (rank + 1)) for rank in range(5))
                for block in range(num_blocks)
            ),
            first_exit=int(first[index]),
            settled_exit=int(last[index]),
            id=index % len(words),
            top_ids=tuple(
                tuple((index + rank + block) % len(words) for rank in range(5)) for block in range(num_blocks)
            ),
        )
        for index in range(24)
    ]
    statistics = prediction_alignment.exit_statistics(
        kept.predictions, f"{count} tokens of the calibration text (4 sequences)"
    )
    result = Analysis(
        description=AnalysisDescription(
            cache_key="0" * 32, sequences=4, sequence_length=LENGTH, token_count=count, seconds=1.0, cached=False
        ),
        similarity=similarity.similarity_from(kept.cosine, position, kept.cosine[0], 17),
        alignment=Alignment(calibration=statistics, generated=None, generated_reason="It cannot generate."),
        passage=Passage(tokens=tuple(shown)),
    )
    token_sample.write(folder, kept)
    record_files.write_analysis(folder, result)


def write_many(runs_folder: Path, count: int, num_blocks: int = 30, num_remove: int = 6) -> None:
    """A store of many runs: one made, the others copies of it with ages of their own."""
    import shutil

    first = runs_folder / "run-0000"
    write_run(first, num_blocks, num_remove)
    for number in range(1, count):
        copy = runs_folder / f"run-{number:04d}"
        shutil.copytree(first, copy)
        os.utime(copy / "spec.json", (time.time() - number, time.time() - number))
