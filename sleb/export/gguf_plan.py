"""The plan of a GGUF file without some of its blocks, or its refusal. Knows GGUF files; decodes no weight.

A GGUF file says in its settings what each block is, and leaves some of it to the program that reads it: llama.cpp
knows the sliding windows of some architectures by the block's index alone. What cannot be said in the smaller file is
refused before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sleb.errors import ExportError, ModelError, OptionError, excerpt
from sleb.export.destination import Destination
from sleb.export.smaller_config import check_removal_list
from sleb.model import demo
from sleb.model.inspection import gguf_header
from sleb.records import ExportJob, Run, is_gguf
from sleb.runtime import files

REMOVAL_LIST = "sleb.removal_list"
BLOCKS_BEFORE = "sleb.blocks_before"

FILE_BYTES = "sleb.file_bytes"
"""The length of the file that an export wrote: another tool that carries the keys over writes another length."""

FILE = "model.gguf"
"""The name of an export before it is moved into place."""

FAILURES = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError)

_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "plamo3": 8} | dict.fromkeys(
    ("afmoe", "cohere2", "exaone-moe", "exaone4", "llama4", "mellum", "olmo2"), 4
)
"""Architectures whose sliding windows follow a period that llama.cpp knows where the file does not say it.

From its `load_swa_pattern` (release b11434): the last block of each period attends to everything.
"""
_SCALED_BY_COUNT = {"gemma2": 46, "gemma3": 62}
"""Number of blocks by which llama.cpp recognises a 27B model, whose attention it scales like that of no other."""

_WINDOWS_UNSAID = re.compile("Gemma[23](?!n)|GptOss")
"""Classes for which llama.cpp's converter (b11434) does not write which blocks have a window: it would lose them."""

_BEWARE = (
    " Beware of the converter here: it does not write which blocks have a sliding window, and llama.cpp then counts "
    "them off again; with `gguf`, a list with which that would go wrong is refused."
)

_NEUTRAL = re.compile(r"^(rope|classifier)\.|layer_norm|time_step")  # names that only seem to be about blocks
_OF_BLOCKS = re.compile(r"layer|block|interval|every|step|pattern|nextn")
_INDICES = re.compile(r"layers$|indices|_idx$|_ids$|mapping")
_SETTINGS_THAT_FOLLOW = ("block_count", "leading_dense_block_count", "nextn_predict_layers")
_WITH_A_PERIOD = ("full_attention_interval", "attention.sliding_window_pattern", "interleave_moe_layer_step")


@dataclass(frozen=True)
class Cut:
    """A GGUF file without some of its blocks, as it is to be written."""

    source: Path
    architecture: str
    num_blocks: int
    """Blocks in the stack; blocks behind it that predict further tokens (MTP) are not counted, and stay."""
    kept: tuple[int, ...]
    """Original indices of the blocks that stay, those behind the stack included."""
    settings: dict[str, Any]
    """The settings that change, by key, and their new values."""
    reader: Any
    """The open `gguf.GGUFReader`; its tensors lie in the file, not in memory."""
    tensors: tuple[tuple[str, Any], ...]
    """New name and `gguf.ReaderTensor` of each tensor that is copied, in the order of the file."""

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are copied."""
        return sum(tensor.n_bytes for _, tensor in self.tensors)


def source_of(run: Run, job: ExportJob) -> Path:
    """The GGUF file that the job cuts: the one it names, or else the run's model. Raises `OptionError` without one."""
    if job.gguf is not None:
        path = files.expanded(Path(job.gguf))
    elif run.spec.model == "demo":
        path = demo.model_file()
    elif is_gguf(run.spec.model):
        path = files.expanded(Path(run.spec.model))
    else:
        beware = "" if run.stack is None or not _WINDOWS_UNSAID.match(run.stack.model_class) else _BEWARE
        raise OptionError(
            f"{run.spec.model} is not a GGUF file. Write the folder (`format=hf`) and convert that with llama.cpp's "
            f"convert_hf_to_gguf.py; or name a GGUF file of this model with `gguf`.{beware}"
        )
    if not path.is_file():
        raise OptionError(f"The file {path} does not exist.")
    return path


def destination_of(out: Path, replace: bool, source: Path | None = None) -> Destination:
    """Where the smaller GGUF file is written; `source` is the file that it is cut from."""
    return Destination(out, replace, FILE, ".gguf", source, _is_export)


