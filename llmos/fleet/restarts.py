"""When a member that ended is started again, and when it is given up. Values only.

Pauses double with each end in a row; who ran steadily for a while begins anew. What drained itself to start afresh
starts at once, unless it does so again and again: then that counts like any other end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmos.lifetime import EXIT_RESTART

_DOUBLINGS = 16
"""More make no longer pause."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Numbers of one fleet."""

    first_pause_s: float = 0.5
    """Before the first start after a steady life; doubled with each further end."""
    longest_pause_s: float = 15.0
    """Longest pause."""
    steady_s: float = 60.0
    """Life after which an end is a first one again."""
    limit: int = 5
    """Ends within `window_s` after which a member is given up."""
    window_s: float = 180.0
    """See `limit`."""


@dataclass(slots=True)
class RestartHistory:
    """The ends of one member."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    _ends: deque[float] = field(default_factory=deque)
    _in_a_row: int = 0

    def ended(self, now: float, lived_s: float, status: int) -> float | None:
        """It ended `now`, monotonic seconds, with an exit status. Seconds until its next start; None: give it up."""
        policy = self.policy
        if lived_s >= policy.steady_s:
            self._in_a_row = 0
            if status == EXIT_RESTART:
                return 0.0
        self._ends.append(now)
        while self._ends[0] < now - policy.window_s:
            self._ends.popleft()
        if len(self._ends) > policy.limit:
            return None
        pause = policy.first_pause_s * 2.0 ** min(self._in_a_row, _DOUBLINGS)
        self._in_a_row += 1
        return min(pause, policy.longest_pause_s)

    def forgive(self) -> None:
        """A person wants it to be tried again."""
        self._ends.clear()
        self._in_a_row = 0
