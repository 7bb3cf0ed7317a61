"""Ids that were cancelled: a cancel that overtakes its own submission still wins."""

from __future__ import annotations


class Tombstones:
    """A bounded set whose members expire. Insertion order is order of expiry, since every entry lives equally long."""

    def __init__(self, ttl_s: float, limit: int) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._expires: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._expires)

    def add(self, request_id: str, now: float) -> None:
        """Refuse `request_id` from now on, for the time to live."""
        self._purge(now)
        self._expires.pop(request_id, None)
        self._expires[request_id] = now + self._ttl_s

    def covers(self, request_id: str, now: float) -> bool:
        """Whether `request_id` was cancelled and the cancel still counts."""
        return self._expires.get(request_id, now) > now

    def _purge(self, now: float) -> None:
        while self._expires:
            oldest = next(iter(self._expires))
            if self._expires[oldest] > now and len(self._expires) < self._limit:
                return
            del self._expires[oldest]
