"""Whether a checkpoint's quantisation was undone or applied when it was loaded. Reads settings and names; no weight.

transformers skips a scheme that it does not know with a line in its log, and casts the integers or 8-bit floats to
weights that are hundreds of times too large. So every scheme that a checkpoint names, and every scale that it stores,
is either used by the loader or refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sleb.errors import ModelError, excerpt, quoted
from sleb.model.inspection.stored_tensors import FLOATS, StoredTensor

DEQUANTISED = ", dequantised while loading"

_KEYS = ("quantization_config", "compression_config", "quant_config", "quantization")
BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json")
"""Files of ModelOpt, AutoGPTQ, AWQ and quanto, in which older versions say what the config does not."""
_DETAILS = ("quant_algo", "format", "fmt", "quant_type", "bits", "weights")

_OF_A_WEIGHT = re.compile(
    r"(^|[._])(weight_\w*scale\w*|input_scale|weight_zero_point|weight_packed|qzeros|qweight|g_idx|absmax|SCB|"
    r"(gate_up_proj|down_proj|up_proj|gate_proj)_(blocks|scales?|scale_inv))$"
)
"""The last part of the names of tensors that a quantised weight is stored with, or as."""
_OF_THE_CACHE = re.compile(r"(^|[._])([kvq]|kv|prob|attn)_scale$|\.[kv]_proj\.output_scale$")
"""Scales of keys and values, which no search keeps: weights are right without them."""

_INSTEAD = "Use the checkpoint that it was made from, or one in a format that transformers applies."


@dataclass(frozen=True)
class Scheme:
    """A quantisation that a checkpoint names."""

    label: str
    """The method with its details, for the screen."""
    method: str | None


def scheme_of(name: str, raw: Mapping[str, Any], config: Any, beside: Mapping[str, Any]) -> Scheme | None:
    """The quantisation that the checkpoint names; `beside` are settings in files of their own.

    Raises `ModelError` for a scheme that transformers would skip, or does not look for where it is.
    """
    named = list(_named(raw))
    read = [getattr(each, "quantization_config", None) for each in (config, _text_part(config))]
    for place, settings in named:
        if place.endswith("quantization_config") and settings in read:
            continue
        if any(settings == other for where, other in named if where != place and other in read):
            continue  # named in two places
        raise _skipped(name, _scheme(settings), f"its config under {excerpt(place, 80)}")
    if not named:
        for file, settings in beside.items():
            raise _skipped(name, _scheme(settings), f"the file {file} beside its config")
        return None
    scheme = _scheme(named[0][1])
    if scheme.method not in _known():
        raise _skipped(name, scheme, f"its config under {excerpt(named[0][0], 80)}")
    return scheme


def is_named(raw: Mapping[str, Any]) -> bool:
    """Whether the config names a quantisation anywhere."""
    return next(_named(raw), None) is not None


def require_consistent(name: str, scheme: Scheme | None, stored: Mapping[str, StoredTensor]) -> None:
    """Raises `ModelError`, before any tensor is loaded, where the stored ones are not those of the scheme."""
    small = sorted(key for key, each in stored.items() if each.dtype.startswith("F") and each.dtype not in FLOATS)
    if scheme is None and small:
        raise ModelError(
            f"{name} stores weights as {stored[small[0]].dtype} ({excerpt(small[0], 100)}, for one), and its config "
            f"names no quantisation that says how they are scaled. {_INSTEAD}"
        )


def require_applied(
    name: str, scheme: Scheme | None, model: Any, stored: Mapping[str, StoredTensor], unused: Iterable[str]
) -> str | None:
    """The quantisation of the loaded model, for the screen; None if there is none.

    Raises `ModelError` where the loader left scales out, or weights packed.
    """
    unused = set(unused)  # with the weights of a part that is not loaded, such as a vision tower, go their scales
    left = sorted(
        key
        for key in unused
        if _OF_A_WEIGHT.search(key) and not _OF_THE_CACHE.search(key)
        if f"{key.rpartition('.')[0]}.weight" not in unused
    )
    if left:
        label = f"with {scheme.label}" if scheme else "though its config does not say how"
        raise ModelError(
            f"{name} is quantised {label}, and transformers leaves {len(left)} of the tensors out that its weights are "
            f"scaled by ({excerpt(left[0], 100)}, for one). {_INSTEAD}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return scheme.label if scheme else None
    for key, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"{name} has weights that are still packed after loading ({excerpt(key, 100)} in {kind}): "
                f"{scheme.label if scheme else 'no quantisation'} was not applied to them. {_INSTEAD}"
            )
        if scheme is None and key in stored and stored[key].dtype not in FLOATS:
            raise ModelError(
                f"{name} stores weights as {stored[key].dtype} ({excerpt(key, 100)}, for one), and its config names no "
                f"quantisation that says how they are scaled. {_INSTEAD}"
            )
    if scheme is None or (stored and all(each.dtype in FLOATS for each in stored.values())):
        return None  # or there was nothing to undo
    if isinstance(getattr(model.config, "quantization_config", None), Mapping):
        raise _skipped(name, scheme, "its config")
    return scheme.label + DEQUANTISED


def _named(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every place of a config that names a quantisation, those that say nothing left out."""
    left: list[tuple[str, Any]] = [("", raw)]
    while left:
        place, settings = left.pop()
        for key, value in settings.items():
            where = f"{place}.{key}".lstrip(".")
            if key in _KEYS:
                if value is not None and value is not False:
                    yield where, value
            elif isinstance(value, Mapping):
                left.append((where, value))


def _scheme(settings: Any) -> Scheme:
    if not isinstance(settings, Mapping):
        return Scheme(f"a scheme given as {quoted(settings)}", None)
    inner, producer = settings.get("quantization"), settings.get("producer")
    settings = inner if isinstance(inner, Mapping) else settings
    method = settings.get("quant_method", producer.get("name") if isinstance(producer, Mapping) else None)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        bits = "4bit" if settings.get("load_in_4bit") else "8bit"
        return Scheme(f"bitsandbytes ({bits})", f"bitsandbytes_{bits}")
    details = [
        f"{value} bits" if key == "bits" else excerpt(value, 40)
        for key in _DETAILS
        if isinstance(value := settings.get(key), str | int) and not isinstance(value, bool)
    ]
    label = excerpt(method, 60) if isinstance(method, str) else "a scheme without a name (quant_method)"
    return Scheme(label + (f" ({', '.join(details)})" if details else ""), method if isinstance(method, str) else None)


def _known() -> frozenset[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return frozenset(AUTO_QUANTIZATION_CONFIG_MAPPING)


def _text_part(config: Any) -> Any:
    """The part of a config in which transformers looks, too."""
    return config.get_text_config(decoder=True)


def _skipped(name: str, scheme: Scheme, place: str) -> ModelError:
    from transformers import __version__

    return ModelError(
        f"{name} is quantised with {scheme.label}, as {place} says, and transformers {__version__} would load its "
        f"numbers without their scales. {_INSTEAD}"
    )
