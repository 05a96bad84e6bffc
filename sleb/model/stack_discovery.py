"""Where a Hugging Face model keeps its blocks, and whether they can be searched. Runs it once; changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sleb.errors import ModelError

HIDDEN = "hidden_states"
"""The name of the input of Hugging Face blocks where it is passed by name."""


def call_model(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> Any:
    """The model's own forward without a cache, and without the router losses some mixtures of experts compute."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):  # type: ignore[union-attr,operator]
        kwargs["output_router_logits"] = False
    return model(input_ids=ids, use_cache=False, **kwargs)


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and list of the model's blocks: the only `nn.ModuleList` as long as `num_hidden_layers` that is run."""
    name = type(model).__name__
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    expected = getattr(config, "num_hidden_layers", None)
    if not isinstance(expected, int):
        raise ModelError(f"{name} does not say how many blocks it has (num_hidden_layers); it cannot be searched.")
    if expected < 2:
        raise ModelError(f"{name} has {expected} block; at least two are needed to remove one.")
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    }
    lists = {  # lists inside blocks are not stacks of their own
        path: module for path, module in lists.items() if not any(path.startswith(f"{outer}.") for outer in lists)
    }
    if len(lists) > 1:  # a vision tower can be as deep as the language model: keep what a text runs through
        lists = {path: module for path, module in lists.items() if _calls_in_order(model, module)}
    if len(lists) != 1:
        actual = "no list" if not lists else "several lists (" + ", ".join(lists) + ")"
        raise ModelError(
            f"{name} should have one list of {expected} blocks (config.num_hidden_layers), and has {actual}; "
            "this architecture is not supported."
        )
    return next(iter(lists.items()))


def _run_blocks(model: nn.Module, blocks: nn.ModuleList) -> tuple[list[tuple[int, Any]], torch.Tensor]:
    """Outputs of the blocks in the order they are run, and logits, of two rows that differ in their last token.

    One pass serves all questions: where weights are streamed, each pass reads all of them.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 64)  # type: ignore[union-attr,operator]
    ids = torch.arange(3, 9).remainder(max(vocabulary, 1)).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    calls: list[tuple[int, Any]] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output, index=index: calls.append((index, output)))
        for index, block in enumerate(blocks)
    ]
    try:
        with torch.inference_mode():
            logits = call_model(model, ids.to(device_of(model))).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run on text alone ({type(error).__name__}: {_first_line(error)}); "
            "a causal language model is needed."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _calls_in_order(model: nn.Module, blocks: nn.ModuleList) -> bool:
    return [index for index, _ in _run_blocks(model, blocks)[0]] == list(range(len(blocks)))


def tuple_lengths(model: nn.Module, blocks: nn.ModuleList) -> list[int | None]:
    """The length of the tuple that each block returns, None for a bare tensor. Raises `ModelError` for unfit models."""
    calls, logits = _run_blocks(model, blocks)
    order = [index for index, _ in calls]
    if order != list(range(len(blocks))):
        raise ModelError(
            f"{type(model).__name__} runs its blocks in the order {order[:12]}, not once each from first to last; "
            "skipping one block has no clear meaning there."
        )
    lengths: list[int | None] = []
    for index, output in calls:
        hidden = first(output)
        if not isinstance(hidden, torch.Tensor):
            raise ModelError(
                f"Block {index} of {type(model).__name__} returns {type(output).__name__}, not a hidden state; "
                "this architecture is not supported."
            )
        lengths.append(len(output) if isinstance(output, tuple | list) else None)
    _require_causal(model, logits)
    return lengths


def _require_causal(model: nn.Module, logits: torch.Tensor) -> None:
    """Raises `ModelError` for an encoder loaded as a language model, which predicts a token it has already seen."""
    # Equal to the last bit where every token takes the same way; mixtures of experts group tokens differently.
    tolerance = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    before, after = logits[:, :-1].float()
    if float((before - after).abs().max()) > tolerance * float(before.abs().max().clamp(min=1e-6)):
        raise ModelError(
            f"{type(model).__name__} is not causal: its prediction for a token depends on later tokens, as in an "
            "encoder; a causal (decoder-only) language model is needed."
        )


def device_of(model: Any) -> torch.device:
    """The device of the embeddings, where token ids go in."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return weight.device if weight is not None else next(model.parameters()).device


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states with which a block was called, (batch, sequence, hidden)."""
    return args[0] if args else kwargs[HIDDEN]


def first(output: Any) -> Any:
    """The hidden states of a block's output, which may come with others in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
