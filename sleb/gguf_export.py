"""A GGUF file with blocks cut out, proven. Knows GGUF files; decodes no weight: what stays is copied as it is.

A GGUF file says what each block is in its settings, and leaves some of it to the program that reads it: llama.cpp
knows the sliding windows of some architectures by the block's index alone. What cannot be said in the smaller file is
refused before anything is written. As with a folder (`export.py`), nothing appears under the name that was asked for
until the file has been reloaded by plain transformers and compared.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from . import demo, files
from . import proof as proof_process
from .blocks import BlockStack
from .configs import check_removal_list
from .errors import ExportError, ModelError, OptionError, StorageError
from .export import expect, let_go, run_proof, workspace, write_expectation
from .records import JobSpec, Proof, Run
from .surgery import Removal, plan_removal, require_same_blocks

REMOVAL_LIST = "sleb.removal_list"
BLOCKS_BEFORE = "sleb.blocks_before"
RUN = "sleb.run"
FILE_BYTES = "sleb.file_bytes"
"""The length of the file that an export wrote: another tool that carries the keys over writes another length."""

_FAILURES = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError)
_FILE = "model.gguf"  # inside the workspace
_SPARE_BYTES = 64 * 1024**2
_CHUNK = 1 << 24  # bytes compared at once

_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "plamo3": 8} | dict.fromkeys(
    ("afmoe", "cohere2", "exaone-moe", "exaone4", "llama4", "mellum", "olmo2"), 4
)
"""Architectures whose sliding windows follow a period that llama.cpp knows where the file does not say it.

From its `load_swa_pattern` (release b11434): the last block of each period attends to everything.
"""
_SCALED_BY_COUNT = {"gemma2": 46, "gemma3": 62}
"""Their 27B models: llama.cpp tells them by the number of blocks, and scales the attention of no other like theirs."""

_WINDOWS_UNSAID = re.compile("Gemma[23](?!n)|GptOss")
"""Classes for which llama.cpp's converter (b11434) does not write which blocks have a window: it would lose them."""

_BEWARE = (
    " Beware of the converter here: it does not write which blocks have a sliding window, and llama.cpp then counts "
    "them off anew; --gguf refuses a list with which that would go wrong."
)

_NEUTRAL = re.compile(r"^(rope|classifier)\.|layer_norm|time_step")  # speak of blocks only at first sight
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
    """Of the stack: blocks behind it that predict further tokens (MTP) are not counted. They stay."""
    kept: tuple[int, ...]
    """Original indices of the blocks that stay, those behind the stack included."""
    settings: dict[str, Any]
    """What changes: key and new value."""
    reader: Any
    """The open `gguf.GGUFReader`; its tensors lie in the file, not in memory."""
    tensors: tuple[tuple[str, Any], ...]
    """New name and `gguf.ReaderTensor` of each tensor that is copied, in the order of the file."""

    @property
    def bytes(self) -> int:
        """Of the tensors that are copied."""
        return sum(tensor.n_bytes for _, tensor in self.tensors)


def source_of(run: Run, job: JobSpec) -> Path:
    """The GGUF file that the job cuts: the one it names, or else the run's model. Raises `OptionError` without one."""
    if job.gguf is not None:
        path = files.expanded(Path(job.gguf))
    elif run.spec.model == "demo":
        path = demo.model_file()
    elif run.spec.model.lower().endswith(".gguf"):
        path = files.expanded(Path(run.spec.model))
    else:
        beware = "" if run.stack is None or not _WINDOWS_UNSAID.match(run.stack.model_class) else _BEWARE
        raise OptionError(
            f"{run.spec.model} is no GGUF file. Write the folder (--format hf) and convert that with llama.cpp's "
            f"convert_hf_to_gguf.py; or name a GGUF file of this model with --gguf.{beware}"
        )
    if not path.is_file():
        raise OptionError(f"There is no file {path}.")
    return path


