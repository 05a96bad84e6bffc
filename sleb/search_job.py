"""One search or analysis of one run: model, text, methods and files meet here, and nowhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from sleb.analysis import block_output_cache, token_sample
from sleb.analysis.measure import analyze
from sleb.analysis.similarity import block_influence
from sleb.errors import (
    ModelError,
    NotNumbers,
    OptionError,
    RunError,
    ScoringError,
    model_without,
)
from sleb.methods.cost_forecast import cost_of_search
from sleb.methods.problem import Decision, Problem, Score, number_to_remove, protected_blocks, require_possible
from sleb.methods.statistics import mean_and_error
from sleb.methods.strategies import baseline, search
from sleb.model.block_stack import BlockStack
from sleb.model.generation import require_positions
from sleb.model.identity import identity_of
from sleb.model.loading import LoadedModel
from sleb.model.model_of_run import require_same_model, require_same_scoring
from sleb.records import Baseline, JobSettings, Method, Run, RunSpec, StackDescription, Step, perplexity_of
from sleb.runtime import origin, record_files, run_folder, trace_file
from sleb.runtime.processes.distributed import Group
from sleb.runtime.processes.progress import Meter, Watcher
from sleb.scoring import recorded_baseline
from sleb.scoring.optimizations.choice import optimized
from sleb.scoring.scorer import Scorer
from sleb.scoring.self_check import self_check
from sleb.scoring.stack_description import facts_of
from sleb.scoring.sweep_plan import SkipSet
from sleb.text import calibration, repetition

log = logging.getLogger(__name__)


class Session:
    """One search or analysis of one run, from the model to the last line of the trace."""

    def __init__(
        self,
        run: Run,
        job: JobSettings,
        loaded: LoadedModel,
        stack: BlockStack,
        text: calibration.CalibrationSet,
        description: StackDescription,
        meter: Meter,
        watcher: Watcher,
        group: Group,
    ) -> None:
        self.run, self.spec, self.loaded = run, run.spec, loaded
        self.text, self.description = text, description
        self.group = group
        """The processes of the run: the first writes; all decide, on the same numbers."""
        self.meter, self.watcher = meter, watcher
        self.job = job
        self.speedups: tuple[str, ...] = ()
        """Names of the optimizations that are in use."""
        self.batch_size = job.batch_size
        """Sequences per batch; once the search is over, those that fitted."""
        self.stack = stack

    @classmethod
    def opened(
        cls,
        run: Run,
        job: JobSettings,
        loaded: LoadedModel,
        meter: Meter,
        watcher: Watcher,
        group: Group | None = None,
    ) -> Session:
        """Draw the calibration text, check model and text against the run, and describe both in it.

        Raises a `SlebError` for what would only fail after the search.
        """
        group, spec, stack = group or Group(), run.spec, BlockStack(loaded.model)
        config = stack.config
        require_positions(config, spec.calibration.sequence_length)
        meter.phase("Reading the calibration text")
        drawing = run.stack.drawing if run.stack else calibration.DRAWING
        text = group.share(
            lambda: calibration.build(
                spec.calibration, spec.held_out, spec.seed, loaded.tokenizer, config.vocab_size, drawing=drawing
            )
        )
        if spec.until_perplexity is not None and text.held_out == 0:
            raise OptionError("`until_perplexity` is judged on held-out sequences; `held_out` must be at least 1.")
        block_output_cache.limit_bytes()  # refused now, not after the search
        description = group.share(lambda: _described(run, job, loaded, stack, text, drawing, meter))
        watcher.described(description)
        return cls(run, job, loaded, stack, text, description, meter, watcher, group)

    def go(self) -> None:
        """Score the baseline, take the steps, run the analyses; whatever exists already is kept."""
        if self.spec.kind == "search":
            self._search()
            if not self.group.first:
                return
            if self.spec.analysis and self.run.analysis is None and self.run.analysis_unavailable is None:
                try:
                    self._analyze()
                except (ModelError, ScoringError) as error:  # the removal list stands without it
                    log.warning("No analysis: %s", error)
                    record_files.write_no_analysis(self.run.run_dir, str(error))
        elif self.run.analysis is None and self.group.first:
            self._analyze()

    def _search(self) -> None:
        description = self.description
        scorer = Scorer(
            self.stack,
            self.text.ids,
            batch_size=self.batch_size,
            plain=description.self_check.scoring == "plain",
            watch=self.meter.advance,
            group=self.group,
        )
        problem = Problem(
            num_blocks=description.num_blocks,
            num_remove=description.num_remove,
            protected=description.protected,
            calibration=np.arange(self.text.sequences),
            held_out=np.arange(self.text.sequences, len(self.text.ids)),
            token_counts=scorer.token_counts,
            confidence=self.spec.confidence,
            until_perplexity=self.spec.until_perplexity,
            objective=self.spec.objective,
            racing=self.spec.races,
            seed=self.spec.seed,
            refine=self.spec.refine,
            dtype=self.loaded.dtype,
        )
        if self.stack.streamed is not None:
            scorer.round_size([(block,) for block in problem.candidates])  # refused now, not after the baseline
        trace = self.run.trace
        steps = list(trace.steps) if trace else []
        if trace is not None:
            self._require_same_baseline(problem, scorer)
        if trace is None or trace.finished is None:
            cost = cost_of_search(self.spec.method, problem, steps, with_baseline=trace is None, plain=scorer.plain)
            ahead = cost.units(scorer.head_weight)
            with self._faster(scorer, ahead / self.group.size, trace.baseline.speedups if trace else None):
                self.meter.expect(ahead, len(steps), problem.num_remove)
                first = trace.baseline if trace else self._baseline(problem, scorer)
                self.watcher.baseline(first)
                for step in steps:
                    self.watcher.step(step, first)
                self._steps(problem, scorer, first, steps)
            if self.group.first:
                trace_file.append_finished(self.run.run_dir, _why_finished(problem, steps))
        self.batch_size = scorer.batch_size

    def _require_same_baseline(self, problem: Problem, scorer: Scorer) -> None:
        """Score the first sequence again: what a run goes on from must be of this model.

        A run by an earlier version, which recorded weights alone, is given the model's identity.
        """
        self.meter.phase("Comparing with the scores of the baseline")
        then = self.group.share(lambda: recorded_baseline.recorded(self.run))
        recorded_baseline.require_same(self.run, scorer, then, len(problem.calibration))
        if self.description.identity is None:
            self.description = self.group.share(
                lambda: recorded_baseline.write_identity(self.run, self.description, self.loaded)
            )

    @contextmanager
    def _faster(self, scorer: Scorer, ahead: float, known: tuple[str, ...] | None) -> Iterator[None]:
        """Run blocks with the optimizations that help here; a resumed run, and all ranks, use the same ones."""
        if self.job.speedups == "off" or scorer.plain:
            yield
            return
        self.meter.phase("Trying optimizations")
        with ExitStack() as switched:
            names = switched.enter_context(optimized(scorer, ahead, known=known)) if self.group.first else ()
            self.speedups = self.group.share(lambda: names)
            if not self.group.first:
                switched.enter_context(optimized(scorer, ahead, known=self.speedups))
            yield

    def _baseline(self, problem: Problem, scorer: Scorer) -> Baseline:
        self.meter.within("Scoring the baseline")
        start = time.perf_counter()
        on_calibration, held_out, nats = baseline(problem, scorer.score)
        if not np.isfinite(nats).all():
            raise NotNumbers(model_without(()), self.loaded.dtype)
        first = Baseline(
            calibration=on_calibration,
            held_out=held_out,
            block_evaluations=scorer.block_evaluations,
            head_evaluations=scorer.head_evaluations,
            seconds=time.perf_counter() - start,
            speedups=self.speedups,
            warnings=(*self.text.warnings, *self._doubts(on_calibration.perplexity or np.inf, nats))
            if self.group.first
            else (),
        )
        if not self.group.first:
            return first
        for warning in first.warnings:
            log.warning("%s", warning)
        trace_file.write_scores(self.run.run_dir, "baseline", nats=nats, token_counts=problem.token_counts)
        trace_file.append_baseline(self.run.run_dir, first)
        log.info("Baseline: perplexity %s in %.1f s", first.perplexity, first.seconds)
        return first

    def _doubts(self, perplexity: float, nats: np.ndarray) -> Iterator[str]:
        """Reasons why the baseline is not worth an hour of searching, with the likely cause."""
        token = self.loaded.tokenizer.bos_token_id
        if (
            not self.text.bos
            and token is not None
            and token < self.description.vocab_size
            and self.spec.calibration.bos == "auto"
        ):
            few = self.text.ids[:2].copy()
            few[:, 0] = token
            with_bos = Scorer(self.stack, few, batch_size=1, plain=True).score([()], np.arange(len(few)))[0].sum()
            tokens = few.size - len(few)
            before, after = (perplexity_of(float(total) / tokens) for total in (nats[: len(few)].sum(), with_bos))
            if after < 0.8 * before:
                yield (
                    f"With a BOS token at the head of each window the perplexity of the first {len(few)} sequences "
                    f"is {after:.1f} instead of {before:.1f}: search with `bos=yes`."
                )
        vocabulary = self.description.vocab_size
        if perplexity >= 0.5 * vocabulary:
            yield (
                f"The baseline's perplexity is {perplexity:,.0f}, no better than guessing among "
                f"{vocabulary:,} tokens: its weights are untrained or damaged, or the tokenizer is not its own."
            )
        elif perplexity > 1000:
            yield (
                f"The baseline's perplexity is {perplexity:,.0f}, which is absurd for text it knows: check "
                "that the text is in a language it was trained on, that the tokenizer is its own, and try `bos=yes`."
            )

    def _steps(self, problem: Problem, scorer: Scorer, first: Baseline, steps: list[Step]) -> None:
        again = bool(steps)  # what Metric1 and Metric2 measure before their first step was counted with that step

        def influence() -> np.ndarray:
            if not again:
                scorer.block_evaluations += len(self.stack) * len(problem.calibration)  # one forward pass
            part = self.group.part(len(problem.calibration))
            sums = np.zeros((len(self.stack), len(problem.calibration)))
            sums[:, part] = block_influence(self.stack, self.text.ids[problem.calibration[part]], scorer.batch_size)
            return self.group.sum(sums)

        score: Score = scorer.diverge if self.spec.objective == "kl" else scorer.score
        if again and self.spec.method is Method.METRIC2:
            score = _uncounted(scorer, score)
        decisions = search(self.spec.method, problem, score, first, tuple(steps), influence, judge=scorer.score)
        while True:
            if len(steps) < problem.num_remove:
                self.meter.step(len(steps) + 1)
            elif problem.refine == "swap":
                self.meter.within("Trying swaps")
            start, blocks, heads = time.perf_counter(), scorer.block_evaluations, scorer.head_evaluations
            decision = next(decisions, None)
            if decision is None:
                return
            error = self._held_out_error(problem, decision.held_out) if self.group.first else None
            step = decision.step.model_copy(
                update={
                    "held_out_standard_error": error,
                    "block_evaluations": scorer.block_evaluations - blocks,
                    "head_evaluations": scorer.head_evaluations - heads,
                    "seconds": time.perf_counter() - start,
                }
            )
            if self.group.first:
                self._write(step, decision)
            back = f", took {list(step.restored)} back" if step.restored else ""
            log.info("Step %d: removed %s%s in %.1f s", step.number, list(step.removed), back, step.seconds)
            steps.append(step)
            self.watcher.step(step, first)
            if problem.racing or step.is_swap:  # how soon candidates leave, or that there is a swap, is only known now
                ahead = cost_of_search(self.spec.method, problem, steps, with_baseline=False, plain=scorer.plain)
                update = self.meter.extend if step.is_swap else self.meter.revise
                update(ahead.units(scorer.head_weight))

    def _write(self, step: Step, decision: Decision) -> None:
        members = np.array([candidate.block for candidate in step.candidates])
        kept = {"blocks": members, "nats": decision.scores, "held_out": decision.held_out}
        if decision.seen is not None:
            kept["seen"] = decision.seen
        trace_file.write_scores(self.run.run_dir, f"step-{step.number:04d}", **kept)
        trace_file.append_step(self.run.run_dir, step)

    def _held_out_error(self, problem: Problem, nats: np.ndarray) -> float | None:
        """Standard error of the rise over the baseline on the held-out sequences, per token."""
        try:
            before = trace_file.read_scores(self.run.run_dir, "baseline")["nats"][problem.held_out]
        except (RunError, KeyError, IndexError):  # the scores were deleted; the rise itself is in the trace
            return None
        _, error = mean_and_error(nats - before, problem.token_counts[problem.held_out])
        return float(error) if np.isfinite(error) else None

    def _analyze(self) -> None:
        self.meter.phase("Analyses")
        analysis, sample = analyze(
            self.stack,
            self.loaded.tokenizer,
            self.text.ids[: self.text.sequences],
            model_key=identity_of(self.loaded).key(self.description.weights_hash, self.description.dtype),
            dtype=self.description.dtype,
            model_name=self.spec.model,
            home=run_folder.home(),
            seed=self.spec.seed,
            batch_size=self.batch_size,
            progress=self.meter.part,
        )
        token_sample.write(self.run.run_dir, sample)
        record_files.write_analysis(self.run.run_dir, analysis)


def _described(
    run: Run,
    job: JobSettings,
    loaded: LoadedModel,
    stack: BlockStack,
    text: calibration.CalibrationSet,
    drawing: int,
    meter: Meter,
) -> StackDescription:
    """The run's description of model and text, after a check that both are the same; a new run's is written first."""
    if run.stack is not None:
        _require_same_text(run, text.tokens_hash)
        require_same_model(run, job, loaded)
        require_same_scoring(run)
        return run.stack
    requested = protected_blocks(run.spec, len(stack))
    candidates = [block for block in range(len(stack)) if block not in requested]
    _number_to_remove(run.spec, len(stack), len(candidates))
    meter.phase("Checking the sweep against plain forward passes")
    check = self_check(stack, candidates, text.ids)
    if check.reason and stack.streamed is not None:
        raise ModelError(
            f"{run.spec.model} cannot be streamed block by block ({check.reason}). Leave `memory_budget` out, or "
            "give one that holds the complete model."
        )
    if check.reason:
        log.warning("Scoring the plain way: %s.", check.reason)
    protected = tuple(sorted({*requested, *check.protected}))
    for block, reason in check.protected.items():
        log.warning("Block %d is protected: %s.", block, reason)
    num_remove = _number_to_remove(run.spec, len(stack), len(stack) - len(protected))
    if run.spec.kind == "search":
        require_possible(run.spec.method, len(stack), num_remove, protected)
    description = StackDescription(
        **facts_of(stack, loaded),
        tokens_hash=text.tokens_hash,
        sequences=text.sequences,
        held_out=text.held_out,
        sequence_length=text.ids.shape[1],
        bos=text.bos,
        text=text.text,
        drawing=drawing,
        num_remove=num_remove,
        protected=protected,
        self_check=check,
    )
    repetition.keep_passages(run.run_dir, text.ids[: text.sequences])
    origin.write_stack(run.run_dir, description)
    return description


def _number_to_remove(spec: RunSpec, num_blocks: int, num_candidates: int) -> int:
    """Number of blocks that the run removes; none where it only analyzes. Raises `OptionError`."""
    return number_to_remove(num_blocks, num_candidates, spec.num_remove, spec.ratio) if spec.kind == "search" else 0


def _uncounted(scorer: Scorer, score: Score) -> Score:
    """Scores that a resumed run takes again, without counting them a second time."""

    def again(skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        with scorer.uncounted():
            return score(skip_sets, sequences)

    return again


def _require_same_text(run: Run, tokens_hash: str) -> None:
    assert run.stack is not None
    if tokens_hash != run.stack.tokens_hash:
        raise RunError(
            f"The calibration text ({run.spec.calibration.source}) or tokenizer is not the one that run {run.run_id} "
            "began with. Restore it, or start a new run."
        )


def _why_finished(problem: Problem, steps: list[Step]) -> str:
    limit = f"raise the held-out perplexity by more than {problem.until_perplexity or 0:.0%}"
    removed = len(steps[-1].removal_list) if steps else 0
    if removed < problem.num_remove:
        return f"the next removal would {limit}" + ("; no swap was tried" if problem.refine == "swap" else "")
    reason = f"removed {removed} block{'s' if removed > 1 else ''}, as asked"
    if problem.refine == "swap":
        reason += "; the best swap lowers the score by no more than its error"
        reason += f", or would {limit}" if problem.until_perplexity is not None else ""
    return reason
