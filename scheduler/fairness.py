"""Who is next in the queue of one model: classes by minimum share, inside them tenants by service per weight.

Tenants are served as by the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024): each has a counter of the tokens that it was charged, divided by its weight, and the lowest counter among those
who wait goes first. A prompt is charged when its request begins, an output token when it is produced. Who comes back
after having waited for nothing is lifted to the lowest counter of those who wait, so that idleness saves nothing up.

The bound. Let P be the longest prompt, M the most output tokens that a tenant's requests which run at once may still
yield. Of two tenants f, g of one class who both wait throughout an interval, and whose requests fit wherever each
other's do, the services W in that interval satisfy |W_f/w_f - W_g/w_g| <= 2 U, with U = max (P + M)/w over both: a
counter passes another one only by what was charged after the last time that it was the lower one. A request that fits
nowhere may be overtaken `Policy.bypass_limit` times, each of which adds at most (P + M)/w once.

Classes are counted in the same way, by share instead of weight, with one difference: a class has a head start of
`Policy.head_start_tokens` on the class below it, so that a short burst of interactive requests waits for nobody. A
class that waits throughout an interval gets at least its share of what the classes that wait get, less the head starts
and U: none starves.

Costs: charging is two additions; a look at the next request is logarithmic in tenants and in a tenant's requests,
spread over the charges since the last look, each of which can make one place in the order outdated.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmos.internal.v1 import request_pb2
from scheduler.forecast import Codel, Forecast

if TYPE_CHECKING:
    from scheduler.requests import LiveRequest

INTERACTIVE, STANDARD, BATCH = 0, 1, 2
CLASSES = (
    request_pb2.PRIORITY_CLASS_INTERACTIVE,
    request_pb2.PRIORITY_CLASS_STANDARD,
    request_pb2.PRIORITY_CLASS_BATCH,
)
"""On the wire, by rank. A lower rank goes first."""
MAX_WEIGHT = 10_000
_RANKS = {priority: rank for rank, priority in enumerate(CLASSES)}


def rank_of(priority: request_pb2.PriorityClass.ValueType) -> int:
    """Of a class on the wire; one that is not set is standard."""
    return _RANKS.get(priority, STANDARD)


@dataclass(slots=True, eq=False)
class Entry:
    """A request that waits."""

    live: LiveRequest
    account: Account
    tokens: int
    """That it is expected to cost."""
    overtaken: int = 0
    gone: bool = False


Item = tuple[float, int, Entry]
"""When it is due, its serial number, the request."""


@dataclass(slots=True, eq=False)
class Account:
    """A tenant in one class of one model: what waits, and what it was charged."""

    owner: FairClass
    tenant: str
    weight: int = 1
    virtual: float = 0.0
    """Tokens charged, divided by the weight at that time; lifted on return."""
    waiting: int = 0
    tokens: int = 0
    """That those waiting are expected to cost."""
    running: dict[str, LiveRequest] = field(default_factory=dict)
    """Its requests that run, by id, oldest first."""
    heap: list[Item] = field(default_factory=list)
    gone: int = 0
    """Entries of the heap that wait no more."""
    codel: Codel = field(default_factory=Codel)
    place: float | None = None
    """Counter under which it stands in the order of its class; None: it does not."""

    def charge(self, tokens: float) -> None:
        """Service was given; negative: some of it is taken back."""
        owner = self.owner
        self.virtual += tokens / self.weight
        owner.virtual += tokens / owner.share
        owner.served += tokens
        if tokens < 0 and self.place is not None:
            owner.enter(self)

    def discount(self) -> None:
        """One of its entries wait no more. Keeps the heap at most half dead, so that the cost is spread."""
        self.gone += 1
        if 2 * self.gone > len(self.heap):
            self.heap = [item for item in self.heap if not item[2].gone]
            heapq.heapify(self.heap)
            self.gone = 0

    def head(self) -> Item | None:
        """Its most urgent request."""
        while self.heap and self.heap[0][2].gone:
            heapq.heappop(self.heap)
            self.gone = max(0, self.gone - 1)
        return self.heap[0] if self.heap else None

    def last(self) -> Entry | None:
        """One of its less urgent requests."""
        return next((entry for _, _, entry in reversed(self.heap) if not entry.gone), None)


class FairClass:
    """A class of service within one model's queue."""

    def __init__(self, rank: int, share: float, handicap: float, accounts_limit: int) -> None:
        self.rank = rank
        self.share = share
        self.handicap = handicap
        """Virtual tokens by which it must be behind a class above it to go first."""
        self.virtual = 0.0
        """Tokens charged, divided by the share; lifted on return."""
        self.served = 0.0
        """Tokens charged, all together."""
        self.waiting = 0
        self.tokens = 0
        self.busy: dict[Account, None] = {}
        """Tenants with a request that runs."""
        self.weights = 0
        """Of the tenants who wait."""
        self.accounts: dict[str, Account] = {}
        """Who used it last comes last."""
        self.base = 0.0
        """Counter at which the first tenant of all begins."""
        self._limit = accounts_limit
        self._order: list[tuple[float, int, Account]] = []
        self._serial = itertools.count()
        self._left: Account | None = None
        """Who was the last to wait for nothing any more."""

    @property
    def key(self) -> float:
        """The lowest goes first."""
        return self.virtual + self.handicap

    def account(self, tenant: str, weight: int) -> Account:
        """A tenant's account, with its present weight. Idle ones are forgotten beyond the limit, oldest first."""
        account = self.accounts.pop(tenant, None)
        if account is None:
            self._forget()
            account = Account(self, tenant)
        self.accounts[tenant] = account
        weight = min(max(1, weight), MAX_WEIGHT)
        if account.waiting:
            self.weights += weight - account.weight
        account.weight = weight
        return account

    def floor(self) -> float:
        """The counter below which nobody begins to wait."""
        first = self.first()
        if first is not None:
            return first.virtual
        return self._left.virtual if self._left is not None else self.base

    def first(self) -> Account | None:
        """The tenant to serve next."""
        order = self._order
        while order:
            place, _, account = order[0]
            if account.place != place or account.head() is None:
                heapq.heappop(order)
                if account.place == place:
                    account.place = None
            elif account.virtual > place:
                account.place = account.virtual
                heapq.heapreplace(order, (account.virtual, next(self._serial), account))
            else:
                return account
        return None

    def enter(self, account: Account) -> None:
        """Put a tenant where its counter says."""
        account.place = account.virtual
        heapq.heappush(self._order, (account.virtual, next(self._serial), account))
        if len(self._order) > 4 * len(self.accounts) + 64:
            self._order = [entry for entry in self._order if entry[2].place == entry[0]]
            heapq.heapify(self._order)

    def runs(self, account: Account, live: LiveRequest) -> None:
        """A request of the tenant runs."""
        account.running[live.id] = live
        self.busy[account] = None

    def rests(self, account: Account, live: LiveRequest) -> None:
        """It runs no more."""
        del account.running[live.id]
        if not account.running:
            del self.busy[account]

    def begins(self, account: Account) -> None:
        """A tenant has something to wait for again."""
        account.virtual = max(account.virtual, self.floor())
        self.weights += account.weight

    def ends(self, account: Account) -> None:
        """A tenant waits for nothing any more."""
        self.weights -= account.weight
        self._left = account

    def _forget(self) -> None:
        while len(self.accounts) >= self._limit:
            idle = next((one for one in self.accounts.values() if not one.waiting and not one.running), None)
            if idle is None:
                return
            del self.accounts[idle.tenant]


