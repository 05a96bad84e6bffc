"""The methods, as generators of decisions over a `score` callable. Knows scores and block indices; never sees a model.

Every method yields one decision a removal, with all its evidence; whoever drives the generator stores it, times
it, and may stop between two. Given the steps of an earlier attempt, a generator goes on after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .errors import OptionError, ScoringError
from .records import Baseline, Candidate, Measured, Method, Step

SkipSet = tuple[int, ...]
Score = Callable[[Sequence[SkipSet], np.ndarray], np.ndarray]
"""score(skip_sets, sequences) -> float64 (skip_sets, sequences), nats."""


@dataclass(frozen=True)
class Problem:
    """What a search needs to know beside the scores."""

    num_blocks: int
    num_remove: int
    protected: tuple[int, ...]
    calibration: np.ndarray
    """Indices of the sequences that choose."""
    held_out: np.ndarray
    """Indices of the sequences that take no part in any choice."""
    token_counts: np.ndarray
    """Predicted tokens of every sequence, int64."""
    confidence: float = 0.95
    until_perplexity: float | None = None
    objective: Literal["nll", "kl"] = "nll"
    """What `score` measures."""
    racing: bool = False
    """Whether candidates that cannot win are dropped before they have seen the whole calibration set."""
    seed: int = 0
    """Of the order in which a race sees the sequences."""
    refine: Literal["none", "swap"] = "none"
    """What follows once `num_remove` blocks are removed."""

    @property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may be removed, ascending."""
        return tuple(block for block in range(self.num_blocks) if block not in set(self.protected))


@dataclass(frozen=True)
class Decision:
    """A step without its costs, and the scores behind it: float64 (candidates, calibration sequences)."""

    step: Step
    scores: np.ndarray
    held_out: np.ndarray
    """Sums of the held-out sequences under the model this step leaves, nats."""
    seen: np.ndarray | None = None
    """Which of the scores were taken, where candidates left a race; None is all of them."""


@dataclass(frozen=True)
class Comparison:
    """How the lowest score compares with the others on the same sequences."""

    winner: int
    margin: float | None
    standard_error: float | None
    tied: tuple[int, ...]
    differences: np.ndarray
    """Per candidate, mean difference to the winner per token; 0 for itself, infinite where not a number."""
    reach: np.ndarray
    """Half width of its interval at the confidence asked for; NaN where one sequence gives no spread."""


def number_to_remove(num_blocks: int, available: int, num_remove: int | None, ratio: float | None) -> int:
    """How many blocks to remove. A ratio is rounded up, as in the paper (4.1). Raises `OptionError` out of range."""
    if num_remove is not None:
        wanted = num_remove
    elif ratio is not None:
        wanted = math.ceil(round(ratio * num_blocks, 9))  # 0.1 * 30 is 3.0000000000000004
    else:
        wanted = min(available, num_blocks - 1)
    if available == 0:
        raise OptionError(f"All {num_blocks} blocks are protected: nothing can be removed. Shorten --protect.")
    if not 1 <= wanted <= min(available, num_blocks - 1):
        raise OptionError(
            f"Asked to remove {wanted} of {num_blocks} blocks; {min(available, num_blocks - 1)} may be removed "
            f"({num_blocks - available} protected, at least one must stay). Lower --remove or --ratio."
        )
    return wanted


def require_possible(method: Method, num_blocks: int, num_remove: int, protected: Sequence[int]) -> None:
    """Whether the method can remove so many at all. Raises `OptionError` before anything is scored."""
    kept = set(protected)
    if method is Method.EARLY_EXIT:
        hit = [block for block in range(num_blocks - num_remove, num_blocks) if block in kept]
        if hit:
            raise OptionError(
                f"Early exit removes the last {num_remove} blocks, and block {hit[-1]} is protected. "
                "Use --protect '' to free it, or --remove fewer."
            )
    if method is Method.BEST_CHUNK and not _chunks(num_blocks, num_remove, kept):
        raise OptionError(
            f"No {num_remove} neighbouring blocks are all unprotected. Shorten --protect, or --remove fewer."
        )


def _chunks(num_blocks: int, length: int, protected: set[int]) -> list[SkipSet]:
    """Contiguous runs of unprotected blocks, by their start."""
    runs = (tuple(range(start, start + length)) for start in range(num_blocks - length + 1))
    return [run for run in runs if protected.isdisjoint(run)]


