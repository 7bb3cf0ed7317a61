"""KV storage."""

from __future__ import annotations

import pytest
import torch

from worker.engine.kv import BLOCK_TOKENS, KVPool, LayerShape, block_bytes

pytestmark = pytest.mark.torch

SHAPES = [LayerShape(2, 4, 6), LayerShape(1, 8, 8)]


def test_a_block_counts_keys_and_values_of_every_layer() -> None:
    assert block_bytes(SHAPES, torch.float32) == BLOCK_TOKENS * 4 * (2 * (4 + 6) + 16)


def test_slots_follow_the_block_table_and_keep_what_is_written() -> None:
    pool = KVPool(SHAPES, 4, torch.device("cpu"), torch.float32)
    slots = pool.slots([2, 0])
    assert slots[[0, 63, 64, 127]].tolist() == [128, 191, 0, 63]
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    pool.write(0, slots[62:65], keys, values)
    assert torch.equal(pool.keys[0][[190, 191, 0]], keys)
    assert torch.equal(pool.values[0][[190, 191, 0]], values)


def test_copying_a_block_copies_every_layer() -> None:
    pool = KVPool(SHAPES, 2, torch.device("cpu"), torch.float32)
    tensors = [*pool.keys, *pool.values]
    for tensor in tensors:
        tensor.normal_()
    pool.copy_block(0, 1)
    assert all(torch.equal(tensor[:BLOCK_TOKENS], tensor[BLOCK_TOKENS:]) for tensor in tensors)
