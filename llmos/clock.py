"""Time as an argument. Decisions use `monotonic`; people and span records get `unix_ns`, which never runs backwards."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. Tests pass one that they move by hand."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; unaffected by changes of the wall clock."""
        ...

    def unix_ns(self) -> int:
        """Nanoseconds since 1970, as the wall clock said at start plus the monotonic time since."""
        ...


class SystemClock:
    """The machine's monotonic clock, anchored once to the wall clock."""

    def __init__(self) -> None:
        self._anchor_ns = time.time_ns() - time.monotonic_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ns(self) -> int:
        return self._anchor_ns + time.monotonic_ns()
