"""What a step's kernels read, at fixed places in device memory, so that graphs can be replayed over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.kv import BLOCK_TOKENS

MAX_ROWS = 192
"""Rows of one pass: those of a prefill chunk and of as many choices as run together. A longer step is several passes,
which changes no bit."""


class StepInput:
    """Written by the host before each pass.

    `table` is the number of blocks that one sequence may have; `spare` the block that belongs to none.
    """

    def __init__(self, device: torch.device, table: int, spare: int) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(6, MAX_ROWS, dtype=torch.int64, pin_memory=pinned)
        self._host_blocks = torch.zeros(1 + MAX_ROWS * table, dtype=torch.int32, pin_memory=pinned)
        self._numbers, self._places = self._host.numpy(), self._host_blocks.numpy()
        self._places[0] = spare
        self._device = torch.zeros_like(self._host, device=device)
        self.blocks = torch.zeros_like(self._host_blocks, device=device)
        """Block tables of the sequences one after another, int32; the first entry is padding's."""
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.tokens, self.positions, self.begins, self.lengths, self.targets, self.wanted = self._device.unbind(0)
        """int64 [MAX_ROWS] each: token, position, begin in `blocks`, tokens seen, slot to write; and, apart from the
        rows, whose logits are wanted."""

    def fill(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[KVRow], wanted: Sequence[int]
    ) -> None:
        """Lay a pass out; what lies behind it is padding, a row each that sees one slot of the spare block."""
        if self._copied is not None:
            self._copied.synchronize()
        count, numbers, places = len(tokens), self._numbers, self._places
        begins: dict[int, int] = {}
        used = 1
        for row in rows:
            if id(row.slots) not in begins:
                begins[id(row.slots)] = used
                places[used : used + len(row.slots)] = row.slots.numpy()
                used += len(row.slots)
        numbers[:4, count:] = ((0,), (0,), (0,), (1,))
        numbers[0, :count] = tokens
        numbers[1, :count] = positions
        numbers[2, :count] = [begins[id(row.slots)] for row in rows]
        numbers[3, :count] = [row.length for row in rows]
        last = numbers[3] - 1
        numbers[4] = places[numbers[2] + last // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + last % BLOCK_TOKENS
        numbers[5] = 0
        numbers[5, : len(wanted)] = wanted
        self._device.copy_(self._host, non_blocking=True)
        self.blocks[:used].copy_(self._host_blocks[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and positions of the first `count` rows, as transformers takes them: twice [1, count]."""
        return self.tokens[None, :count], self.positions[None, :count]
