"""Better than greedy: swaps after the last removal, over tables of scores and through a whole run."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import sleb
from sleb import specs
from sleb.cli import search as search_commands
from sleb.cli.main import app
from sleb.errors import OptionError, RunError
from sleb.formats import command_line
from sleb.formats.list_formats import FORMATS, render
from sleb.formats.model_card import model_card
from sleb.formats.run_json import summary
from sleb.methods.cost_forecast import cost_of_search, cost_of_spec
from sleb.methods.problem import Decision, Problem
from sleb.methods.statistics import compare
from sleb.methods.strategies import baseline, search
from sleb.records import Baseline, Method, RunSpec, Step
from sleb.runtime import run_folder, trace_file
from sleb.scoring.sweep_plan import Cost, cost_of
from tests.support import tiny

SkipSet = tuple[int, ...]
Table = Callable[[SkipSet, np.ndarray], np.ndarray]
"""Nats of each of the sequences without the blocks."""
LENGTH = 9  # predicted tokens of every sequence


def problem(sequences: int = 24, num_remove: int = 2, **more: Any) -> Problem:
    settings: dict[str, Any] = dict(
        num_blocks=6,
        num_remove=num_remove,
        protected=(),
        calibration=np.arange(sequences),
        held_out=np.arange(sequences, sequences + 4),
        token_counts=np.full(sequences + 4, LENGTH),
        refine="swap",
    )
    return Problem(**(settings | more))


def scored(table: Table, requests: list[tuple[SkipSet, int]] | None = None) -> Any:
    def score(skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        if requests is not None:
            requests.extend((tuple(sorted(skipped)), len(sequences)) for skipped in skip_sets)
        return np.array([table(tuple(skipped), sequences) for skipped in skip_sets], dtype=float)

    return score


def baseline_of(made: Problem, table: Table) -> Baseline:
    calibration, held_out, _ = baseline(made, scored(table))
    return Baseline(calibration=calibration, held_out=held_out, block_evaluations=0, head_evaluations=0, seconds=0)


def decisions(made: Problem, table: Table, steps: Sequence[Step] = (), **more: Any) -> list[Decision]:
    return list(search(Method.METRIC3, made, scored(table), baseline_of(made, table), tuple(steps), **more))


def steps_of(made: Problem, table: Table, steps: Sequence[Step] = (), **more: Any) -> list[Step]:
    return [decision.step for decision in decisions(made, table, steps, **more)]


def greedy_trap(better: float = 2.0, spread: float = 0.1, seed: int = 0, num_blocks: int = 6) -> Table:
    """Block 1 is the cheapest alone and dear beside any other, so that greedy takes 1 and 2, and 2 and 4 are better.

    `better` is by how much, in nats a sequence; `spread` is the standard deviation of each block's cost.
    """
    draw = np.random.default_rng(seed)
    hard = draw.normal(30, 5, 1000)
    alone = np.array([9.0, 1.0, 1.5, 6.0, 2.0, *np.linspace(9, 12, num_blocks - 5)])
    own = draw.normal(0, spread, (num_blocks, 1000))

    def table(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        blocks = list(skipped)
        beside = better + 1.0 if 1 in skipped and len(skipped) > 1 else 0.0
        return hard[sequences] + alone[blocks].sum() + beside + own[np.ix_(blocks, sequences)].sum(axis=0)

    return table


def tangled(seed: int, num_blocks: int = 9) -> Table:
    """Every pair of blocks costs or saves something: greedy is seldom the best."""
    draw = np.random.default_rng(seed)
    hard, alone = draw.normal(30, 5, 1000), draw.uniform(1, 4, num_blocks)
    pairs, own = draw.normal(0, 2, (num_blocks, num_blocks)), draw.normal(0, 0.3, (num_blocks, 1000))

    def table(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        both = sum(float(pairs[one, other]) for one, other in itertools.combinations(sorted(skipped), 2))
        return hard[sequences] + alone[list(skipped)].sum() + both + own[np.ix_(list(skipped), sequences)].sum(axis=0)

    return table


def test_a_planted_better_swap_is_found_with_its_evidence() -> None:
    made, table = problem(), greedy_trap()
    *greedy, swap = steps_of(made, table)
    assert [step.removal_list for step in greedy] == [(1,), (1, 2)]
    assert greedy == steps_of(replace(made, refine="none"), table)
    assert not any(step.is_swap or step.improvement is not None for step in greedy)
    assert swap.is_swap
    assert (swap.number, swap.removed, swap.restored, swap.removal_list) == (3, (4,), (1,), (2, 4))
    pairs = {(*swap.restored_by(each), each.block) for each in swap.candidates}
    assert pairs == set(itertools.product((1, 2), (0, 3, 4, 5)))  # each of the two for each of the four that are there
    assert all(set(each.skipped) == {1, 2, each.block} - {*swap.restored_by(each)} for each in swap.candidates)
    before, after = (table(skipped, made.calibration) for skipped in ((1, 2), (2, 4)))
    assert swap.improvement == pytest.approx((before - after).mean() / LENGTH)
    per_token = (before - after) / LENGTH
    assert swap.improvement_standard_error == pytest.approx(per_token.std(ddof=1) / math.sqrt(24))
    assert swap.calibration.nll_sum == pytest.approx(after.sum())
    assert swap.held_out.nll_sum == pytest.approx(table((2, 4), made.held_out).sum())


@pytest.mark.parametrize(("better", "is_accepted"), [(0.3, False), (3.0, True)])
def test_an_improvement_within_its_error_is_not_accepted(better: float, is_accepted: bool) -> None:
    """The difference of two blocks has a standard error of 2 x sqrt(2 / 24) = 0.6 nats a sequence."""
    table = greedy_trap(better, spread=2.0, seed=4)
    made = problem()
    lists = [step.removal_list for step in steps_of(made, table)]
    before, after = (table(skipped, made.calibration).sum() for skipped in ((1, 2), (2, 4)))
    assert after < before  # better on this text either way
    assert (lists[-1] == (2, 4)) is is_accepted
    assert len(lists) == 2 + is_accepted


def test_one_sequence_is_no_reason_to_swap() -> None:
    assert [step.removal_list for step in steps_of(problem(1), greedy_trap())] == [(1,), (1, 2)]


@pytest.mark.parametrize("seed", range(12))
def test_swaps_end_where_none_is_better(seed: int) -> None:
    made = problem(num_blocks=9, num_remove=4, protected=(0, 8))
    table = tangled(seed)
    is_accepted = decisions(made, table)
    steps = [each.step for each in is_accepted]
    assert [step.is_swap for step in steps] == [False] * 4 + [True] * (len(steps) - 4)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    scores = [float(table(step.removal_list, made.calibration).sum()) for step in steps[3:]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    for decision, before in zip(is_accepted[4:], steps[3:], strict=False):
        assert decision.scores.shape == (4 * 3, 24)
        assert len(decision.step.removal_list) == 4
        assert decision.step.before == set(before.removal_list)
        winner = next(each for each in decision.step.candidates if each.skipped == decision.step.removal_list)
        assert winner.score == min(each.score or 0 for each in decision.step.candidates)
    last = steps[-1].removal_list
    for back, block in itertools.product(last, [each for each in range(1, 8) if each not in last]):
        swapped = (*(each for each in last if each != back), block)
        both = np.stack([table(swapped, made.calibration), table(last, made.calibration)])
        against = compare(both, made.token_counts[made.calibration], 0.95)
        assert against.winner == 1 or against.tied


def test_there_are_tables_with_no_swap_with_one_and_with_several() -> None:
    """What the test above is worth."""
    made = problem(num_blocks=9, num_remove=4, protected=(0, 8))
    assert {min(len(steps_of(made, tangled(seed))) - 4, 2) for seed in range(12)} == {0, 1, 2}


def test_swaps_that_remove_the_same_block_are_told_apart_when_tied() -> None:
    def table(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        own = np.random.default_rng(sum(1 << block for block in skipped)).normal(0, 1, 1000)[sequences]
        return 50 + own + (20.0 if {1, 2} <= set(skipped) else len(skipped))

    made = problem(num_blocks=5, num_remove=2, protected=())
    greedy = steps_of(replace(made, num_remove=1, refine="none"), table)
    bad = greedy[0].model_copy(
        update={"number": 2, "removal_list": (1, 2), "removed": (2,)}  # as an earlier program might have left it
    )
    (swap, *_) = steps_of(made, table, [greedy[0], bad])
    assert swap.is_swap
    assert len(swap.tied) > len(set(swap.tied))
    tied = [(*swap.restored_by(each), each.block) for each in swap.tied_candidates]
    assert tied == list(zip(swap.tied_restored, swap.tied, strict=True))
    assert (*swap.restored, *swap.removed) not in tied


@pytest.mark.parametrize("seed", [0, 3, 9, 11])  # no swap, one, three, one
@pytest.mark.parametrize("racing", [False, True])
def test_a_search_with_swaps_resumed_after_any_step_ends_the_same(seed: int, racing: bool) -> None:
    made = problem(64, num_blocks=9, num_remove=4, protected=(0, 8), racing=racing)
    whole = steps_of(made, tangled(seed))
    for after in range(len(whole) + 1):
        assert steps_of(made, tangled(seed), whole[:after]) == whole[after:]


@pytest.mark.parametrize("seed", range(4))
def test_a_race_makes_the_same_swaps_and_asks_for_less(seed: int) -> None:
    table = greedy_trap(seed=seed, spread=0.8, num_blocks=14)
    made = problem(64, num_blocks=14, protected=(0,), racing=True)
    raced_asked: list[tuple[SkipSet, int]] = []
    full_asked: list[tuple[SkipSet, int]] = []
    first = baseline_of(made, table)
    raced = list(search(Method.METRIC3, made, scored(table, raced_asked), first))
    full = list(search(Method.METRIC3, replace(made, racing=False), scored(table, full_asked), first))
    assert [each.step.removal_list for each in raced] == [each.step.removal_list for each in full]
    one, other = raced[-1].step, full[-1].step
    assert one.is_swap
    assert one.restored == (1,)
    assert one.calibration == other.calibration
    assert (one.improvement, one.improvement_standard_error) == pytest.approx(
        (other.improvement, other.improvement_standard_error)
    )  # the list as it was left the race, and is scored to the end for this
    assert raced[-1].seen is not None
    assert raced[-1].seen.shape == raced[-1].scores.shape == full[-1].scores.shape == (2 * 11, 64)
    assert sum(count for _, count in raced_asked) < 0.6 * sum(count for _, count in full_asked)


def test_the_list_as_it_is_leaves_the_race_and_is_scored_to_the_end_all_the_same() -> None:
    requests: list[tuple[SkipSet, int]] = []
    table = greedy_trap(8.0)
    made = problem(64, racing=True)
    first = baseline_of(made, table)
    greedy = steps_of(replace(made, refine="none"), table)
    swaps = search(Method.METRIC3, made, scored(table, requests), first, tuple(greedy))
    assert next(swaps).step.is_swap
    looks = [count for skipped, count in requests if skipped == (1, 2)]
    assert looks[0] == 8
    assert sum(looks) == 64
    assert len(looks) == 2  # after eight sequences it was out; then the rest at once


def test_by_divergence_the_likelihood_of_a_swap_is_measured_too() -> None:
    divergence, likelihood = greedy_trap(), tangled(3)
    made = problem(objective="kl")
    *_, swap = steps_of(made, divergence, judge=scored(likelihood))
    assert swap.removal_list == (2, 4)
    assert {each.objective for each in swap.candidates} == {"kl"}
    assert swap.improvement == pytest.approx(
        (divergence((1, 2), made.calibration) - divergence((2, 4), made.calibration)).sum() / (24 * LENGTH)
    )
    assert swap.calibration.nll_sum == pytest.approx(likelihood((2, 4), made.calibration).sum())


def test_swaps_follow_only_where_all_removals_were_made_and_keep_to_the_limit() -> None:
    table = greedy_trap()
    free = steps_of(problem(until_perplexity=100.0), table)
    assert free[-1].removal_list == (2, 4)
    stopped = steps_of(problem(until_perplexity=0.2), table)
    assert [step.removal_list for step in stopped] == [(1,)]

    def worse_elsewhere(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        return table(skipped, sequences) + (200.0 * (sequences >= 24) if set(skipped) == {2, 4} else 0.0)

    kept = steps_of(problem(until_perplexity=100.0), worse_elsewhere)
    assert [step.removal_list for step in kept] == [(1,), (1, 2)]


def test_a_block_whose_absence_gives_no_numbers_is_never_swapped_in() -> None:
    table = greedy_trap()

    def broken(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        return np.full(len(sequences), math.nan) if {2, 4} <= set(skipped) else table(skipped, sequences)

    for racing in (False, True):
        last = steps_of(problem(64, racing=racing), broken)[-1]
        assert last.removal_list == (1, 2)


def test_the_forecast_counts_one_round_exactly() -> None:
    """A table in which greedy is the best: one round, and no swap."""
    alone = np.array([9.0, 1.0, 1.5, 6.0, 2.0, 8.0])

    def table(skipped: SkipSet, sequences: np.ndarray) -> np.ndarray:
        return np.full(len(sequences), 30 + alone[list(skipped)].sum())

    total = Cost(0, 0)

    def counting(skip_sets: Sequence[SkipSet], sequences: np.ndarray) -> np.ndarray:
        nonlocal total
        total += cost_of(skip_sets, 6, len(sequences))
        return scored(table)(skip_sets, sequences)

    made = problem(num_remove=3)
    for _ in search(Method.METRIC3, made, counting, baseline_of(made, table)):
        pass
    ahead = cost_of_search(Method.METRIC3, made, with_baseline=False)
    assert ahead.head_evaluations == total.head_evaluations == (6 + 5 + 4 + 3 * 3 + 1) * 24 + 3 * 4
    greedy = cost_of_search(Method.METRIC3, replace(made, refine="none"), with_baseline=False)
    assert ahead.head_evaluations - greedy.head_evaluations == (3 * 3 + 1) * 24


@pytest.mark.parametrize("racing", [False, True])
def test_the_forecast_ends_whatever_was_removed(racing: bool) -> None:
    made = problem(64, num_blocks=9, num_remove=4, protected=(0, 8), racing=racing)
    whole = steps_of(made, tangled(9))
    assert len(whole) == 7
    for after in range(len(whole) + 1):
        ahead = cost_of_search(Method.METRIC3, made, whole[:after], with_baseline=False)
        plain = cost_of_search(Method.METRIC3, replace(made, refine="none"), whole[:after], with_baseline=False)
        rounds = ahead.head_evaluations - plain.head_evaluations
        assert 8 * (4 * 3 + 1) <= rounds <= 64 * (4 * 3 + 1) + 4 + 64  # at most one, and the luck of made-up noise
    spec = RunSpec(model="x", num_remove=4, protected=(0, 8), refine="swap", calibration={"sequences": 24})  # type: ignore[arg-type]
    cost, removing = cost_of_spec(spec, 9)
    assert removing == 4
    more = cost.head_evaluations - cost_of_spec(spec.model_copy(update={"refine": "none"}), 9)[0].head_evaluations
    assert more == (4 * 3 + 1) * 24


@pytest.mark.parametrize("method", ["metric1", "metric2", "early-exit", "best-chunk"])
def test_only_metric3_is_refined(method: str) -> None:
    with pytest.raises(OptionError, match=f"`refine=swap` goes on from Metric3's list; leave it out with {method}"):
        specs.run_spec("x/y", method=method, refine="swap")
    with pytest.raises(OptionError, match="`refine`"):
        specs.run_spec("x/y", refine="swaps")  # type: ignore[arg-type]


def test_the_command_line_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specs.run_spec("org/x", remove=4, refine="swap")
    heard: list[Any] = []
    monkeypatch.setattr(search_commands, "_start", lambda *given: heard.extend(given))
    line = command_line.command_line(spec)
    assert "--refine=swap" in line
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert heard[0] == spec
    refused = CliRunner().invoke(app, ["search", "org/x", "--refine=swap", "--method=metric2"])
    assert isinstance(refused.exception, OptionError)
    assert "--refine" not in command_line.command_line(specs.run_spec("org/x", remove=4))


def test_why_a_search_ended_says_what_was_tried() -> None:
    from sleb.search_job import _why_finished

    steps, made = steps_of(problem(), greedy_trap()), problem(until_perplexity=0.1)
    assert _why_finished(replace(made, refine="none"), steps[:2]) == "removed 2 blocks, as asked"
    assert _why_finished(made, steps).endswith(
        "; the best swap lowers the score by no more than its error, or would raise the held-out perplexity by more "
        "than 10%"
    )
    stopped = "the next removal would raise the held-out perplexity by more than 10%"
    assert _why_finished(made, steps[:1]) == f"{stopped}; no swap was tried"
    assert _why_finished(made, []) == f"{stopped}; no swap was tried"
    assert _why_finished(replace(made, refine="none"), steps[:1]) == stopped


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of eight blocks of which greedy does not remove the best three."""
    return tiny.save(tmp_path_factory.mktemp("refined") / "model", num_blocks=8, seed=9)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refined-text") / "text.txt"
    path.write_text(tiny.text(12_000))
    return path


