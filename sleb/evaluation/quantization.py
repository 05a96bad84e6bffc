"""Perplexity of removal lists with quantised weights (torchao). Writes no folder.

What is quantised are the linear weights inside the blocks; embeddings, head, norms and routers stay as they are, as in
AWQ and so in the paper's Figures 10 to 12. Weights are rounded to the nearest value without looking at any text, each
matrix by itself. So a block becomes the same whatever other blocks are there, and one quantised copy of the model
answers for the baseline and for every list, in one sweep.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sleb.errors import ModelError, OptionError
from sleb.evaluation import perplexity, quantized_folder
from sleb.evaluation.evaluated_model import Subject
from sleb.evaluation.quantized_folder import Quantised
from sleb.export.destination import Destination
from sleb.export.removal import plan_removal
from sleb.methods import statistics
from sleb.model.block_stack import BlockStack
from sleb.model.inspection.library_errors import quieten_torchao
from sleb.model.stack_discovery import find_stack
from sleb.records import EvaluatedText, Quantization, QuantizeJob, QuantizeSpec, RemovalList

SMALLEST_GROUP = 16  # weights that share a scale
_LEAST_SHARE = 0.5  # of the blocks' weights: below it the answer would be about something else


def require(job: QuantizeJob) -> None:
    """Refuse what can be refused before minutes of loading. Raises `CalibrationError`, `OptionError`."""
    ask = job.ask
    if importlib.util.find_spec("torchao") is None:
        raise OptionError("Quantising weights needs torchao: pip install 'sleb[quantize]'.")
    if not ask.texts:
        raise OptionError("Nothing to measure: give `perplexity` a text.")
    perplexity.require_there(ask.texts)
    if ask.out is not None:
        quantized_folder.require()
        if not ask.lists:
            raise OptionError("`out` names a folder for a model without blocks: give a removal list that names some.")
        Destination(Path(ask.out), ask.replace).require_free()


def work(subject: Subject, ask: QuantizeSpec) -> None:
    """Measure every scheme on every text, for the baseline and the lists; each finding is kept as soon as it is made.

    Raises `OptionError` for a model that torchao cannot quantise so, `ExportError` for one that cannot be written.
    """
    subject.require_in_memory("quantising it")
    if ask.out is not None:
        plan_removal(subject.model, ask.lists[-1])  # refused now rather than after the sweeps
    texts = [subject.windows(name, window=ask.window, limit=ask.limit) for name in ask.texts]
    before = [subject.perplexities(windows, ask.lists) for windows in texts]
    schemes = tuple(dict.fromkeys(ask.schemes))
    for scheme in schemes:
        of_scheme = _Scheme(subject, ask, scheme)
        for windows, nats in zip(texts, before, strict=True):
            of_scheme.measure(windows, nats)
        if ask.out is not None and scheme == schemes[-1]:
            of_scheme.write([windows.text for windows in texts])


class _Scheme:
    """One scheme of the request. The quantised copy is made when it is first needed."""

    def __init__(self, subject: Subject, ask: QuantizeSpec, scheme: str) -> None:
        self.subject = subject
        self.ask = ask
        self.scheme = scheme
        self.group_size = ask.group_size if scheme == "int4" else None
        self._quantised: Quantised | None = None

    def measure(self, windows: perplexity.Windows, before: dict[RemovalList, np.ndarray]) -> None:
        """Measure perplexity on one text, of lists for which it is unknown; `before` are nats of the loaded weights."""
        known = self._known(windows.text)
        wanted = tuple(dict.fromkeys([(), *self.ask.lists]))
        missing = [each for each in wanted if each not in known]
        if missing:
            started = time.perf_counter()
            nats = self._nats(windows, missing)
            seconds = (time.perf_counter() - started) / len(missing)
        for each in wanted:
            if each in known:
                self.subject.answer(known[each])
            else:
                self.subject.keep(self._finding(windows, each, before[each], nats[each], seconds))

    def write(self, texts: Sequence[EvaluatedText]) -> None:
        """Write the last list's model as a folder, proven, and name it in the findings."""
        removal_list, out = self.ask.lists[-1], Path(str(self.ask.out))
        measured = [self._known(text)[removal_list] for text in texts]
        quantized_folder.write(self.subject, self._copy(), removal_list, out, measured, allow_existing=self.ask.replace)
        for each in measured:
            self.subject.keep(each.model_copy(update={"out": self.ask.out}))

    def _known(self, text: EvaluatedText) -> dict[RemovalList, Quantization]:
        """Findings of this scheme on a text that exist already, by list."""
        wanted = (self.subject.loaded.dtype, self.scheme, self.group_size, text)
        return {
            each.removal_list: each
            for each in self.subject.known(Quantization)
            if (each.dtype, each.scheme, each.group_size, each.text) == wanted
        }

    def _nats(self, windows: perplexity.Windows, lists: Sequence[RemovalList]) -> dict[RemovalList, np.ndarray]:
        """Nats of the quantised model on every window; an interrupted sweep goes on where it was."""
        meter, scorer = self.subject.meter, self.subject.scorer(windows, self._copy().stack)
        group = "" if self.group_size is None else f"-{self.group_size}"
        weights = f"{self.subject.loaded.dtype}-{self.scheme}{group}"
        table = self.subject.table(windows, weights)
        rows = table.read()
        meter.expect(scorer.cost(lists, len(windows.ids)).units(scorer.head_weight), 0, 0)
        meter.within(f"Perplexity on {windows.text.name} in {self.scheme}")
        return perplexity.score(scorer, lists, rows, lambda scored: table.write(rows | scored))

    def _finding(
        self, windows: perplexity.Windows, removal_list: RemovalList, before: np.ndarray, after: np.ndarray, took: float
    ) -> Quantization:
        tokens = windows.token_counts
        bytes_before, bytes_after, share = self._copy().weight_bytes(removal_list)
        change, error = perplexity.rise(after, before, tokens)
        return Quantization(
            **self.subject.facts(removal_list, took),
            scheme=self.scheme,
            group_size=self.group_size,
            group_sizes=tuple(sorted(set(self._copy().group_sizes.values()))),
            text=windows.text,
            before=statistics.measured(before, tokens),
            measured=statistics.measured(after, tokens),
            change=change,
            change_standard_error=error,
            weight_bytes_before=bytes_before,
            weight_bytes=bytes_after,
            quantised_share=share,
            library=f"torchao {version('torchao')}",
        )

    def _copy(self) -> Quantised:
        if self._quantised is None:
            self.subject.meter.phase(f"Quantising to {self.scheme}")
            self._quantised = quantised(self.subject.model, self.scheme, self.ask.group_size)
        return self._quantised


