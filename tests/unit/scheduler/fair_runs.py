"""Random runs of a queue before a machine with a few places; the service bounds are checked at every step.

A run has tenants with weights in up to three classes. Each either always has something waiting, or comes and goes.
Places are given out through the waiting room; each running request yields a token a step.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmos.internal.v1 import request_pb2
from scheduler import charges
from scheduler.fairness import CLASSES, Account, FairClass
from scheduler.policy import Policy
from scheduler.requests import Attempt, LiveRequest
from scheduler.waiting import WaitingRoom

KEY = ("m", "1")
STEPS = 120
_EPS = 1e-6


@dataclass(slots=True)
class Tenant:
    """Who sends requests."""

    name: str
    rank: int
    weight: int
    steady: bool
    """Always has something waiting."""
    on: bool = True
    sent: int = 0


@dataclass(slots=True)
class Span:
    """Difference of two parties' services per weight, while both wait."""

    lowest: float
    highest: float
    bound: float

    def add(self, difference: float) -> None:
        self.lowest, self.highest = min(self.lowest, difference), max(self.highest, difference)

    @property
    def holds(self) -> bool:
        return self.highest - self.lowest <= self.bound + _EPS


@dataclass
class Run:
    """One run. `check` is called after each step."""

    seed: int
    spans: dict[tuple[object, object], Span] = field(default_factory=dict)
    service: dict[Account | FairClass, float] = field(default_factory=dict)
    """Tokens charged so far, not divided."""

    def __post_init__(self) -> None:
        self.source = source = random.Random(self.seed)
        self.policy = Policy(head_start_tokens=source.choice((0.0, 50.0, 400.0)))
        self.room = WaitingRoom(self.policy)
        self.queue = self.room.queue(KEY)
        self.places = source.choice((1, 2, 2, 3, 5))
        self.prompt, self.output = source.choice((1, 5, 20)), source.choice((1, 4, 12))
        ranks = source.choice(((0,), (0, 1), (0, 2), (0, 1, 2), (1, 2)))
        self.tenants = [
            Tenant(f"t{number}", source.choice(ranks), source.randint(1, 8), source.random() < 0.6)
            for number in range(source.randint(2, 7))
        ]
        # Requests are alike here: what does not fit is as good as the next one.
        self.most = source.choice((1, 1, 1, None))
        self.running: list[LiveRequest] = []
        self.waits: dict[str, int] = {}
        self.now = 0.0

    def go(self) -> Run:
        for _ in range(STEPS):
            self.now += 1.0
            self._arrive()
            self._produce()
            self.room.admit(KEY, self._start, most=self.most)
            self._check()
        return self

    def _arrive(self) -> None:
        for tenant in self.tenants:
            if not tenant.steady and self.source.random() < 0.03:
                tenant.on = not tenant.on
            account = self.queue.account(tenant.rank, tenant.name, tenant.weight)
            wanted = 2 * self.places if tenant.steady else self.places * (tenant.on and self.source.random() < 0.7)
            while account.waiting < wanted:
                self._send(tenant)

    def _send(self, tenant: Tenant) -> None:
        tenant.sent += 1
        request = request_pb2.Request(
            request_id=f"{tenant.name}/{tenant.sent}",
            tenant=tenant.name,
            tenant_weight=tenant.weight,
            priority=CLASSES[tenant.rank],
            token_ids=[1] * self.source.randint(1, self.prompt),
            max_tokens=self.source.randint(1, self.output),
            choices=1,
        )
        self.room.push(LiveRequest.accept(request, "g", 1, KEY, self.now), self.now)

    def _produce(self) -> None:
        for live in list(self.running):
            (choice,) = live.choices
            choice.tokens.append(1)
            charges.produced(live, choice)
            self._serve(live, 1)
            if len(choice.tokens) == live.request.max_tokens:
                self.running.remove(live)
                charges.stopped(live)

    def _start(self, live: LiveRequest) -> bool:
        if len(self.running) >= self.places:
            return False
        live.attempt = Attempt(1, 1, "w", 1, "m")
        charges.started(live)
        self._serve(live, len(live.request.token_ids))
        self.running.append(live)
        return True

    def _serve(self, live: LiveRequest, tokens: int) -> None:
        assert live.account is not None
        for party in (live.account, live.account.owner):
            self.service[party] = self.service.get(party, 0.0) + tokens

    # -- the bounds --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        most = self.prompt + self.places * self.output
        waiting = {account for one in self.queue.classes for account in one.accounts.values() if account.waiting}
        for a, b in _pairs(waiting):
            bound = most / a.weight + most / b.weight
            self._span(a, b, self.service.get(a, 0.0) / a.weight - self.service.get(b, 0.0) / b.weight, bound)
        classes = [one for one in self.queue.classes if one.waiting]
        for one, other in itertools.combinations(classes, 2):
            bound = most / one.share + most / other.share + other.handicap - one.handicap
            difference = self.service.get(one, 0.0) / one.share - self.service.get(other, 0.0) / other.share
            self._span(one, other, difference, bound)
        together = {(a, b) for a, b in _pairs(waiting)} | set(itertools.combinations(classes, 2))
        for pair in self.spans.keys() - together:
            del self.spans[pair]

    def _span(self, a: object, b: object, difference: float, bound: float) -> None:
        if (a, b) not in self.spans:
            self.spans[a, b] = Span(difference, difference, bound)
        self.spans[a, b].add(difference)
        assert self.spans[a, b].holds, f"seed {self.seed}: {self.spans[a, b]}"

    def shares(self) -> list[float]:
        """Of the classes in all service."""
        served = [self.service.get(one, 0.0) for one in self.queue.classes]
        return [tokens / max(1.0, sum(served)) for tokens in served]


def _pairs(accounts: set[Account]) -> Iterator[tuple[Account, Account]]:
    ordered = sorted(accounts, key=lambda account: (account.owner.rank, account.tenant))
    return (pair for pair in itertools.combinations(ordered, 2) if pair[0].owner is pair[1].owner)
