"""Cost in blocks: `overlap_weight` x blocks to prefill + blocks in use, as NVIDIA Dynamo's KV router.

From its documentation ("KV Cache Routing", "Router Design"): blocks to prefill are those of all prompts there without a
first token and of the new request less what the worker's cache has, which its KV events tell exactly; blocks in use are
those of the sequences there, a shared block once, and the new request's. The cheapest worker is taken; with a
`temperature`, one is drawn from the softmax of the negated costs, normalised to their range.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from bench.rivals.rule import Rule
from bench.simulated.traffic import Request


class BlockCost(Rule):
    """See the module."""

    def __init__(
        self, workers: int, rng: random.Random, *, overlap_weight: float = 1.0, temperature: float = 0.0
    ) -> None:
        super().__init__(workers, rng)
        self._weight = overlap_weight
        self._temperature = temperature
        self._active: list[Counter[int]] = [Counter() for _ in range(workers)]
        self._tails = [0] * workers
        """Blocks of active sequences that have no hash: the prompts' last ones and the answers' first."""

    def choose(self, request: Request) -> int:
        """See `Rule`."""
        costs = [self.cost(worker, request) for worker in range(len(self.seen))]
        worker = self._draw(costs)
        self._active[worker].update(request.hashes)
        self._tails[worker] += 1
        return worker

    def ended(self, worker: int, request: Request) -> None:
        """See `Rule`."""
        self._active[worker].subtract(request.hashes)
        self._active[worker] += Counter()
        self._tails[worker] -= 1

    def cost(self, worker: int, request: Request) -> float:
        """In blocks."""
        seen, active = self.seen[worker], self._active[worker]
        fresh = request.prompt - 64 * seen.overlap(request)
        prefill = (sum(seen.prefilling.values()) + fresh) / 64
        new = sum(number not in active for number in request.hashes) + 1
        return self._weight * prefill + len(active) + self._tails[worker] + new

    def _draw(self, costs: list[float]) -> int:
        low, high = min(costs), max(costs)
        if self._temperature == 0 or high == low:
            return self.rng.choice([worker for worker, cost in enumerate(costs) if cost == low])
        scale = self._temperature * (high - low)
        return self.rng.choices(range(len(costs)), [math.exp((low - cost) / scale) for cost in costs])[0]
