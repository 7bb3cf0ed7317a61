"""A decoder's passes on CUDA. Every pass has one of a few shapes, each recorded once and replayed as a graph.

Rows are padded to multiples of `CUDA_TILE_ROWS`, products have exactly that many, and attention goes row by row
(`worker/engine/cuda/kernels.py`): a row's bits do not depend on the rest of the pass, nor on its shape.
"""

from __future__ import annotations

import functools
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.engine.attention import KVRow, LayerCall
from worker.engine.cuda import kernels
from worker.engine.cuda.pool import CudaKVPool
from worker.engine.cuda.step import MAX_ROWS, StepInput
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.layers import CUDA_TILE_ROWS

if TYPE_CHECKING:
    from worker.engine.model import Decoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Implements `worker.engine.attention.Attention` over a pass that is laid out in `step`."""

    pool: CudaKVPool
    step: StepInput

    def attend(self, layer: int, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`."""
        step, keys, values = self.step, self.pool.keys[layer], self.pool.values[layer]
        kernels.store(key, keys, step.targets)
        kernels.store(value, values, step.targets)
        return kernels.attend(call, query, keys, values, step.blocks, step.begins, step.lengths)


class PagedCudaDecoder:
    """Implements `worker.engine.paged.Paged`. Called by one thread."""

    def __init__(self, decoder: Decoder, blocks: int) -> None:
        self._decoder = decoder
        self.memory = CudaKVPool(decoder.layers, blocks, decoder.device, decoder.kv_dtype)
        longest = blocks if decoder.context_length is None else -(-decoder.context_length // BLOCK_TOKENS)
        self._step = StepInput(decoder.device, min(blocks, longest + 1), self.memory.spare)
        self._attention = _Attention(self.memory, self._step)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._memory_pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            self._step.fill([], [], [], [])
            for rows in range(CUDA_TILE_ROWS, MAX_ROWS + 1, CUDA_TILE_ROWS):
                self._graph(rows, CUDA_TILE_ROWS)

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[KVRow],
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """See `Paged`."""
        order = sorted(set(wanted))
        parts = []
        for first in range(0, len(tokens), MAX_ROWS):
            part = slice(first, first + MAX_ROWS)
            asked = order[bisect_left(order, first) : bisect_left(order, first + MAX_ROWS)]
            self._step.fill(tokens[part], positions[part], rows[part], [row - first for row in asked])
            parts.append(self._pass(len(tokens[part]), len(asked), adapters[part]))
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits if order == list(wanted) else logits[[order.index(row) for row in wanted]]

    def _pass(self, rows: int, wanted: int, adapters: Sequence[int]) -> Tensor:
        """Over the rows that are laid out. Logits: float32 [wanted, vocabulary]."""
        rows, width = _padded(rows), _padded(wanted)
        if any(adapters):
            self._decoder.adapted.assign(adapters)
            logits = self._compute(rows, width)
            self._decoder.adapted.assign(())
            return logits[:wanted]
        graph = self._graph(rows, width)
        if graph is None:
            return self._compute(rows, width)[:wanted]
        graph[0].replay()
        # The next replay writes to the same place.
        return graph[1][:wanted].clone()

    def _compute(self, rows: int, width: int) -> Tensor:
        tokens, positions = self._step.rows(rows)
        out = self._decoder.model(
            input_ids=tokens,
            position_ids=positions,
            logits_to_keep=self._step.wanted[:width],
            use_cache=False,
            paged=self._attention,
        )
        logits: Tensor = out.logits[0].float()
        return logits

    def _graph(self, rows: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """A recorded pass of that shape and where it leaves its logits; None if it cannot be recorded."""
        if (rows, width) not in self._graphs:
            current = torch.cuda.current_stream()
            try:
                self._graphs[rows, width] = self._record(rows, width)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("passes of %d rows cannot be replayed, which makes them slower: %s", rows, error)
                self._graphs[rows, width] = None
            finally:
                # A recording that fails leaves its own stream behind.
                torch.cuda.set_stream(current)
        return self._graphs[rows, width]

    def _record(self, rows: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once as it is: kernels are compiled and libraries take their memory, which a recording must not see. What is
        # laid out is computed twice then, to the same end.
        beside = _beside(self._decoder.device)
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._compute(rows, width)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool, capture_error_mode="thread_local"):
            logits = self._compute(rows, width)
        return graph, logits


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _padded(rows: int) -> int:
    return max(1, -(-rows // CUDA_TILE_ROWS)) * CUDA_TILE_ROWS
