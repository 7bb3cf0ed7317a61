"""A decoder with the calls of `worker.engine.model.Decoder`, computed by the kernels."""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.demand import workspace_bytes
from worker.engine.attention import KVRow
from worker.engine.fast.adapters import AdapterTable
from worker.engine.fast.packing import KindOf, PackedModel, all_int8, open_model, pack
from worker.engine.fast.pool import FastKVPool
from worker.engine.fast.rows import MAX_ROWS, FastRows, StepArgs
from worker.engine.kv import LayerShape
from worker.engine.lora import Adapter
from worker.kernels import Isa, Kernels, abi, load
from worker.kernels.binding import address, check


class FastDecoder:
    """A packed model. Calls from several threads take turns.

    `layers`, `vocabulary`, `context_length`, `end_tokens`, `device`, `weight_bytes` and `workspace_bytes` are those of
    `Decoder`.
    """

    def __init__(
        self,
        packed: PackedModel,
        kernels: Kernels,
        *,
        isa: Isa | None = None,
        end_tokens: frozenset[int] = frozenset(),
        kv_dtype: torch.dtype = torch.float16,
    ) -> None:
        self._packed = packed
        self._library = kernels.library
        self.kv_dtype = kv_dtype
        self.isa = kernels.isa if isa is None else isa
        self._handle = open_model(packed, kernels, self.isa)
        self._close = weakref.finalize(self, self._library.llk_close, self._handle)
        shape = packed.shape
        self._adapters = AdapterTable(shape)
        self._step, self._turn = StepArgs(), threading.Lock()
        self.layers: Sequence[LayerShape] = tuple(call.shape for call in packed.calls)
        self.vocabulary = int(shape.vocabulary)
        self.context_length: int | None = int(shape.positions)
        self.end_tokens = end_tokens
        self.device = torch.device("cpu")
        self.weight_bytes = packed.weight_bytes
        self.workspace_bytes = workspace_bytes(self.vocabulary)

    def with_memory(self, blocks: int) -> PagedFastDecoder:
        """See `worker.engine.paged.Servable`."""
        return PagedFastDecoder(self, self.open_pool(blocks))

    def put_adapter(self, number: int, adapter: Adapter) -> None:
        """See `worker.engine.lora.AdapterHolder`."""
        self._adapters.put(number, adapter)

    def drop_adapter(self, number: int) -> None:
        """See `worker.engine.lora.AdapterHolder`."""
        self._adapters.drop(number)

    def open_pool(self, blocks: int) -> FastKVPool:
        """KV memory of `blocks` blocks for this model."""
        return FastKVPool(self.layers, blocks, self.kv_dtype)

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        attend: FastRows,
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """One pass over rows of any sequences, one token each; writes their keys and values.

        Logits of the rows in `wanted`, float32 [wanted, vocabulary]. `adapters` are the numbers of the rows' adapters,
        0 for none; empty: none has one. Raises ValueError, before anything is written, for a token, position, block or
        adapter that is out of range.
        """
        if not len(tokens) == len(positions) == len(attend.sequence) == (len(adapters) or len(tokens)):
            raise ValueError("tokens, positions, rows and adapters differ in number")
        if attend.pool.dtype != self.kv_dtype or attend.pool.shapes != self.layers:
            raise ValueError("the pool was made for another model")
        rows = sorted(set(wanted))
        if rows and not 0 <= rows[0] <= rows[-1] < len(tokens):
            raise ValueError(abi.MESSAGES[5])
        logits = torch.empty(len(rows), self.vocabulary)
        adapted = np.asarray(adapters, np.int32) - np.int32(1) if any(adapters) else None
        for first in range(0, len(tokens), MAX_ROWS):
            part = slice(first, first + MAX_ROWS)
            low, high = bisect_left(rows, first), bisect_left(rows, first + MAX_ROWS)
            asked = [row - first for row in rows[low:high]]
            with self._turn:
                args = self._step.fill(attend, part, tokens[part], positions[part], asked, logits[low:high])
                if adapted is not None:
                    self._adapters.fill(args, adapted[part])
                check(self._library.llk_step(self._handle, ctypes.byref(args)))
        if rows == list(wanted):
            return logits
        return logits[[rows.index(row) for row in wanted]]

    def attend(self, layer: int, queries: Tensor, positions: Sequence[int], attend: FastRows) -> Tensor:
        """Attention of one layer over what the pool holds: scaled queries, float32 [rows, heads, dim], same shape out.

        At most `MAX_ROWS` rows. For tests and measurements.
        """
        shape = self._packed.shape
        wanted = (len(attend.sequence), shape.heads, shape.head_dim)
        if tuple(queries.shape) != wanted or len(positions) != wanted[0]:
            raise ValueError(f"queries of shape {wanted} are needed")
        out, count = torch.empty_like(queries), len(positions)
        with self._turn:
            args = self._step.fill(attend, slice(0, count), [0] * count, positions, [], torch.empty(0))
            library, handle = self._library, self._handle
            check(library.llk_attend(handle, layer, ctypes.byref(args), address(queries), address(out)))
        return out


@dataclass(frozen=True, slots=True)
class PagedFastDecoder:
    """Implements `worker.engine.paged.Paged`."""

    decoder: FastDecoder
    memory: FastKVPool

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[KVRow],
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """See `Paged`."""
        return self.decoder.forward(tokens, positions, FastRows(self.memory, rows), wanted, adapters)


def fast_decoder(
    model: Any,
    *,
    context_length: int | None = None,
    end_tokens: frozenset[int] = frozenset(),
    kv_dtype: torch.dtype = torch.float16,
    isa: Isa | None = None,
    kind_of: KindOf = all_int8,
) -> FastDecoder:
    """Pack transformers' module for the fast path; the module can be dropped afterwards.

    `context_length` lowers the model's own limit; `kind_of` says how each matrix is stored. Raises UnsupportedFeature
    where `why_not` or the missing compiler says so.
    """
    kernels = load()
    limit = int(model.config.max_position_embeddings)
    positions = min(context_length or limit, limit)
    packed = pack(model, kernels, positions, MAX_ROWS, kv_dtype, kind_of)
    kernels.set_threads(torch.get_num_threads())
    return FastDecoder(packed, kernels, isa=isa, end_tokens=end_tokens, kv_dtype=kv_dtype)