def export_gguf(
    model: nn.Module,
    tokenizer: Any,
    source: Path,
    removal_list: Sequence[int],
    out: Path,
    run_id: str = "",
    allow_existing: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    *,
    trust_remote_code: bool = False,
) -> Proof:
    """Write `source` without these blocks to the file `out`, and prove that it reloads and answers as it did.

    `model` is `source` as loaded by transformers; it is used up, like in `export_checkpoint`. `allow_existing` lets an
    earlier export at `out` be replaced, and nothing else. Raises `ExportError` where the file cannot express the
    removal or the proof fails; then nothing is left at `out`.
    """
    out = Path(os.path.abspath(out))
    require_free(out, allow_existing, source)
    cut = plan_cut(source, removal_list)
    stack = BlockStack(model)
    if len(stack) != cut.num_blocks:
        raise ExportError(f"{source.name} has {cut.num_blocks} blocks, and transformers loads {len(stack)} of it.")
    removal = plan_removal(model, removal_list)
    if removal.packed:
        raise _refused(cut, f"{min(removal.packed)} holds a slice for each block, and GGUF tensors are not cut")
    _require_space(cut, out.parent)

    progress("Recording what the model answers with the blocks skipped")
    expectation = expect(model, tokenizer, removal)
    blocks: Any = stack.blocks
    removed = sum(
        parameter.numel()
        for block in range(removal.num_blocks)
        if block not in removal.kept
        for parameter in blocks[block].parameters()
    )
    with workspace(out) as folder:
        progress(f"Writing {len(removal.kept)} of {removal.num_blocks} blocks")
        write_cut(cut, folder / _FILE, removal_list, run_id)
        _require_same_reading(model, folder, removal)
        dtype = str(model.dtype).removeprefix("torch.")
        write_expectation(folder, removal, expectation, expectation.parameters - removed, dtype, _FILE)
        device = str(stack.device)
        let_go(model)
        progress("Reloading it in a new process, to compare")
        proof = run_proof(folder, device, trust_remote_code)
        require_free(out, allow_existing, source)  # again: the proof took its time
        try:
            os.replace(folder / _FILE, out)
        except OSError as error:
            raise StorageError(f"The exported model could not be moved to {out} ({error.strerror}).") from error
    _opened.cache_clear()
    return proof.model_copy(update={"bytes_before": source.stat().st_size})


def require_same_model(run: Run, source: Path, model: nn.Module) -> None:
    """The GGUF file that was named is of the model that was searched, as far as shapes can tell."""
    assert run.stack is not None
    stack, searched = BlockStack(model), run.stack
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    parameters = tuple(sum(parameter.numel() for parameter in block.parameters()) for block in stack.blocks)
    other = None
    if len(stack) != searched.num_blocks:
        other = f"it has {len(stack)} blocks, and the model has {searched.num_blocks}"
    elif config.hidden_size != searched.hidden_size:
        other = f"its hidden size is {config.hidden_size}, and the model's is {searched.hidden_size}"
    elif parameters != searched.block_parameters:
        other = "its blocks have other numbers of parameters than the model's"
    if other is not None:
        raise OptionError(f"{source} is not a file of the model that run {run.run_id} searched: {other}.")


def require_free(out: Path, allow_existing: bool, source: Path) -> None:
    """Nothing that somebody else put at `out` is ever lost: it is free, or an earlier export that may go."""
    if out.is_symlink():
        raise OptionError(f"{out} is a link; name the file itself.")
    if out.is_dir():
        raise OptionError(f"{out} is a folder; name a file that ends in .gguf.")
    if out.suffix.lower() != ".gguf":
        raise OptionError(f"{out} does not end in .gguf, by which programs know such files; name one that does.")
    if not out.exists():
        return
    if source.exists() and out.samefile(source):
        raise OptionError(f"{out} is the model itself; name another file.")
    if not allow_existing:
        raise OptionError(f"{out} is there already; name another file, or replace an earlier export with --replace.")
    if not _is_export(out):
        raise OptionError(f"{out} is something other than an earlier export; name another file.")


