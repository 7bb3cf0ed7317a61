"""KV memory in the layout of the kernels: in each block of 64 tokens, keys of sixteen tokens interleaved."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.fast.arena import Arena, aligned
from worker.engine.kv import BLOCK_TOKENS, LayerShape
from worker.kernels import abi


class FastKVPool:
    """Keys and values of all layers; the same calls as `worker.engine.kv.KVPool`, on the CPU.

    `dtype` is float16 or float32. Owns the memory that `keys` and `values` point to.
    """

    def __init__(self, shapes: Sequence[LayerShape], blocks: int, dtype: torch.dtype = torch.float16) -> None:
        self.shapes = tuple(shapes)
        self.blocks = blocks
        self.dtype = dtype
        tiles = BLOCK_TOKENS // abi.KEY_TILE
        keys = [(blocks, s.kv_heads, tiles, s.key_dim, abi.KEY_TILE) for s in shapes]
        values = [(blocks, s.kv_heads, BLOCK_TOKENS, s.value_dim) for s in shapes]
        # Not filled: a slot is written before it is read.
        arena = Arena(sum(aligned(math.prod(size) * dtype.itemsize) for size in (*keys, *values)))
        self._keys, self._values = ([_tensor(arena, size, dtype) for size in sizes] for sizes in (keys, values))
        self.keys = _addresses(self._keys)
        self.values = _addresses(self._values)

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """A sequence's row of the kernels' block table: `blocks` as int32."""
        return torch.tensor(list(blocks), dtype=torch.int32)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in every layer."""
        for tensor in (*self._keys, *self._values):
            tensor[target] = tensor[source]

    def read(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one block in order of position: twice [kv_heads, BLOCK_TOKENS, dim]."""
        keys = self._keys[layer][block].transpose(-1, -2)
        return keys.reshape(keys.shape[0], BLOCK_TOKENS, -1), self._values[layer][block]


def _tensor(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return arena.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
