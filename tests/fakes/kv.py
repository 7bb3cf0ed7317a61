"""KV memory that only notes which blocks are copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NotedMemory:
    """Implements `worker.engine.paged.KVMemory` without storing anything."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """The block numbers themselves."""
        return torch.tensor(list(blocks))

    def copy_block(self, source: int, target: int) -> None:
        """Note the copy."""
        self.copies.append((source, target))
