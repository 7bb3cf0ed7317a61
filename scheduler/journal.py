"""What a leader remembers of requests, so that a client can come back to them: while they live, and for a while after.

An entry is the request, its tokens, and a blob that only gateways can read. What is over is kept for a time under byte
limits; the oldest gives way. Each time a client comes back its stream gets a *claim*, higher than the last: output goes
to the highest, and lower ones are over. A claim begins with the leader's term, so that a leader that has not heard of
the last one gives a higher one all the same. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmos.internal.v1 import journal_pb2, request_pb2
from scheduler import charges
from scheduler.requests import Choice, LiveRequest

LIVE = journal_pb2.JOURNAL_PHASE_LIVE
BROKEN = journal_pb2.JOURNAL_PHASE_BROKEN
ENDED = journal_pb2.JOURNAL_PHASE_ENDED

BREAKS = frozenset({"client_gone", "slow_reader", "deadline", "broken"})
"""Reasons for which a gateway stops a request whose client may come back."""
_KEPT = BREAKS | {"", "gateway_lost", "unavailable", "deadline_exceeded"}
"""How requests end that are remembered: well, or through no decision of anybody."""
_CLAIMS_PER_TERM = 1 << 20
"""A stream is not taken up so often in one."""
_ENTRY_BYTES = 512
"""What an entry takes beside its content, roughly."""


@dataclass(slots=True)
class Entry:
    """One remembered stream. `live` while it waits or runs, else `kept` has its content."""

    origin_id: str
    request: request_pb2.Request
    sealed: bytes
    claim: int = 0
    """The last one that was given out."""
    open_from: int = 0
    """Lowest claim that may compute."""
    live: LiveRequest | None = None
    kept: journal_pb2.JournalEntry | None = None
    phase: journal_pb2.JournalPhase.ValueType = LIVE
    over_at: float = 0.0
    """When it broke or ended."""
    size: int = 0
    sent: list[tuple[int, bool]] = field(default_factory=list)
    """What followers know of each choice: its tokens, and whether it has ended."""
    left_out: bool = False
    """What was asked is too long to be sent to followers."""

    def message(self, now: float) -> journal_pb2.JournalEntry:
        """As it stands. Not to be changed by who gets it."""
        entry = self.kept
        if entry is None:
            assert self.live is not None
            entry = written(self.origin_id, self.sealed, self.live)
        entry.claim, entry.open_from, entry.phase = self.claim, self.open_from, self.phase
        entry.age_ms = 0 if self.live is not None else max(0, int(1000 * (now - self.over_at)))
        return entry


class Journal:
    """Owned by the core. `counters` gets how many entries gave way to others."""

    def __init__(self, ttl_s: float, limit_bytes: int, tenant_limit_bytes: int, counters: Counter[str]) -> None:
        self._ttl_s = ttl_s
        self._limit_bytes = limit_bytes
        self._tenant_limit_bytes = tenant_limit_bytes
        self._counters = counters
        self._entries: dict[str, Entry] = {}
        self._by_origin: dict[str, str] = {}
        self._over: dict[str, None] = {}
        """Ids of what is over, oldest first."""
        self._over_of: dict[str, dict[str, None]] = {}
        """The same by tenant."""
        self._bytes_of: dict[str, int] = {}
        self.bytes = 0
        """Of everything that is over."""
        self.followed = False
        """Somebody keeps a copy: what changes is marked."""
        self.marks: dict[str, bool] = {}
        """Requests that followers must hear of; True: all that is known, not just what was added."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request_id: str) -> Entry | None:
        """What is remembered of a request."""
        return self._entries.get(request_id)

    def grown(self, request_id: str) -> None:
        """A request has more output."""
        if self.followed:
            self.marks.setdefault(request_id, False)

    def changed(self, request_id: str) -> None:
        """A request is not just longer than it was."""
        if self.followed:
            self.marks[request_id] = True

    def entries(self) -> Iterable[tuple[str, Entry]]:
        """All of them: what is over in order of its time."""
        yield from [(request_id, self._entries[request_id]) for request_id in self._over]
        yield from [item for item in self._entries.items() if item[1].live is not None]

    def inherit(self, said: journal_pb2.JournalEntry, now: float) -> None:
        """Take over what an earlier leader remembered; oldest first. What lived there is broken until its gateway, or
        its client, comes."""
        request_id = said.request.request_id
        if request_id in self._entries or said.age_ms >= 1000 * self._ttl_s:
            return
        entry = Entry(said.origin_id, said.request, said.sealed, said.claim, said.open_from, kept=said)
        entry.phase = BROKEN if said.phase == LIVE else said.phase
        self._entries[request_id] = entry
        self._by_origin[said.origin_id] = request_id
        self._lay_down(entry, now - said.age_ms / 1000)

    def begin(self, live: LiveRequest, origin_id: str, sealed: bytes, claim: int) -> None:
        """A request is accepted, new or to go on with. Without a sealed blob nothing could be done with it later."""
        if not sealed:
            return
        origin_id = origin_id or live.id
        entry = self._entries.get(live.id)
        goes_on = bool(claim or live.request.resume)
        if entry is not None and (goes_on or entry.phase != ENDED) and _same(live.request, entry.request):
            self._rest_no_more(entry)
            _carry_on(live, entry)
        else:
            if entry is not None:  # the name is used again
                self._forget(live.id)
            entry = Entry(origin_id, live.request, sealed)
        older = self._by_origin.get(origin_id, live.id)
        if older != live.id:
            self._forget(older)
        entry.live, entry.kept, entry.phase = live, None, LIVE
        entry.request, entry.sealed = live.request, sealed
        entry.claim = max(entry.claim, claim)
        self._entries[live.id] = entry
        self._by_origin[origin_id] = live.id
        self.changed(live.id)

    def claimed(self, request_id: str, claim: int) -> None:
        """What lives goes on under this claim. An earlier leader may have given it out, and this one not know of it."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.claim = max(entry.claim, claim)
            self.changed(request_id)

    def end(self, live: LiveRequest, reason: str, now: float) -> None:
        """A request is over: well (`reason` is empty), or for what reason."""
        entry = self._entries.get(live.id)
        if entry is None or entry.live is not live:
            return
        if reason not in _KEPT:
            self._forget(live.id)
            return
        entry.kept = written(entry.origin_id, entry.sealed, live)
        entry.live = None
        entry.phase = BROKEN if reason else ENDED
        self.changed(live.id)
        self._lay_down(entry, now)

    def close(self, request_id: str, claim: int) -> None:
        """A gateway has stopped what it submitted under this claim: only a later one goes on with it."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.open_from = max(entry.open_from, claim + 1)
            self.changed(request_id)

    def cancel(self, request_id: str) -> None:
        """It was cancelled for good: forget it, if it is known at all."""
        self.changed(request_id)
        if request_id in self._entries:
            self._forget(request_id)

    def is_over(self, request_id: str, claim: int) -> bool:
        """Whether a later claim than this one was needed to go on with a stream that was stopped."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.phase == BROKEN and claim < entry.open_from

    def take_up(self, tenant: str, origin_ids: Iterable[str], term: int, now: float) -> journal_pb2.JournalEntry | None:
        """What is remembered under one of these names, with a new claim; None if it is nothing of this tenant."""
        self.purge(now)
        for origin_id in origin_ids:
            entry = self._entries.get(self._by_origin.get(origin_id, ""))
            if entry is not None and entry.request.tenant == tenant:
                entry.claim = max(entry.claim, entry.open_from - 1, term * _CLAIMS_PER_TERM) + 1
                if entry.live is None:  # it has come back: its time begins anew
                    self._rest_no_more(entry)
                    self._lay_down(entry, now)
                self.changed(entry.request.request_id)
                answer = journal_pb2.JournalEntry()
                answer.CopyFrom(entry.message(now))
                return answer
        return None

    def purge(self, now: float) -> None:
        """Forget what has had its time."""
        while self._over:
            oldest = next(iter(self._over))
            if self._entries[oldest].over_at + self._ttl_s > now:
                return
            self._forget(oldest)

    def _lay_down(self, entry: Entry, now: float) -> None:
        """Keep what is over; the oldest give way where that is too much."""
        assert entry.kept is not None
        request_id, tenant = entry.request.request_id, entry.request.tenant
        entry.over_at = now
        entry.request = entry.kept.request
        entry.size = entry.kept.ByteSize() + _ENTRY_BYTES
        self._over[request_id] = None
        mine = self._over_of.setdefault(tenant, {})
        mine[request_id] = None
        self.bytes += entry.size
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + entry.size
        while self._bytes_of.get(tenant, 0) > self._tenant_limit_bytes:
            self._give_way(next(iter(mine)))
        while self.bytes > self._limit_bytes:
            self._give_way(next(iter(self._over)))

    def _give_way(self, request_id: str) -> None:
        self._counters["journal_evicted"] += 1
        self._forget(request_id)

    def _rest_no_more(self, entry: Entry) -> None:
        request_id, tenant = entry.request.request_id, entry.request.tenant
        if request_id not in self._over:
            return
        del self._over[request_id]
        mine = self._over_of[tenant]
        del mine[request_id]
        self.bytes -= entry.size
        self._bytes_of[tenant] -= entry.size
        if not mine:
            del self._over_of[tenant], self._bytes_of[tenant]

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        self.changed(request_id)
        self._rest_no_more(entry)
        if self._by_origin.get(entry.origin_id) == request_id:
            del self._by_origin[entry.origin_id]


def written(origin_id: str, sealed: bytes, live: LiveRequest) -> journal_pb2.JournalEntry:
    """A live request as it stands."""
    entry = journal_pb2.JournalEntry(
        origin_id=origin_id,
        request=live.request,
        sealed=sealed,
        cached_tokens=live.cached_tokens,
        prompt_charged=live.prompt_charged,
    )
    del entry.request.resume[:]
    for number, choice in enumerate(live.choices):
        entry.choices.append(choice_message(number, choice, 0))
    return entry


def choice_message(number: int, choice: Choice, index: int) -> journal_pb2.JournalChoice:
    """A choice from a token index on."""
    known_from = max(index, choice.logprobs_from)
    return journal_pb2.JournalChoice(
        choice=number,
        index=index,
        token_ids=choice.tokens[index:],
        logprobs=choice.logprobs[known_from - choice.logprobs_from :],
        finish_reason=choice.finish_reason,
        finished=choice.finished,
        charged=choice.charged,
    )


def _same(request: request_pb2.Request, earlier: request_pb2.Request) -> bool:
    """One goes on with the other; else a name is used again for something else."""
    return request.token_ids == earlier.token_ids and (request.model, request.adapter) == (
        earlier.model,
        earlier.adapter,
    )


def _carry_on(live: LiveRequest, entry: Entry) -> None:
    """What its tenant has paid for, and what its first attempt found, are the stream's, whoever goes on with it."""
    before = entry.message(entry.over_at)
    live.cached_tokens = max(live.cached_tokens, before.cached_tokens)
    if before.prompt_charged:
        charges.inherited(live)
    for choice, earlier in zip(live.choices, before.choices, strict=False):
        choice.charged = max(choice.charged, earlier.charged)
        if choice.finished:  # its gateway may have found a stop string before what was paid for
            charges.cut(live, choice, len(choice.tokens))
        if choice.finished and earlier.finished and not choice.finish_reason:
            choice.finish_reason = earlier.finish_reason
