"""Round robin: the default of most proxies and of SGLang's and Dynamo's routers without a policy."""

from __future__ import annotations

import random

from bench.rivals.rule import Rule
from bench.simulated.traffic import Request


class RoundRobin(Rule):
    """Everybody in turn."""

    def __init__(self, workers: int, rng: random.Random) -> None:
        super().__init__(workers, rng)
        self._next = rng.randrange(workers)

    def choose(self, request: Request) -> int:
        """See `Rule`."""
        self._next = (self._next + 1) % len(self.seen)
        return self._next