def options(text: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        calibration=str(text), sequences=24, sequence_length=32, held_out=4, remove=3, dtype="float32", analysis=False
    )
    return settings | more


@pytest.fixture
def run(model: Path, text: Path) -> sleb.Run:
    return sleb.search(str(model), refine="swap", **options(text))


def test_a_run_with_a_swap_from_the_model_to_the_files(run: sleb.Run, model: Path, text: Path) -> None:
    assert run.trace is not None
    assert run.stack is not None
    plain = sleb.search(str(model), **options(text))
    assert plain.trace is not None
    assert [step.removal_list for step in run.trace.steps[:3]] == [step.removal_list for step in plain.trace.steps]
    swap = run.trace.steps[3]
    assert swap.is_swap
    assert swap.number == 4
    assert len(run.trace.steps) == 4
    assert run.trace.finished == "removed 3 blocks, as asked; the best swap lowers the score by no more than its error"
    assert plain.trace.finished == "removed 3 blocks, as asked"
    assert swap.perplexity is not None
    assert swap.perplexity < (run.trace.steps[2].perplexity or 0)
    assert run_folder.load(run.run_id).trace == run.trace
    assert run.trace.by_length == (*run.trace.steps[:2], swap)
    assert run.trace.removed_at == {**dict.fromkeys(swap.removed, 4)} | {
        block: plain.trace.removed_at[block] for block in swap.removal_list if block not in swap.removed
    }
    scores = trace_file.read_scores(run.run_dir, "step-0004")
    assert scores["nats"].shape == (3 * 3, 24)
    np.testing.assert_allclose(scores["nats"].sum(axis=1), [each.nll_sum for each in swap.candidates])
    before = trace_file.read_scores(run.run_dir, "step-0003")["nats"]
    chosen = next(i for i, each in enumerate(swap.candidates) if each.skipped == swap.removal_list)
    fall = (before[before.sum(axis=1).argmin()] - scores["nats"][chosen]).mean() / 31
    assert swap.improvement == pytest.approx(fall, rel=1e-5)
    assert swap.held_out_standard_error is not None
    json.dumps(summary(run), allow_nan=False)
    assert summary(run)["refine"] == "swap"
    assert summary(run)["steps"][3]["improvement"] == swap.improvement


