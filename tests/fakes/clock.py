"""A clock that a test moves by hand."""

from __future__ import annotations


class ManualClock:
    """Starts at `start` seconds and stands still until `advance` is called."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def monotonic(self) -> float:
        return self._now

    def unix_ns(self) -> int:
        return int(self._now * 1e9)

    def advance(self, seconds: float) -> None:
        self._now += seconds
