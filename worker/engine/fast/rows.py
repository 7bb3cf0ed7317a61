"""Rows of a step as the kernels take them. Little is made anew each step: Python's share of a fast step counts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.fast.pool import FastKVPool
from worker.kernels import abi

MAX_ROWS = 256
"""Rows of one call of the kernels; a longer step is several calls, which changes no bit."""


class FastRows:
    """Where the rows of a step lie; built like `PagedAttention`, whose place it takes. `targets` is not needed."""

    def __init__(self, pool: FastKVPool, rows: Sequence[KVRow], targets: Tensor | None = None) -> None:
        self.pool = pool
        self._slots = {id(row.slots): row.slots for row in rows}
        numbers = dict(zip(self._slots, range(len(self._slots)), strict=True))
        self.sequence = [numbers[id(row.slots)] for row in rows]
        """Number of each row's sequence."""
        count = len(numbers)
        self.tables = (ctypes.c_void_p * count)(*[slots.data_ptr() for slots in self._slots.values()])
        """Block table of each sequence; this object keeps them alive."""
        self.widths = (ctypes.c_int32 * count)(*map(len, self._slots.values()))
        """Blocks in each table."""


class StepArgs:
    """The arguments of a step, laid out once."""

    def __init__(self) -> None:
        self._numbers = np.empty((4, MAX_ROWS), np.int32)
        tokens, positions, sequence, wanted = (row.ctypes.data for row in self._numbers)
        self._args = abi.StepArgs(tokens=tokens, positions=positions, sequence=sequence, wanted=wanted)

    def fill(
        self,
        rows: FastRows,
        part: slice,
        tokens: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        logits: Tensor,
    ) -> abi.StepArgs:
        """Arguments for the `part` of `rows` that `tokens` and `positions` belong to; overwritten by the next call.

        `wanted` counts from the part's begin. The caller keeps `rows` and `logits` alive. No row has an adapter.
        """
        args, count, pool = self._args, len(tokens), rows.pool
        self._numbers[0, :count] = tokens
        self._numbers[1, :count] = positions
        self._numbers[2, :count] = rows.sequence[part]
        self._numbers[3, : len(wanted)] = wanted
        args.rows, args.wanted_rows, args.blocks, args.sequences = count, len(wanted), pool.blocks, len(rows.widths)
        args.tables, args.table_blocks = ctypes.addressof(rows.tables), ctypes.addressof(rows.widths)
        args.logits = logits.data_ptr()
        args.keys, args.values = ctypes.addressof(pool.keys), ctypes.addressof(pool.values)
        args.adapter_count, args.adapter, args.adapters = 0, None, None
        return args