def test_every_export_takes_the_refined_list(run: sleb.Run) -> None:
    assert run.trace is not None
    assert run.stack is not None
    lists = [step.removal_list for step in run.trace.steps]
    assert [run.removal_list_after(steps) for steps in (1, 2, 3, 4)] == lists
    assert run.removal_list_after() == lists[3]
    for name in FORMATS:
        assert render(run, name) != render(run, name, 3)
    assert json.loads(render(run, "json"))["removal_list"] == list(lists[3])
    assert json.loads(render(run, "json"))["refine"] == "swap"
    rows = list(csv.DictReader(io.StringIO(render(run, "csv"))))
    assert [json.loads(row["removal_list"]) for row in rows[1:]] == [list(each) for each in lists]
    card = model_card(run, lists[3])
    assert "metric3, refined by swaps" in card
    swap = run.trace.steps[3]
    assert f"| 4 | {swap.removed[0]} (back: {swap.restored[0]}) |" in card
    greedy = model_card(run, lists[2])
    assert "| 3 |" in greedy
    assert "| 4 |" not in greedy
    assert "swaps" not in greedy


def test_the_terminal_shows_a_swap(run: sleb.Run) -> None:
    assert run.trace is not None
    swap = run.trace.steps[3]
    done = CliRunner().invoke(app, ["show", run.run_id])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("   4 "))
    assert f"{swap.removed[0]}, {swap.restored[0]} back" in line
    assert f"better by {swap.improvement:.4f} ± {swap.improvement_standard_error:.4f}" in line
    assert "refined by swaps" in done.stdout
    assert f"Removal list: {list(swap.removal_list)}" in done.stdout


