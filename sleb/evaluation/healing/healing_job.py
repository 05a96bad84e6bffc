"""Healing a streamlined model: a refit at its cuts (`least_squares`), adapters (`lora`), and what it costs.

Healed weights are kept in `<run>/healing/`, so that another text or a folder to write needs no second training. The
baseline's weights are never written to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sleb.errors import NotNumbers, OptionError, ScoringError, model_without
from sleb.evaluation import perplexity
from sleb.evaluation.evaluated_model import Subject
from sleb.evaluation.healing import healed_weights, least_squares, lora
from sleb.evaluation.healing.healed_folder import Healed, write_adapter, write_merged
from sleb.evaluation.healing.healed_weights import Facts
from sleb.export.destination import Destination
from sleb.export.removal import streamlined
from sleb.methods import statistics
from sleb.model.block_stack import BlockStack
from sleb.model.generation import require_positions
from sleb.model.loading import forget_quantisation
from sleb.records import CalibrationSpec, EvaluatedText, Healing, HealJob, HealSpec, Measured, RemovalList
from sleb.runtime.files import inside
from sleb.scoring.scorer import Scorer
from sleb.text import calibration, repetition

log = logging.getLogger(__name__)

_NOT_OF_WEIGHTS = ("limit", "window", "out", "adapter", "replace")  # what a request says besides the healing
_TRAINING = ("epochs", "rank", "learning_rate", "batch_sequences")  # without a training they mean nothing
_MOST_HELD_OUT = 32  # sequences
_ENOUGH_TO_REFIT = 65_536  # tokens, where a training on more of them follows


def require(job: HealJob) -> None:
    """Refuse what can be refused before minutes of loading. Raises `CalibrationError`, `OptionError`."""
    ask = job.ask
    if not ask.lists:
        raise OptionError(
            "There is nothing to heal in the baseline: give `removal_list` some blocks, or `steps` above 0."
        )
    if not ask.texts:
        raise OptionError("Nothing to measure: give `perplexity` a text.")
    perplexity.require_there(ask.texts)
    calibration.require_there(_text_of(ask))
    if ask.how != "linear":
        lora.require()
    if ask.adapter and ask.how != "lora":
        raise OptionError(f"`how={ask.how}` changes weights, which no adapter holds; leave `adapter` out.")
    if ask.adapter and ask.out is None:
        raise OptionError("`adapter` says what to write: name a folder with `out`.")
    if ask.out is not None:
        Destination(Path(ask.out), ask.replace).require_free()


def work(subject: Subject, ask: HealSpec) -> None:
    """Heal the last list and measure it on every text; write it where the request names a folder.

    Raises `OptionError` for a model that cannot be healed so, `ExportError` where no config can say what is removed,
    `NotNumbers` where there is nothing to heal from, `ScoringError` where the training diverged.
    """
    subject.require_in_memory("healing")
    _require_one_device(subject)
    if ask.how != "lora" and subject.is_plain:
        raise OptionError(f"This model's blocks cannot be run one by one, as `how={ask.how}` needs; use `how=lora`.")
    require_positions(subject.stack.config, ask.sequence_length)
    texts = [subject.windows(name, window=ask.window, limit=ask.limit) for name in ask.texts]
    healing = _Healing.of(subject, ask)
    for windows in texts:
        healing.measure(windows)
    if ask.out is not None:
        healing.write([windows.text for windows in texts])


def _require_one_device(subject: Subject) -> None:
    if len(set((getattr(subject.model, "hf_device_map", None) or {}).values())) > 1:
        raise OptionError("Healing works on one device, and the model is spread over several; use `device=cuda:0`.")


def _text_of(ask: HealSpec) -> CalibrationSpec:
    return CalibrationSpec(
        source=ask.source, sequences=ask.sequences, sequence_length=ask.sequence_length, chat=ask.chat
    )


class _Healing:
    """One list and its healing. The weights are computed, or read, when they are first needed."""

    def __init__(
        self, subject: Subject, ask: HealSpec, request: HealSpec, text: calibration.CalibrationSet, folder: Path
    ) -> None:
        self.subject = subject
        self.ask = ask
        self.request = request
        """The settings that affect the weights, as a finding keeps them."""
        self.removal_list: RemovalList = ask.lists[-1]
        self.text = text
        self.folder = folder
        self._kept: tuple[dict[str, torch.Tensor], Facts] | None = None
        self._healed: Healed | None = None

    @classmethod
    def of(cls, subject: Subject, ask: HealSpec) -> _Healing:
        """Read the text to heal on. Raises `CalibrationError`."""
        subject.meter.phase(f"Reading {Path(ask.source).name}")
        held_out = min(_MOST_HELD_OUT, max(1, ask.sequences // 8))
        text = calibration.build(_text_of(ask), held_out, ask.seed, subject.tokenizer, subject.stack.config.vocab_size)
        defaults = HealSpec.model_fields
        others = (*_NOT_OF_WEIGHTS, *(_TRAINING if ask.how == "linear" else ()))
        nothing = {"lists": (), "texts": ()} | {name: defaults[name].default for name in others}
        request = ask.model_copy(update=nothing)
        question = [request.model_dump(mode="json"), ask.lists[-1], subject.depends_on, text.tokens_hash]
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:20]
        return cls(subject, ask, request, text, inside(subject.run.run_dir, "healing", key))

    def measure(self, windows: perplexity.Windows) -> None:
        """Measure perplexity on one text before and after, unless it is known."""
        nats = self.subject.perplexities(windows, (self.removal_list,))
        self.subject.require_numbers(self.removal_list, nats[self.removal_list])
        known = self._known(windows.text)
        if known is not None:
            self.subject.answer(known)
            return
        shared = repetition.count_sharing(windows.ids, self.text.ids[: self.text.sequences])
        if shared:
            log.warning(
                "%d of %d windows of %s repeat text that is healed on: they do not test the healing.",
                shared, len(windows.ids), windows.text.name,
            )  # fmt: skip
        _, facts = self._weights()
        started = time.perf_counter()
        after = self._nats(windows)
        if not np.isfinite(after).all():
            raise self._diverged("the healed model's predictions are not numbers")
        seconds = facts.seconds + time.perf_counter() - started
        change, error = perplexity.rise(after, nats[self.removal_list], windows.token_counts)
        self.subject.keep(
            Healing(
                **self.subject.facts(self.removal_list, seconds),
                ask=self.request,
                text=windows.text,
                baseline=statistics.measured(nats[()], windows.token_counts),
                before=statistics.measured(nats[self.removal_list], windows.token_counts),
                after=statistics.measured(after, windows.token_counts),
                change=change,
                change_standard_error=error,
                healed_on=self.text.tokens_hash,
                healing_text=self.text.text,
                windows_healed_on=shared,
                held_out_before=Measured(nll_sum=facts.held_out_before, token_count=facts.held_out_tokens),
                held_out_after=Measured(nll_sum=facts.held_out_after, token_count=facts.held_out_tokens),
                trained_parameters=facts.trained_parameters,
                trained_tokens=facts.trained_tokens,
                losses=facts.losses,
            )
        )

    def write(self, texts: Sequence[EvaluatedText]) -> None:
        """Write the folder that was asked for, and name it in the findings."""
        out = str(self.ask.out)
        measured = [known for text in texts if (known := self._known(text)) is not None]
        if self.ask.adapter:
            adapted = lora.adapt(self._smaller(), self.ask.rank, self.ask.seed)
            lora.put(adapted, self._weights()[0])
            write_adapter(
                self.subject, adapted, self.removal_list, Path(out), measured, allow_existing=self.ask.replace
            )
        else:
            write_merged(self.subject, self._model(), Path(out), measured, allow_existing=self.ask.replace)
        for each in measured:
            self.subject.keep(each.model_copy(update={"out": out}))

    def _known(self, text: EvaluatedText) -> Healing | None:
        wanted = (self.removal_list, self.subject.loaded.dtype, self.request, text, self.text.tokens_hash)
        for each in self.subject.known(Healing):
            if (each.removal_list, each.dtype, each.ask, each.text, each.healed_on) == wanted:
                return each
        return None

    def _nats(self, windows: perplexity.Windows) -> np.ndarray:
        """Nats of the healed model on every window, float64 (windows,); an interrupted sweep goes on where it was."""
        meter, scorer = self.subject.meter, self.subject.scorer(windows, self._model().stack)
        weights = f"{self.subject.loaded.dtype}-healed-{self.folder.name}"
        table = self.subject.table(windows, weights)
        rows = table.read()
        meter.expect(scorer.cost([()], len(windows.ids)).units(scorer.head_weight), 0, 0)
        meter.within(f"Perplexity on {windows.text.name}, healed")
        return perplexity.score(scorer, [()], rows, lambda scored: table.write(rows | scored))[()]

    def _model(self) -> Healed:
        """The smaller model with healed weights."""
        if self._healed is None:
            tensors, _ = self._weights()
            self._healed = self._with(tensors)
        return self._healed

    def _with(self, tensors: dict[str, torch.Tensor]) -> Healed:
        smaller: Any = self._smaller()
        own = smaller.state_dict().keys() & tensors.keys()
        least_squares.put(smaller, {name: tensors[name] for name in own})
        if own != tensors.keys():
            adapted = lora.adapt(smaller, self.ask.rank, self.ask.seed)
            lora.put(adapted, tensors)
            smaller = lora.merge(adapted)
        return Healed(self.removal_list, BlockStack(smaller))

    def _smaller(self) -> nn.Module:
        """A streamlined model that shares its weights with the baseline."""
        smaller = streamlined(self.subject.model, self.removal_list)
        forget_quantisation(smaller)
        return smaller

    def _weights(self) -> tuple[dict[str, torch.Tensor], Facts]:
        """Adapters, or refit layers, by name in the smaller model: read where they are known."""
        if self._kept is None:
            self._kept = self._read() or self._compute()
        return self._kept

    def _compute(self) -> tuple[dict[str, torch.Tensor], Facts]:
        tensors: dict[str, torch.Tensor] = {}
        losses: tuple[float, ...] = ()
        seconds = 0.0
        if self.ask.how != "lora":
            tensors, seconds = self._refit()
        if self.ask.how != "linear":
            trained, losses, more = self._trained(tensors)
            tensors, seconds = tensors | trained, seconds + more
        if not all(each.isfinite().all() for each in tensors.values()):
            raise self._diverged("the healed weights are not numbers")
        healed = self._healed = self._with(tensors)
        before, after = self._held_out(self.subject.stack, self.removal_list), self._held_out(healed.stack, ())
        if before is None:
            raise NotNumbers(model_without(self.removal_list), self.subject.loaded.dtype)
        if after is None:
            raise self._diverged("the healed model's predictions are not numbers")
        epochs = 1 if self.ask.how == "linear" else self.ask.epochs
        length = self.text.ids.shape[1]
        facts = Facts(
            trained_parameters=sum(each.numel() for each in tensors.values()),
            trained_tokens=epochs * self.text.sequences * length,
            losses=losses,
            seconds=seconds,
            held_out_before=before,
            held_out_after=after,
            held_out_tokens=self.text.held_out * (length - 1),
        )
        healed_weights.write(self._path, tensors, asdict(facts))
        self._tidy()
        return tensors, facts

    def _diverged(self, symptom: str) -> ScoringError:
        """The error of healed weights that are not numbers; without a training only their type can be too narrow."""
        if self.ask.how == "linear":
            return NotNumbers("The healed model", self.subject.loaded.dtype)
        return lora.diverged(symptom, self.subject.loaded.dtype)

    def _tidy(self) -> None:
        """Delete what a training would have been resumed from."""
        for path in (self._checkpoint, self._before_training):
            path.unlink(missing_ok=True)

    def _trained(self, refits: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple[float, ...], float]:
        """Train adapters; returns them, the losses, and seconds."""
        subject, ask = self.subject, self.ask
        smaller = self._smaller()
        least_squares.put(smaller, refits)
        adapted = lora.adapt(smaller, ask.rank, ask.seed)
        settings = lora.Settings(ask.rank, ask.learning_rate, ask.epochs, ask.batch_sequences, ask.seed)
        subject.meter.phase("Training adapters")
        ahead = [0]

        def tell(done: int, updates: int, message: str) -> None:
            if not ahead[0]:  # the first of this job, which may resume from a checkpoint
                ahead[0] = updates - done + 1
                subject.meter.expect(float(ahead[0]), 0, 0)
                subject.meter.within("Training adapters")
            subject.meter.advance(1.0, message)

        ids = self.text.ids[: self.text.sequences]
        progress = lora.train(adapted, ids, settings, self._checkpoint, tell, in_pieces=not subject.is_plain)
        return lora.weights(adapted), lora.course(progress.losses), progress.seconds

    def _refit(self) -> tuple[dict[str, torch.Tensor], float]:
        """Refit layers, and seconds; where a training follows, on no more text than is needed."""
        known = None if self.ask.how == "linear" else healed_weights.read(self._before_training)
        if known is not None:
            return known[0], float(known[1]["seconds"])
        started = time.perf_counter()
        self.subject.meter.phase("Refitting before the cuts")
        ids, count = self.text.ids, self.text.sequences
        if self.ask.how == "both":
            count = min(count, max(1, _ENOUGH_TO_REFIT // ids.shape[1]))
            ids = np.concatenate([ids[:count], ids[self.text.sequences :]])
        smaller = BlockStack(self._smaller())
        refits = least_squares.refit(
            self.subject.stack, smaller, self.removal_list, ids, len(ids) - count, self.subject.meter.part
        )
        tensors, seconds = {each.name: each.weight for each in refits}, time.perf_counter() - started
        if self.ask.how == "both":
            healed_weights.write(self._before_training, tensors, {"seconds": seconds})
        return tensors, seconds

    @property
    def _path(self) -> Path:
        return inside(self.folder, "healed.safetensors")

    @property
    def _checkpoint(self) -> Path:
        return inside(self.folder, "checkpoint.safetensors")

    @property
    def _before_training(self) -> Path:
        return inside(self.folder, "mended.safetensors")

    def _read(self) -> tuple[dict[str, torch.Tensor], Facts] | None:
        """The weights of an earlier job; None where they are missing or damaged, and computed again."""
        stored = healed_weights.read(self._path)
        if stored is None:
            return None
        tensors, values = stored
        try:
            facts = Facts(**values | {"losses": tuple(values["losses"])})
            self._tidy()
            return tensors, facts
        except (KeyError, TypeError) as error:
            log.warning("%s cannot be read, and is made again: %s", self._path, error)
            return None

    def _held_out(self, stack: BlockStack, removal_list: RemovalList) -> float | None:
        """Nats on the sequences of the healing text that were not healed on; None where predictions are not numbers."""
        windows = self.text.ids[self.text.sequences :]
        self.subject.meter.phase("Perplexity on held-out text")
        scorer = Scorer(stack, windows, plain=self.subject.is_plain)
        total = float(scorer.score([removal_list], np.arange(len(windows))).sum())
        return total if np.isfinite(total) else None