def plan_cut(source: Path, removal_list: Sequence[int]) -> Cut:
    """Plan the file without these blocks.

    Raises `ExportError` where a GGUF file cannot express it, `ModelError` for a file that is not a complete model,
    `OptionError` for a removal list that does not fit it.
    """
    try:
        return _planned(source, removal_list)
    except (*FAILURES, ArithmeticError) as error:  # such as a setting of the wrong type
        raise ModelError(
            f"{source} says what no model does ({type(error).__name__}: {excerpt(error)}); fetch it again."
        ) from error


def _planned(source: Path, removal_list: Sequence[int]) -> Cut:
    reader = _read(source)
    architecture = value_of(reader, "general.architecture")
    total = value_of(reader, f"{architecture}.block_count")
    if not isinstance(architecture, str) or not isinstance(total, int) or total < 1:
        raise ModelError(f"{source} does not say how many blocks it has ({architecture}.block_count); fetch it again.")
    if value_of(reader, "general.type") not in (None, "model"):
        raise ModelError(f"{source} is not a model but a file of type {value_of(reader, 'general.type')!r}.")
    further = value_of(reader, f"{architecture}.nextn_predict_layers") or 0
    num_blocks = total - further
    check_removal_list(removal_list, num_blocks)
    kept = tuple(block for block in range(total) if block not in set(removal_list))
    position = {block: index for index, block in enumerate(kept)}
    tensors, seen = [], set()
    for tensor in reader.tensors:
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        if match is None:
            tensors.append((tensor.name, tensor))
            continue
        seen.add(int(match[1]))
        if int(match[1]) in position:
            tensors.append((f"blk.{position[int(match[1])]}.{tensor.name[match.end() :]}", tensor))
    if seen != set(range(total)):
        odd = min(seen ^ set(range(total)))
        raise ModelError(
            f"{source} says it has {total} blocks and {'has' if odd in seen else 'lacks'} tensors of block {odd}; "
            "fetch it again."
        )
    cut = Cut(source, architecture, num_blocks, kept, {}, reader, tuple(tensors))
    return replace(cut, settings=_settings(cut, total))


def _settings(cut: Cut, total: int) -> dict[str, Any]:
    """The settings that change. Raises `ExportError` for those that would then be wrong."""
    prefix = f"{cut.architecture}."
    stack = tuple(block for block in cut.kept if block < cut.num_blocks)
    changed: dict[str, Any] = {f"{prefix}block_count": len(cut.kept)}
    for key, field in cut.reader.fields.items():
        is_array = len(field.types) > 1
        if is_array and not key.startswith("tokenizer.") and _names_blocks(field):
            raise refused(cut, f"{key} names tensors of blocks, and what it says of them is not known here")
        if not key.startswith(prefix) or _NEUTRAL.search(key.removeprefix(prefix)):
            continue
        name = key.removeprefix(prefix)
        if is_array:
            entries = field.contents()
            if len(entries) == total and not _are_indices(name, entries):
                changed[key] = [entries[block] for block in cut.kept]
            elif len(entries) == cut.num_blocks and not _are_indices(name, entries):
                changed[key] = [entries[block] for block in stack]
            elif len(entries) > 1 and (_OF_BLOCKS.search(name) or _INDICES.search(name)):
                raise refused(cut, f"{key} has {len(entries)} entries, and which blocks they mean is not known here")
            continue
        value = field.contents()
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or name in _SETTINGS_THAT_FOLLOW:
            continue
        if name in _WITH_A_PERIOD:
            known = name != "attention.sliding_window_pattern" or cut.architecture in _PERIODS
            _require_period(cut, stack, value, f"{key} = {value}", which_is_other=known)
        elif name == "attention.shared_kv_layers":
            raise refused(cut, f"its last {value} blocks use keys and values of others ({key})")
        elif name == "embedding_length_per_layer_input":
            raise refused(cut, f"it has tensors with a slice for each block ({key}), and GGUF tensors are not cut")
        elif _OF_BLOCKS.search(name):
            raise refused(cut, f"{key} = {value} may count blocks, and what it means is not known here")
    dense = value_of(cut.reader, f"{prefix}leading_dense_block_count")
    if dense is not None:
        changed[f"{prefix}leading_dense_block_count"] = sum(block < dense for block in stack)
    _require_what_llama_cpp_knows(cut, stack)
    return changed


