"""Weighted scorers behind a saturation filter: llm-d's scheduler and the Gateway API inference extension's picker.

From their documentation: metrics are scraped every 50 ms; a worker is saturated if its queue is longer than
`queue_threshold` or its KV usage is above `kv_threshold`; saturated ones are left out unless all are. Scores from 0 to
1: `prefix`, share of the prompt's blocks in the worker's cache, by its KV events; `queue`, linear between the longest
queue and the shortest; `kv`, the share of blocks that is free; `active`, linear in the requests in flight. The best
weighted sum is picked, ties at random.
"""

from __future__ import annotations

import random

from bench.rivals.rule import Rule, Seen
from bench.simulated.traffic import Request


class Weighted(Rule):
    """Weights by scorer, and the filter's thresholds."""

    scrape_s = 0.05

    def __init__(
        self,
        workers: int,
        rng: random.Random,
        *,
        prefix: float = 3.0,
        queue: float = 2.0,
        kv: float = 2.0,
        active: float = 0.0,
        queue_threshold: int = 5,
        kv_threshold: float = 0.8,
    ) -> None:
        super().__init__(workers, rng)
        self._weights = (prefix, queue, kv, active)
        self._queue_threshold, self._kv_threshold = queue_threshold, kv_threshold

    def choose(self, request: Request) -> int:
        """See `Rule`."""
        open_ones = [worker for worker, seen in enumerate(self.seen) if not self._saturated(seen)]
        candidates = open_ones or list(range(len(self.seen)))
        queues = _linear([self.seen[worker].waiting for worker in candidates])
        actives = _linear([len(self.seen[worker].pending) for worker in candidates])
        scores = [
            self._sum(self.seen[worker], request, queue, active)
            for worker, queue, active in zip(candidates, queues, actives, strict=True)
        ]
        best = max(scores)
        return self.rng.choice([worker for worker, score in zip(candidates, scores, strict=True) if score == best])

    def _saturated(self, seen: Seen) -> bool:
        return seen.waiting > self._queue_threshold or seen.kv_usage > self._kv_threshold

    def _sum(self, seen: Seen, request: Request, queue: float, active: float) -> float:
        prefix = seen.overlap(request) / max(1, len(request.hashes))
        scores = (prefix, queue, 1.0 - seen.kv_usage, active)
        return sum(weight * score for weight, score in zip(self._weights, scores, strict=True))


def _linear(values: list[int]) -> list[float]:
    """1 for the lowest, 0 for the highest; 1 for all if they are equal."""
    low, high = min(values), max(values)
    return [1.0 if high == low else (high - value) / (high - low) for value in values]
