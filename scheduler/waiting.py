"""Requests that wait for a worker: per model version in order of urgency, bounded overtaking, a measured drain rate."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmos.internal.v1 import request_pb2
from scheduler.requests import LiveRequest, ModelKey

PATIENCE_S = {
    request_pb2.PRIORITY_CLASS_INTERACTIVE: 10.0,
    request_pb2.PRIORITY_CLASS_STANDARD: 30.0,
    request_pb2.PRIORITY_CLASS_BATCH: 300.0,
}
"""Seconds after its arrival at which a request of a class counts as due. First come first served inside a class."""


def due_at(live: LiveRequest) -> float:
    """When a request should have begun: its class's patience, or the client's deadline if that is earlier."""
    patience = PATIENCE_S.get(live.request.priority, PATIENCE_S[request_pb2.PRIORITY_CLASS_STANDARD])
    return min(live.accepted_at + patience, live.deadline_at)


@dataclass(slots=True)
class _Entry:
    live: LiveRequest
    overtaken: int = 0
    gone: bool = False


_Item = tuple[float, int, _Entry]


@dataclass(frozen=True, slots=True)
class Admission:
    """What one look at a queue came to."""

    taken: int
    """Requests that began."""
    wanting: list[LiveRequest]
    """Requests with an adapter that found no worker, most urgent first; one of each adapter that is loaded nowhere."""


class WaitingRoom:
    """Order: earliest due first (EDF over class patience), then arrival. A request is in it at most once."""

    def __init__(self, lookahead: int, bypass_limit: int) -> None:
        self._lookahead = lookahead
        self._bypass_limit = bypass_limit
        self._heaps: dict[ModelKey, list[_Item]] = {}
        self._stranded: dict[ModelKey, dict[str, _Item]] = {}
        """Too large for every worker at present: they neither hold the others up nor are looked at each time."""
        self._lacking: dict[ModelKey, dict[ModelKey, dict[str, _Item]]] = {}
        """The same for those whose adapter is loaded nowhere: by model, then by adapter."""
        self._reach: dict[ModelKey, float] = {}
        self._entries: dict[str, _Entry] = {}
        self._gone: dict[ModelKey, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def short(self, key: ModelKey) -> bool:
        """Everybody who waits for this model is looked at each time: a new one may fit where others do not."""
        return len(self._heaps.get(key, ())) <= self._lookahead

    def keys(self) -> list[ModelKey]:
        """Model versions that somebody waits for, in order of name."""
        return sorted(self._heaps.keys() | self._stranded.keys() | self._lacking.keys())

    def waiting_for(self, key: ModelKey) -> Iterator[LiveRequest]:
        """Everybody who waits for a model version, in no order."""
        items = [*self._heaps.get(key, ()), *self._stranded.get(key, {}).values()]
        for lacking in self._lacking.get(key, {}).values():
            items += lacking.values()
        return (entry.live for _, _, entry in items if not entry.gone)

    def stranded(self) -> list[LiveRequest]:
        """Those that no worker could hold when they were last looked at."""
        return [entry.live for items in self._stranded.values() for _, _, entry in items.values()]

    def recall(self) -> None:
        """Look at those who stepped aside again, next time."""
        for key in list(self._stranded):
            self._recall(key)
        for key in list(self._lacking):
            self._recall_lacking(key, lambda adapter: False)

    def push(self, live: LiveRequest) -> None:
        """Begin to wait."""
        entry = _Entry(live)
        self._entries[live.id] = entry
        self._serial += 1
        heapq.heappush(self._heaps.setdefault(live.key, []), (due_at(live), self._serial, entry))

    def discard(self, live: LiveRequest) -> bool:
        """Stop waiting; whether it did."""
        entry = self._entries.pop(live.id, None)
        if entry is None:
            return False
        if self._discard_aside(live):
            return True
        entry.gone = True
        self._gone[live.key] = self._gone.get(live.key, 0) + 1
        if self._gone[live.key] * 2 > len(self._heaps[live.key]):
            self._compact(live.key)
        return True

    def admit(
        self,
        key: ModelKey,
        start: Callable[[LiveRequest], bool],
        reach: float = math.inf,
        absent: Callable[[ModelKey], bool] = lambda adapter: False,
    ) -> Admission:
        """Offer the most urgent requests to `start`, which says whether it took one.

        Looks a few places past one that does not fit, so that a large request does not idle the fleet; one that was
        overtaken too often is not overtaken any more. Requests of more than `reach` KV blocks fit nowhere, whoever else
        ends: they step aside until the reach grows or they are recalled. So do those whose adapter is `absent`, loaded
        nowhere: room that is kept for them would help nobody.
        """
        if reach > self._reach.get(key, 0):
            self._recall(key)
        self._recall_lacking(key, absent)
        self._reach[key] = reach
        heap = self._heaps.get(key, []) if reach else []
        passed: list[_Item] = []
        taken = 0
        while heap and len(passed) < self._lookahead:
            item = heapq.heappop(heap)
            entry = item[2]
            if entry.gone or self._step_aside(item, reach, absent):
                continue
            if start(entry.live):
                taken += 1
                del self._entries[entry.live.id]
                for _, _, other in passed:
                    other.overtaken += 1
            else:
                passed.append(item)
            if any(other.overtaken >= self._bypass_limit for _, _, other in passed):
                break
        for item in passed:
            heapq.heappush(heap, item)
        if reach and not heap:
            self._heaps.pop(key, None)
        return Admission(taken, self._wanting(key, passed))

    def _step_aside(self, item: _Item, reach: float, absent: Callable[[ModelKey], bool]) -> bool:
        live = item[2].live
        if live.blocks > reach:
            self._stranded.setdefault(live.key, {})[live.id] = item
        elif live.adapter is not None and absent(live.adapter):
            self._lacking.setdefault(live.key, {}).setdefault(live.adapter, {})[live.id] = item
        else:
            return False
        return True

    def _wanting(self, key: ModelKey, passed: list[_Item]) -> list[LiveRequest]:
        # They stepped aside in order of urgency, since the last recall at least: the first one speaks for the others.
        first = [next(iter(items.values())) for items in self._lacking.get(key, {}).values()]
        items = sorted(first + [item for item in passed if item[2].live.adapter is not None])
        return [entry.live for _, _, entry in items]

    def _discard_aside(self, live: LiveRequest) -> bool:
        stranded = self._stranded.get(live.key, {})
        if stranded.pop(live.id, None) is not None:
            if not stranded:
                del self._stranded[live.key]
            return True
        lacking = self._lacking.get(live.key, {})
        if live.adapter is None or lacking.get(live.adapter, {}).pop(live.id, None) is None:
            return False
        if not lacking[live.adapter]:
            del lacking[live.adapter]
        if not lacking:
            del self._lacking[live.key]
        return True

    def _recall(self, key: ModelKey) -> None:
        for item in self._stranded.pop(key, {}).values():
            heapq.heappush(self._heaps.setdefault(key, []), item)

    def _recall_lacking(self, key: ModelKey, absent: Callable[[ModelKey], bool]) -> None:
        lacking = self._lacking.pop(key, {})
        for adapter, items in lacking.items():
            if absent(adapter):
                self._lacking.setdefault(key, {})[adapter] = items
                continue
            for item in items.values():
                heapq.heappush(self._heaps.setdefault(key, []), item)

    def _compact(self, key: ModelKey) -> None:
        """Forget entries that are gone; they are at least half of the heap, so that the cost is spread."""
        heap = [item for item in self._heaps.pop(key) if not item[2].gone]
        del self._gone[key]
        if heap:
            heapq.heapify(heap)
            self._heaps[key] = heap


class DrainRate:
    """Dispatches per second, exponentially weighted over about ten seconds: what Retry-After is estimated from."""

    def __init__(self, horizon_s: float = 10.0) -> None:
        self._horizon_s = horizon_s
        self._weight = 0.0
        self._at = 0.0

    def count(self, now: float, amount: int = 1) -> None:
        """`amount` requests left the queue at `now`."""
        self._decay(now)
        self._weight += amount

    def retry_after_ms(self, waiting: int, now: float) -> int:
        """Time in which half of those waiting will have left at the present rate; 1 to 60 seconds."""
        self._decay(now)
        rate = max(self._weight / self._horizon_s, 1e-3)
        return int(1000 * min(60.0, max(1.0, waiting / 2 / rate)))

    def _decay(self, now: float) -> None:
        self._weight *= math.exp(-max(0.0, now - self._at) / self._horizon_s)
        self._at = max(self._at, now)
