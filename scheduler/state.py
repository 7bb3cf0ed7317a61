"""Everything the core knows. The core's modules are functions over this state; nobody else writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from llmos.v1 import fleet_pb2
from scheduler.allocation.book import Book
from scheduler.allocation.shares import Reserved
from scheduler.budget import Budget
from scheduler.catalogue import Catalogue
from scheduler.commands import Command
from scheduler.forecast import DrainRate
from scheduler.journal import Journal
from scheduler.meters import Meters
from scheduler.placement import Placement, RoomIndex
from scheduler.policy import Policy
from scheduler.pools import WorkerPool
from scheduler.prefix_index import PrefixIndex
from scheduler.quotas import Quotas
from scheduler.recent import Recent
from scheduler.requests import LiveRequest, ModelKey
from scheduler.timers import Timers
from scheduler.timing import FleetTimes
from scheduler.trust import NotAgain, OneSuspect, default_placement
from scheduler.waiting import WaitingRoom
from scheduler.workers import LOADED, ModelSlot, WorkerView

Outbox = list[Command]
"""Commands in the order in which they are to be carried out."""


@dataclass(slots=True)
class GatewayView:
    """A gateway with a live stream."""

    node: fleet_pb2.Node
    stream_id: int


@dataclass(slots=True)
class State:
    """Requests, workers, gateways, and the indices over them."""

    scheduler_id: str
    term: int
    policy: Policy
    members_listed: bool = False
    """All workers that were registered at the election have been announced."""
    elected_at: float = 0.0
    now: float = 0.0
    """Time of the event that is being handled."""
    settled: bool = False
    """Gateways and workers had time to come after the election."""
    requests: dict[str, LiveRequest] = field(default_factory=dict)
    by_stream: dict[int, set[str]] = field(default_factory=dict)
    """Ids of the requests that came on each gateway stream."""
    parked: dict[str, LiveRequest] = field(default_factory=dict)
    """Accepted requests for a model that nobody has reported yet; part of `requests`."""
    gateways: dict[str, GatewayView] = field(default_factory=dict)
    workers: dict[str, WorkerView] = field(default_factory=dict)
    pools: dict[ModelKey, WorkerPool] = field(default_factory=dict)
    """Usable workers with a free block, by model version; with an adapter loaded, by its version."""
    looking: set[ModelKey] = field(default_factory=set)
    """Models whose waiting requests are to be looked at next: one came, or a worker's room grew."""
    leading: set[ModelKey] = field(default_factory=set)
    """Those of them for which nothing is new but the first request."""
    kept_apart: set[ModelKey] = field(default_factory=set)
    """Those for which a suspect waits, perhaps just for others to get on: looked at with every frame."""
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    """Who has which prefix cached."""
    times: dict[ModelKey, FleetTimes] = field(default_factory=dict)
    """How long all workers of a model take."""
    claims: dict[str, str] = field(default_factory=dict)
    """Request id to the worker that reported to run it and has not been told otherwise."""
    afresh_until: float = 0.0
    """Until then no other worker is started afresh."""
    nobody_since: dict[ModelKey, float] = field(default_factory=dict)
    """Since when no connected worker could ever serve a model that somebody waits for."""
    largest: dict[ModelKey, int] = field(default_factory=dict)
    """KV blocks of the largest loaded slot of each model; absent: not known since something changed."""
    reachable: dict[ModelKey, int] = field(default_factory=dict)
    """The same, of workers that may be given new work now."""
    wanted_at: dict[ModelKey, float] = field(default_factory=dict)
    """Adapters: when a worker was last looked for that could load one."""
    stranded_since: dict[str, float] = field(default_factory=dict)
    """Waiting requests that are too large for every such worker, as of the last sweep."""
    rota: Iterator[WorkerView] = field(default_factory=lambda: iter(()))
    """Workers whose predictions are to be looked at again, a few each tick."""
    catalogue: Catalogue = field(default_factory=Catalogue)
    book: Book = field(default_factory=Book)
    """Promises of resources, and what they come to."""
    timers: Timers = field(default_factory=Timers)
    quotas: Quotas = field(default_factory=Quotas)
    drain: DrainRate = field(default_factory=DrainRate)
    meters: Meters = field(default_factory=Meters)
    budget: Budget = field(default_factory=Budget)
    """For second tries."""
    hedged: dict[str, None] = field(default_factory=dict)
    """Ids of requests with two attempts, oldest first."""
    on_trial: set[str] = field(default_factory=set)
    """Workers that were put out and are given one request, to see."""
    counters: Counter[str] = field(default_factory=Counter)
    """What was refused or repeated, by name; for people and tests."""
    waiting: WaitingRoom = field(init=False)
    quarantine: Recent[str] = field(init=False)
    """Fingerprints of requests that workers died of; by whom it was found."""
    condemned: list[str] = field(default_factory=list)
    """Those that followers of the journal must hear of yet."""
    suspected: Recent[str] = field(init=False)
    """Fingerprints of what ran when an engine ended; the last one's request."""
    tombstones: Recent[str] = field(init=False)
    """Why a request was cancelled; it must not start any more."""
    closed: Recent[int] = field(init=False)
    """Of streams that broke: the highest claim that is over. Known for as long as the tombstone, journal or not."""
    last_attempts: Recent[int] = field(init=False)
    """Attempts of ended requests: one that comes again continues the count, as workers refuse epochs they know."""
    journal: Journal = field(init=False)
    followers: set[int] = field(default_factory=set)
    """Streams of those who keep a copy of the journal."""
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        policy = self.policy
        self.book.listed = not policy.await_promises
        self.waiting = WaitingRoom(policy)
        self.quarantine = Recent(policy.quarantine_s, policy.quarantine_limit)
        self.suspected = Recent(policy.quarantine_s, policy.quarantine_limit)
        self.tombstones = Recent(policy.tombstone_ttl_s, policy.tombstone_limit)
        self.last_attempts = Recent(2 * policy.tombstone_ttl_s, policy.tombstone_limit)
        self.closed = Recent(policy.tombstone_ttl_s, policy.tombstone_limit)
        self.journal = Journal(policy.journal_ttl_s, policy.journal_bytes, policy.journal_tenant_bytes, self.counters)
        indices = RoomIndex(self.workers, self.pools, self.prefixes, self.claims, self.on_trial)
        placement = default_placement(indices, policy.candidates, policy.weights)
        reserved = Reserved(self.book, self.requests)
        again = NotAgain(indices, lambda: self.now, policy.avoid_s)
        apart = OneSuspect(self.requests, self.suspected, lambda: self.now)
        self.placement = replace(placement, filters=(*placement.filters, reserved, again, apart))

    def stream_of(self, live: LiveRequest) -> int | None:
        """Where its output goes now; None while its gateway is away or has not taken it up again."""
        gateway = self.gateways.get(live.gateway_id)
        return live.stream_id if gateway is not None and gateway.stream_id == live.stream_id else None

    def room_changed(self, worker: WorkerView, slot: ModelSlot) -> None:
        """Keep `pools` and predictions true, and look at who waits, after a slot, or its worker's load or standing, has
        changed."""
        if len(worker.slots) == 1:
            self._file(worker, slot, slot)
            return
        for other in worker.slots.values():
            # Models share the worker's time, adapters their base's blocks.
            holder = worker.slots.get(other.base) if other.base else other
            if holder is not None and (other is slot or other.state == LOADED):
                self._file(worker, other, holder)

    def _file(self, worker: WorkerView, slot: ModelSlot, holder: ModelSlot) -> None:
        """Enter a slot into its pool, or take it out. `holder` has the blocks: the slot itself, or an adapter's base,
        in whose queue its requests wait."""
        room = holder.available
        if slot.state != LOADED or not worker.usable or (room <= 0 and holder is slot):
            self.lost_room(worker.id, slot)
            return
        load, times = worker.load, holder.times
        slot.backlog_s = times.first_token.seconds(0, load.ahead, load.decoding)
        slot.token_s = times.first_token.per_token(load.decoding)
        slot.step_s = times.step.seconds(load.decoding + 1, prefilling=False)
        pool = self.pools.get(slot.key)
        if pool is None:
            pool = self.pools[slot.key] = WorkerPool()
        room = max(0, room)
        pool.put(worker.id, int(1000 * slot.backlog_s), room)
        if room > slot.room:
            self.looking.add(holder.key)
            self.leading.discard(holder.key)
        slot.room = room

    def lost_room(self, worker_id: str, slot: ModelSlot) -> None:
        """A worker takes nothing more of that model."""
        slot.room = -1
        if slot.key in self.pools:
            self.pools[slot.key].discard(worker_id)

    def standing_changed(self, worker: WorkerView) -> None:
        """A worker came or went, or its slots changed in state or size."""
        for slot in worker.slots.values():
            self.largest.pop(slot.key, None)
            self.reachable.pop(slot.key, None)

    def times_of(self, key: ModelKey) -> FleetTimes:
        """What is known of a model's speed anywhere."""
        if key not in self.times:
            self.times[key] = FleetTimes()
        return self.times[key]

    def largest_slot(self, key: ModelKey) -> int:
        """KV blocks of the largest slot in which a model is loaded; 0 if it is nowhere."""
        if key not in self.largest:
            self.largest[key] = _largest(self.workers.values(), key)
        return self.largest[key]

    def reach(self, key: ModelKey) -> int:
        """KV blocks beyond which no usable worker could hold a request, even if it had nothing else to do."""
        if key not in self.reachable:
            self.reachable[key] = _largest((worker for worker in self.workers.values() if worker.usable), key)
        return self.reachable[key]

    def absent(self, adapter: ModelKey) -> bool:
        """No usable worker has this adapter loaded."""
        return not self.pools.get(adapter)


def _largest(workers: Iterable[WorkerView], key: ModelKey) -> int:
    slots = (worker.slot_for(key) for worker in workers)
    return max((slot.total_blocks for slot in slots if slot is not None and slot.state == LOADED), default=0)