def baseline(problem: Problem, score: Score) -> tuple[Measured, Measured, np.ndarray]:
    """The unmodified model: calibration set, held-out sequences, and the sums per sequence (all of them)."""
    everything = np.concatenate([problem.calibration, problem.held_out])
    nats = score([()], everything)[0]
    count = len(problem.calibration)
    return (
        measured(nats[:count], problem.token_counts[problem.calibration]),
        measured(nats[count:], problem.token_counts[problem.held_out]),
        nats,
    )


def measured(nats: np.ndarray, token_counts: np.ndarray) -> Measured:
    """Sums; None where any sequence's predictions were not numbers."""
    total = float(nats.sum())
    return Measured(nll_sum=total if math.isfinite(total) else None, token_count=int(token_counts.sum()))


def compare(
    scores: np.ndarray, token_counts: np.ndarray, confidence: float, seen: np.ndarray | None = None
) -> Comparison:
    """Winner, margin to the runner-up with its standard error, and who cannot be told from the winner.

    `scores` is (candidates, sequences), and `seen` says which of them were scored: all of them unless candidates left
    a race. The sequences are the same for a candidate and the winner, so differences are taken in pairs, and the
    interval of their mean is Student's. One sequence gives no interval: then nobody can be told from the winner.
    """
    seen = np.ones(scores.shape, dtype=bool) if seen is None else seen
    numbers = np.asarray(np.isfinite(np.where(seen, scores, 0.0)).all(axis=1))
    totals = np.where(numbers & seen.all(axis=1), scores.sum(axis=1), np.inf)
    winner = int(np.argmin(totals))  # the first of equals: the earliest block, like the reference (sleb.py, strict <)
    others = np.array([i for i in range(len(scores)) if i != winner and numbers[i]], dtype=int)
    all_differences, all_reach = np.full(len(scores), np.inf), np.full(len(scores), np.nan)
    all_differences[winner] = all_reach[winner] = 0.0
    if not len(others):
        return Comparison(winner, None, None, (), all_differences, all_reach)
    differences = np.where(seen[others], scores[others] - scores[winner], 0.0)
    means, errors = mean_and_error(differences, token_counts * seen[others])
    all_differences[others] = means
    runner_up = int(np.argmin(means))
    from scipy.special import stdtrit  # a third of a second to import

    freedom = seen[others].sum(axis=1) - 1
    reach = np.where(freedom > 0, stdtrit(np.maximum(freedom, 1), 0.5 + confidence / 2) * errors, np.nan)
    all_reach[others] = reach
    tied = tuple(others[~(means > reach)].tolist())
    error = float(errors[runner_up]) if np.isfinite(errors[runner_up]) else None
    return Comparison(winner, float(means[runner_up]), error, tied, all_differences, all_reach)


