"""Who holds which KV block, and the prefix cache: blocks of prompts that are found again by their hash. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llmos.errors import Unavailable


class BlockManager:
    """Reference counts of the blocks 0 to `total` - 1. Owned by one thread.

    A cached block that nobody holds stays until its place is needed, the least recently used one first. Whoever holds
    a cached block holds those before it in the prompt too, and `release` takes the last block first: so a block never
    goes before those that continue it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))
        self._references = [0] * total
        self._block_of: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody holds, least recently used first."""
        self._changes: dict[int, bool] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated, those that only the cache keeps included."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by hash."""
        return len(self._block_of)

    def allocate(self) -> int:
        """A block with one reference, for the caller to release. Raises Unavailable if none is free."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            known = self._hash_of.pop(block)
            del self._block_of[known]
            self._note(known, stored=False)
        else:
            raise Unavailable("No KV block is free.")
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Take another reference to a block."""
        if not self._references[block]:
            del self._idle[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, which are in order of position."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence reads the block, so that none may write it."""
        return self._references[block] > 1

    def find(self, prefix_hash: int) -> int | None:
        """The block cached under a hash; the caller does not hold it yet."""
        return self._block_of.get(prefix_hash)

    def held(self, prefix_hashes: Iterable[int]) -> int:
        """How many blocks of a prompt, from its beginning on, are cached and held by a sequence."""
        count = 0
        for prefix_hash in prefix_hashes:
            block = self._block_of.get(prefix_hash)
            if block is None or not self._references[block]:
                break
            count += 1
        return count

    def store(self, prefix_hash: int, block: int) -> int:
        """Cache a block that the caller holds. Returns the block to use from now on, held in its place.

        That is another one where the same tokens were cached before.
        """
        known = self._block_of.get(prefix_hash)
        if known == block:
            return block
        if known is not None:
            self.hold(known)
            self.release([block])
            return known
        self._block_of[prefix_hash], self._hash_of[block] = block, prefix_hash
        self._note(prefix_hash, stored=True)
        return block

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Hashes that have been stored and removed since the last call."""
        changes, self._changes = self._changes, {}
        return [key for key, stored in changes.items() if stored], [
            key for key, stored in changes.items() if not stored
        ]

    def _note(self, prefix_hash: int, *, stored: bool) -> None:
        if self._changes.pop(prefix_hash, stored) == stored:
            self._changes[prefix_hash] = stored
