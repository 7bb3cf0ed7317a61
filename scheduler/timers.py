"""Things that fall due: a heap of (time, event). The core has no clock; it asks what is due at `now`."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from scheduler.events import Event


class Timers:
    """Events by the time they are due. One whose reason is gone may stay: its handler finds out."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Event]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, event: Event) -> None:
        """Deliver `event` once `now` has reached `when`."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, event))

    def due(self, now: float) -> Iterator[Event]:
        """Take out what is due, in order of time, then of arrival."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]

    def drop(self, pointless: Callable[[Event], bool]) -> None:
        """Forget events that would change nothing; linear in their number."""
        self._heap = [item for item in self._heap if not pointless(item[2])]
        heapq.heapify(self._heap)
