"""Longest matching prefix, unless the load is out of balance: the cache-aware policy of SGLang's router.

From its documentation ("SGLang Router", cache-aware load balancing): an approximate tree per worker, made of what was
sent there, bounded by evicting the least recently used. Out of balance, when of the requests in flight
max - min > `balance_abs_threshold` and max > `balance_rel_threshold` * min, a request goes to the shortest queue.
Otherwise it goes to the longest match if that covers more than `cache_threshold` of the prompt, else to the smallest
tree or, in later versions, to the least loaded worker.
"""

from __future__ import annotations

import random
from collections import OrderedDict

from bench.rivals.rule import Rule
from bench.simulated.traffic import Request


class CacheAware(Rule):
    """`tree_blocks` bounds a worker's tree, in blocks of 64 tokens; leaves go before what they continue."""

    def __init__(
        self,
        workers: int,
        rng: random.Random,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        tree_blocks: int = 1024,
        least_loaded: bool = False,
    ) -> None:
        super().__init__(workers, rng)
        self._cache_threshold = cache_threshold
        self._abs, self._rel = balance_abs_threshold, balance_rel_threshold
        self._tree_blocks = tree_blocks
        self._least_loaded = least_loaded
        self._trees: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(workers)]

    def choose(self, request: Request) -> int:
        """See `Rule`."""
        loads = [len(seen.pending) for seen in self.seen]
        high, low = max(loads), min(loads)
        if high - low > self._abs and high > self._rel * low:
            worker = self._lowest(loads)
        else:
            matches = [self._match(tree, request) for tree in self._trees]
            longest = max(matches)
            if longest * 64 > self._cache_threshold * request.prompt:
                worker = self._lowest([-match for match in matches])
            else:
                worker = self._lowest(loads if self._least_loaded else [len(tree) for tree in self._trees])
        self._insert(self._trees[worker], request)
        return worker

    def _lowest(self, values: list[int]) -> int:
        low = min(values)
        return self.rng.choice([worker for worker, value in enumerate(values) if value == low])

    def _match(self, tree: OrderedDict[int, None], request: Request) -> int:
        count = 0
        for number in request.hashes:
            if number not in tree:
                break
            count += 1
        return count

    def _insert(self, tree: OrderedDict[int, None], request: Request) -> None:
        # The last block first: so a block never goes before those that continue it.
        for number in reversed(request.hashes):
            tree[number] = None
            tree.move_to_end(number)
        while len(tree) > self._tree_blocks:
            tree.popitem(last=False)
