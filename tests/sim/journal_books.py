"""What a leader must remember of requests, and what not: a second journal, kept by the rules of decision 0018 alone.

It learns from what reaches the core and from what the core has done, never from the journal itself; where entries give
way to byte limits it only demands a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmos.internal.v1 import journal_pb2
from scheduler import events
from scheduler.commands import AnswerTakeUp, RequestOver, SendJournal, StartAttempt
from scheduler.state import State
from tests.sim.bills import COMES_BACK, Bills, Paid
from tests.sim.copies import ENDED, LIVE, Astray, Copies, Copy, key_of
from tests.sim.orders import tokens_of

BREAKS = frozenset({"client_gone", "slow_reader", "deadline", "broken"})
_SLACK = 0.25
"""By which our idea of an entry's size may differ from its real one."""
_MS = 0.002

Known = Callable[[str], dict[int, int]]
"""Tokens of each choice of a request that a leader has been told of, or has sent."""


@dataclass(slots=True)
class Remembered:
    """One stream."""

    request_id: str
    origin_id: str
    tenant: str
    prompt: tuple[int, ...]
    seed: int
    most: int
    """Tokens of a choice."""
    base: int
    """Bytes without tokens, roughly."""
    claim: int = 0
    open_from: int = 0
    live: bool = True
    broken: bool = False
    over_at: float = 0.0
    known: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return self.base + sum(self.known.values())


