"""Where a request runs: candidates -> filter -> score -> pick. Each stage is a protocol of one method.

Cost does not grow with the fleet: at most `Policy.candidates` workers are looked at.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from scheduler.requests import LiveRequest, ModelKey
from scheduler.workers import WorkerPool, WorkerView


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that looks for a worker."""

    live: LiveRequest
    blocks: int
    """KV blocks to be set aside for it."""


class CandidateSource(Protocol):
    """Names workers worth looking at, likeliest first."""

    def candidates(self, ask: Ask) -> Iterable[WorkerView]:
        """May repeat workers, and name ones that cannot take the request."""
        ...


class Filter(Protocol):
    """Says who cannot take a request."""

    def admits(self, ask: Ask, worker: WorkerView) -> bool:
        """Hard limits only; preferences are scores."""
        ...


class Scorer(Protocol):
    """Rates a worker that could take a request."""

    def score(self, ask: Ask, worker: WorkerView) -> float:
        """Higher is better; 0 to 1 before weighting."""
        ...


class Picker(Protocol):
    """Chooses among rated workers."""

    def pick(self, ask: Ask, rated: Sequence[tuple[float, WorkerView]]) -> WorkerView:
        """`rated` is not empty."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """The stages, put together."""

    sources: Sequence[CandidateSource]
    filters: Sequence[Filter]
    scorers: Sequence[tuple[float, Scorer]]
    picker: Picker
    most: int

    def place(self, live: LiveRequest) -> WorkerView | None:
        """The worker to send `live` to now; None if it has to wait."""
        ask = Ask(live, live.blocks)
        rated = [(self._score(ask, worker), worker) for worker in self._fitting(ask)]
        return self.picker.pick(ask, rated) if rated else None

    def _fitting(self, ask: Ask) -> list[WorkerView]:
        fitting: dict[str, WorkerView] = {}
        for source in self.sources:
            for worker in source.candidates(ask):
                if worker.id not in fitting and all(f.admits(ask, worker) for f in self.filters):
                    fitting[worker.id] = worker
                if len(fitting) >= self.most:
                    return list(fitting.values())
        return list(fitting.values())

    def _score(self, ask: Ask, worker: WorkerView) -> float:
        return sum(weight * scorer.score(ask, worker) for weight, scorer in self.scorers)


@dataclass(frozen=True, slots=True)
class RoomIndex:
    """Views of the core's indices over workers; read only, always current."""

    workers: Mapping[str, WorkerView]
    pools: Mapping[ModelKey, WorkerPool]
    """Usable workers with a free block; of an adapter, those that have it loaded."""
    freed: Mapping[ModelKey, Set[str]]
    """Workers whose room just grew."""
    looking: Set[ModelKey]
    """Models for which all of `pools` is to be considered; for others nothing but `freed` can have changed."""
    claims: Mapping[str, str]
    """Request id to the worker that reported to run it."""


@dataclass(frozen=True, slots=True)
class Home:
    """The worker that still runs an earlier attempt: its caches are warm and the new attempt replaces the old one."""

    index: RoomIndex

    def candidates(self, ask: Ask) -> Iterable[WorkerView]:
        worker = self.index.workers.get(self.index.claims.get(ask.live.id, ""))
        return () if worker is None else (worker,)

    def score(self, ask: Ask, worker: WorkerView) -> float:
        return float(self.index.claims.get(ask.live.id) == worker.id)


@dataclass(frozen=True, slots=True)
class Roomy:
    """Workers with room: those where blocks just became free, then an even handful of the others."""

    index: RoomIndex
    count: int

    def candidates(self, ask: Ask) -> Iterable[WorkerView]:
        workers = self.index.workers
        for worker_id in sorted(self.index.freed.get(ask.live.key, ()))[: self.count]:
            yield workers[worker_id]
        pool = self.index.pools.get(ask.live.adapter or ask.live.key)
        if pool is not None and ask.live.key in self.index.looking:
            # More than will be scored: some may be too full for a large request.
            for worker_id in pool.draw(4 * self.count, ask.live.id):
                yield workers[worker_id]


class HasRoom:
    """Capacity is never exceeded: model and adapter are loaded, the worker takes work, enough blocks are free."""

    def admits(self, ask: Ask, worker: WorkerView) -> bool:
        slot = worker.slot_for(ask.live.key)
        if slot is None or not worker.usable:
            return False
        if ask.live.adapter is not None and not worker.loaded(ask.live.adapter):
            return False
        return slot.fits(ask.blocks, ask.blocks if ask.live.id in worker.unclaimed else 0)


class Untried:
    """A worker on which this request has not been lost before."""

    def score(self, ask: Ask, worker: WorkerView) -> float:
        return float(worker.id not in ask.live.tried)


class SameNumerics:
    """Continues with the same bytes; any worker does for a request without tokens."""

    def score(self, ask: Ask, worker: WorkerView) -> float:
        return float(not ask.live.fingerprint or ask.live.fingerprint == worker.fingerprint)


class Headroom:
    """The share of KV blocks that stays free."""

    def score(self, ask: Ask, worker: WorkerView) -> float:
        slot = worker.slots[ask.live.key[0]]
        return max(0.0, slot.available - ask.blocks) / max(1, slot.total_blocks)


class BestThenSpread:
    """The best score; ties are spread by a hash of request and worker, so that equals share the load."""

    def pick(self, ask: Ask, rated: Sequence[tuple[float, WorkerView]]) -> WorkerView:
        best = max(score for score, _ in rated)
        tied = [worker for score, worker in rated if score >= best - 1e-9]
        return max(tied, key=lambda worker: zlib.crc32(f"{ask.live.id}/{worker.id}".encode()))


def default_placement(index: RoomIndex, candidates: int) -> Placement:
    """Untried workers first, then equal numerics, then the warm one, then room."""
    home = Home(index)
    return Placement(
        sources=(home, Roomy(index, candidates)),
        filters=(HasRoom(),),
        scorers=((100.0, Untried()), (10.0, SameNumerics()), (2.0, home), (1.0, Headroom())),
        picker=BestThenSpread(),
        most=candidates,
    )
