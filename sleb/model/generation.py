"""Greedy text by a model's own `generate`, and the size of its cache. Knows one model and token ids; no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sleb.errors import CalibrationError, ModelError, NotNumbers, OptionError
from sleb.model.out_of_memory import is_out_of_memory

# What `generate` raises where a family cannot do what is asked of it.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def continued(
    model: nn.Module,
    ids: torch.Tensor,
    tokens: int,
    *,
    stop: bool,
    cached: bool = True,
    tick: Callable[[], None] | None = None,
) -> tuple[torch.Tensor, Any]:
    """Greedy continuations of ids (batch, length), and the cache at their end: (batch, length + new tokens).

    With `stop` each ends with the model's own end-of-sequence token, and the last to end ends them all; else there are
    exactly `tokens` new ones. Nothing else of the model's generation settings is used: they may sample, or penalise
    repetition. `tick` is called after each token. Raises `ModelError` where the family cannot generate this way.
    """
    name = type(model).__name__
    if getattr(model, "generation_config", None) is None or not callable(getattr(model, "generate", None)):
        raise ModelError(f"{name} cannot generate text (it has no generate()).")
    settings = _greedy_settings(model, tokens, stop=stop, cached=cached)
    kwargs = _after_each_token(tick) if tick is not None else {}
    if getattr(model.config.get_text_config(), "output_router_logits", False):  # type: ignore[union-attr,operator]
        kwargs["output_router_logits"] = False  # losses that are not used
    try:
        with _settings_aside(model), torch.inference_mode():
            done = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, **kwargs
            )
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        cache = "with its cache" if cached else "without a cache"
        raise ModelError(f"{name} cannot generate text {cache} ({type(error).__name__}: {reason}).") from error
    return done.sequences, done.past_key_values


def _greedy_settings(model: Any, tokens: int, *, stop: bool, cached: bool) -> Any:
    from transformers import GenerationConfig

    ends = ends_of(model) if stop else []
    pad = next((token for token in (model.generation_config.pad_token_id, *ends) if token is not None), 0)
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=cached,
        return_dict_in_generate=True,
        eos_token_id=ends or None,
        pad_token_id=pad if ends else None,
    )


def _after_each_token(tick: Callable[[], None]) -> dict[str, Any]:
    """Arguments of `generate` by which it calls `tick` after each token."""
    from transformers import StoppingCriteriaList

    def stop_nothing(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return {"stopping_criteria": StoppingCriteriaList([stop_nothing])}


@contextmanager
def numbers_only(model: nn.Module, whose: str) -> Iterator[None]:
    """A context in which a forward pass without numbers raises `NotNumbers`: greedy text would go on."""

    def look(_model: Any, _args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and not are_numbers(logits[:, -1]):
            raise NotNumbers(whose, str(model.dtype).removeprefix("torch."))

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def are_numbers(logits: torch.Tensor) -> bool:
    """Whether each row of logits (rows, vocabulary) is a prediction; a token that is ruled out may have -inf."""
    return bool(logits.float().logsumexp(dim=-1).isfinite().all())


def ends_of(model: nn.Module) -> list[int]:
    """The model's own end-of-sequence tokens."""
    own: Any = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    return [ends] if isinstance(ends, int) else list(ends or [])


@contextmanager
def _settings_aside(model: Any) -> Iterator[None]:
    """A context in which the model has no generation settings, which `generate` would use where none is given."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds: keys and values, recurrent and convolutional states, whatever its class.

    A slice counts as itself, not as the tensor it was cut from, a tensor that is held twice once, and a single number
    (a sliding window's length) not at all.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    ahead = [cache]
    while ahead:
        value = ahead.pop()
        if isinstance(value, torch.Tensor):
            sizes[id(value)] = value.nbytes if value.ndim else 0
        elif isinstance(value, dict):
            ahead.extend(value.values())
        elif isinstance(value, list | tuple):
            ahead.extend(value)
        elif type(value).__module__.partition(".")[0] in ("builtins", "torch"):
            continue
        elif hasattr(value, "__dict__") and id(value) not in seen and not isinstance(value, type | nn.Module):
            seen.add(id(value))
            ahead.extend(vars(value).values())
    return sum(sizes.values())


def require_resident(streamed: object, work: str) -> None:
    """Raises `OptionError` where the blocks stay on disk: every token would read all of them."""
    if streamed is not None:
        raise OptionError(
            f"The model is read from disk block by block (`memory_budget`), and {work} would read all of it for every "
            "token. Leave `memory_budget` out."
        )


def positions_of(config: Any) -> int | None:
    """The number of tokens that the model has positions for; None where nothing limits them."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def require_positions(config: Any, length: int) -> None:
    """Raises `CalibrationError` for sequences of text that are longer than the positions of the model."""
    limit = positions_of(config)
    if limit is not None and limit < length:
        raise CalibrationError(
            f"Sequences of {length} tokens are longer than the {limit} positions of the model. "
            f"Use `sequence_length={limit}` or less."
        )
