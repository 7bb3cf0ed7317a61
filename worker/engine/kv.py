"""KV memory: blocks of 64 tokens and the tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token: `kv_heads` keys of `key_dim` and values of `value_dim` numbers."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Elements, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def block_bytes(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return BLOCK_TOKENS * dtype.itemsize * sum(shape.numbers_per_token for shape in shapes)


class KVPool:
    """Keys and values of all layers. A slot is one token's place: block * `BLOCK_TOKENS` + offset."""

    def __init__(self, shapes: Sequence[LayerShape], blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        slots = blocks * BLOCK_TOKENS
        # Not filled: the operating system gives pages on first touch, and a slot is written before it is read.
        self.keys = [torch.empty(slots, s.kv_heads, s.key_dim, dtype=dtype, device=device) for s in shapes]
        self.values = [torch.empty(slots, s.kv_heads, s.value_dim, dtype=dtype, device=device) for s in shapes]

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """Slots of a sequence that lies in `blocks`, in order of position: int64 [len(blocks) * BLOCK_TOKENS]."""
        offsets = torch.arange(BLOCK_TOKENS)
        return (torch.tensor(blocks)[:, None] * BLOCK_TOKENS + offsets).flatten().to(self.device)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ([tokens, kv_heads, dim]) of one layer at `slots` ([tokens])."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in every layer."""
        here, there = (slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in (source, target))
        for tensor in (*self.keys, *self.values):
            tensor[there] = tensor[here]
