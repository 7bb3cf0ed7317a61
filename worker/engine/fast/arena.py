"""One stretch of memory in huge pages, handed out in aligned pieces."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_ALIGN = 64


class Arena:
    """Memory that the operating system gives page by page on first touch, in huge pages where it has them.

    Weights and KV blocks are read from all over: with ordinary pages, translating addresses costs as much as reading.
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without huge pages refuses; ordinary ones only cost speed.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """`size` bytes (uint8), aligned to 64, that live as long as the arena or the tensor."""
        start, self._used = self._used, self._used + aligned(size)
        return self._memory[start : start + size]


def aligned(size: int) -> int:
    """What `take(size)` uses up."""
    return -(-size // _ALIGN) * _ALIGN