def plan_cut(source: Path, removal_list: Sequence[int]) -> Cut:
    """What the file becomes without these blocks. Raises `ExportError` where it cannot be said in a GGUF file,
    `ModelError` for a file that is no whole model, `OptionError` for a removal list that does not fit it.
    """
    reader = _read(source)
    architecture = _value(reader, "general.architecture")
    total = _value(reader, f"{architecture}.block_count")
    if not isinstance(total, int) or total < 1:
        raise ModelError(f"{source} does not say how many blocks it has ({architecture}.block_count); fetch it again.")
    if _value(reader, "general.type") not in (None, "model"):
        raise ModelError(f"{source} is no model but a file of type {_value(reader, 'general.type')!r}.")
    further = _value(reader, f"{architecture}.nextn_predict_layers") or 0
    num_blocks = total - further
    check_removal_list(removal_list, num_blocks)
    kept = tuple(block for block in range(total) if block not in set(removal_list))
    position = {block: index for index, block in enumerate(kept)}
    tensors, seen = [], set()
    for tensor in reader.tensors:
        found = re.match(r"blk\.(\d+)\.", tensor.name)
        if found is None:
            tensors.append((tensor.name, tensor))
            continue
        seen.add(int(found[1]))
        if int(found[1]) in position:
            tensors.append((f"blk.{position[int(found[1])]}.{tensor.name[found.end() :]}", tensor))
    if seen != set(range(total)):
        odd = min(seen ^ set(range(total)))
        raise ModelError(
            f"{source} says it has {total} blocks and {'has' if odd in seen else 'lacks'} tensors of block {odd}; "
            "fetch it again."
        )
    cut = Cut(source, architecture, num_blocks, kept, {}, reader, tuple(tensors))
    return replace(cut, settings=_settings(cut, total))