def mean_and_error(differences: np.ndarray, token_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean per token of paired differences (..., sequences) in nats, and its standard error.

    `token_counts` is (..., sequences) or the same for all; 0 where a sequence was not seen. The error is that of a
    ratio estimate (Cochran, Sampling Techniques, 6.4); NaN for a single sequence.
    """
    counts = np.broadcast_to(token_counts, differences.shape)
    sequences = (counts > 0).sum(axis=-1)
    tokens = counts.sum(axis=-1)
    means = differences.sum(axis=-1) / tokens
    residuals = differences - means[..., None] * counts
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt((residuals**2).sum(axis=-1) * sequences / (sequences - 1))
    return means, np.where(sequences > 1, spread / tokens, np.nan)


def race(
    problem: Problem, score: Score, skip_sets: Sequence[SkipSet], number: int, lasted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores (candidates, sequences) of the calibration set, and which of them were taken (None: all).

    In a race, sequences come in rounds, in an order drawn anew for each step. After a round a candidate leaves whose
    mean difference to some other, on the same sequences, is above zero beyond what chance allows; whoever stays sees
    the whole calibration set. Asked is who wins on *this* finite set, so the error shrinks as the set is used up
    (finite-population correction, Cochran, 2.6), and the doubt about a candidate is shared out over its rivals and the
    looks (Bonferroni): the best candidate is lost in at most 1 - `confidence` of the steps. The shares follow
    `lasted`, the sequences that each candidate saw in the race before, where there was one.
    """
    everything = problem.calibration
    if not problem.racing or len(skip_sets) == 1:
        return score(skip_sets, everything), None
    count = len(everything)
    looks = looks_of(count)
    by_rival, by_look = _shares(len(skip_sets), looks, lasted)
    order = np.random.default_rng([problem.seed, number]).permutation(count)
    scores = np.full((len(skip_sets), count), np.nan)
    alive, done = np.arange(len(skip_sets)), 0
    while done < count:
        stop = next((look for look in looks if look > done), count) if len(alive) > 1 else count
        chosen = order[done:stop]
        found = score([skip_sets[int(index)] for index in alive], everything[chosen])
        scores[np.ix_(alive, chosen)] = np.where(np.isfinite(found), found, np.inf)
        done = stop
        if done < count and len(alive) > 1:
            so_far = scores[np.ix_(alive, order[:done])]
            share = by_rival[np.ix_(alive, alive)] * by_look[alive, looks.index(done), None]
            doubt = (1.0 - problem.confidence) * share
            alive = alive[~_beaten(so_far, problem.token_counts[everything[order[:done]]], count, doubt)]
    return scores, ~np.isnan(scores)


def looks_of(sequences: int) -> tuple[int, ...]:
    """After how many sequences a race looks who can leave: 8, 12, 16, 24, 32 ... Few looks cost little confidence."""
    looks, size = [], 8
    while size < sequences:
        looks += [look for look in (size, size * 3 // 2) if look < sequences]
        size *= 2
    return tuple(looks)


def _shares(candidates: int, looks: Sequence[int], lasted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """How the doubt about each candidate is shared out: over (candidates, rivals) and over (candidates, looks).

    Evenly where nothing is known. Else a candidate will likely leave when it left in the race before, and whoever
    lasted long there will likely be the one to beat it. What a candidate's rivals get adds up to 1, and so do its
    looks; settled before the order of the sequences is drawn, that is all Bonferroni asks. A wrong guess costs
    evaluations only.
    """
    weights = np.ones(candidates) if lasted is None else lasted
    ratio = np.ones((candidates, len(looks))) if lasted is None else np.array(looks) / lasted[:, None]
    nearness = np.minimum(ratio, 1.0 / ratio) ** 2
    return weights / (weights.sum() - weights[:, None]), nearness / nearness.sum(axis=1, keepdims=True)


def _lasted(before: Step | None, blocks: Sequence[int]) -> np.ndarray | None:
    """How many sequences each candidate saw in the race of the step before; None where there was none."""
    seen = {each.block: each.sequences for each in before.candidates} if before else {}
    lasted = [seen.get(block) for block in blocks]
    return None if None in lasted else np.array(lasted, dtype=np.float64)


def _beaten(scores: np.ndarray, token_counts: np.ndarray, population: int, doubt: np.ndarray) -> np.ndarray:
    """Who is worse than some other beyond `doubt` (candidates, rivals), bool (candidates,).

    `population` sequences are there in all. The error of all paired differences comes from one product of the
    residuals to the leader: a thousand swaps have a million pairs.
    """
    from scipy.special import stdtrit

    totals = scores.sum(axis=1)
    finite: np.ndarray = np.isfinite(totals)
    if not finite.any():
        return np.zeros(len(scores), dtype=bool)
    behind = np.where(finite[:, None], scores - scores[int(np.argmin(totals))], 0.0)
    seen, tokens = len(token_counts), token_counts.sum()
    means = behind.sum(axis=1) / tokens
    residuals = behind - means[:, None] * token_counts
    products = residuals @ residuals.T
    squares = np.maximum(np.diag(products)[:, None] + np.diag(products) - 2.0 * products, 0.0)
    errors = np.sqrt(squares * seen / (seen - 1) * (1.0 - seen / population)) / tokens  # as in `mean_and_error`
    doubts, where = np.unique(doubt, return_inverse=True)
    reach = stdtrit(seen - 1, 1.0 - doubts)[where].reshape(doubt.shape) * errors
    beaten: np.ndarray = means[:, None] - means > reach
    return ~finite | (beaten & finite).any(axis=1)


def search(
    method: Method,
    problem: Problem,
    score: Score,
    first: Baseline,
    steps: Sequence[Step] = (),
    influence: Callable[[], np.ndarray] | None = None,
    judge: Score | None = None,
) -> Iterator[Decision]:
    """Decisions after `steps` until enough blocks are removed, or until the held-out perplexity rises too far.

    `influence()` gives Metric1's sums, (blocks, calibration sequences), and is called for that method only. `judge`
    is the likelihood, by which the model a step leaves is measured, where `score` is another objective. Where
    `problem.refine` asks for them, swaps follow the last removal.
    """
    rank = {
        Method.METRIC3: _greedy,
        Method.METRIC2: _one_shot,
        Method.EARLY_EXIT: _early_exit,
        Method.BEST_CHUNK: _best_chunk,
    }
    last = steps[-1] if steps else None
    removed = last.removal_list if last else ()
    if method is Method.METRIC1:
        assert influence is not None
        decisions = _metric1(problem, judge or score, removed, influence)
    else:
        decisions = rank[method](problem, score, judge or score, last)
    number = len(steps)
    for decision in decisions:
        if _too_far(decision.step, first, problem.until_perplexity):
            return
        yield decision
        removed, number = decision.step.removal_list, decision.step.number
    if problem.refine == "swap":
        for decision in _swaps(problem, score, judge or score, removed, number):
            if _too_far(decision.step, first, problem.until_perplexity):
                return
            yield decision


def _too_far(step: Step, first: Baseline, until: float | None) -> bool:
    if until is None or first.held_out.perplexity is None:
        return False
    before, now = first.held_out, step.held_out
    if before.nll_sum is None or now.nll_sum is None:
        return True
    # In nats: a perplexity can be too large for a number, and a rise of it still be one.
    return now.nll_sum / now.token_count - before.nll_sum / before.token_count > math.log1p(until)


def _greedy(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """Metric3 (paper, Algorithm 1): the lowest likelihood loss under the model as streamlined so far."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(*removed, block) for block in alive]
        nats, seen = race(problem, score, skip_sets, len(removed) + 1, _lasted(last, alive))
        decision = _decide(problem, judge, removed, alive, skip_sets, nats, seen=seen)
        yield decision
        last, removed = decision.step, decision.step.removal_list


def _swaps(problem: Problem, score: Score, judge: Score, removed: SkipSet, number: int) -> Iterator[Decision]:
    """Better than greedy: one block back and another out, as long as that lowers the score beyond its error.

    A round races every such swap against the list as it is. The best one is accepted if its paired difference to that
    list, over the whole calibration set, is below zero beyond the interval by which candidates are called tied. A list
    that left the race has lost it, but the race asks about this very set: its score is completed all the same, so that
    the rule and the number on record are the same with a race and without. The first round whose best swap does not
    pass ends it. Every swap lowers the score, so no list comes back and there is an end.
    """
    counts = problem.token_counts[problem.calibration]
    while True:
        number += 1
        alive = [block for block in problem.candidates if block not in removed]
        swaps = [(*(each for each in removed if each != back), block) for back in removed for block in alive]
        if not swaps:
            return
        nats, seen = race(problem, score, [removed, *swaps], number)  # the list as it is comes first: it wins draws
        best = compare(nats, counts, problem.confidence, seen).winner
        if best == 0:
            return
        if seen is not None and not seen[0].all():
            nats[0, ~seen[0]] = score([removed], problem.calibration[~seen[0]])[0]
        against = compare(nats[[best, 0]], counts, problem.confidence)
        if against.winner != 0 or against.tied:
            return
        blocks, rest = [swap[-1] for swap in swaps], None if seen is None else seen[1:]
        decision = _decide(problem, judge, removed, blocks, swaps, nats[1:], seen=rest, number=number)
        fall = {"improvement": against.margin, "improvement_standard_error": against.standard_error}
        yield replace(decision, step=decision.step.model_copy(update=fall))
        removed = decision.step.removal_list


def _one_shot(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """Metric2 (paper, equation 4): all blocks scored once on the whole model, the lowest removed in turn."""
    singles = score([(block,) for block in problem.candidates], problem.calibration)
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        rows = [row for row, block in enumerate(problem.candidates) if block not in removed]
        alive = [problem.candidates[row] for row in rows]
        decision = _decide(problem, judge, removed, alive, [(block,) for block in alive], singles[rows], alone=True)
        yield decision
        removed = decision.step.removal_list


def _metric1(
    problem: Problem, judge: Score, removed: SkipSet, influence: Callable[[], np.ndarray]
) -> Iterator[Decision]:
    """Metric1 (paper, equation 3): 1 - cosine of a block's input and output; no model runs without the block."""
    sums = influence()
    while len(removed) < problem.num_remove:
        alive = [block for block in problem.candidates if block not in removed]
        skip_sets = [(block,) for block in alive]
        decision = _decide(problem, judge, removed, alive, skip_sets, sums[alive], alone=True, objective="metric1")
        yield decision
        removed = decision.step.removal_list


def _early_exit(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """The last blocks, from the end (paper, Figure 4, "Early Exit")."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        block = problem.num_blocks - 1 - len(removed)
        skip_set = (*removed, block)
        nats = score([skip_set], problem.calibration)
        decision = _decide(problem, judge, removed, [block], [skip_set], nats)
        yield decision
        removed = decision.step.removal_list


def _best_chunk(problem: Problem, score: Score, judge: Score, last: Step | None) -> Iterator[Decision]:
    """The contiguous run of blocks with the lowest perplexity, for each length (paper, Figure 4, "Chunk Best")."""
    removed = last.removal_list if last else ()
    while len(removed) < problem.num_remove:
        chunks = _chunks(problem.num_blocks, len(removed) + 1, set(problem.protected))
        starts = [chunk[0] for chunk in chunks]
        nats, seen = race(problem, score, chunks, len(removed) + 1, _lasted(last, starts))
        decision = _decide(problem, judge, removed, starts, chunks, nats, seen=seen)
        yield decision
        last, removed = decision.step, decision.step.removal_list


def _decide(
    problem: Problem,
    judge: Score,
    before: SkipSet,
    blocks: Sequence[int],
    skip_sets: Sequence[SkipSet],
    scores: np.ndarray,
    *,
    alone: bool = False,
    objective: Literal["nll", "kl", "metric1"] | None = None,
    seen: np.ndarray | None = None,
    number: int | None = None,
) -> Decision:
    """Choose the lowest of `scores` (candidates, calibration sequences) and measure the model it leaves.

    `alone`: candidates were scored without the blocks removed `before`, and are added to them. `seen`: which scores
    were taken, where candidates left a race. `number` is the step's, where it is not one more than those removed.
    """
    number = number or len(before) + 1
    objective = objective or problem.objective
    counts = problem.token_counts[problem.calibration]
    score_counts = counts + 1 if objective == "metric1" else counts  # hidden states exist for the last token too
    result = compare(scores, score_counts, problem.confidence, seen)
    taken = np.ones(scores.shape, dtype=bool) if seen is None else seen
    chosen = skip_sets[result.winner]
    candidates = []
    for block, skipped, row, own in zip(blocks, skip_sets, scores, taken, strict=True):
        total = measured(row[own], score_counts[own])
        candidates.append(
            Candidate(
                block=block,
                skipped=skipped,
                objective=objective,
                score_sum=total.nll_sum,
                nll_sum=total.nll_sum if objective == "nll" else None,
                token_count=total.token_count,
                sequences=int(own.sum()),
            )
        )
    if candidates[result.winner].score_sum is None:
        raise ScoringError(
            f"No candidate of step {number} gives predictions that are numbers. "
            "Use --dtype bfloat16 or float32, or remove fewer blocks."
        )
    removal_list = (*before, *chosen) if alone else chosen
    on_calibration = scores[result.winner]
    if objective != "nll" or set(removal_list) != set(chosen):  # nobody has run this model yet
        on_calibration = judge([removal_list], problem.calibration)[0]
    held_out = judge([removal_list], problem.held_out)[0] if len(problem.held_out) else np.zeros(0)
    removed = tuple(block for block in removal_list if block not in before)
    restored = tuple(block for block in before if block not in removal_list)
    is_swap = len(removed) == len(restored)
    step = Step(
        number=number,
        removed=removed,
        restored=restored,
        removal_list=removal_list,
        candidates=tuple(candidates),
        calibration=measured(on_calibration, counts),
        held_out=measured(held_out, problem.token_counts[problem.held_out]),
        margin=result.margin,
        margin_standard_error=result.standard_error,
        tied=tuple(blocks[index] for index in result.tied),
        tied_restored=tuple(min(set(before) - set(skip_sets[index])) for index in result.tied) if is_swap else (),
        block_evaluations=0,
        head_evaluations=0,
        seconds=0.0,
    )
    return Decision(step, scores, held_out, seen)
