"""Attention over paged KV for transformers' own modules, every row by itself.

A row of a step is one token of one sequence. Its scores and its weighted sum are taken by kernels that go through the
row's own keys one by one, in order of position: sampled matrix product for q k^T, bag of weighted rows for p v. Thus
a row has the same bits alone, in any batch, in a prefill chunk and in a decode step, with any number of threads.
torch's fused attention and batched products do not give that (`docs/decisions/0005-exactness-in-fp32.md`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
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
"""Scores that are computed together; bounds memory (index, score, weight: 24 bytes each) at long contexts."""


@dataclass(frozen=True, slots=True)
class KVRow:
    """A row's sequence: its slots in order of position, and how many of them the row sees (itself included)."""

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
        count, kv_heads = len(self._rows), call.shape.kv_heads
        self._pool.write(layer, self._targets, key.transpose(0, 1)[:count], value.transpose(0, 1)[:count])
        keys, values = self._pool.keys[layer].flatten(0, 1), self._pool.values[layer].flatten(0, 1)
        queries = query.transpose(0, 1)[:count].flatten(0, 1)
        out = query.new_zeros(query.shape[1], call.heads, call.shape.value_dim)
        flat = out.view(-1, call.shape.value_dim)
        for group in self._grouped(call.heads, kv_heads, call.window):
            bags = slice(group.first_row * call.heads, group.last_row * call.heads)
            flat[bags] = group.attend(queries[bags], keys, values, call)
        return out

    def _grouped(self, heads: int, kv_heads: int, window: int | None) -> list[_Group]:
        # Layers of one geometry share the index; building it costs more than using it.
        found = self._groups.get((heads, kv_heads, window))
        if found is None:
            found = list(_groups(self._rows, heads, kv_heads, window))
            self._groups[heads, kv_heads, window] = found
        return found


@dataclass(frozen=True, slots=True)
class _Group:
    """Bags of a run of rows: one bag for each (row, head), holding the row's keys in order of position."""

    first_row: int
    last_row: int
    index: Tensor
    """Which (slot, kv head) each score belongs to; int64 [scores]."""
    offsets: Tensor
    """Where each bag begins in `index`, and the end of the last; int64 [bags + 1]."""
    padded: Tensor
    """Where each score lies in the padded [bags, width] matrix; int64 [scores]."""
    width: int

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, call: LayerCall) -> Tensor:
        """[bags, key_dim] queries against [slots * kv_heads, dim] keys and values: [bags, value_dim]."""
        bags = queries.shape[0]
        pattern = torch.sparse_csr_tensor(
            self.offsets,
            self.index,
            queries.new_zeros(self.index.shape[0]),
            size=(bags, keys.shape[0]),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(pattern, queries, keys.t(), beta=0.0, alpha=call.scaling)
        scores = product.values()
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        dense = queries.new_full((bags * self.width,), -math.inf).index_copy_(0, self.padded, scores)
        weights = dense.view(bags, self.width).softmax(-1).flatten().index_select(0, self.padded)
        return nnf.embedding_bag(
            self.index, values, self.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )


def _groups(rows: Sequence[KVRow], heads: int, kv_heads: int, window: int | None) -> Iterator[_Group]:
    first, width = 0, 0
    for number, row in enumerate(rows):
        wider = max(width, -(-_seen(row, window) // _SOFTMAX_ALIGN) * _SOFTMAX_ALIGN)
        if number > first and (number + 1 - first) * heads * wider > _GROUP_ELEMENTS:
            yield _group(rows, first, number, width, heads, kv_heads, window)
            first, wider = number, -(-_seen(row, window) // _SOFTMAX_ALIGN) * _SOFTMAX_ALIGN
        width = wider
    yield _group(rows, first, len(rows), width, heads, kv_heads, window)


def _seen(row: KVRow, window: int | None) -> int:
    return row.length if window is None else min(row.length, window)


def _group(
    rows: Sequence[KVRow], first: int, last: int, width: int, heads: int, kv_heads: int, window: int | None
) -> _Group:
    device = rows[first].slots.device
    head_of = (torch.arange(heads, device=device) // (heads // kv_heads))[:, None]
    counts = [_seen(row, window) for row in rows[first:last]]
    index = torch.cat(
        [
            (row.slots[row.length - seen : row.length] * kv_heads + head_of).flatten()
            for row, seen in zip(rows[first:last], counts, strict=True)
        ]
    )
    lengths = torch.tensor(counts, device=device).repeat_interleave(heads)
    offsets = nnf.pad(lengths.cumsum(0), (1, 0))
    starts = torch.arange(lengths.shape[0], device=device) * width
    padded = torch.arange(index.shape[0], device=device) + (starts - offsets[:-1]).repeat_interleave(lengths)
    return _Group(first, last, index, offsets, padded, width)


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