class JournalBooks:
    """One leader's."""

    def __init__(
        self,
        state: State,
        bills: Bills,
        known: Known,
        fail: Callable[[str, str], None],
        denied: Counter[tuple[str, str]],
        given: set[tuple[str, int]],
        paid: dict[bytes, Paid],
        inheritance: Copies,
        now: float,
    ) -> None:
        """`denied` counts what was asked for in vain, by tenant and name; `given` has the claims of all leaders;
        `paid` gets what was paid by each record."""
        self._state, self._bills, self._known, self._fail = state, bills, known, fail
        self._denied, self._given_out, self._paid = denied, given, paid
        self._inheritance, self._began_at = inheritance, now
        self._ttl_s = state.policy.journal_ttl_s
        self._entries: dict[str, Remembered] = {}
        self._by_origin: dict[str, str] = {}
        self.dead: set[str] = set(inheritance.cancelled)
        """Cancelled for good."""
        self._closed: dict[str, int] = {}
        """Highest claim that was stopped for its client to come back."""
        self._claims: dict[str, int] = {}
        """Of those that run, the claim under which they were submitted last."""
        self._followers: set[int] = set()
        self._told: Copies | None = None
        self._changed = True
        self._passed: list[Remembered] = []
        """Cancelled for good in this turn: until then it rested, and took others' room."""

    def before(self, event: events.Event, now: float) -> None:
        """An event is about to be handled."""
        if isinstance(event, events.Tick | events.TakeUpAsked):
            for one in list(self._entries.values()):
                if not one.live and one.over_at + self._ttl_s <= now:
                    self._forget(one.request_id)

    def begins_or_ends(self, command: Any, now: float) -> None:
        """An attempt begins or a request is over. Of timers' commands: before the event's turn comes, and `after`."""
        if isinstance(command, StartAttempt):
            self._bills.began(command.request.request_id)
        elif isinstance(command, RequestOver):
            self._over(command, now)

    def after(self, event: events.Event, commands: list[Any], now: float, begun: bool) -> None:
        """It was handled; `begun`: it was a request that was accepted."""
        self._changed = self._changed or not isinstance(event, events.Tick)
        match event:
            case events.JournalInherited():
                self._inherit(event, now)
            case events.Submitted():
                self._submitted(event, begun)
            case events.Cancelled():
                self._cancelled(event, commands)
            case events.Killed():
                self._kill(event.request_id)
            case events.FollowerJoined():
                self._followers.add(event.follower)
            case events.FollowerLeft():
                self._followers.discard(event.follower)
        for command in commands:
            self.begins_or_ends(command, now)
            if isinstance(command, AnswerTakeUp):
                assert isinstance(event, events.TakeUpAsked)
                self._answered(event, command, now)
            elif isinstance(command, SendJournal):
                self._tell(command, now)
        kinds = [type(one) for one in commands]
        told_last = RequestOver not in kinds[kinds.index(SendJournal) if SendJournal in kinds else 0 :]
        self._look_for_lost()  # first: what gave way in this turn is not told of
        self._passed.clear()
        if isinstance(event, events.Tick | events.FollowerJoined) and told_last:
            self._compare()

    # What happens to requests

    def _submitted(self, event: events.Submitted, begun: bool) -> None:
        request_id = event.request.request_id
        live = self._state.requests.get(request_id)
        if not begun:
            self._bound(event)
            return
        if request_id in self.dead:
            self._fail("a cancel is final", f"{request_id} was accepted again")
        if event.claim <= self._closed.get(request_id, -1):
            self._fail("an old claim is over", f"{request_id} goes on under {event.claim}, which was stopped")
        if live is not None:
            self._claims[request_id] = event.claim
        entry = self._entries.get(request_id)
        if entry is not None and (event.claim or event.request.resume or entry.broken or entry.live):
            if entry.broken and not entry.live and event.claim < entry.open_from:
                self._fail("an old claim is over", f"{request_id} goes on under {event.claim}, not {entry.open_from}")
            entry.live, entry.claim = True, max(entry.claim, event.claim)
        else:
            entry = self._new(event)
        older = self._by_origin.get(entry.origin_id, request_id)
        if older != request_id:
            self._forget(older)
        self._by_origin[entry.origin_id] = request_id

    def _new(self, event: events.Submitted) -> Remembered:
        request = event.request
        name = request.request_id
        if name in self._entries:
            self._forget(name)
        self._bills.forgotten(name)
        entry = self._entries[name] = Remembered(
            request_id=name,
            origin_id=event.origin_id or name,
            tenant=request.tenant,
            prompt=tuple(request.token_ids),
            seed=request.sampling.seed,
            most=request.max_tokens,
            base=request.ByteSize() + len(event.sealed) + 560 - sum(len(one.token_ids) for one in request.resume),
            claim=event.claim,
        )
        return entry

    def _bound(self, event: events.Submitted) -> None:
        """A request that runs here came once more: the highest claim has it."""
        request_id = event.request.request_id
        live = self._state.requests.get(request_id)
        before = self._claims.get(request_id)
        if live is None or before is None or live.stream_id != event.stream_id:
            return
        if event.claim < before:
            self._fail("an old claim is over", f"{request_id} bound to claim {event.claim} after {before}")
        self._claims[request_id] = max(before, event.claim)
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.claim = max(entry.claim, event.claim)

    def _cancelled(self, event: events.Cancelled, commands: list[Any]) -> None:
        request_id = event.request_id
        ended = any(isinstance(one, RequestOver) and one.request_id == request_id for one in commands)
        claim = self._claims.get(request_id)
        if event.reason not in BREAKS:
            if claim is not None and not ended:
                self._fail("a cancel is final", f"{request_id} goes on after {event.reason}")
            self._kill(request_id)
            return
        if claim is not None and event.claim < claim:
            if ended:
                self._fail("an old claim is over", f"{request_id}: {claim} was stopped by {event.claim}")
            return
        if claim is not None and not ended:
            if self._state.requests[request_id].stream_id == event.stream_id:
                self._fail("nothing is computed for who is gone", f"{request_id} goes on after {event.reason}")
            return
        self._closed[request_id] = max(event.claim, self._closed.get(request_id, 0))
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.open_from = max(entry.open_from, event.claim + 1)

    def _kill(self, request_id: str) -> None:
        self.dead.add(request_id)
        entry = self._entries.get(request_id)
        if entry is not None:
            if not entry.live:
                self._passed.append(entry)
            self._forget(request_id)

    def _over(self, command: RequestOver, now: float) -> None:
        request_id = command.request_id
        self._bills.over(request_id, command.error)
        self._claims.pop(request_id, None)
        entry = self._entries.get(request_id)
        if entry is None or not entry.live or command.error not in COMES_BACK:
            self._bills.forgotten(request_id)
            if entry is not None and entry.live:
                self._forget(request_id)
            return
        entry.live, entry.broken, entry.over_at = False, bool(command.error), now
        entry.known = dict(self._known(request_id))
        self._entries[request_id] = self._entries.pop(request_id)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        if self._by_origin.get(entry.origin_id) == request_id:
            del self._by_origin[entry.origin_id]
        self._bills.forgotten(request_id)

    # What is said of it

    def _inherit(self, event: events.JournalInherited, now: float) -> None:
        copies, got = self._inheritance, {one.request.request_id: one for one in event.entries}
        for name, copy in copies.entries.items():
            entry = got.pop(name, None)
            if entry is None:
                if copy.over_at + self._ttl_s - now > _MS:
                    self._fail("a successor begins with what it was told", f"{name} is missing")
                continue
            said = (entry.claim, entry.open_from, [tuple(one.token_ids) for one in entry.choices])
            if said != (copy.claim, copy.open_from, copy.tokens):
                self._fail("a successor begins with what it was told", f"{name}: {said[:2]}, not {copy}")
            over_at = now - entry.age_ms / 1000
            if not -_MS < over_at - copy.over_at < now - self._began_at + _MS:
                self._fail("nothing is remembered for too long", f"{name} is said to be {entry.age_ms} ms old")
            self._keep(copy, over_at)
        for name, entry in got.items():
            if entry.age_ms < 1000 * (self._ttl_s - _MS):
                self._fail("a successor begins with what it was told", f"{name} is not known")
        missing = copies.cancelled - {name for name, _ in event.cancelled}
        if missing:
            self._fail("a cancel is final", f"{sorted(missing)} are forgotten by a new leader")
        if lost := copies.quarantined - {mark for mark, *_ in event.quarantined}:
            self._fail("a successor begins with what it was told", f"prompts {sorted(lost)} are not in quarantine")
        self._bills.inherited(copies)

    def _keep(self, copy: Copy, over_at: float) -> None:
        self._entries[copy.request_id] = Remembered(
            request_id=copy.request_id,
            origin_id=copy.origin_id,
            tenant=copy.tenant,
            prompt=copy.prompt,
            seed=copy.seed,
            most=copy.most,
            base=copy.size,
            claim=copy.claim,
            open_from=copy.open_from,
            live=False,
            broken=copy.phase != ENDED,
            over_at=over_at,
            known={choice: len(tokens) for choice, tokens in enumerate(copy.tokens)},
        )
        self._by_origin[copy.origin_id] = copy.request_id

    def _answered(self, event: events.TakeUpAsked, command: AnswerTakeUp, now: float) -> None:
        answer = command.entry
        names = [self._by_origin.get(origin, "") for origin in event.origin_ids]
        found = [self._entries[name] for name in names if name in self._entries]
        mine = next((one for one in found if one.tenant == event.tenant), None)
        if answer is None:
            self._denied[event.tenant, event.origin_ids[-1]] += command.settled
            if mine is not None:
                self._fail("what is remembered is given back", f"{mine.request_id} is not")
            return
        name = answer.request.request_id
        if answer.request.tenant != event.tenant:
            self._fail("another tenant gets nothing", f"{name} was given to {event.tenant}")
        elif name in self.dead:
            self._fail("a cancel is final", f"{name} was given back")
        elif mine is None or mine.request_id != name:
            self._fail("nothing is remembered for too long", f"{name} was given back")
        else:
            self._given(mine, answer, now)

    def _given(self, mine: Remembered, answer: journal_pb2.JournalEntry, now: float) -> None:
        least, name = max(mine.claim, mine.open_from - 1) + 1, (mine.request_id, answer.claim)
        if answer.claim < least or name in self._given_out:
            self._fail("each return has a claim of its own", f"{mine.request_id}: {answer.claim}, not {least}")
        self._given_out.add(name)
        known = self._known(mine.request_id) if mine.live else mine.known
        for said in answer.choices:
            count = len(said.token_ids)
            if tuple(said.token_ids) != tokens_of(mine.prompt, mine.seed, said.choice, mine.most)[:count]:
                self._fail("no token is changed", f"{mine.request_id}: choice {said.choice} is remembered wrongly")
            if count < known.get(said.choice, 0) and not said.finished:
                self._fail("no token is lost or repeated", f"{mine.request_id}: {count} of {known} remembered")
        mine.claim = max(mine.claim, answer.claim)
        if not mine.live:
            mine.over_at = now
            self._entries[mine.request_id] = self._entries.pop(mine.request_id)

    def _tell(self, command: SendJournal, now: float) -> None:
        """What standbys are told is what we know."""
        told = Copies() if command.newcomer else self._told
        if told is None:
            return
        try:
            about = told.take(command.records, now)
        except Astray as error:
            self._fail("standbys are told what is so", str(error))
            self._told = None
            return
        for record, request_id in zip(command.records, about, strict=True):
            paid = self._bills.so_far(request_id)
            if paid is not None:
                self._paid[key_of(record)] = paid
        self._told = told

    def _compare(self) -> None:
        if not self._followers:
            self._told = None
        if self._told is None or not self._changed:
            return
        self._changed = False
        said = self._told.entries
        for name, one in self._entries.items():
            copy = said.get(name)
            if copy is None or (copy.claim, copy.open_from) != (one.claim, one.open_from):
                self._fail("standbys are told what is so", f"{name}: {copy}, not {one}")
                continue
            known = self._known(name) if one.live else one.known
            short = [choice for choice, tokens in enumerate(copy.tokens) if len(tokens) < known.get(choice, 0)]
            if (copy.phase == LIVE) != one.live or any(not copy.finished[choice] for choice in short):
                self._fail("standbys are told what is so", f"{name}: {copy}, of {known}")
        if extra := sorted(said.keys() - self._entries.keys()):
            self._fail("standbys are told what is so", f"{extra} are remembered no more")
        if untold := sorted(self.dead - self._told.cancelled):
            self._fail("a cancel is final", f"standbys have not been told of {untold}")

    # What gives way

    def _look_for_lost(self) -> None:
        """What lives is always remembered, and what is over gives way only where there is too much of it."""
        journal, policy = self._state.journal, self._state.policy
        lost = [one for name, one in self._entries.items() if journal.get(name) is None]
        for one in sorted(lost, key=lambda one: one.over_at):
            resting = [other for other in (*self._entries.values(), *self._passed) if not other.live]
            mine = [other for other in resting if other.tenant == one.tenant]
            needed = _gives_way(one, resting, policy.journal_bytes) or _gives_way(
                one, mine, policy.journal_tenant_bytes
            )
            if one.live or not needed:
                self._fail("what is remembered is given back", f"{one.request_id} gave way without need")
            self._forget(one.request_id)
        total = sum(one.size for one in self._entries.values() if not one.live)
        if total * (1 - _SLACK) > policy.journal_bytes:
            self._fail("no more is remembered than may be", f"{total} of {policy.journal_bytes} bytes")


def of_timers(over: RequestOver, event: events.Event) -> bool:
    """A timer ended it, and timers come before the event: it was over when the event came."""
    return over.error == "gateway_lost" or (
        over.error == "deadline_exceeded" and isinstance(event, events.Killed | events.Cancelled)
    )


def _gives_way(one: Remembered, among: list[Remembered], limit: int) -> bool:
    oldest = min((other.over_at for other in among), default=0.0)
    return one.over_at <= oldest + _MS and sum(other.size for other in among) * (1 + _SLACK) > limit
