"""KV memory on CUDA: the blocks, and one more that padding is written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.kv import BLOCK_TOKENS, KVPool, LayerShape


class CudaKVPool(KVPool):
    """Blocks in device memory; where a sequence lies is said in the host's, as a step's tables are made there."""

    def __init__(self, shapes: Sequence[LayerShape], blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shapes, blocks + 1, device, dtype)
        self.blocks = blocks
        for tensor in (*self.keys, *self.values):
            tensor[self.spare * BLOCK_TOKENS :].zero_()

    @property
    def spare(self) -> int:
        """The block that no sequence has."""
        return self.blocks

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """`blocks` as int32, on the host."""
        return torch.tensor(list(blocks), dtype=torch.int32)
