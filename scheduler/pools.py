"""Workers that may have room for a model: an even handful, the least loaded, the roomiest. All in constant time.

Loads and rooms are kept as steps of at most a quarter (`step`), workers of one step in a bag. Within a bag everybody is
equal, and who is named depends on the salt: so equals share the load, and a change within a step costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator


def step(amount: int) -> int:
    """The step that a non-negative number falls on: itself up to 7, from there on four steps for each doubling."""
    shift = amount.bit_length() - 3
    return amount if shift <= 0 else 4 * shift + (amount >> shift)


def top(at: int) -> int:
    """The largest number that falls on a step."""
    if at < 8:
        return at
    shift = at // 4 - 1
    return ((at % 4 + 5) << shift) - 1


class Bag:
    """Ids in no order. Constant time to enter, to leave and to draw a few."""

    __slots__ = ("_ids", "_where")

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._where: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, worker_id: str) -> None:
        """Idempotent."""
        if worker_id not in self._where:
            self._where[worker_id] = len(self._ids)
            self._ids.append(worker_id)

    def discard(self, worker_id: str) -> None:
        """Idempotent."""
        where = self._where.pop(worker_id, None)
        if where is None:
            return
        last = self._ids.pop()
        if last != worker_id:
            self._ids[where] = last
            self._where[last] = where

    def draw(self, count: int, salt: int) -> list[str]:
        """At most `count` members, neighbours from a place that depends on `salt`."""
        ids, size = self._ids, len(self._ids)
        if size <= count:
            return ids[:]
        start = salt % size
        drawn = ids[start : start + count]
        return drawn if len(drawn) == count else drawn + ids[: count - len(drawn)]


class _Steps:
    """Bags by step, with the bits of those that are not empty."""

    __slots__ = ("_bags", "_filled", "_step_of")

    def __init__(self) -> None:
        self._step_of: dict[str, int] = {}
        self._bags: dict[int, Bag] = {}
        self._filled = 0

    def put(self, worker_id: str, at: int) -> None:
        known = self._step_of.get(worker_id)
        if known == at:
            return
        if known is not None:
            self._leave(worker_id, known)
        self._step_of[worker_id] = at
        bag = self._bags.get(at)
        if bag is None:
            bag = self._bags[at] = Bag()
        bag.add(worker_id)
        self._filled |= 1 << at

    def discard(self, worker_id: str) -> None:
        known = self._step_of.pop(worker_id, None)
        if known is not None:
            self._leave(worker_id, known)

    def upwards(self) -> Iterator[Bag]:
        filled = self._filled
        while filled:
            lowest = filled & -filled
            yield self._bags[lowest.bit_length() - 1]
            filled ^= lowest

    def downwards(self) -> Iterator[tuple[int, Bag]]:
        filled = self._filled
        while filled:
            at = filled.bit_length() - 1
            yield at, self._bags[at]
            filled ^= 1 << at

    @property
    def highest(self) -> int:
        return self._filled.bit_length() - 1

    def _leave(self, worker_id: str, at: int) -> None:
        bag = self._bags[at]
        bag.discard(worker_id)
        if not bag:
            self._filled ^= 1 << at


class WorkerPool:
    """Workers that may be given requests for one model version, or for one adapter."""

    __slots__ = ("_all", "_loads", "_rooms")

    def __init__(self) -> None:
        self._all = Bag()
        self._loads = _Steps()
        self._rooms = _Steps()

    def __len__(self) -> int:
        return len(self._all)

    def put(self, worker_id: str, load: int, room: int) -> None:
        """Enter, or change: `load` is what it has to do, in any unit; `room` its free KV blocks."""
        self._all.add(worker_id)
        self._loads.put(worker_id, step(load))
        self._rooms.put(worker_id, step(room))

    def discard(self, worker_id: str) -> None:
        """Idempotent."""
        self._all.discard(worker_id)
        self._loads.discard(worker_id)
        self._rooms.discard(worker_id)

    @property
    def most_room(self) -> int:
        """Nobody has more free blocks than so many."""
        return top(self._rooms.highest) if len(self._all) else 0

    def draw(self, count: int, salt: int) -> list[str]:
        """At most `count` of all, evenly."""
        return self._all.draw(count, salt)

    def least_loaded(self, count: int, salt: int) -> list[str]:
        """At most `count` of those with the least to do."""
        found: list[str] = []
        for bag in self._loads.upwards():
            found += bag.draw(count - len(found), salt)
            if len(found) >= count:
                break
        return found

    def roomiest(self, count: int, salt: int, room: int) -> list[str]:
        """At most `count` of those with the most free blocks, none that certainly has less than `room`."""
        found: list[str] = []
        for at, bag in self._rooms.downwards():
            if top(at) < room or len(found) >= count:
                break
            found += bag.draw(count - len(found), salt)
        return found
