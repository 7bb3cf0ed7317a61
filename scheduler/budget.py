"""What second tries may cost: retries and hedges together, whoever asks. Pure.

Each accepted request earns a share of a try; beside that there is a small reserve, so that a quiet fleet can retry at
all. Moves of attempts whose worker died, drains, stalls or was preempted are no second tries: they are paced by the
room that there is, and not counted here.
"""

from __future__ import annotations

from collections import deque

SHARE = 0.1
"""Tries that each accepted request earns."""
HEDGE_SHARE = 0.05
"""Hedges alone, per accepted request."""
RESERVE, WINDOW_S = 3, 10.0
"""So many tries more in any span of that length."""
_MOST = 100.0
"""Tries that are kept for later at most: what a busy hour has earned is no licence for a storm."""


class Budget:
    """One leader's account."""

    def __init__(self) -> None:
        self._earned = 0.0
        self._hedges = 0.0
        self._reserve: deque[float] = deque()
        """When the reserve was last drawn on."""

    def accepted(self) -> None:
        """A request came."""
        self._earned = min(_MOST, self._earned + SHARE)
        self._hedges = min(_MOST, self._hedges + HEDGE_SHARE)

    def take(self, now: float) -> bool:
        """Pay for a retry; False: there is nothing left for it now."""
        if self._earned >= 1.0:
            self._earned -= 1.0
            return True
        if self.wait_s(now) > 0.0:
            return False
        self._reserve.append(now)
        return True

    def take_hedge(self, now: float) -> bool:
        """Pay for a hedge, which is drawn from what requests have earned only: it helps nobody in need."""
        if self._earned < 1.0 or self._hedges < 1.0:
            return False
        self._earned -= 1.0
        self._hedges -= 1.0
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until a retry can be paid for even if no request comes; 0: now."""
        while self._reserve and now - self._reserve[0] >= WINDOW_S:
            self._reserve.popleft()
        if self._earned >= 1.0 or len(self._reserve) < RESERVE:
            return 0.0
        return self._reserve[0] + WINDOW_S - now
