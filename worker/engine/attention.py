"""Attention over paged KV for transformers' own modules, every row by itself.

A row of a step is one token of one sequence. Its scores and its weighted sum are taken by kernels that go through the
row's own keys one by one, in order of position: sampled matrix product for q k^T, bag of weighted rows for p v. Thus
a row has the same bits alone, in any batch, in a prefill chunk and in a decode step, with any number of threads.
torch's fused attention and batched products do not give that (`docs/decisions/0005-exactness-in-fp32.md`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface

from worker.engine.kv import KVPool, LayerShape

IMPLEMENTATION = "llmos_paged"
_SOFTMAX_ALIGN = 64
"""Softmax rows are padded to a multiple of this many elements; the vectorized sum then has no partial vector."""
_GROUP_ELEMENTS = 1 << 20
"""Scores that are computed together; bounds memory (about 24 bytes each) at long contexts."""
_CHEAP_ELEMENTS = 2048
_PADDING_RATIO = 1.25
"""Rows of a group may be padded by this factor together, and always up to `_CHEAP_ELEMENTS` per head."""


@dataclass(frozen=True, slots=True)
class KVRow:
    """A row's sequence, as `KVMemory.slots` describes it, and how many of its tokens the row sees (itself included)."""

    slots: Tensor
    length: int


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a layer calls attention: fixed per layer."""

    heads: int
    shape: LayerShape
    scaling: float
    window: int | None
    softcap: float | None


class Attention(Protocol):
    """What a model's layers call."""

    def attend(self, layer: int, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[heads, rows, dim] and twice [kv_heads, rows, dim] to [rows, heads, value_dim]."""
        ...


class PagedAttention:
    """Attention of one step: `rows` are the step's first rows, `targets` the slots that they are written to.

    Rows of the step beyond `rows` are padding; they get zeros.
    """

    def __init__(self, pool: KVPool, rows: Sequence[KVRow], targets: Tensor) -> None:
        self._pool = pool
        self._rows = rows
        self._targets = targets
        self._groups: dict[tuple[int, int, int | None], list[_Group]] = {}

    def attend(self, layer: int, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`."""
        count = len(self._rows)
        self._pool.write(layer, self._targets, key.transpose(0, 1)[:count], value.transpose(0, 1)[:count])
        keys, values = self._pool.keys[layer].flatten(0, 1), self._pool.values[layer].flatten(0, 1)
        queries = query.transpose(0, 1)
        out = query.new_zeros(query.shape[1], call.heads, call.shape.value_dim)
        for group in self._grouped(call, keys):
            out.index_copy_(0, group.rows, group.attend(queries, keys, values, call))
        return out

    def _grouped(self, call: LayerCall, keys: Tensor) -> list[_Group]:
        # Layers of one geometry share the index; building it costs more than using it.
        geometry = (call.heads, call.shape.kv_heads, call.window)
        found = self._groups.get(geometry)
        if found is None:
            members = group_rows([_seen(row, call.window) for row in self._rows], _GROUP_ELEMENTS // call.heads)
            found = [_group(self._rows, numbers, call, keys) for numbers in members]
            self._groups[geometry] = found
        return found


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of similar length. Each (row, head) is a bag of `width` keys: the row's own in order, then padding."""

    rows: Tensor
    """Row numbers, int64 [rows]."""
    index: Tensor
    """Which (slot, kv head) each score belongs to; int64 [rows * heads, width]. Padding repeats the row's first key."""
    pattern: Tensor
    """Sparse [rows * heads, slots * kv_heads] matrix with these indices; its values are scratch."""
    padding: Tensor
    """Where a bag has no key; bool [rows, 1, width]."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        """[step's rows, heads, dim] queries, [slots * kv_heads, dim] keys and values: [rows, heads, value_dim]."""
        count, heads, width = self.rows.shape[0], call.heads, self.index.shape[1]
        chosen = queries.index_select(0, self.rows).flatten(0, 1)
        # The pattern takes the result: a fresh one would copy the index for every layer.
        torch.sparse.sampled_addmm(self.pattern, chosen, keys.t(), beta=0.0, alpha=call.scaling, out=self.pattern)
        scores = self.pattern.values().view(count, heads, width)
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        weights = scores.masked_fill(self.padding, -math.inf).softmax(-1).view(-1, width)
        bags = nnf.embedding_bag(self.index, values, mode="sum", per_sample_weights=weights)
        return bags.view(count, heads, -1)


def group_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers by group: similar lengths together, so that padding to the longest costs little. Pure.

    A group has at most `limit` elements after padding, unless one row alone has more.
    """
    groups: list[list[int]] = []
    needed = 0
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        width = _padded(lengths[number])
        members = groups[-1] if groups else []
        padded = (len(members) + 1) * width
        fits = padded <= min(limit, max(_CHEAP_ELEMENTS, (needed + width) * _PADDING_RATIO))
        if members and fits:
            members.append(number)
            needed += width
        else:
            groups.append([number])
            needed = width
    return groups


def _padded(length: int) -> int:
    return -(-length // _SOFTMAX_ALIGN) * _SOFTMAX_ALIGN


def _seen(row: KVRow, window: int | None) -> int:
    return row.length if window is None else min(row.length, window)


def _group(rows: Sequence[KVRow], numbers: Sequence[int], call: LayerCall, keys: Tensor) -> _Group:
    heads, kv_heads, device = call.heads, call.shape.kv_heads, keys.device
    counts = torch.tensor([_seen(rows[number], call.window) for number in numbers], device=device)
    width = _padded(int(counts.max()))
    slots = torch.stack([_bag(rows[number], call.window, width) for number in numbers])
    head_of = torch.arange(heads, device=device) // (heads // kv_heads)
    index = (slots[:, None] * kv_heads + head_of[:, None]).flatten(0, 1)
    pattern = torch.sparse_csr_tensor(
        torch.arange(index.shape[0] + 1, device=device) * width,
        index.flatten(),
        keys.new_zeros(index.numel()),
        size=(index.shape[0], keys.shape[0]),
        check_invariants=False,
    )
    padding = torch.arange(width, device=device) >= counts[:, None, None]
    return _Group(torch.tensor(numbers, device=device), index, pattern, padding)


def _bag(row: KVRow, window: int | None, width: int) -> Tensor:
    first = row.length - _seen(row, window)
    return torch.cat([row.slots[first : row.length], row.slots[first].expand(width - row.length + first)])


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Attention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention modules call. `paged` is handed through the model's `forward`.

    `query` is [1, heads, rows, dim]. Raises ValueError for anything that it would otherwise silently leave out.
    """
    extra = sorted(name for name in ("s_aux", "position_bias", "sinks") if options.get(name) is not None)
    causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
    if paged is None or attention_mask is not None or not causal or extra:
        raise ValueError(f"attention with mask, sinks or bias, or without paged KV: {type(module).__name__} {extra}")
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    call = LayerCall(query.shape[1], shape, scale, sliding_window, softcap)
    return paged.attend(int(module.layer_idx), call, query[0], key[0], value[0])[None], None  # type: ignore[arg-type]


def register() -> None:
    """Make the function known to transformers, and pass over torch's one-time notice on sparse tensors."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
