"""Where one sequence's keys and values lie, and how far they are computed."""

from __future__ import annotations

from torch import Tensor

from worker.engine.blocks import BlockManager
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.paged import KVMemory


def blocks_of(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class SequenceKV:
    """Blocks of a sequence in order of position. Holds a reference to each until `release`.

    Blocks are shared with other sequences after `fork` and `adopt`; a shared one is copied before it is written.
    """

    def __init__(self, manager: BlockManager, memory: KVMemory) -> None:
        self._manager = manager
        self._memory = memory
        self._slots: Tensor | None = None
        self.blocks: list[int] = []
        self.computed = 0
        """Positions whose keys and values are stored."""

    @property
    def slots(self) -> Tensor:
        """Where the tokens are, for `KVRow`. The same object until a block is added or replaced."""
        if self._slots is None:
            self._slots = self._memory.slots(self.blocks)
        return self._slots

    def lacks(self, end: int) -> int:
        """Blocks that `reserve` would allocate."""
        return max(0, blocks_of(end) - len(self.blocks)) + self._copies(end)

    def reserve(self, end: int) -> None:
        """Make the positions from `computed` up to `end` writable. Ask `lacks` and `BlockManager.free` first."""
        if self._copies(end):
            at = self.computed // BLOCK_TOKENS
            copy = self._manager.allocate()
            self._memory.copy_block(self.blocks[at], copy)
            self._manager.release([self.blocks[at]])
            self._replace(at, copy)
        while len(self.blocks) < blocks_of(end):
            self._append(self._manager.allocate())

    def adopt(self, prefix_hash: int) -> bool:
        """Go on with the cached block of that hash, if there is one. `computed` must be at the end of `blocks`."""
        block = self._manager.find(prefix_hash)
        if block is None:
            return False
        self._manager.hold(block)
        self._append(block)
        self.computed += BLOCK_TOKENS
        return True

    def store(self, number: int, prefix_hash: int) -> None:
        """Cache a full block of the prompt."""
        block = self._manager.store(prefix_hash, self.blocks[number])
        if block != self.blocks[number]:
            self._replace(number, block)

    def fork(self) -> SequenceKV:
        """Another sequence that begins like this one and shares its blocks."""
        other = SequenceKV(self._manager, self._memory)
        other.blocks, other.computed, other._slots = list(self.blocks), self.computed, self._slots
        for block in self.blocks:
            self._manager.hold(block)
        return other

    def release(self) -> None:
        """Let go of all blocks; nothing is computed any more."""
        self._manager.release(self.blocks)
        self.blocks, self.computed, self._slots = [], 0, None

    def _copies(self, end: int) -> int:
        # Only the block of the next position can be both shared and written: full ones are not written again.
        at = self.computed // BLOCK_TOKENS
        return int(end > self.computed and at < len(self.blocks) and self._manager.is_shared(self.blocks[at]))

    def _append(self, block: int) -> None:
        self.blocks.append(block)
        self._slots = None

    def _replace(self, number: int, block: int) -> None:
        self.blocks[number] = block
        self._slots = None