def test_an_interrupted_run_makes_the_same_swaps(run: sleb.Run) -> None:
    """Cut after every line of the trace, and torn within the next: what follows is found again."""
    assert run.trace is not None
    path = run.run_dir / "trace.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = run.trace
    for kept in (1, 2, 4, 5):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
        trace = sleb.resume(run.run_id).trace
        assert trace is not None
        untimed = [step.model_copy(update={"seconds": 0.0}) for step in trace.steps]
        assert untimed == [step.model_copy(update={"seconds": 0.0}) for step in whole.steps]
        assert trace.finished == whole.finished


@pytest.mark.parametrize(
    "change",
    [
        {"removal_list": [1, 5]},  # one block fewer
        {"removal_list": [1, 5, 6, 4]},  # one more, and yet a swap
        {"removal_list": [1, 5, 3]},  # another one than it says
        {"restored": [2]},  # takes back what was never removed
        {"restored": []},  # no swap, and no longer list
        {"tied_restored": [1]},  # of nobody
    ],
)
def test_a_swap_that_does_not_do_what_it_says_is_not_believed(run: sleb.Run, change: dict[str, Any]) -> None:
    path = run.run_dir / "trace.jsonl"
    lines = path.read_text().splitlines()
    entry = json.loads(lines[4])
    assert (entry["step"]["removal_list"], entry["step"]["restored"]) == ([1, 5, 4], [6])
    step = entry["step"] | change
    winner = next(each for each in step["candidates"] if each["skipped"] == entry["step"]["removal_list"])
    winner["skipped"] = step["removal_list"]
    path.write_text("\n".join([*lines[:4], json.dumps({"step": step}), *lines[5:]]) + "\n")
    with pytest.raises(RunError, match=r"Line 5 .* damaged"):
        run_folder.load(run.run_id)


def test_work_is_forecast_and_extended_by_each_swap(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sleb.records import Progress
    from sleb.runtime.processes.progress import Meter

    totals: list[float] = []
    done, phases = 0.0, []
    advance, tell = Meter.advance, Meter._tell

    def advancing(self: Meter, units: float, where: str) -> None:
        nonlocal done
        if self._total:
            done += units
            totals.append(self._total)
        advance(self, units, where)

    def telling(self: Meter, progress: Progress, *, force: bool = False) -> None:
        phases.append((progress.phase, progress.step))
        tell(self, progress, force=force)

    monkeypatch.setattr(Meter, "advance", advancing)
    monkeypatch.setattr(Meter, "_tell", telling)
    sleb.search(str(model), refine="swap", **options(text, search="full"))
    assert len(set(totals)) == 2  # one swap, and so another round
    assert done == pytest.approx(totals[-1], rel=0.05)
    assert ("Trying swaps", 0) in phases
    assert max(step for phase, step in phases) == 3