def write_cut(cut: Cut, target: Path, removal_list: Sequence[int], run_id: str = "") -> None:
    """Write the planned file, tensor by tensor, and look whether every byte of every tensor has arrived."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = cut.reader
    writer = GGUFWriter(target, cut.architecture, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    kinds = GGUFValueType
    blocks_before, whole_list = _since_the_first(cut, removal_list)
    name = _value(reader, "general.name")
    if isinstance(name, str) and name:
        name = re.sub(r" without \d+ of \d+ blocks$", "", name)
        cut.settings["general.name"] = f"{name} without {len(whole_list)} of {blocks_before} blocks"
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "sleb.")) or key == "general.architecture":
            continue
        kind, sub_kind = field.types[0], field.types[-1] if field.types[0] == kinds.ARRAY else None
        value = cut.settings[key] if key in cut.settings else _as_written(cut, key, field)
        writer.add_key_value(key, value, kind, sub_kind)
    writer.add_key_value(REMOVAL_LIST, whole_list, kinds.ARRAY, kinds.UINT32)
    writer.add_uint32(BLOCKS_BEFORE, blocks_before)
    writer.add_string(RUN, run_id)
    writer.add_uint64(FILE_BYTES, 0)
    for name, tensor in cut.tensors:
        writer.add_tensor_info(name, tensor.data.shape, tensor.data.dtype, tensor.n_bytes, tensor.tensor_type)
    with _writing():
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor in cut.tensors:
                writer.write_tensor_data(tensor.data)
        finally:
            writer.close()
        written = GGUFReader(target, "r+")
        written.fields[FILE_BYTES].parts[-1][0] = target.stat().st_size
        written.data.flush()
        _require_copied(cut, written)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(cut: Cut, total: int) -> dict[str, Any]:
    """What changes in the settings. Raises `ExportError` for what would then be wrong."""
    prefix = f"{cut.architecture}."
    stack = tuple(block for block in cut.kept if block < cut.num_blocks)
    changed: dict[str, Any] = {f"{prefix}block_count": len(cut.kept)}
    for key, field in cut.reader.fields.items():
        is_array = len(field.types) > 1
        if is_array and not key.startswith("tokenizer.") and _names_blocks(field):
            raise _refused(cut, f"{key} names tensors of blocks, and what it says of them is not known here")
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
                raise _refused(cut, f"{key} has {len(entries)} entries, and which blocks they mean is not known here")
            continue
        value = field.contents()
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or name in _SETTINGS_THAT_FOLLOW:
            continue
        if name in _WITH_A_PERIOD:
            known = name != "attention.sliding_window_pattern" or cut.architecture in _PERIODS
            _require_period(cut, stack, value, f"{key} = {value}", which_is_other=known)
        elif name == "attention.shared_kv_layers":
            raise _refused(cut, f"its last {value} blocks use keys and values of others ({key})")
        elif name == "embedding_length_per_layer_input":
            raise _refused(cut, f"it has tensors with a slice for each block ({key}), and GGUF tensors are not cut")
        elif _OF_BLOCKS.search(name):
            raise _refused(cut, f"{key} = {value} may count blocks, and what it means is not known here")
    dense = _value(cut.reader, f"{prefix}leading_dense_block_count")
    if dense is not None:
        changed[f"{prefix}leading_dense_block_count"] = sum(block < dense for block in stack)
    _require_what_llama_cpp_knows(cut, stack)
    return changed


def _require_what_llama_cpp_knows(cut: Cut, stack: tuple[int, ...]) -> None:
    """What follows from the architecture's name, a block's index and the number of blocks, and is in no file."""
    prefix = f"{cut.architecture}."
    period = _PERIODS.get(cut.architecture)
    said = f"{prefix}attention.sliding_window_pattern" in cut.reader.fields
    slides = cut.architecture == "gemma2" or _value(cut.reader, f"{prefix}attention.sliding_window")
    if period is not None and slides and not said:
        _require_period(cut, stack, period, f"every {period} blocks, known by the name {cut.architecture}")
    if _SCALED_BY_COUNT.get(cut.architecture) in (cut.num_blocks, len(stack)):
        width, heads, per_head = (
            _value(cut.reader, f"{prefix}{name}")
            for name in ("embedding_length", "attention.head_count", "attention.key_length")
        )
        if per_head is not None and not (isinstance(heads, int) and width // heads == per_head):
            count = _SCALED_BY_COUNT[cut.architecture]
            raise _refused(
                cut,
                f"llama.cpp scales the attention of {cut.architecture} by another number where there are {count} "
                "blocks, so with fewer it would compute something else",
                "Skip them while running instead, or write the folder (--format hf) for other programs.",
            )


def _require_period(cut: Cut, stack: tuple[int, ...], period: int, said: str, which_is_other: bool = True) -> None:
    """Kept blocks must stay of their kind: the last of each period is of another one than the others; where it is not
    known which of them is, each must keep its place.
    """
    for new, old in enumerate(stack):
        was, becomes = old % period + 1, new % period + 1
        if was != becomes and (period in (was, becomes) or not which_is_other):
            raise _refused(
                cut,
                f"what kind a block is follows from its index by a period ({said}), and block {old}, number {was} of "
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


def _refused(cut: Cut, reason: str, instead: str = "") -> ExportError:
    removed = [block for block in range(cut.num_blocks) if block not in cut.kept]
    instead = instead or "Choose other blocks, such as the last ones (nothing moves then), or skip them while running."
    return ExportError(f"{cut.source.name} cannot be written without blocks {removed}: {reason}. {instead}")


# --- reading and writing ----------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The file, open. Raises `ModelError` for what is no whole GGUF file, or only a part of one."""
    path = path.absolute()
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name, re.IGNORECASE):
        raise _split(path)
    status = path.stat()
    reader = _opened(path, status.st_size, status.st_mtime_ns)
    if (_value(reader, "split.count") or 0) > 1:
        raise _split(path)
    if reader.byte_order != "I":
        raise ModelError(f"{path} was written for machines of the other byte order; convert it first.")
    return reader


