"""A decoder with the calls of `worker.engine.model.Decoder`, computed by the kernels."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.fast.adapters import AdapterTable
from worker.engine.fast.packing import KindOf, PackedModel, all_int8, open_model, pack
from worker.engine.fast.pool import FastKVPool
from worker.engine.kv import BLOCK_TOKENS, LayerShape
from worker.engine.lora import Adapter
from worker.kernels import Isa, Kernels, abi, load
from worker.kernels.binding import address, check

MAX_ROWS = 256
"""Rows of one call of the kernels; a longer step is several calls, which changes no bit."""

Int32s = NDArray[np.int32]


class FastRows:
    """Where the rows of a step lie; built like `PagedAttention`, whose place it takes. `targets` is not needed."""

    def __init__(self, pool: FastKVPool, rows: Sequence[KVRow], targets: Tensor | None = None) -> None:
        self.pool = pool
        numbers: dict[int, int] = {}
        self.sequence = np.empty(len(rows), np.int32)
        lengths: list[int] = []
        slots: list[Tensor] = []
        for number, row in enumerate(rows):
            known = numbers.setdefault(id(row.slots), len(slots))
            if known == len(slots):
                slots.append(row.slots)
                lengths.append(0)
            self.sequence[number] = known
            lengths[known] = max(lengths[known], row.length)
        self.tables = np.zeros((len(slots), max(map(_blocks, lengths), default=1)), np.int32)
        for known, (own, length) in enumerate(zip(slots, lengths, strict=True)):
            self.tables[known, : _blocks(length)] = own.numpy()[: _blocks(length)]


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class FastDecoder:
    """A packed model. Call from one thread at a time.

    `layers`, `vocabulary`, `context_length`, `end_tokens`, `device` and `weight_bytes` are those of `Decoder`.
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
        self.layers: Sequence[LayerShape] = [call.shape for call in packed.calls]
        self.vocabulary = int(shape.vocabulary)
        self.context_length: int | None = int(shape.positions)
        self.end_tokens = end_tokens
        self.device = torch.device("cpu")
        self.weight_bytes = packed.weight_bytes

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
        if attend.pool.dtype != self.kv_dtype or list(attend.pool.shapes) != list(self.layers):
            raise ValueError("the pool was made for another model")
        ids, places = np.asarray(tokens, np.int32), np.asarray(positions, np.int32)
        rows = sorted(set(wanted))
        if rows and not 0 <= rows[0] <= rows[-1] < len(ids):
            raise ValueError(abi.MESSAGES[5])
        logits = torch.empty(len(rows), self.vocabulary)
        adapted = np.asarray(adapters, np.int32) - np.int32(1) if any(adapters) else None
        for first in range(0, len(ids), MAX_ROWS):
            part = slice(first, first + MAX_ROWS)
            low, high = (sum(row < bound for row in rows) for bound in (first, first + MAX_ROWS))
            asked = np.asarray(rows[low:high], np.int32) - np.int32(first)
            args = self._args(ids[part], places[part], attend.sequence[part], attend, asked, logits[low:high])
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
        places, nothing = np.asarray(positions, np.int32), np.zeros(len(positions), np.int32)
        out = torch.empty_like(queries)
        args = self._args(nothing, places, attend.sequence, attend, nothing[:0], torch.empty(0))
        library, handle = self._library, self._handle
        check(library.llk_attend(handle, layer, ctypes.byref(args), address(queries), address(out)))
        return out

    @staticmethod
    def _args(
        ids: Int32s, places: Int32s, sequence: Int32s, attend: FastRows, wanted: Int32s, logits: Tensor
    ) -> abi.StepArgs:
        """Addresses of arrays that the caller keeps alive during the call."""
        tables, pool = attend.tables, attend.pool
        return abi.StepArgs(
            rows=len(ids),
            sequences=tables.shape[0],
            table_width=tables.shape[1],
            wanted_rows=len(wanted),
            blocks=pool.blocks,
            tokens=ids.ctypes.data,
            positions=places.ctypes.data,
            sequence=sequence.ctypes.data,
            tables=tables.ctypes.data,
            wanted=wanted.ctypes.data,
            logits=logits.data_ptr(),
            keys=ctypes.addressof(pool.keys),
            values=ctypes.addressof(pool.values),
        )


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