class FairQueue:
    """The queue of one model. Entries are put in, looked at in order, and taken out by whoever owns them."""

    def __init__(self, shares: Sequence[float], head_start: float, accounts_limit: int) -> None:
        """`shares` by rank, all positive; `head_start` in tokens of the lower class."""
        self.classes: list[FairClass] = []
        handicap = 0.0
        for rank, share in enumerate(shares):
            handicap += head_start / share if rank else 0.0
            self.classes.append(FairClass(rank, share, handicap, accounts_limit))
        self.forecast = Forecast()
        self._left = self.classes[0]

    def __len__(self) -> int:
        return sum(one.waiting for one in self.classes)

    @property
    def tokens(self) -> int:
        """That those waiting are expected to cost."""
        return sum(one.tokens for one in self.classes)

    @property
    def served(self) -> float:
        """Tokens charged so far."""
        return sum(one.served for one in self.classes)

    def account(self, rank: int, tenant: str, weight: int) -> Account:
        """A tenant's account in one class."""
        return self.classes[rank].account(tenant, weight)

    def push(self, item: Item) -> None:
        """Begin to wait, or do so again after `left`."""
        entry = item[2]
        account = entry.account
        one = account.owner
        if not one.waiting:
            one.virtual = max(one.virtual, self._floor(one))
        if not account.waiting:
            one.begins(account)
        account.waiting += 1
        account.tokens += entry.tokens
        one.waiting += 1
        one.tokens += entry.tokens
        self.put_back(item)

    def put_back(self, item: Item) -> None:
        """An item that was looked at waits on."""
        account = item[2].account
        heapq.heappush(account.heap, item)
        if account.place is None:
            account.owner.enter(account)

    def left(self, entry: Entry) -> None:
        """An entry does not wait any more. Its item must be out of the heap, or be marked gone."""
        account = entry.account
        one = account.owner
        account.waiting -= 1
        account.tokens -= entry.tokens
        one.waiting -= 1
        one.tokens -= entry.tokens
        if not account.waiting:
            one.ends(account)
        if not one.waiting:
            self._left = one

    def _floor(self, one: FairClass) -> float:
        """Where a class begins to wait: level with the lowest that waits; further on where that would leave it further
        behind a class above it than the head start between them; but nowhere further on than a class above it, or than
        one below it and the head start between them."""
        others = [other for other in self.classes if other.waiting]
        if not others:
            return self._left.virtual
        most = min(other.virtual + max(0.0, other.handicap - one.handicap) for other in others)
        least = max(other.virtual - max(0.0, one.handicap - other.handicap) for other in others)
        return min(most, max(least, min(other.virtual for other in others)))

    def first_class(self) -> FairClass | None:
        """The class to serve next; the higher one of equals."""
        best: FairClass | None = None
        for one in self.classes:
            if one.waiting and (best is None or one.key < best.key) and one.first() is not None:
                best = one
        return best

    def owed(self, rank: int) -> bool:
        """Whether a class goes before those above it, though some of these wait: its minimum share is due."""
        above = [one.key for one in self.classes[:rank] if one.waiting]
        return bool(above) and self.classes[rank].key < min(above)

    def leads(self, live: LiveRequest) -> bool:
        """Whether a request is the next one of all."""
        one = self.first_class()
        account = one.first() if one is not None else None
        head = account.head() if account is not None else None
        return head is not None and head[2].live is live

    def items(self) -> Iterator[Item]:
        """Everybody who waits, in no order."""
        for one in self.classes:
            for account in one.accounts.values():
                for item in account.heap:
                    if not item[2].gone:
                        yield item


class Look:
    """One pass over a queue. Each item that `next` gives is begun, or left, or reported as failed."""

    def __init__(self, queue: FairQueue, tries: int) -> None:
        """`tries`: a tenant's requests that may fail before others have their turn."""
        self.failed: list[Item] = []
        """In the order in which they were looked at."""
        self._queue = queue
        self._tries = tries
        self._counts: dict[Account, int] = {}

    def next(self) -> Item | None:
        """The next item, out of its heap; None if there is none."""
        one = self._queue.first_class()
        account = one.first() if one is not None else None
        return heapq.heappop(account.heap) if account is not None else None

    def fail(self, item: Item) -> None:
        """It finds no room."""
        account = item[2].account
        self.failed.append(item)
        self._counts[account] = count = self._counts.get(account, 0) + 1
        if count >= self._tries:
            account.place = None

    def close(self) -> None:
        """Put back what failed."""
        for item in self.failed:
            if not item[2].gone:
                self._queue.put_back(item)
        for account in self._counts:
            if account.place is None and account.head() is not None:
                account.owner.enter(account)
