"""Where a request runs: candidates -> filter -> score -> pick. Each stage is a protocol of one method.

Cost does not grow with the fleet: at most `Policy.candidates` workers are looked at. Scores are costs in seconds, with
a minus: what a request is expected to wait on a worker, and what else is weighed against that. What was sent a moment
ago counts at once, so that nobody herds: a hot prefix stays on its holder for as long as waiting there costs less than
computing it again elsewhere. Why these stages and scores: docs/decisions/0013-placement.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from scheduler.pools import WorkerPool
from scheduler.prefix_index import Match, PrefixIndex
from scheduler.requests import BLOCK_TOKENS, LiveRequest, ModelKey
from scheduler.workers import LOADED, ModelSlot, WorkerView


@dataclass(slots=True)
class Ask:
    """A request that looks for a worker."""

    live: LiveRequest
    blocks: int
    """KV blocks to be set aside for it."""
    tokens: int
    """To be computed before its next output, if nothing is cached."""
    match: Match
    """Who has how much of its prompt cached."""
    salt: int
    """A number of its own, for picking evenly."""


@dataclass(slots=True)
class Option:
    """A worker that could take a request."""

    worker: WorkerView
    slot: ModelSlot
    cached: int
    """Tokens of the prompt that are cached there."""
    uncached: int
    """Tokens to be computed there; at least 1."""


class CandidateSource(Protocol):
    """Names workers worth looking at, likeliest first."""

    def candidates(self, ask: Ask) -> Iterable[str]:
        """Ids. May repeat workers, and name ones that cannot take the request."""
        ...


class Filter(Protocol):
    """Says who cannot take a request."""

    def admits(self, ask: Ask, option: Option) -> bool:
        """Hard limits only; preferences are scores."""
        ...


class Scorer(Protocol):
    """Rates workers that could take a request."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        """One for each option, higher is better, never above 0; empty if the request has no preference."""
        ...


class Picker(Protocol):
    """Chooses among rated workers."""

    def pick(self, ask: Ask, options: Sequence[Option], scores: Sequence[float]) -> Option:
        """Both are equally long and not empty."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """The stages, put together."""

    index: RoomIndex
    sources: Sequence[CandidateSource]
    last_resorts: Sequence[CandidateSource]
    """Asked if nobody of the others' can take the request."""
    filters: Sequence[Filter]
    scorers: Sequence[tuple[float, Scorer]]
    picker: Picker
    most: int

    def place(self, live: LiveRequest) -> Option | None:
        """The worker to send `live` to now; None if it has to wait."""
        if not self.index.may_fit(live):
            return None
        match = self.index.prefixes.match(live.prefix) if live.prefix else ()
        ask = Ask(live, live.blocks, live.known_tokens, match, zlib.crc32(live.id.encode()))
        options = self._fitting(ask, self.sources)
        if all(option.worker.id in live.tried for option in options):
            options += self._fitting(ask, self.last_resorts)
        if len(options) < 2:
            return options[0] if options else None
        return self.picker.pick(ask, options, self._score(ask, options))

    def _fitting(self, ask: Ask, sources: Sequence[CandidateSource]) -> list[Option]:
        found: dict[str, Option] = {}
        for source in sources:
            options = self._options(ask, [one for one in source.candidates(ask) if one not in found])
            for rule in self.filters:
                options = [option for option in options if rule.admits(ask, option)]
            for option in options:
                found[option.worker.id] = option
            if len(found) >= self.most:
                break
        return list(found.values())[: self.most]

    def _options(self, ask: Ask, worker_ids: Sequence[str]) -> list[Option]:
        workers, model, tokens = self.index.workers, ask.live.key[0], ask.tokens
        match, bits = ask.match, self.index.prefixes.bits
        options: list[Option] = []
        for worker_id in worker_ids:
            worker = workers.get(worker_id)
            slot = worker.slots.get(model) if worker is not None else None
            if worker is None or slot is None:
                continue
            cached = 0
            if match:
                bit = bits.get(worker_id, 0)
                for length, holders in match:
                    if holders & bit:
                        cached = length * BLOCK_TOKENS
                        break
            options.append(Option(worker, slot, cached, tokens - cached if cached < tokens else 1))
        return options

    def _score(self, ask: Ask, options: Sequence[Option]) -> list[float]:
        totals = [0.0] * len(options)
        for weight, scorer in self.scorers:
            scores = scorer.scores(ask, options)
            if scores:
                totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return totals


@dataclass(frozen=True, slots=True)
class RoomIndex:
    """Views of the core's indices over workers; read only, always current."""

    workers: Mapping[str, WorkerView]
    pools: Mapping[ModelKey, WorkerPool]
    """Usable workers with a free block; of an adapter, those that have it loaded."""
    prefixes: PrefixIndex
    claims: Mapping[str, str]
    """Request id to the worker that reported to run it."""
    on_trial: Collection[str] = ()
    """Workers that are to be given one request, to see whether they are well again."""

    def pool(self, live: LiveRequest) -> WorkerPool | None:
        """Workers to choose from."""
        return self.pools.get(live.adapter or live.key)

    def may_fit(self, live: LiveRequest) -> bool:
        """False: certainly nobody has room."""
        pool = self.pool(live)
        return (pool is not None and pool.most_room >= live.blocks) or live.id in self.claims


