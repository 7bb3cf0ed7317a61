"""Who holds which block, and what the prefix cache keeps."""

from __future__ import annotations

import random

import pytest

from llmos.errors import Unavailable
from tests.fakes.kv import NotedMemory
from worker.engine.blocks import BlockManager
from worker.engine.sequence import SequenceKV

pytestmark = pytest.mark.torch


def prompt(manager: BlockManager, hashes: list[int]) -> SequenceKV:
    """A sequence whose full blocks have these hashes, each found in the cache or computed and stored."""
    kv = SequenceKV(manager, NotedMemory())
    for number, prefix_hash in enumerate(hashes):
        if not kv.adopt(prefix_hash):
            kv.reserve(64 * (number + 1))
            kv.computed = 64 * (number + 1)
            kv.store(number, prefix_hash)
    return kv


def test_a_block_is_free_when_nobody_holds_it() -> None:
    manager = BlockManager(3)
    blocks = [manager.allocate() for _ in range(3)]
    assert sorted(blocks) == [0, 1, 2] and manager.free == 0
    with pytest.raises(Unavailable):
        manager.allocate()
    manager.hold(blocks[0])
    manager.release(blocks)
    assert manager.free == 2
    manager.release(blocks[:1])
    assert manager.free == 3


def test_a_cached_prefix_is_found_while_its_place_is_not_needed() -> None:
    manager = BlockManager(4)
    prompt(manager, [11, 12, 13]).release()
    assert (manager.free, manager.cached) == (4, 3)
    again = prompt(manager, [11, 12, 99])
    assert again.blocks[:2] == [manager.find(11), manager.find(12)]
    assert manager.free == 1  # 13 gives way only when its place is needed
    manager.allocate()
    assert (manager.find(13), manager.free) == (None, 0)


def test_the_least_recently_used_goes_first_and_no_block_before_its_continuations() -> None:
    manager = BlockManager(6)
    prompt(manager, [1, 2]).release()
    prompt(manager, [1, 3]).release()
    prompt(manager, [7]).release()
    prompt(manager, [1, 2]).release()
    gone: list[int] = []
    while manager.free:
        manager.allocate()
        gone.extend(manager.take_changes()[1])
    assert gone == [3, 7, 2, 1]


def test_the_same_prompt_computed_twice_ends_in_one_place() -> None:
    manager = BlockManager(4)
    first, second = (SequenceKV(manager, NotedMemory()) for _ in range(2))
    for kv in (first, second):
        kv.reserve(64)
        kv.computed = 64
        kv.store(0, 5)
    assert first.blocks == second.blocks
    assert manager.free == 3
    first.release()
    second.release()
    assert manager.free == 4


def test_a_shared_block_is_copied_before_it_is_written_unless_its_last_holder_writes() -> None:
    manager, memory = BlockManager(5), NotedMemory()
    kv = SequenceKV(manager, memory)
    kv.reserve(100)
    kv.computed = 100
    forks = [kv.fork(), kv.fork()]
    kv.release()
    assert [fork.lacks(101) for fork in forks] == [1, 1]
    for fork in forks:
        fork.reserve(101)
    (one, other) = forks
    assert one.blocks[0] == other.blocks[0] and one.blocks[1] != other.blocks[1]
    assert memory.copies == [(other.blocks[1], one.blocks[1])]
    assert one.slots.tolist() == one.blocks
    assert manager.free == 2


def test_changes_tell_the_net_effect_in_hashes() -> None:
    manager = BlockManager(2)
    prompt(manager, [1, 2]).release()
    assert manager.take_changes() == ([1, 2], [])
    prompt(manager, [3, 4]).release()
    assert manager.take_changes() == ([3, 4], [2, 1])
    prompt(manager, [5, 6]).release()
    prompt(manager, [3, 4]).release()
    assert manager.take_changes() == ([], [])


def test_random_traffic_leaves_no_block_behind() -> None:
    source = random.Random(3)
    manager = BlockManager(40)
    known: set[int] = set()
    held: list[SequenceKV] = []
    for _ in range(2000):
        if held and (source.random() < 0.5 or manager.free < 8):
            held.pop(source.randrange(len(held))).release()
        else:
            # Hashes of a prefix tree: each names all that is before it.
            path, node = [], 1
            for _ in range(source.randrange(1, 5)):
                node = node * 3 + source.randrange(3)
                path.append(node)
            kv = prompt(manager, path)
            kv.reserve(64 * len(path) + 1)
            held.append(kv)
            if source.random() < 0.3:
                held.append(kv.fork())
        stored, removed = manager.take_changes()
        assert known.isdisjoint(stored) and known.issuperset(removed)
        known = (known | set(stored)) - set(removed)
        assert all(node // 3 < 3 or node // 3 in known for node in known)
        in_use = {block for kv in held for block in kv.blocks}
        assert manager.free == 40 - len(in_use)
    for kv in held:
        kv.release()
    assert manager.free == 40
