"""The opened model of a run, on which an evaluation job works, and what is already known of it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from sleb.errors import ExportError, NotNumbers, OptionError, SlebError, model_without
from sleb.evaluation import perplexity
from sleb.export.removal import streamlined
from sleb.methods.statistics import measured
from sleb.model.block_stack import BlockStack
from sleb.model.generation import positions_of
from sleb.model.identity import identity_of
from sleb.model.inspection.source_folder import SourceFolder, source_folder
from sleb.model.loading import LoadedModel
from sleb.records import (
    EVALUATION_VERSION,
    NAMED_TEXTS,
    SCORING_VERSION,
    Finding,
    JobSettings,
    RemovalList,
    Run,
    TextPerplexity,
)
from sleb.runtime import findings_folder, job_folder
from sleb.runtime.processes.progress import Meter
from sleb.scoring.recorded_baseline import agrees, write_identity
from sleb.scoring.scorer import Scorer
from sleb.text import repetition, text_files
from sleb.text.calibration import RESERVED

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Finding)


def _is_same_text(evaluated: str, searched: str) -> bool:
    """Whether an evaluation reads what a search read: the same file, under whichever name."""
    if evaluated in NAMED_TEXTS or searched in RESERVED:  # of two named ones each reads another split
        return evaluated == searched == "demo"
    try:
        one, other = text_files.local(evaluated), text_files.local(searched)
        return one is not None and other is not None and one[0].samefile(other[0])
    except (SlebError, OSError):  # the search's text no longer exists
        return evaluated == searched


@dataclass
class Subject:
    """The model of a run, and the place where findings about it are kept."""

    run: Run
    job: JobSettings
    job_dir: Path
    loaded: LoadedModel
    stack: BlockStack
    meter: Meter
    answered: list[str] = field(default_factory=list)
    """Questions of the job, whether their answers were known or computed now."""

    @property
    def model(self) -> Any:
        """The baseline, in evaluation mode on its device."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that came with the model; None where it has none."""
        return self.loaded.tokenizer

    def source(self) -> SourceFolder | None:
        """The folder that the model was loaded from, where it has one."""
        return source_folder(self.loaded.name, self.loaded.revision)

    @property
    def is_plain(self) -> bool:
        """Whether this model's blocks cannot be replayed, so that each skip set takes a forward pass of its own."""
        return self.run.stack is not None and self.run.stack.self_check.scoring == "plain"

    def require_in_memory(self, work: str) -> None:
        """Require a model that is not read from disk block by block, for `work` on it. Raises `OptionError`."""
        if self.stack.streamed is not None:
            raise OptionError(
                f"The model is read from disk block by block (`memory_budget`), and {work} needs all of it in memory. "
                "Leave `memory_budget` out."
            )

    def require_within(self, lists: tuple[RemovalList, ...]) -> None:
        """Require that every list fits the model. Raises `OptionError`."""
        count = len(self.stack)
        for each in lists:
            outside = [block for block in each if block >= count]
            if outside:
                raise OptionError(f"The removal list names block {outside[0]}; the model has blocks 0 to {count - 1}.")
            if len(each) >= count:
                raise OptionError(f"The removal list names all {count} blocks; at least one must stay.")
        needed = {} if self.run.stack is None else self.run.stack.self_check.protected
        missed = sorted({block for each in lists for block in each} & set(needed))
        if missed:
            raise OptionError(f"Block {missed[0]} cannot be removed: {needed[missed[0]]}.")

    @cached_property
    def depends_on(self) -> str:
        """What findings depend on besides list and question, as a key: model and code."""
        assert self.run.stack is not None
        model = identity_of(self.loaded).key(self.run.stack.weights_hash, self.loaded.dtype)
        return hashlib.sha256(f"{model} {SCORING_VERSION} {EVALUATION_VERSION}".encode()).hexdigest()[:32]

    def adopt(self) -> None:
        """Take the findings of an earlier version for this model's, as far as what it wrote shows."""
        assert self.run.stack is not None
        if self.run.stack.identity is None:
            stack = write_identity(self.run, self.run.stack, self.loaded)
            self.run = self.run.model_copy(update={"stack": stack})
        findings_folder.adopt(self.run.run_dir, self.depends_on)

    def known(self, kind: type[F]) -> list[F]:
        """Findings of one kind that exist already, by this model and this code."""
        kept = findings_folder.of_kind(findings_folder.findings(self.run.run_dir), kind)
        return [each for each in kept if each.depends_on == self.depends_on]

    def table(self, windows: perplexity.Windows, weights: str) -> findings_folder.Table:
        """Nats on every window of a text, with weights of this type and treatment."""
        return findings_folder.Table(self.run.run_dir, windows.text, weights, self.depends_on)

    def keep(self, finding: Finding) -> None:
        """Write a finding at once, and count it as an answer."""
        findings_folder.keep(self.run.run_dir, finding)
        self.answer(finding)

    def answer(self, finding: Finding) -> None:
        """Count a finding as an answer of this job."""
        if finding.question not in self.answered:
            self.answered.append(finding.question)
        job_folder.write_result(self.job_dir, {"findings": self.answered})

    def windows(self, name: str, *, window: int, bos: Any = "no", limit: int | None = None) -> perplexity.Windows:
        """A text, cut into windows for this model. Raises `OptionError`, `CalibrationError`."""
        limited = positions_of(self.model.config)
        if limited is not None and window > limited:
            raise OptionError(
                f"Windows of {window} tokens are longer than the {limited} positions of the model. "
                f"Use `window={limited}` or less."
            )
        self.meter.phase(f"Reading {name}")
        windows = perplexity.windows(
            name, self.tokenizer, self.stack.config.vocab_size, window=window, bos=bos, limit=limit
        )
        if self.run.spec.kind == "search":
            remark = ""
            if _is_same_text(name, self.run.spec.calibration.source):
                remark = "; the blocks were chosen on a part of it"
            elif repeating := repetition.count_repeating(windows.ids, self.run.run_dir):
                remark = f"; {repeating:,} of its windows repeat text that the blocks were chosen on"
            described = windows.text.description + remark
            windows = replace(windows, text=windows.text.model_copy(update={"description": described}))
        return windows

    def scorer(self, windows: perplexity.Windows, stack: BlockStack | None = None) -> Scorer:
        """A scorer of lists on a text; of another model with the same blocks where `stack` is given."""
        return Scorer(
            stack or self.stack,
            windows.ids,
            batch_size=self.job.batch_size,
            plain=self.is_plain,
            watch=self.meter.advance,
        )

    def perplexities(
        self, windows: perplexity.Windows, lists: tuple[RemovalList, ...]
    ) -> dict[RemovalList, np.ndarray]:
        """Nats of the baseline and of each list on every window: what is known is read, the rest is computed and kept.

        Infinite where a list's predictions are not numbers. Raises `NotNumbers` where the baseline's are not: then
        nothing that it would be compared with says anything.
        """
        wanted = tuple(dict.fromkeys([(), *lists]))
        table, started = self.table(windows, self.loaded.dtype), time.perf_counter()
        scorer = self.scorer(windows)
        rows = table.read() or self._rows_without_key(windows, scorer)
        self.require_numbers((), rows.get((), np.zeros(0)))
        ahead = [each for each in wanted if each not in rows or np.isnan(rows[each]).any()]
        if ahead:
            self.meter.expect(scorer.cost(ahead, len(windows.ids)).units(scorer.head_weight), 0, 0)
            self.meter.within(f"Perplexity on {windows.text.name}")

        def keep(scored: dict[RemovalList, np.ndarray]) -> None:
            self.require_numbers((), scored[()])
            table.write(rows | scored)

        nats = perplexity.score(scorer, wanted, rows, keep)
        seconds = (time.perf_counter() - started) / max(1, len(ahead))
        have = {each.question: each for each in self.known(TextPerplexity)}
        for each in wanted:
            mean, error = perplexity.rise(nats[each], nats[()], windows.token_counts) if each else (None, None)
            finding = TextPerplexity(
                **self.facts(each, seconds),
                text=windows.text,
                measured=measured(nats[each], windows.token_counts),
                rise=mean,
                rise_standard_error=error,
            )
            if each in ahead or finding.question not in have:
                self.keep(finding)
            else:
                self.answer(finding)
        return nats

    def _rows_without_key(self, windows: perplexity.Windows, scorer: Scorer) -> dict[RemovalList, np.ndarray]:
        """Rows by an earlier version, which compared weights alone; none where the first window disagrees."""
        rows = findings_folder.Table(self.run.run_dir, windows.text, self.loaded.dtype).read()
        first = rows.get((), np.array([np.nan]))[0]
        if np.isnan(first):
            return {}
        now = scorer.score([()], np.arange(1))[0, 0]
        if agrees(now, first, windows.token_counts[0], self.loaded.dtype):
            self.adopt()
            return rows
        log.warning("What was scored on %s was of another model, and is scored again.", windows.text.name)
        return {}

    def require_numbers(self, removal_list: RemovalList, nats: np.ndarray) -> None:
        """Require that a list's predictions were numbers in every window. Raises `NotNumbers`."""
        if np.isinf(nats).any():
            raise NotNumbers(model_without(removal_list), self.loaded.dtype)

    def facts(self, removal_list: RemovalList, seconds: float) -> dict[str, Any]:
        """The fields that every finding has."""
        return dict(
            removal_list=removal_list,
            dtype=self.loaded.dtype,
            device=self.loaded.device,
            seconds=seconds,
            finished=time.time(),
            depends_on=self.depends_on,
        )

    @contextmanager
    def without(self, removal_list: RemovalList) -> Iterator[nn.Module]:
        """The model without these blocks, ready to generate with its cache; shares its weights with the baseline.

        Where the family's config cannot express that, it is the baseline with the blocks skipped.
        """
        if not removal_list:
            yield self.model
            return
        try:
            smaller = streamlined(self.model, removal_list)
        except ExportError:
            with self.stack.skipping(removal_list):
                yield self.model
            return
        yield smaller

    def num_removed(self, removal_list: RemovalList) -> str:
        """How many blocks a list removes, in words for a line of progress."""
        return f"{len(removal_list)} of {len(self.stack)} blocks removed" if removal_list else "the baseline"
