"""Which workers have which prefixes cached: from the salted hash of a block to its holders. Pure.

Fed by `WorkFrame.cache`. A hash stands for its block and all before it, so whoever holds one holds those before it too:
holders only grow fewer along a prompt. The holders of a hash are the bits of one integer; a block that only one worker
has, as most do, shares that integer with the worker's other blocks. What is expected of attempts that have just begun
counts as cached too, so that a burst of the same prefix finds itself before the first of it has been computed. The
index is a hint: that it is wrong costs time, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmos.internal.v1 import work_pb2

LIMIT = 8_000_000
"""Most hashes that are remembered; further ones are ignored until some are gone."""
_LEVELS = 8
"""Most lengths of a match that are told apart."""


@dataclass(slots=True)
class _Cache:
    """One model's cache on one worker."""

    number: int = 0
    """Of the last change."""
    lost: bool = False
    """A change was missed: what comes is ignored until everything is named again."""
    held: dict[int, None] = field(default_factory=dict)
    """A dictionary, because the garbage collector does not walk one of integers, as it does a set."""


Match = Sequence[tuple[int, int]]
"""Lengths in blocks, longest first, each with the bits of the workers that have at least so much of the prompt."""


class PrefixIndex:
    """Blocks by hash. Owned by the core."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._holders: dict[int, int] = {}
        self.bits: dict[str, int] = {}
        """What stands for a worker in a match; nothing for one of which nothing is known."""
        self._workers: list[str] = []
        self._caches: dict[str, dict[str, _Cache]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Different hashes."""
        return len(self._holders)

    def clear(self, worker_id: str) -> None:
        """A stream began or ended: nothing is known of its worker's caches."""
        for cache in self._caches.pop(worker_id, {}).values():
            self._drop(worker_id, cache.held)
        # Its bit stays in hashes that attempts are expected to cache; it is given away only once those have settled.

    def forget(self, worker_id: str) -> None:
        """A worker is gone for good, and its attempts are settled."""
        self.clear(worker_id)
        bit = self.bits.pop(worker_id, 0)
        if bit:
            self._workers[bit.bit_length() - 1] = ""
            self._free.append(bit)

    def apply(self, worker_id: str, change: work_pb2.CacheChange) -> bool:
        """Take in a change. False: one was missed before it, and the worker must name everything again."""
        cache = self._caches.setdefault(worker_id, {}).setdefault(change.model, _Cache())
        if change.number == 1:
            self._drop(worker_id, cache.held)
            cache.held.clear()
            cache.lost = False
        elif cache.lost:
            return True
        elif change.number != cache.number + 1:
            self._drop(worker_id, cache.held)
            cache.held.clear()
            cache.lost = True
            return False
        cache.number = change.number
        self._drop(worker_id, change.removed)
        for prefix_hash in change.removed:
            cache.held.pop(prefix_hash, None)
        self._store(worker_id, cache, change.stored)
        return True

    def expect(self, worker_id: str, hashes: Sequence[int], known: int) -> Sequence[int]:
        """An attempt begins that will cache `hashes`, of which the worker has the first `known`.

        Returns those that are now expected, for `settle`.
        """
        expected = hashes[known:]
        if expected:
            bit, holders = self._bit_of(worker_id), self._holders
            for prefix_hash in expected:
                holders[prefix_hash] = holders.get(prefix_hash, 0) | bit
        return expected

    def settle(self, worker_id: str, model: str, expected: Iterable[int]) -> None:
        """The attempt has computed its prompt, or is over: from now on the worker's word counts alone."""
        cache = self._caches.get(worker_id, {}).get(model)
        held = cache.held if cache is not None else {}
        self._drop(worker_id, [prefix_hash for prefix_hash in expected if prefix_hash not in held])

    def match(self, hashes: Sequence[int]) -> Match:
        """Who has how much of a prompt. Logarithmic in its length, whatever the number of workers."""
        holders = self._holders
        length = _longest(holders, hashes)
        if not length:
            return ()
        levels = [(length, holders[hashes[length - 1]])]
        bits = holders[hashes[0]]
        while length > 1 and levels[-1][1] != bits and len(levels) < _LEVELS:
            # The longest length above which the holders are only those that are known already.
            low, high, above = 1, length, levels[-1][1]
            while high - low > 1:
                middle = (low + high) // 2
                if holders.get(hashes[middle - 1], 0) == above:
                    high = middle
                else:
                    low = middle
            length = low
            levels.append((length, holders.get(hashes[length - 1], 0)))
        return levels

    def workers(self, bits: int, most: int, start: int) -> list[str]:
        """At most `most` of the workers that `bits` stand for, in turn from a place that `start` decides."""
        found: list[str] = []
        shift = start % bits.bit_length() if bits else 0
        behind = bits >> shift << shift
        for part in (behind, bits ^ behind):
            while part and len(found) < most:
                lowest = part & -part
                found.append(self._workers[lowest.bit_length() - 1])
                part ^= lowest
        return found

    def _bit_of(self, worker_id: str) -> int:
        bit = self.bits.get(worker_id, 0)
        if not bit:
            if self._free:
                bit = self._free.pop()
                self._workers[bit.bit_length() - 1] = worker_id
            else:
                bit = 1 << len(self._workers)
                self._workers.append(worker_id)
            self.bits[worker_id] = bit
        return bit

    def _store(self, worker_id: str, cache: _Cache, hashes: Iterable[int]) -> None:
        bit, holders, held = self._bit_of(worker_id), self._holders, cache.held
        for prefix_hash in hashes:
            known = holders.get(prefix_hash, 0)
            if not known and len(holders) >= self._limit:
                continue
            holders[prefix_hash] = known | bit if known else bit
            held[prefix_hash] = None

    def _drop(self, worker_id: str, hashes: Iterable[int]) -> None:
        bit, holders = self.bits.get(worker_id, 0), self._holders
        for prefix_hash in hashes:
            left = holders.get(prefix_hash, 0) & ~bit
            if left:
                holders[prefix_hash] = left
            else:
                holders.pop(prefix_hash, None)


def _longest(holders: dict[int, int], hashes: Sequence[int]) -> int:
    """How many of the first hashes anybody has."""
    if not hashes or hashes[0] not in holders:
        return 0
    if hashes[-1] in holders:
        return len(hashes)
    low, high = 1, len(hashes)
    while high - low > 1:
        middle = (low + high) // 2
        if hashes[middle - 1] in holders:
            low = middle
        else:
            high = middle
    return low
