"""A GGUF file with blocks cut out, proven. What stays is copied as it is.

As with a folder (`checkpoint.py`), the file appears under its name when plain transformers have reloaded it and it
answers as the baseline does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sleb.errors import ExportError, OptionError, StorageError
from sleb.export import proof_process
from sleb.export.destination import require_space, saving
from sleb.export.gguf_plan import (
    BLOCKS_BEFORE,
    FILE,
    FILE_BYTES,
    REMOVAL_LIST,
    Cut,
    destination_of,
    opened,
    plan_cut,
    refused,
    value_of,
)
from sleb.export.proven_folder import Exporter, Origin, Written, count_parameters, dtype_of
from sleb.export.removal import Removal, plan_removal, require_same_blocks
from sleb.model.block_stack import BlockStack
from sleb.records import Proof, Run

RUN = "sleb.run"

_CHUNK = 1 << 24  # bytes compared at once


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
    origin: Origin | None = None,
    trust_remote_code: bool = False,
) -> Proof:
    """Write `source` without these blocks to the file `out`, and prove that it reloads and answers as it did.

    `model` is `source` as loaded by transformers; it is used up, like in `export_checkpoint`. `allow_existing` lets an
    earlier export at `out` be replaced, and nothing else. Raises `ExportError` where the file cannot express the
    removal or the proof fails; then nothing is left at `out`.
    """
    destination = destination_of(Path(os.path.abspath(out)), allow_existing, source)
    destination.require_free()
    cut = plan_cut(source, removal_list)
    stack = BlockStack(model)
    if len(stack) != cut.num_blocks:
        raise ExportError(f"{source.name} has {cut.num_blocks} blocks, and transformers loads {len(stack)} of it.")
    removal = plan_removal(model, removal_list)
    if removal.packed:
        raise refused(cut, f"{min(removal.packed)} holds a slice for each block, and GGUF tensors are not cut")
    require_space("The file", cut.bytes, destination.out.parent)

    def write(folder: Path) -> Written:
        write_cut(cut, folder / FILE, removal_list, run_id)
        _require_same_reading(model, folder, removal)
        removed = [stack.blocks[block] for block in range(removal.num_blocks) if block not in removal.kept]
        parameters = count_parameters(model) - sum(map(count_parameters, removed))
        return Written(parameters, dtype_of(model), gguf_file=FILE, finished=(model,))

    exporter = Exporter(
        model, tokenizer, removal, origin=origin or Origin(), trust_remote_code=trust_remote_code, progress=progress
    )
    proof = exporter.export(destination, write)
    opened.cache_clear()
    return proof.model_copy(update={"bytes_before": source.stat().st_size})


def require_same_model(run: Run, source: Path, model: nn.Module) -> None:
    """Require a GGUF file of the model that was searched, as far as shapes show. Raises `OptionError`."""
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


def write_cut(cut: Cut, target: Path, removal_list: Sequence[int], run_id: str = "") -> None:
    """Write the planned file, tensor by tensor, and check that every byte of every tensor has arrived."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = cut.reader
    writer = GGUFWriter(target, cut.architecture, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    kinds = GGUFValueType
    blocks_before, whole_list = _since_the_first(cut, removal_list)
    name = value_of(reader, "general.name")
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
    with saving("file"):
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


def _as_written(cut: Cut, key: str, field: Any) -> Any:
    """A setting as the writer takes it: text stays bytes, which need not be valid UTF-8. Raises `ExportError`."""
    from gguf import GGUFValueType

    kind = field.types[0]
    if kind == GGUFValueType.STRING:
        return field.parts[-1].tobytes()
    if kind == GGUFValueType.ARRAY:
        if len(field.types) != 2:
            raise refused(cut, f"{key} is an empty list or one of lists, which the gguf library cannot write", "")
        if field.types[1] == GGUFValueType.STRING:
            return [field.parts[index].tobytes() for index in field.data]
    return field.contents()


def _since_the_first(cut: Cut, removal_list: Sequence[int]) -> tuple[int, list[int]]:
    """Number of blocks and removal list, both in terms of the first file, where this one was cut before."""
    before, earlier = value_of(cut.reader, BLOCKS_BEFORE), value_of(cut.reader, REMOVAL_LIST)
    if isinstance(before, int) and isinstance(earlier, list) and before - len(set(earlier)) == cut.num_blocks:
        left = [block for block in range(before) if block not in set(earlier)]
        if len(left) == cut.num_blocks:
            return before, [*earlier, *(left[block] for block in removal_list)]
    return cut.num_blocks, list(removal_list)


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
    """Require that every kept block is what it was, also where the proof's text is too short to show it.

    Raises `ExportError`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), gguf_file=FILE)
    except proof_process.FAILURES as error:
        raise ExportError(f"The settings that are left cannot be read ({type(error).__name__}: {error}).") from error
    try:
        require_same_blocks(model, config, removal)
    except ExportError as error:
        raise ExportError(
            f"A GGUF file cannot say what the kept blocks are: {error}. Choose other blocks, or write the folder "
            "(`format=hf`)."
        ) from error
