"""What a rule knows and is asked, and the dispatcher that asks it. None queues: a request goes to a worker at once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.simulated.engine import Engine, Step
from bench.simulated.fleet import Order, Start
from bench.simulated.traffic import Request


@dataclass(slots=True)
class Seen:
    """What a router knows of a worker."""

    pending: dict[str, Request] = field(default_factory=dict)
    """Sent there by this router, and not ended."""
    prefilling: dict[str, int] = field(default_factory=dict)
    """Those without a first token, and the prompt tokens that were expected to be computed for each."""
    cached: set[int] = field(default_factory=set)
    """Hashes in its prefix cache, by its events."""
    waiting: int = 0
    """Requests in its own queue, as of the last scrape of its metrics."""
    kv_usage: float = 0.0
    """Share of its KV blocks that requests hold, as of then."""

    def overlap(self, request: Request) -> int:
        """Blocks of the prompt, from its beginning, that its cache has."""
        count = 0
        for number in request.hashes:
            if number not in self.cached:
                break
            count += 1
        return count


class Rule:
    """A router's rule. Subclasses choose; what they do not need to hear they leave out."""

    scrape_s = 0.0
    """How often it reads the workers' metrics; 0: never."""

    def __init__(self, workers: int, rng: random.Random) -> None:
        self.seen = [Seen() for _ in range(workers)]
        self.rng = rng

    def choose(self, request: Request) -> int:
        """The number of a worker."""
        raise NotImplementedError

    def ended(self, worker: int, request: Request) -> None:
        """A request there had its last token."""


class Routed:
    """Implements `Dispatcher` for a rule."""

    naming = False

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.tick_s = rule.scrape_s

    def submitted(self, request: Request, now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        worker = self.rule.choose(request)
        seen = self.rule.seen[worker]
        seen.pending[request.id] = request
        seen.prefilling[request.id] = request.prompt - 64 * seen.overlap(request)
        return (Start(worker, request.id),)

    def stepped(self, worker: int, step: Step, engine: Engine, now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        seen = self.rule.seen[worker]
        for job in step.first:
            seen.prefilling.pop(job.id, None)
        for job in step.finished:
            self.rule.ended(worker, seen.pending.pop(job.id))
        if step.removed:
            seen.cached.difference_update(step.removed)
        if step.stored:
            seen.cached.update(step.stored)
        return ()

    def ticked(self, engines: Sequence[Engine], now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        for seen, engine in zip(self.rule.seen, engines, strict=True):
            seen.waiting = engine.waiting
            seen.kv_usage = engine.used / engine.manager.total
        return ()
