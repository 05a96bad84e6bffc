"""A model name, a local folder or a GGUF file -> model and tokenizer. Refuses what it cannot use, in one sentence."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import nn

from sleb.errors import ModelError, OptionError, SlebError, excerpt
from sleb.model import demo
from sleb.model.block_stack import find_stack
from sleb.model.inspection import gguf_header, model_files, quantisation, stored_tensors, tokenizer_growth
from sleb.model.inspection.presence import is_path, not_there, require_code_elsewhere, require_file
from sleb.model.inspection.quantisation import Scheme
from sleb.model.inspection.stored_tensors import StoredTensor, main_dtype
from sleb.model.streamed_loading import files_by_key, load_within
from sleb.model.streaming import streamed_blocks
from sleb.runtime import run_folder

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

_LONGEST_NOTE = 4000  # characters
_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # as transformers writes them itself


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    """The commit that was loaded, where the hub names one."""
    dtype: str
    device: str
    checkpoint_dtype: str | None = None
    """The type that most of the stored weights have; None where they are packed, or their files do not say."""
    quantisation: str | None = None
    """What the checkpoint is quantised with, in words; None if it is not."""


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
    only_to_compare: bool = False,
) -> LoadedModel:
    """Load for scoring. `dtype` "auto" is what is fast here (`fast_dtype`), "checkpoint" what the weights have.

    With a `memory_budget` in bytes that the weights exceed, the blocks stay on disk and are read when they are needed.
    `only_to_compare` takes a GGUF file whose rotary positions transformers reads otherwise than llama.cpp: what is cut
    out of it is copied, and read in the same way. Raises `ModelError` for whatever is no causal language model that can
    be read here, `OptionError` for a device that is not there, or a budget that is too small.
    """
    quieten_torchao()
    where = resolve_device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source: str | Path = name
    gguf, header = None, None
    if name == "demo":
        source = demo.model_folder(convert_gguf)
    elif name.lower().endswith(".gguf"):
        gguf = Path(name).expanduser()
        header = _header(gguf)
        source = gguf.parent
        options["gguf_file"] = gguf.name
    elif is_path(name):
        source = Path(name).expanduser()
        _require_folder(source, allow_pickle)
    else:
        revision = options["revision"] = _commit(name, revision)
    _loading(name, lambda: model_files.require_no_adapter(name, str(source), revision))
    config, raw = _config(str(source), name, options)
    checkpoint = _Checkpoint(name, str(source), config, raw, options)
    if header is not None:
        model_files.require_enough(name, config, options, header.elements)
        if not only_to_compare:
            _loading(name, lambda: gguf_header.require_rope(Path(name), header, config))
    else:
        _loading(name, lambda: checkpoint.inspect())
    chosen = _dtype(dtype, config, checkpoint.dtype, where)
    kwargs = dict(options, dtype=chosen, use_safetensors=None if allow_pickle or gguf else True)
    told = checkpoint.dtype or getattr(config, "dtype", None)
    told_by_pickle = dtype == "checkpoint" and header is None and not checkpoint.stored and not told
    if told_by_pickle and memory_budget is None:
        kwargs["dtype"] = "auto"
    if where.type == "cuda" and gguf is None:
        # Straight to the GPU, without a second copy in memory; or where accelerate finds room for it.
        kwargs["device_map"] = "auto" if device == "all" else {"": where}

    def load(**others: Any) -> Any:
        return _auto_model().from_pretrained(str(source), output_loading_info=True, **(kwargs | others))

    if memory_budget is None:
        model, report = _loading(name, load, checkpoint.scheme)
    elif gguf is not None:
        raise OptionError(f"{name} is dequantised as a whole; `memory_budget` needs a safetensors folder.")
    else:
        scratch = run_folder.home() / "cache" / "offload"
        model, report = _loading(
            name,
            lambda: load_within(memory_budget, str(source), config, chosen, where, scratch, options, load),
            checkpoint.scheme,
        )
    quantised = checkpoint.applied(model, report) if header is None else _of_gguf(header)
    _require_complete(name, report)
    checkpoint.require_every_block(model, report)
    chosen = model.dtype if kwargs["dtype"] == "auto" else chosen
    if name == "demo":
        quantised = _of_gguf(gguf_header.check(demo.model_file()))
    tokenizer = _loading(name, lambda: _tokenizer(name, str(source), options))
    if streamed_blocks(model) is None:
        _cast(model, chosen)
        if kwargs.get("device_map") is None:
            model.to(where)
    model.eval()
    model.requires_grad_(False)
    if not getattr(tokenizer, "vocab_size", None):
        raise ModelError(f"{name} has no usable tokenizer; save one beside the weights (tokenizer.json).")
    if quantised is not None:
        log.info("%s is quantised: %s.", name, quantised)
    kind = str(chosen).removeprefix("torch.")
    return LoadedModel(model, tokenizer, name, revision, kind, str(where), checkpoint.dtype, quantised)


class _Checkpoint:
    """What is stored in a model's safetensors files, and whether all of it was used; empty without such files."""

    def __init__(self, name: str, source: str, config: Any, raw: dict[str, Any], options: dict[str, Any]) -> None:
        self.name, self.source, self.config, self.raw, self.options = name, source, config, raw, options
        self.stored: dict[str, StoredTensor] = {}
        self.scheme: Scheme | None = None

    @property
    def dtype(self) -> str | None:
        """The type that most weights have; None where they are packed."""
        return None if self.scheme is not None else main_dtype(self.stored)

    def inspect(self) -> None:
        """Raises `ModelError` where the files are not those of the config, or quantised as the loader cannot undo."""
        beside = {} if quantisation.is_named(self.raw) else self._beside()
        self.scheme = quantisation.scheme_of(self.name, self.raw, self.config, beside)
        files = list(dict.fromkeys(files_by_key(self.source, self.options).values()))
        self.stored = stored_tensors.read_headers(map(Path, files))
        size = sum(Path(each).stat().st_size for each in files)
        model_files.require_stored(self.name, self.config, self.options, self.stored, size)
        quantisation.require_consistent(self.name, self.scheme, self.stored)

    def applied(self, model: Any, report: dict[str, Any]) -> str | None:
        """What the loaded model is quantised with. Raises `ModelError` where its scales were left out."""
        return quantisation.require_applied(self.name, self.scheme, model, self.stored, _unused(model, report))

    def require_every_block(self, model: Any, report: dict[str, Any]) -> None:
        """Raises `ModelError` where something that is stored for a block was left out of the model."""
        try:
            path, blocks = find_stack(model)
        except ModelError:  # told where it is used as a stack of blocks
            return
        unused = _unused(model, report)
        modules = {part for part, _ in model.named_modules()}
        model_files.require_every_block(self.name, path, len(blocks), self.raw, self.stored, unused, modules)

    def _beside(self) -> dict[str, Any]:
        from transformers.utils.hub import cached_file

        quiet = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        found = {}
        for file in quantisation.BESIDE if Path(self.source).is_dir() else quantisation.BESIDE[:1]:
            path = cached_file(self.source, file, revision=self.options["revision"], **quiet)
            if path is not None:
                found[file] = model_files.read_text_json(Path(path))
        return found