@lru_cache(maxsize=1)
def _opened(path: Path, size: int, changed: int) -> Any:
    """A large vocabulary takes seconds to read, and an export asks before and after loading."""
    return _open(path)


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except _FAILURES as error:
        raise ModelError(f"{path} is no GGUF file, or damaged ({type(error).__name__}); fetch it again.") from error


def _split(path: Path) -> ModelError:
    return ModelError(
        f"{path} is one of several parts; merge them into one file first: llama-gguf-split --merge {path.name} OUT.gguf"
    )


def _value(reader: Any, key: str) -> Any:
    """A setting, or None where it is not there."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _as_written(cut: Cut, key: str, field: Any) -> Any:
    """A setting as the writer takes it: text stays bytes, which need not be valid UTF-8."""
    from gguf import GGUFValueType

    kind = field.types[0]
    if kind == GGUFValueType.STRING:
        return field.parts[-1].tobytes()
    if kind == GGUFValueType.ARRAY:
        if len(field.types) != 2:
            raise _refused(cut, f"{key} is an empty list or one of lists, which the gguf library cannot write", "")
        if field.types[1] == GGUFValueType.STRING:
            return [field.parts[index].tobytes() for index in field.data]
    return field.contents()


def _since_the_first(cut: Cut, removal_list: Sequence[int]) -> tuple[int, list[int]]:
    """Number of blocks and removal list; of the file before the earlier export, where this one was cut already."""
    before, earlier = _value(cut.reader, BLOCKS_BEFORE), _value(cut.reader, REMOVAL_LIST)
    if isinstance(before, int) and isinstance(earlier, list) and before - len(set(earlier)) == cut.num_blocks:
        left = [block for block in range(before) if block not in set(earlier)]
        if len(left) == cut.num_blocks:
            return before, [*earlier, *(left[block] for block in removal_list)]
    return cut.num_blocks, list(removal_list)


def _is_export(path: Path) -> bool:
    """Whether the file is as an export left it."""
    try:
        reader = _open(path)
        return REMOVAL_LIST in reader.fields and _value(reader, FILE_BYTES) == path.stat().st_size
    except (ModelError, *_FAILURES):
        return False


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"The file could not be written ({error}); free some disk space.") from error


def _require_copied(cut: Cut, written: Any) -> None:
    if len(written.tensors) != len(cut.tensors):
        raise StorageError(
            f"{len(cut.tensors)} tensors were written and {len(written.tensors)} have arrived; try again."
        )
    for (name, old), new in zip(cut.tensors, written.tensors, strict=True):
        same = (name, old.tensor_type, old.shape.tolist()) == (new.name, new.tensor_type, new.shape.tolist())
        if not same or any(not np.array_equal(a, b) for a, b in zip(_chunks(old), _chunks(new), strict=True)):
            raise StorageError(f"{name} has not arrived as it was; try again, on another disk if it stays so.")


def _chunks(tensor: Any) -> Iterator[np.ndarray[Any, Any]]:
    data = tensor.data.reshape(-1).view(np.uint8)
    return (data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK))


def _require_same_reading(model: nn.Module, folder: Path, removal: Removal) -> None:
    """Every kept block is what it was, also where the proof's text is too short to tell."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), gguf_file=_FILE)
    except proof_process.FAILURES as error:
        raise ExportError(f"The settings that are left cannot be read ({type(error).__name__}: {error}).") from error
    try:
        require_same_blocks(model, config, removal)
    except ExportError as error:
        raise ExportError(
            f"A GGUF file cannot say what the kept blocks are: {error}. Choose other blocks, or write the folder "
            "(--format hf)."
        ) from error


def _require_space(cut: Cut, where: Path) -> None:
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < cut.bytes + _SPARE_BYTES:
        raise StorageError(
            f"The file takes {cut.bytes / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left; "
            "free some, or name another folder."
        )
