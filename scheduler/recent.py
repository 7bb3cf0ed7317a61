"""A memory of ids that outlives their requests: bounded, and every entry expires."""

from __future__ import annotations

from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by id for `ttl_s` seconds. Insertion order is order of expiry, since all entries live equally long."""

    def __init__(self, ttl_s: float, limit: int) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._entries: dict[str, tuple[float, V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, value: V, now: float) -> None:
        """Remember `value` from now on; the oldest entries give way at the limit."""
        self._purge(now)
        self._entries.pop(key, None)
        self._entries[key] = (now + self._ttl_s, value)

    def get(self, key: str, now: float) -> V | None:
        """What is remembered of `key`."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] > now else None

    def drop(self, key: str) -> None:
        """Remember it no more."""
        self._entries.pop(key, None)

    def items(self, now: float) -> list[tuple[str, float, V]]:
        """Everything that is remembered: key, seconds since, value."""
        return [(key, now + self._ttl_s - until, value) for key, (until, value) in self._entries.items() if until > now]

    def _purge(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest][0] > now and len(self._entries) < self._limit:
                return
            del self._entries[oldest]