def _require_complete(name: str, report: dict[str, Any]) -> None:
    """Weights that a checkpoint lacks are made up at random while loading; nobody should search among those."""
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of the weights its config asks for ({missing[0]}, for one): the files are "
            "incomplete, or the config belongs to another model."
        )


def _unused(model: Any, report: dict[str, Any]) -> list[str]:
    """Stored tensors that the model did not take, those left out that its family always ignores."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = report.get("unexpected_keys") or ()
    return [key for key in found if not any(re.search(pattern, key) for pattern in ignored)]


def _cast(model: Any, dtype: torch.dtype) -> None:
    """What was dequantised may have kept the type of the checkpoint; float32 is some families' own choice."""
    if getattr(model, "hf_quantizer", None) is None:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and parameter.dtype is not dtype:
                parameter.data = parameter.data.to(dtype)


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer as a safetensors folder (float32: quantised weights are dequantised)."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = _auto_model().from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer = _auto_tokenizer().from_pretrained(str(source.parent), gguf_file=source.name)
    forget_quantisation(model)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def forget_quantisation(model: Any) -> None:
    """The weights were dequantised while loading (GGUF); a quantiser still remembered refuses to save them."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none; `all` begins on the first GPU."""
    if device == "all":
        if not torch.cuda.is_available():
            raise OptionError("`device=all` spreads a model over all GPUs; this machine has none. Use cpu or auto.")
        return torch.device("cuda", 0)
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise OptionError(f"There is no device {device!r}; use auto, cpu, cuda:0 and so on, or all (GPUs).")
    if device == "cpu":
        return torch.device("cpu")
    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise OptionError(
            f"Asked for {device}; this machine has {count} CUDA devices. Use `device=cpu` or `device=auto`."
        )
    return torch.device("cuda", index)


