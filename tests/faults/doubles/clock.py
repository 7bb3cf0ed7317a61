"""A wall clock that jumps: the order `jump` holds the seconds by which it is wrong. Monotonic time is left alone.

Only our own clock, which every service is given: that of the machine belongs to others too.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmos.clock import SystemClock


def install() -> None:
    """For this process."""
    order = Path(os.environ["LLMOS_TEST_ORDERS"]) / "jump"
    unix_ns = SystemClock.unix_ns

    def offset_s() -> int:
        try:
            return int(order.read_text() or 0)
        except (FileNotFoundError, ValueError):
            return 0

    SystemClock.unix_ns = lambda self: unix_ns(self) + offset_s() * 10**9  # type: ignore[method-assign]