@dataclass(frozen=True, slots=True)
class Home:
    """The worker that still runs an earlier attempt: its caches are warm and the new attempt replaces the old one."""

    index: RoomIndex

    def candidates(self, ask: Ask) -> Iterable[str]:
        home = self.index.claims.get(ask.live.id)
        return () if home is None or home not in self.index.workers else (home,)

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        home = self.index.claims.get(ask.live.id)
        return () if home is None else [-float(option.worker.id != home) for option in options]


@dataclass(frozen=True, slots=True)
class Holders:
    """Workers that have most of the prompt cached, each time others of them."""

    index: RoomIndex
    count: int

    def candidates(self, ask: Ask) -> Iterable[str]:
        left, before = self.count, 0
        for _, bits in ask.match:
            found = self.index.prefixes.workers(bits & ~before, left, ask.salt)
            yield from found
            left, before = left - len(found), bits
            if left <= 0:
                return


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Workers with the least to do."""

    index: RoomIndex
    count: int

    def candidates(self, ask: Ask) -> Iterable[str]:
        pool = self.index.pool(ask.live)
        return () if pool is None else pool.least_loaded(self.count, ask.salt)


@dataclass(frozen=True, slots=True)
class Handful:
    """An even handful: whoever is overlooked by the others is found, and its speed stays known."""

    index: RoomIndex
    count: int

    def candidates(self, ask: Ask) -> Iterable[str]:
        pool = self.index.pool(ask.live)
        return () if pool is None else pool.draw(self.count, ask.salt >> 8)


@dataclass(frozen=True, slots=True)
class Roomiest:
    """Workers with the most free blocks: a large request is placed if it fits anywhere."""

    index: RoomIndex
    count: int

    def candidates(self, ask: Ask) -> Iterable[str]:
        pool = self.index.pool(ask.live)
        return () if pool is None else pool.roomiest(self.count, ask.salt, ask.blocks)


class HasRoom:
    """Capacity is never exceeded: model and adapter are loaded, the worker takes work, enough blocks are free."""

    def admits(self, ask: Ask, option: Option) -> bool:
        live, worker, slot = ask.live, option.worker, option.slot
        if slot.key != live.key:
            return False
        if live.adapter is not None and not worker.loaded(live.adapter):
            return False
        if slot.room >= ask.blocks:
            return True
        # What it replaces there gives its blocks back.
        return (
            live.id in worker.unclaimed and worker.usable and slot.state == LOADED and slot.fits(ask.blocks, ask.blocks)
        )


class SameNumerics:
    """Continues with the same bytes; any worker does for a request without tokens."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        wanted = ask.live.fingerprint
        return [-float(option.worker.fingerprint != wanted) for option in options] if wanted else ()


class FirstTokenSoon:
    """Predicted seconds to the first token: what the worker has to do, what it has cached, and how fast it is."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        return [-(option.slot.backlog_s + option.uncached * option.slot.token_s) for option in options]


class LittleDisturbance:
    """Seconds by which the prompt's uncached part holds up streams that run there, all together."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        return [-option.uncached * option.slot.token_s * option.worker.load.decoding for option in options]


class LittleWork:
    """Seconds of computing the prompt's uncached part: they are lost to whoever comes later, wherever it goes."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        return [-option.uncached * option.slot.token_s for option in options]


class FastDecode:
    """Predicted seconds of decoding the answer, with one sequence more than now."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        tokens = min(ask.live.request.max_tokens, ANSWER_TOKENS)
        return [-tokens * option.slot.step_s for option in options]


class Overlap:
    """The share of the prompt that is not cached."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        return [option.cached / ask.tokens - 1.0 for option in options] if ask.match else ()


class LowPressure:
    """The share of KV blocks that is taken afterwards, squared: the last ones cost most, in evictions."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        return [-((1.0 - (o.slot.room - ask.blocks) / (o.slot.total_blocks or 1)) ** 2) for o in options]


class TenantSpread:
    """The share of the worker's attempts that are the tenant's own: one worker's loss hits few of anybody's."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        tenant = ask.live.request.tenant
        return [-option.worker.tenants.get(tenant, 0) / (len(option.worker.running) + 1) for option in options]


@dataclass(frozen=True, slots=True)
class BestThenSpread:
    """The best score; those that differ by less than predictions err share the load, by a hash of the request."""

    share: float
    limit_s: float

    def pick(self, ask: Ask, options: Sequence[Option], scores: Sequence[float]) -> Option:
        best = max(scores)
        least = best - max(_INSTANT_S, min(self.share * -best, self.limit_s))
        tied = [option for option, score in zip(options, scores, strict=True) if score >= least]
        return tied[ask.salt % len(tied)]


ANSWER_TOKENS = 256
_INSTANT_S = 1e-3
"""Differences below this are none."""