def fast_dtype(stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type that `dtype="auto"` chooses: 16 bits where the device multiplies them faster, else float32.

    A GPU keeps a 16-bit checkpoint's own type. A CPU is asked: bfloat16 runs three times faster than float32 where
    it has instructions for it, and slower where it has not.
    """
    if device.type == "cuda":
        if stored in (torch.float16, torch.bfloat16):
            return stored
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_is_faster_in(torch.bfloat16) else torch.float32


def weights_hash(model: nn.Module, dtype: str | None = None) -> str:
    """xxh3-128 of every tensor's name, type, shape and bytes: equal means the same weights.

    With `dtype`, of what they would be in that type.
    """
    cast = getattr(torch, dtype) if dtype else None
    digest = xxhash.xxh3_128()
    seen: set[int] = set()
    streamed = streamed_blocks(model)
    for name, tensor in sorted(model.state_dict().items()):
        kind = cast if cast is not None and tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name}{tuple(tensor.shape)}{kind}".encode())
        if streamed is not None and tensor.is_meta:
            tensor = streamed.tensor(name)
        elif tensor.data_ptr() in seen:  # tied
            continue
        else:
            seen.add(tensor.data_ptr())
        plain = (tensor.dequantize() if hasattr(tensor, "tensor_impl") else tensor).to(kind)
        digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _cpu_is_faster_in(dtype: torch.dtype) -> bool:
    """The best of twenty products each, in turn and by one thread: on a busy machine a few of many threads' lie."""
    pairs = [(torch.ones(256, 512, dtype=kind), torch.ones(512, 1024, dtype=kind)) for kind in (dtype, torch.float32)]
    best = [float("inf"), float("inf")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(20):
            for index, (left, right) in enumerate(pairs):
                start = time.perf_counter()
                torch.mm(left, right)
                best[index] = min(best[index], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0] * 1.3 < best[1]


def _dtype(asked: str, config: Any, stored_as: str | None, device: torch.device) -> torch.dtype:
    """The files are believed before the config, which names another type in some checkpoints, or none."""
    stored = stored_as or getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if asked == "checkpoint":
        return stored or torch.float32
    return fast_dtype(stored, device) if asked == "auto" else getattr(torch, asked)


def _config(source: str, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as a library reads it, and what its file says; that is empty for GGUF files."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    raw: dict[str, Any] = {}
    if "gguf_file" not in options:
        raw, _ = _loading(name, lambda: PreTrainedConfig.get_config_dict(source, **options))
        model_files.require_modest(name, raw)
        if options["trust_remote_code"]:
            require_code_elsewhere(raw)
        else:
            model_files.require_own_kernels(name, raw)
    config = _loading(name, lambda: AutoConfig.from_pretrained(source, **options))
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({kind}); removing blocks is defined here for decoder-only ones."
        )
    if kind not in CAUSAL and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(f"{name} ({kind}) is no causal language model; a decoder-only language model is needed.")
    return config, raw


def _loading(name: str, load: Callable[[], Loaded], scheme: Scheme | None = None) -> Loaded:
    """What a library makes of a model's files; what it raises for damaged or foreign ones, in a sentence."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    quieten_torchao()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_printable)
    try:
        return load()
    except SlebError:
        raise
    except Exception as error:  # any class there is: the data decides how far a library gets with it
        raise ModelError(_explain(name, error, scheme)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; it has no class to import
            raise
        raise ModelError(_explain(name, error, scheme)) from error


def _printable(record: logging.LogRecord) -> bool:
    """What transformers tells of a model has names in it that come from its files."""
    text = _COLOURS.sub("", record.getMessage())
    record.msg = "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)[:_LONGEST_NOTE]
    record.args = ()
    return True


def _explain(name: str, error: BaseException, scheme: Scheme | None) -> str:
    text = str(error).strip()
    first = excerpt(text if text.split("\n")[0].endswith(":") else text.split("\n")[0]) or type(error).__name__
    if "trust_remote_code" in text:
        return f"{name} needs code of its own to run; read it, and allow it with `trust_remote_code=True`."
    if "gated" in text.lower() or "401" in text:
        return f"{name} is gated or private on the hub: accept its terms there and log in with: hf auth login."
    if "no file named model.safetensors" in text or "does not appear to have a file named" in text:
        return f"{name} has no safetensors weights that can be read: {first}"
    if scheme is not None:
        return f"{name} is quantised with {scheme.label}, which cannot be loaded here ({type(error).__name__}): {first}"
    if isinstance(error, ImportError):
        return f"{name} needs a library that is not installed: {first}"
    if isinstance(error, OSError) and not Path(name).exists() and name != "demo":
        return str(not_there(name, first))
    return f"{name} cannot be loaded ({type(error).__name__}): {first}"


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub model is now, so that all of its files are of one; as asked if unknown."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    config = _loading(name, lambda: cached_file(name, "config.json", revision=revision))
    return extract_commit_hash(config, None) or revision


def _require_folder(folder: Path, allow_pickle: bool) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file; a model is a folder with config.json, a .gguf file, or a hub name.")
    model_files.require_no_adapter(str(folder), str(folder), None)  # it may have no config.json
    model_files.read_config(folder)
    model_files.require_plain_files(folder)
    if list(folder.glob("*.safetensors")):
        return
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickles and not allow_pickle:
        raise ModelError(
            f"{folder} has its weights only as a pickle ({pickles[0].name}), which can run any code when it is read. "
            "Convert it to safetensors, or allow it with `allow_pickle=True`."
        )
    if not pickles:
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors).")


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if "gguf_file" not in options:
        tokenizer_growth.require_modest_files(name, source, options["revision"])
        if options["trust_remote_code"]:
            require_code_elsewhere(get_tokenizer_config(source, revision=options["revision"]))
    tokenizer = _auto_tokenizer().from_pretrained(source, **options)
    tokenizer_growth.require_modest(name, tokenizer)
    return tokenizer


def _header(path: Path) -> gguf_header.Header:
    """The header of a GGUF file that can be a model. Raises `ModelError` for any other."""
    require_file(path)
    header = gguf_header.check(path)
    gguf_header.require_model(path, header)
    own = {
        key.rpartition(".")[2]: value for key, value in header.settings.items() if key.startswith(header.architecture)
    }
    model_files.require_modest(str(path), own)
    return header


def _of_gguf(header: gguf_header.Header) -> str | None:
    """What the weights of a GGUF file are quantised with; None where they are not."""
    kind = header.weight_type
    return None if kind in ("F32", "F16", "BF16", "F64") else f"GGUF ({kind}){quantisation.DEQUANTISED}"


def quieten_torchao() -> None:
    """Transformers imports torchao where it is installed, which warns of kernels for other machines and of itself."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _auto_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer
