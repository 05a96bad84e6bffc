"""Healing a streamlined model: a refit at its cuts (`least_squares`), adapters (`lora`), and what it costs.

What was found of the weights is kept in `<run>/healing/`, so that another text or a folder to write needs no second
training. The unmodified model's weights are never written to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sleb.errors import NotNumbers, OptionError, ScoringError, model_without
from sleb.evaluation import perplexity
from sleb.evaluation.evaluated_model import Subject
from sleb.evaluation.healing import least_squares, lora
from sleb.evaluation.healing.healed_folder import Healed, write_adapter, write_merged
from sleb.export.destination import require_free
from sleb.export.removal import streamlined
from sleb.methods import statistics
from sleb.model.block_stack import BlockStack
from sleb.model.generation import require_positions
from sleb.model.loading import forget_quantisation
from sleb.records import CalibrationSpec, EvaluatedText, Healing, HealJob, HealSpec, Measured, RemovalList
from sleb.runtime.files import inside, replace_file
from sleb.scoring.sweep import Scorer
from sleb.text import calibration

log = logging.getLogger(__name__)

_TRAINING = ("epochs", "rank", "learning_rate", "batch_sequences")  # nothing to a remedy without training
_MOST_HELD_OUT = 32  # sequences
_ENOUGH_TO_MEND = 65_536  # tokens, where a training on more of them follows


def require(job: HealJob) -> None:
    """What can be refused before minutes of loading. Raises `CalibrationError`, `OptionError`."""
    ask = job.ask
    if not ask.lists:
        raise OptionError(
            "There is nothing to heal in the unmodified model: give --removal-list some blocks, or --steps above 0."
        )
    if not ask.texts:
        raise OptionError("Nothing to measure: give --perplexity a text.")
    perplexity.require_there(ask.texts)
    calibration.require_there(_text_of(ask))
    if ask.how != "linear":
        lora.require()
    if ask.adapter and ask.how != "lora":
        raise OptionError(f"--how {ask.how} changes weights, which no adapter holds; leave --adapter out.")
    if ask.adapter and ask.out is None:
        raise OptionError("--adapter says what to write: name a folder with --out.")
    if ask.out is not None:
        require_free(Path(ask.out), ask.replace)


def work(subject: Subject, ask: HealSpec) -> None:
    """Heal the last list and measure it on every text; write it where the ask names a folder.

    Raises `OptionError` for a model that cannot be healed so, `ExportError` where no config can say what is removed,
    `NotNumbers` where there is nothing to heal from, `ScoringError` where the training diverged.
    """
    _require_whole(subject)
    if ask.how != "lora" and subject.is_plain:
        raise OptionError(f"This model's blocks cannot be run one by one, as --how {ask.how} needs; use --how lora.")
    require_positions(subject.stack.config, ask.sequence_length)
    texts = [subject.windows(name, window=ask.window, limit=ask.limit) for name in ask.texts]
    healing = _Healing(subject, ask)
    for windows in texts:
        healing.measure(windows)
    if ask.out is not None:
        healing.write([windows.text for windows in texts])


def _require_whole(subject: Subject) -> None:
    if subject.stack.streamed is not None:
        raise OptionError(
            "The model is read from disk block by block (--memory-budget), and healing needs all of it in memory. "
            "Leave --memory-budget out."
        )
    if len(set((getattr(subject.model, "hf_device_map", None) or {}).values())) > 1:
        raise OptionError("Healing works on one device, and the model is spread over several; use --device cuda:0.")


def _text_of(ask: HealSpec) -> CalibrationSpec:
    return CalibrationSpec(
        source=ask.source, sequences=ask.sequences, sequence_length=ask.sequence_length, chat=ask.chat
    )


@dataclass(frozen=True)
class _Facts:
    """What is known of a healing besides its weights."""

    trained_parameters: int
    trained_tokens: int
    losses: tuple[float, ...]
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    """Nats; None where predictions were no numbers."""
    held_out_tokens: int


class _Healing:
    """One list, healed as asked. The weights are found, or read, when they are first needed."""

    def __init__(self, subject: Subject, ask: HealSpec) -> None:
        self.subject = subject
        self.ask = ask
        self.removal_list: RemovalList = ask.lists[-1]
        subject.meter.phase(f"Reading {Path(ask.source).name}")
        held_out = min(_MOST_HELD_OUT, max(1, ask.sequences // 8))
        self.text = calibration.build(
            _text_of(ask), held_out, ask.seed, subject.tokenizer, subject.stack.config.vocab_size
        )
        defaults = HealSpec.model_fields
        nothing = {"lists": (), "texts": (), **{name: defaults[name].default for name in ("limit", "window", "out")}}
        nothing |= {name: defaults[name].default for name in ("adapter", "replace")}
        if ask.how == "linear":
            nothing |= {name: defaults[name].default for name in _TRAINING}
        self.asked = ask.model_copy(update=nothing)
        question = [self.asked.model_dump(mode="json"), self.removal_list, subject.depends_on, self.text.tokens_hash]
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = inside(subject.run.run_dir, "healing", key)
        self._found: tuple[dict[str, torch.Tensor], _Facts] | None = None
        self._healed: Healed | None = None

    def measure(self, windows: perplexity.Windows) -> None:
        """Perplexity on one text before and after, unless it is known."""
        nats = self.subject.perplexities(windows, (self.removal_list,))
        self.subject.require_numbers(self.removal_list, nats[self.removal_list])
        known = self._known(windows.text)
        if known is not None:
            self.subject.answer(known)
            return
        shared = calibration.count_sharing(windows.ids, self.text.ids[: self.text.sequences])
        if shared:
            log.warning(
                "%d of %d windows of %s repeat text that is healed on: what they say is no test of the healing.",
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
                ask=self.asked,
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
        """The folder that was asked for; the findings say so."""
        out = str(self.ask.out)
        measured = [found for text in texts if (found := self._known(text)) is not None]
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
        wanted = (self.removal_list, self.subject.loaded.dtype, self.asked, text, self.text.tokens_hash)
        for each in self.subject.known(Healing):
            if (each.removal_list, each.dtype, each.ask, each.text, each.healed_on) == wanted:
                return each
        return None

    def _nats(self, windows: perplexity.Windows) -> np.ndarray:
        """Of the healed model on every window, float64 (windows,); a sweep that was cut short goes on where it was."""
        meter, scorer = self.subject.meter, self.subject.scorer(windows, self._model().stack)
        weights = f"{self.subject.loaded.dtype}-healed-{self.folder.name}"
        table = self.subject.table(windows, weights)
        rows = table.read()
        meter.expect(scorer.cost([()], len(windows.ids)).units(scorer.head_weight), 0, 0)
        meter.within(f"Perplexity on {windows.text.name}, healed")
        return perplexity.score(scorer, [()], rows, lambda found: table.write(rows | found))[()]

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
        """A streamlined model that shares its weights with the unmodified one."""
        smaller = streamlined(self.subject.model, self.removal_list)
        forget_quantisation(smaller)
        return smaller

    def _weights(self) -> tuple[dict[str, torch.Tensor], _Facts]:
        """Adapters, or layers fitted anew, by name in the smaller model: read where they are known."""
        if self._found is None:
            self._found = self._read() or self._find()
        return self._found

    def _find(self) -> tuple[dict[str, torch.Tensor], _Facts]:
        tensors: dict[str, torch.Tensor] = {}
        losses: tuple[float, ...] = ()
        seconds = 0.0
        if self.ask.how != "lora":
            tensors, seconds = self._mended()
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
        facts = _Facts(
            trained_parameters=sum(each.numel() for each in tensors.values()),
            trained_tokens=epochs * self.text.sequences * length,
            losses=losses,
            seconds=seconds,
            held_out_before=before,
            held_out_after=after,
            held_out_tokens=self.text.held_out * (length - 1),
        )
        _store(self._path, tensors, asdict(facts))
        self._tidy()
        return tensors, facts

    def _diverged(self, how: str) -> ScoringError:
        """Without a training it is the type alone: its weights are those that the fit found, rounded."""
        if self.ask.how == "linear":
            return NotNumbers("The healed model", self.subject.loaded.dtype)
        return lora.diverged(how, self.subject.loaded.dtype)

    def _tidy(self) -> None:
        """What a training goes on from is needed no longer."""
        for path in (self._checkpoint, self._before_training):
            path.unlink(missing_ok=True)

    def _trained(self, mended: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple[float, ...], float]:
        """Adapters, losses and seconds."""
        subject, ask = self.subject, self.ask
        smaller = self._smaller()
        least_squares.put(smaller, mended)
        adapted = lora.adapt(smaller, ask.rank, ask.seed)
        settings = lora.Settings(ask.rank, ask.learning_rate, ask.epochs, ask.batch_sequences, ask.seed)
        subject.meter.phase("Training adapters")
        ahead = [0]

        def tell(done: int, updates: int, message: str) -> None:
            if not ahead[0]:  # the first of this job, which may go on from a checkpoint
                ahead[0] = updates - done + 1
                subject.meter.expect(float(ahead[0]), 0, 0)
                subject.meter.within("Training adapters")
            subject.meter.advance(1.0, message)

        ids = self.text.ids[: self.text.sequences]
        progress = lora.train(adapted, ids, settings, self._checkpoint, tell, in_pieces=not subject.is_plain)
        return lora.weights(adapted), lora.course(progress.losses), progress.seconds

    def _mended(self) -> tuple[dict[str, torch.Tensor], float]:
        """Layers fitted anew, and seconds; where a training follows, on no more text than is needed."""
        known = None if self.ask.how == "linear" else _stored(self._before_training)
        if known is not None:
            return known[0], float(known[1]["seconds"])
        started = time.perf_counter()
        self.subject.meter.phase("Mending the cuts")
        ids, count = self.text.ids, self.text.sequences
        if self.ask.how == "both":
            count = min(count, max(1, _ENOUGH_TO_MEND // ids.shape[1]))
            ids = np.concatenate([ids[:count], ids[self.text.sequences :]])
        smaller = BlockStack(self._smaller())
        mended = least_squares.mend(
            self.subject.stack, smaller, self.removal_list, ids, len(ids) - count, self.subject.meter.part
        )
        tensors, seconds = {each.name: each.weight for each in mended}, time.perf_counter() - started
        if self.ask.how == "both":
            _store(self._before_training, tensors, {"seconds": seconds})
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

    def _read(self) -> tuple[dict[str, torch.Tensor], _Facts] | None:
        """What an earlier job found; nothing where it is missing or damaged: then it is found anew."""
        found = _stored(self._path)
        if found is None:
            return None
        try:
            facts = _Facts(**found[1] | {"losses": tuple(found[1]["losses"])})
            self._tidy()
            return found[0], facts
        except (KeyError, TypeError) as error:
            log.warning("%s cannot be read, and is made anew: %s", self._path, error)
            return None

    def _held_out(self, stack: BlockStack, removal_list: RemovalList) -> float | None:
        """Nats on the sequences of the text to heal on that were not healed on."""
        windows = self.text.ids[self.text.sequences :]
        self.subject.meter.phase("Perplexity on held-out text")
        scorer = Scorer(stack, windows, plain=self.subject.is_plain)
        total = float(scorer.score([removal_list], np.arange(len(windows))).sum())
        return total if np.isfinite(total) else None


def _store(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    whole = {name: each.cpu().contiguous() for name, each in tensors.items()}
    replace_file(path, save(whole, {"facts": json.dumps(facts)}))


def _stored(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `_store` wrote; nothing where it is missing or damaged: then it is made anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read, and is made anew: %s", path, error)
        return None
