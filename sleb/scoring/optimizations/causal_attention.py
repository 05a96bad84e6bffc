"""Causal attention by matrix products, some rows at a time, in place of torch's CPU kernel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sleb.scoring.scorer import Scorer


class PiecewiseAttention:
    """Causal attention over whole sequences by matrix products, some rows at a time, in place of torch's CPU kernel.

    For models whose attention is transformers' `sdpa`, whose masked attention and everything else stays as it was.
    """

    name = "attention in pieces"

    def __init__(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.functions = ALL_ATTENTION_FUNCTIONS
        self.before = self.functions["sdpa"]
        self.attend = _piecewise(self.before)  # one object: code is compiled again for another

    @contextmanager
    def on(self, scorer: Scorer) -> Iterator[None]:
        """A context in which transformers' table of attention functions, read at each call, has this one in it."""
        self.functions["sdpa"] = self.attend
        try:
            yield
        finally:
            del self.functions["sdpa"]  # an entry of the table's own goes before the library's
            if self.functions["sdpa"] is not self.before:
                self.functions["sdpa"] = self.before


def _piecewise(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    understood = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
    special = set(inspect.signature(sdpa).parameters) - understood | {"softcap"}

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        plain = attention_mask is None and causal and not dropout
        same = query.shape[2] == key.shape[2] > 1 and query.shape[1] % key.shape[1] == 0
        known = query.device.type == "cpu" and all(kwargs.get(name) is None for name in special)
        if plain and same and known:
            return causal_attention(query, key, value, scaling), None
        result: tuple[torch.Tensor, Any] = sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return result

    return attend


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Each token attends to itself and those before it: (batch, sequence, heads, size), as transformers wants it.

    `query` is (batch, heads, sequence, size); `key` and `value` may have fewer heads, shared by groups of queries.
    Only the scores of some rows exist at a time, and none of tokens to come but within those rows.
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    group = heads // shared
    rows = 64 if length <= 512 else 128  # measured: scores stay in the cache, products are large enough
    query = (query * (size**-0.5 if scaling is None else scaling)).view(batch, shared, group, length, size)
    key, value = key.reshape(batch * shared, length, size), value.reshape(batch * shared, length, -1)
    future = torch.full((rows, rows), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    pieces = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        some = query[:, :, :, start:stop].reshape(batch * shared, -1, size)
        scores = torch.bmm(some, key[:, :stop].transpose(1, 2))  # (batch x shared, group x rows, stop)
        scores.view(batch * shared, group, stop - start, stop)[..., start:] += future[: stop - start, : stop - start]
        output = torch.bmm(scores.softmax(dim=-1), value[:, :stop])
        pieces.append(output.view(batch, shared, group, stop - start, -1))
    return torch.cat(pieces, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