def quantised(model: nn.Module, scheme: str, group_size: int = 128) -> Quantised:
    """A copy of the model with quantised linear weights in its blocks; the model itself stays as it is.

    int8 has a scale for each row, int4 one for each group of `group_size` weights of a row, halved until it divides
    the row; both are symmetric. Raises `OptionError` with the reason where this model cannot be quantised so.
    """
    made: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    path, blocks = find_stack(made)
    linear = {f"{path}.{name}": module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    _require_linear(made, blocks, linear)
    sizes = _group_sizes(linear, group_size) if scheme == "int4" else {}
    _quantise(blocks, {id(module): sizes.get(name) for name, module in linear.items()})
    try:
        stack = BlockStack(made)
    except ModelError as error:
        cause = error.__cause__ or error
        raise OptionError(
            f"{type(model).__name__} cannot run on torchao's {scheme} weights: it uses some otherwise than as a "
            f"linear map ({type(cause).__name__}: {str(cause)[:120]})."
        ) from error
    return Quantised(scheme, stack, sizes)


def _quantise(blocks: nn.ModuleList, sizes: dict[int, int | None]) -> None:
    """Replace the weights of these modules; a size is that of an int4 group, None means int8."""
    quieten_torchao()
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    for size in dict.fromkeys(sizes.values()):
        # Not Int4WeightOnlyConfig: all its formats need a GPU, this one runs everywhere. The inductor's settings are
        # those of the whole process, and quantising must not change how others multiply.
        config = (
            Int8WeightOnlyConfig(set_inductor_config=False)
            if size is None
            else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(size))  # type: ignore[attr-defined]
        )
        own = {key for key, other in sizes.items() if other == size}
        quantize_(blocks, config, filter_fn=lambda module, _name, own=own: id(module) in own)


def _require_linear(model: nn.Module, blocks: nn.ModuleList, linear: dict[str, nn.Linear]) -> None:
    """Refuse what is quantised already, and blocks that are mostly something else. Raises `OptionError`."""
    name = type(model).__name__
    method = getattr(model, "quantization_method", None)
    plain = all(
        type(module.weight.data) is torch.Tensor and module.weight.is_floating_point() for module in linear.values()
    )
    if not plain or getattr(method, "value", method) not in (None, "gguf"):  # GGUF is dequantised while it is loaded
        raise OptionError(f"{name} is quantised already; give the model that it was made from.")
    weights = {id(module.weight) for module in linear.values()}
    others = {path: each for path, each in blocks.named_parameters() if id(each) not in weights}
    total = sum(each.numel() for each in blocks.parameters())
    share = 1 - sum(each.numel() for each in others.values()) / max(total, 1)
    if share < _LEAST_SHARE:
        largest = max(others, key=lambda path: others[path].numel(), default="none")
        raise OptionError(
            f"torchao quantises linear modules, which hold {share:.0%} of the weights in the blocks of {name}; the "
            f"rest is elsewhere (in {largest}, for one), and half a quantised model would say little."
        )


def _group_sizes(linear: dict[str, nn.Linear], wanted: int) -> dict[str, int]:
    """The wanted size by module, halved until it divides the rows: kernels for int4 are for 128, 64 and 32.

    Raises `OptionError` where no half of it divides some rows, with a size that does for all of them.
    """
    rows = {module.in_features: name for name, module in reversed(linear.items())}
    unfit = sorted(row for row in rows if _fitting(row, wanted) is None)
    if unfit:
        smaller = range(min(wanted, max(rows)), SMALLEST_GROUP - 1, -1)
        best = next((size for size in smaller if all(_fitting(row, size) for row in rows)), None)
        listed = ", ".join(f"{row} ({rows[row]})" for row in unfit[:5]) + (" and others" if len(unfit) > 5 else "")
        raise OptionError(
            f"Groups of {wanted} weights, or of halves of that, do not divide rows of {listed}; "
            f"{f'give `group_size={best}`' if best else 'use int8'}."
        )
    return {name: _fitting(module.in_features, wanted) or wanted for name, module in linear.items()}


def _fitting(row: int, size: int) -> int | None:
    """The size or the first half of it that divides a row; None where none does."""
    while row % size and size % 2 == 0 and size // 2 >= SMALLEST_GROUP:
        size //= 2
    return None if row % size else size