def _require_what_llama_cpp_knows(cut: Cut, stack: tuple[int, ...]) -> None:
    """Require what llama.cpp derives from the architecture, a block's index and the number of blocks, and no file says.

    Raises `ExportError`.
    """
    prefix = f"{cut.architecture}."
    period = _PERIODS.get(cut.architecture)
    has_pattern = f"{prefix}attention.sliding_window_pattern" in cut.reader.fields
    slides = cut.architecture == "gemma2" or value_of(cut.reader, f"{prefix}attention.sliding_window")
    if period is not None and slides and not has_pattern:
        _require_period(cut, stack, period, f"every {period} blocks, known by the name {cut.architecture}")
    if _SCALED_BY_COUNT.get(cut.architecture) in (cut.num_blocks, len(stack)):
        width, heads, per_head = (
            value_of(cut.reader, f"{prefix}{name}")
            for name in ("embedding_length", "attention.head_count", "attention.key_length")
        )
        if per_head is not None and not (isinstance(heads, int) and width // heads == per_head):
            count = _SCALED_BY_COUNT[cut.architecture]
            raise refused(
                cut,
                f"llama.cpp scales the attention of {cut.architecture} by another number where there are {count} "
                "blocks, so with fewer it would compute something else",
                "Skip them while running instead, or write the folder (`format=hf`) for other programs.",
            )


def _require_period(cut: Cut, stack: tuple[int, ...], period: int, source: str, which_is_other: bool = True) -> None:
    """Require that kept blocks stay of their kind. Raises `ExportError`.

    The last of each period is of another kind than the others; where it is unknown which of them is, each must keep
    its place.
    """
    for new, old in enumerate(stack):
        was, becomes = old % period + 1, new % period + 1
        if was != becomes and (period in (was, becomes) or not which_is_other):
            raise refused(
                cut,
                f"what kind a block is follows from its index by a period ({source}), and block {old}, number {was} of "
                f"its period, would become block {new}, number {becomes}",
            )


def _are_indices(name: str, entries: list[Any]) -> bool:
    """Whether a list as long as the stack may hold block indices rather than an entry for each block."""
    return bool(_INDICES.search(name)) and not set(entries) <= {0, 1}


def _names_blocks(field: Any) -> bool:
    from gguf import GGUFValueType

    if field.types[-1] != GGUFValueType.STRING:
        return False
    return any(field.parts[index][:4].tobytes() == b"blk." for index in field.data)


def refused(cut: Cut, reason: str, instead: str = "") -> ExportError:
    """The error that says why a GGUF file cannot be cut this way, and what to do instead."""
    removed = [block for block in range(cut.num_blocks) if block not in cut.kept]
    instead = instead or "Choose other blocks, such as the last ones (nothing moves then), or skip them while running."
    return ExportError(f"{cut.source.name} cannot be written without blocks {removed}: {reason}. {instead}")


def _read(path: Path) -> Any:
    """Open a GGUF file. Raises `ModelError` for what is not a GGUF file, or only a part of one."""
    path = path.absolute()
    gguf_header.require_single(path, {})
    status = path.stat()
    reader = opened(path, status.st_size, status.st_mtime_ns)
    gguf_header.require_single(path, {"split.count": value_of(reader, "split.count")})
    if reader.byte_order != "I":
        raise ModelError(f"{path} was written for machines of the other byte order; convert it first.")
    return reader


@lru_cache(maxsize=1)
def opened(path: Path, size: int, changed: int) -> Any:
    """The open file, kept: a large vocabulary takes seconds to read, and an export does before and after loading."""
    return _open(path)


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        gguf_header.check(path)
        return GGUFReader(path)
    except FAILURES as error:
        raise ModelError(f"{path} is not a GGUF file, or damaged ({type(error).__name__}); fetch it again.") from error


def value_of(reader: Any, key: str) -> Any:
    """The value of a setting; None where the file does not have it."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _is_export(path: Path) -> bool:
    """Whether the file is exactly as an earlier export left it."""
    try:
        reader = _open(path)
        return REMOVAL_LIST in reader.fields and value_of(reader, FILE_BYTES) == path.stat().st_size
    except (ModelError, *FAILURES):
        return False
