"""Attention inside a packed row (`packing.py`), as an attention function that transformers' models can call.

A model that routes its attention through transformers' interface calls `pair_attention` within `attending_by_pairs`
and hands on the row it was called with.

On CPU each pair is computed by itself, in two calls of SDPA: prompt + chosen causally, then rejected against prompt +
rejected, so that no mask is larger than one answer times one sequence. On a GPU one compiled FlexAttention call takes
the whole row, with a block mask made once a row. Not tested: the GPU path (its mask is, on CPU). Not covered: sliding
windows shorter than a sequence, soft caps, attention sinks, position biases; they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainer.pair_rows import Row

NAME = "zephyr_pairs"
_NOT_TAKEN = ("softcap", "s_aux", "position_bias", "cache")


def pair_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    row: Row,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Query [1, heads, tokens, size], key and value [1, key-value heads, tokens, size] → [1, tokens, heads, size].

    Raises ValueError for what a row cannot be computed with.
    """
    odd = [name for name in _NOT_TAKEN if others.get(name) is not None]
    if odd or dropout:
        raise ValueError(f"attention with {', '.join(odd) or 'dropout'}")
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        return _by_pair(query, key, value, row, scale=scaling, enable_gqa=grouped), None
    output = _compiled_flex_attention()(
        query, key, value, block_mask=row.block_mask(), scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2), None


def _by_pair(query: Tensor, key: Tensor, value: Tensor, row: Row, **how: Any) -> Tensor:
    found: list[Tensor] = []
    for start, pair in zip(row.layout.starts, row.layout.pairs, strict=True):
        middle, end = start + pair.prompt + pair.chosen, start + pair.tokens
        prompt, whole, rejected = slice(start, start + pair.prompt), slice(start, middle), slice(middle, end)
        asks, keys, values = (both[:, :, whole] for both in (query, key, value))
        found.append(scaled_dot_product_attention(asks, keys, values, is_causal=True, **how))
        if pair.rejected:
            keys, values = (torch.cat([both[:, :, prompt], both[:, :, rejected]], dim=2) for both in (key, value))
            mask = row.answer_mask(pair)
            found.append(scaled_dot_product_attention(query[:, :, rejected], keys, values, attn_mask=mask, **how))
    return torch.cat(found, dim=2).transpose(1, 2)


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@contextmanager
def attending_by_pairs(config: Any) -> Iterator[None]:
    """Within, the model of this configuration calls `pair_attention`. Backward belongs within too: it may recompute."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, pair_attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
