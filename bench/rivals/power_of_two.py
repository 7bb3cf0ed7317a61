"""Power of two choices: of two random workers the less loaded one.

M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001; `power_of_two` of
SGLang's router, which compares what it has sent and not had back.
"""

from __future__ import annotations

import random

from bench.rivals.rule import Rule
from bench.simulated.traffic import Request


class PowerOfTwo(Rule):
    """`tokens`: load is prompt tokens, else requests."""

    def __init__(self, workers: int, rng: random.Random, *, tokens: bool = False) -> None:
        super().__init__(workers, rng)
        self._tokens = tokens

    def choose(self, request: Request) -> int:
        """See `Rule`."""
        pair = self.rng.sample(range(len(self.seen)), 2)
        return min(pair, key=self._load)

    def _load(self, worker: int) -> int:
        pending = self.seen[worker].pending
        return sum(request.prompt for request in pending.values()) if self._tokens else len(pending)
