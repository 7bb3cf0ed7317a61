"""Attention of encoders for transformers' own modules: every token of a text sees the whole text and nothing else.

A step's rows are texts one after another. Texts of equal length are attended together, in one fused call without mask
or padding; inside, each text and head is a task of its own whose order of sums depends on the length alone, so that a
text has the same bits alone, in any batch, and with any number of threads (`docs/decisions/0005-exactness-in-fp32.md`;
`tests/integration/engine/test_encoder.py` repeats the measurement).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "llmos_texts"


class TextAttention:
    """Attention of one step: `lengths` of its texts, in the order of their rows. Equal ones should be neighbours."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._groups = list(_runs(lengths))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Thrice [heads, rows, dim] to [rows, heads, dim]."""
        parts = [self._group(query, key, value, scaling, *group) for group in self._groups]
        return torch.cat(parts)

    def _group(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, first: int, count: int, length: int
    ) -> Tensor:
        def texts(rows: Tensor) -> Tensor:
            cut = rows[:, first : first + count * length]
            return cut.view(cut.shape[0], count, length, cut.shape[2]).transpose(0, 1)

        if length == 1:  # a token that sees itself only; the fused call treats a single query in a way of its own
            return texts(value).transpose(1, 2).flatten(0, 1)
        out = nnf.scaled_dot_product_attention(texts(query), texts(key), texts(value), scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First row, number and length of neighbouring texts of one length."""
    first = 0
    for length, members in groupby(lengths):
        count = len(list(members))
        yield first, count, length
        first += count * length


def text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    texts: TextAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention modules call. `texts` is handed through the model's `forward`.

    `query` is [1, heads, rows, dim]. Raises ValueError for anything that it would otherwise silently leave out.
    """
    known = ("sliding_window", "softcap", "s_aux", "position_bias", "sinks")
    extra = sorted(name for name in known if options.get(name) is not None)
    causal = getattr(module, "is_causal", False) or options.get("is_causal") is True
    if texts is None or attention_mask is not None or causal or extra or key.shape[1] != query.shape[1]:
        raise ValueError(f"attention that is causal, masked, biased or grouped: {type(module).__name__} {extra}")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    return texts.attend(query[0], key[0], value[0], scale)[None], None


def register() -> None:
    """Make the function known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, text_attention)
