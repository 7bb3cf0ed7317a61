"""Block accounting and KV storage."""

from __future__ import annotations

import pytest
import torch

from llmos.errors import Unavailable
from worker.engine.kv import BLOCK_TOKENS, BlockAllocator, KVPool, LayerShape, block_bytes, blocks_needed

pytestmark = pytest.mark.torch

SHAPES = [LayerShape(2, 4, 6), LayerShape(1, 8, 8)]


@pytest.mark.parametrize(
    ("prompt", "answer", "choices", "blocks"),
    [
        (1, 1, 1, 1),
        (63, 1, 1, 1),
        (64, 1, 1, 2),
        (64, 64, 1, 2),
        (100, 28, 1, 2),
        (100, 28, 3, 1 + 3),
        (128, 64, 4, 2 + 4),
        (10, 10, 5, 5),
    ],
)
def test_full_blocks_of_the_prompt_are_shared_by_the_choices(
    prompt: int, answer: int, choices: int, blocks: int
) -> None:
    assert blocks_needed(prompt, answer, choices) == blocks


def test_blocks_have_one_owner() -> None:
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.free == 0
    with pytest.raises(Unavailable):
        allocator.allocate(1)
    allocator.release(second)
    assert sorted(allocator.allocate(3)) == sorted(second)


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
