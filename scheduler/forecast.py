"""When a request will be served, from what was seen of its model: the queue ahead of it and the speed of the workers.

Everything is learned; what has not been seen yet promises nothing and refuses nobody.
"""

from __future__ import annotations

import math
from typing import Protocol

_HORIZON_S = 10.0
"""Speeds are those of about the last so many seconds during which somebody waited."""
_SHARE = 0.05
"""Weight of one observation in the running means."""
_SAMPLE_S = 0.02
"""Shortest time over which a speed is taken."""


class FirstToken(Protocol):
    """How long a request takes from its dispatch to its first token."""

    def seconds(self, uncached_tokens: int) -> float:
        """0 while nothing is known."""
        ...


class Mean:
    """Exponentially weighted; the first observations count in full."""

    def __init__(self) -> None:
        self._value = 0.0
        self._count = 0

    @property
    def known(self) -> bool:
        """Something was seen."""
        return self._count > 0

    @property
    def value(self) -> float:
        """0 while nothing is known."""
        return self._value

    def add(self, value: float) -> None:
        """Take in an observation."""
        self._count += 1
        self._value += max(_SHARE, 1 / self._count) * (value - self._value)


class MeanFirstToken:
    """A `FirstToken` that knows one mean for all."""

    def __init__(self) -> None:
        self.seen = Mean()

    def seconds(self, uncached_tokens: int) -> float:
        """See `FirstToken`."""
        return self.seen.value


class Forecast:
    """Of one model, all its workers together."""

    def __init__(self) -> None:
        self.first = MeanFirstToken()
        self.gap_s = Mean()
        """Between two tokens of a choice."""
        self.used = Mean()
        """What requests that ended had produced, as a part of what they might have."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._served = 0.0
        self._at = -math.inf
        self._backlogged = False

    def observe(self, served: float, waiting: int, now: float) -> None:
        """`served` tokens were charged so far. For every tick: time in which nobody waited says nothing of speed."""
        passed = now - self._at
        if self._backlogged and waiting:
            if passed < _SAMPLE_S:
                return
            fade = math.exp(-passed / _HORIZON_S)
            self._tokens = self._tokens * fade + max(0.0, served - self._served)
            self._seconds = self._seconds * fade + passed
        self._served, self._at, self._backlogged = served, now, waiting > 0

    @property
    def rate(self) -> float:
        """Tokens per second, prompts included, while somebody waits; 0: not known."""
        return self._tokens / self._seconds if self._seconds >= 0.2 else 0.0

    def output_tokens(self, most: int) -> int:
        """What a request that may produce `most` tokens is expected to."""
        return most if not self.used.known else min(most, math.ceil(self.used.value * most))

    def service_s(self, prompt: int, output: int) -> tuple[float, float]:
        """Seconds from a dispatch to the first and to the last token; 0 as far as nothing is known."""
        first = self.first.seconds(prompt)
        return first, first + max(0, output - 1) * self.gap_s.value


class Codel:
    """Controlled delay (Nichols and Jacobson, RFC 8289) of one tenant's queue.

    As in FQ-CoDel (RFC 8290), who keeps his own queue short loses nothing to those who do not.
    """

    def __init__(self) -> None:
        self._above_from = math.inf
        """When the sojourn time will have been above the target for an interval."""
        self._drop_at = 0.0
        self._drops = 0

    def drops(self, sojourn_s: float, target_s: float, interval_s: float, now: float) -> bool:
        """Whether the request that leaves the queue now, after `sojourn_s`, is to be shed."""
        if sojourn_s < target_s:
            self._above_from = math.inf
            self._drops = 0
            return False
        if self._above_from == math.inf:
            self._above_from = now + interval_s
            return False
        if now < max(self._above_from, self._drop_at):
            return False
        self._drops += 1
        self._drop_at = now + interval_s / math.sqrt(self._drops)
        return True


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
