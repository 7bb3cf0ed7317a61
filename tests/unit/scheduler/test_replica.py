"""A standby's copy of the journal is the journal, whenever it began to follow, and goes on where a leader was lost."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import pytest

from llmos.errors import StaleTerm
from llmos.internal.v1 import journal_pb2
from llmos.rpc import MAX_MESSAGE_BYTES
from scheduler import commands, events, replication
from scheduler.core import Core
from scheduler.followers import FollowerDesk
from scheduler.loop import Loop
from scheduler.policy import Policy
from scheduler.replica import OutOfStep, Replica
from tests.fakes.clock import ManualClock
from tests.unit.scheduler.arena import Arena, make_request, token
from tests.unit.scheduler.test_journal import Submitter, cancel, failures, produce, take_up, tokens


class Standby:
    """Follows an arena's core as the shell does."""

    def __init__(self, arena: Arena, number: int, term: int = 7) -> None:
        self.replica = Replica(120.0)
        self.arena = arena
        self.number = number
        self.term = term
        self.sequence = 0
        self.replica.begin()
        self._read = len(arena.commands)
        arena.post(events.FollowerJoined(number))
        self.take()

    def take(self) -> None:
        """What the leader has sent since the last time."""
        issued, self._read = self.arena.commands[self._read :], len(self.arena.commands)
        for command in issued:
            if isinstance(command, commands.SendJournal) and command.newcomer in (0, self.number):
                if command.newcomer == 0 and self.sequence == 0:
                    continue  # said before it was there
                self.sequence += 1
                batch = journal_pb2.FollowResponse(term=self.term, sequence=self.sequence, records=command.records)
                self.replica.take(journal_pb2.FollowResponse.FromString(batch.SerializeToString()), self.arena.now)

    def tick(self) -> None:
        """A tick of the leader's clock."""
        self.arena.now += 0.05
        self.arena.post(events.Tick())
        self.take()


def ready(*, policy: Policy | None = None) -> tuple[Arena, Submitter]:
    arena = Arena(policy)
    arena.add_worker("w1")
    arena.connect("g1")
    arena.connect("g2")
    arena.post(events.MembersListed())
    return arena, Submitter(arena)


def content(entry: journal_pb2.JournalEntry) -> bytes:
    plain = journal_pb2.JournalEntry()
    plain.CopyFrom(entry)
    plain.age_ms = 0
    return plain.SerializeToString(deterministic=True)


def journal_of(arena: Arena) -> dict[str, bytes]:
    return {name: content(entry.message(arena.now)) for name, entry in arena.core.state.journal.entries()}


def copy_of(standby: Standby) -> dict[str, bytes]:
    return {name: content(copy.entry) for name, copy in standby.replica._table.entries.items()}


def succeed(arena: Arena, standby: Standby, term: int = 9) -> None:
    """The leader is gone; the standby leads with what it has, among workers and gateways that have to find it."""
    inheritance = standby.replica.inheritance(arena.now)
    arena.new_leader(term)
    arena.post(inheritance)
    for worker_id in arena.workers:
        arena.attach(worker_id)
    for gateway_id in arena.gateways:
        arena.connect(gateway_id)
    arena.advance(2.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_copy_is_the_journal_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    arena, say = ready(policy=Policy(journal_bytes=20_000, journal_tenant_bytes=9_000))
    standbys: list[Standby] = []
    for number in range(60):
        name = f"r{rng.randrange(8)}"
        stream_id = arena.gateways["g1"].stream_id
        match rng.randrange(7):
            case 0 | 1:
                say(name, max_tokens=rng.randrange(1, 30), prompt=rng.randrange(1, 200), tenant=rng.choice("tu"))
            case 2:
                reason = rng.choice(["client_gone", "cancelled", "slow_reader"])
                arena.post(events.Cancelled(stream_id, name, reason))
            case 3:
                entry = take_up(arena, name)
                if entry is not None and not all(choice.finished for choice in entry.choices):
                    say(name, "g2", claim=entry.claim, resume=tokens(entry), max_tokens=entry.request.max_tokens)
            case 4:
                arena.post(events.ChoiceFinished(stream_id, name, 0, rng.randrange(5)))
            case 5:
                arena.post(events.Killed(name))
            case 6:
                arena.now += rng.choice((0.0, 40.0))
        for _ in range(rng.randrange(3)):
            arena.deliver_orders("w1")
            arena.step("w1")
        if rng.random() < 0.1:
            standbys.append(Standby(arena, number + 1))
        if rng.random() < 0.5 and standbys:
            arena.now += 0.05
            arena.post(events.Tick())
            for standby in standbys:
                standby.take()
                assert copy_of(standby) == journal_of(arena)
    assert standbys


def test_a_gateway_and_the_leader_lost_in_a_row_cost_time_alone() -> None:
    arena, say = ready()
    standby = Standby(arena, 1)
    say(max_tokens=12)
    produce(arena, 4)
    standby.tick()
    produce(arena, 2)  # the standby never hears of these, though their client may have them
    arena.disconnect("g1")
    del arena.gateways["g1"]
    succeed(arena, standby)
    entry = take_up(arena)
    assert tokens(entry) == [token("r1", 0, index) for index in range(4)]
    assert entry is not None
    assert not failures(say(gateway="g2", claim=entry.claim, resume=tokens(entry), max_tokens=12))
    produce(arena, 14)
    assert tokens(take_up(arena)) == [token("r1", 0, index) for index in range(12)]


def test_a_gateway_that_lives_takes_its_stream_up_at_the_new_leader() -> None:
    arena, say = ready()
    standby = Standby(arena, 1)
    say(max_tokens=12)
    produce(arena, 4)
    standby.tick()
    succeed(arena, standby)
    assert not failures(say(max_tokens=12, resume=[token("r1", 0, index) for index in range(4)]))
    assert arena.core.state.requests["r1"].claim == 0


def test_what_was_cancelled_under_one_leader_is_refused_by_the_next() -> None:
    arena, say = ready()
    say()
    produce(arena, 2)
    before = take_up(arena)
    assert before is not None
    arena.post(events.Killed("early"))
    standby = Standby(arena, 1)
    arena.post(events.Cancelled(arena.gateways["g1"].stream_id, "r1", "cancelled"))
    standby.tick()
    succeed(arena, standby)
    assert take_up(arena) is None
    assert failures(say(gateway="g2", claim=before.claim, resume=tokens(before))) == ["cancelled"]
    assert failures(say("early")) == ["cancelled"]


def test_a_client_that_leaves_what_was_killed_does_not_make_it_less_dead() -> None:
    arena, say = ready()
    say()
    produce(arena, 2)
    arena.post(events.Killed("r1"))
    arena.post(events.Cancelled(arena.gateways["g1"].stream_id, "r1", "client_gone"))
    standby = Standby(arena, 1)
    succeed(arena, standby)
    assert failures(say(resume=[token("r1", 0, 0)])) == ["cancelled"]


def test_cancelled_ids_are_refused_for_longer_than_streams_are_remembered() -> None:
    replica = Replica(5.0, tombstone_ttl_s=60.0)
    removal = journal_pb2.JournalRemoval(request_id="r1", cancelled="killed")
    replica.begin()
    replica.take(journal_pb2.FollowResponse.FromString(batch(1, journal_pb2.JournalRecord(removal=removal))), 0.0)
    replica.take(journal_pb2.FollowResponse.FromString(batch(2)), 30.0)
    assert replica.inheritance(59.0).cancelled == (("r1", "killed"),)


def test_claims_go_on_under_the_next_leader_and_a_lower_one_stays_over() -> None:
    arena, say = ready()
    standby = Standby(arena, 1)
    say()
    produce(arena, 2)
    first = take_up(arena)
    assert first is not None
    say(gateway="g2", claim=first.claim, resume=tokens(first))
    stream_id = arena.gateways["g2"].stream_id
    arena.post(events.Cancelled(stream_id, "r1", "client_gone", first.claim))
    standby.tick()
    succeed(arena, standby)
    assert failures(say(claim=0, resume=[])) == ["cancelled"]
    assert failures(say(claim=first.claim, resume=[])) == ["cancelled"]
    later = take_up(arena)
    assert later is not None and later.claim > first.claim
    assert not failures(say(claim=later.claim, resume=tokens(later)))


def test_a_claim_that_the_standby_never_heard_of_stops_nothing_under_the_next_leader() -> None:
    arena, say = ready()
    standby = Standby(arena, 1)
    say()
    produce(arena, 2)
    standby.tick()
    unheard = take_up(arena)
    assert unheard is not None
    say(gateway="g2", claim=unheard.claim, resume=tokens(unheard))
    succeed(arena, standby)
    later = take_up(arena)
    assert later is not None and later.claim > unheard.claim
    arena.post(events.Cancelled(arena.gateways["g2"].stream_id, "r1", "client_gone", unheard.claim))
    assert not failures(say(claim=later.claim, resume=tokens(later)))


def test_a_stream_that_began_before_a_reign_is_out_of_step_after_it() -> None:
    replica = Replica(5.0)
    replica.begin()
    replica.inheritance(0.0)
    with pytest.raises(OutOfStep):
        replica.take(journal_pb2.FollowResponse.FromString(batch(1)), 1.0)
    replica.begin()
    replica.take(journal_pb2.FollowResponse.FromString(batch(1)), 1.0)


def batch(sequence: int, *records: journal_pb2.JournalRecord, term: int = 7, more: bool = False) -> bytes:
    return journal_pb2.FollowResponse(term=term, sequence=sequence, snapshot=more, records=records).SerializeToString()


def entry_of(name: str) -> journal_pb2.JournalRecord:
    entry = journal_pb2.JournalEntry(
        origin_id=name, request=make_request(name), sealed=b"s", phase=journal_pb2.JOURNAL_PHASE_LIVE
    )
    entry.choices.add()
    return journal_pb2.JournalRecord(entry=entry)


def test_a_lower_term_is_refused_a_gap_begins_anew_and_half_a_beginning_replaces_nothing() -> None:
    replica = Replica(120.0)

    def take(message: bytes) -> None:
        replica.take(journal_pb2.FollowResponse.FromString(message), 0.0)

    replica.begin()
    take(batch(1, entry_of("old")))
    with pytest.raises(OutOfStep):
        take(batch(3))
    replica.begin()
    take(batch(1, entry_of("new"), term=8, more=True))
    assert list(replica._table.entries) == ["old"]
    with pytest.raises(StaleTerm):
        take(batch(2, term=7))
    replica.begin()
    take(batch(1, entry_of("new"), term=8))
    assert list(replica._table.entries) == ["new"]
    progress = journal_pb2.JournalProgress(request_id="new")
    progress.choices.add(index=1, token_ids=[1])
    with pytest.raises(OutOfStep):
        take(batch(2, journal_pb2.JournalRecord(progress=progress), term=8))


def test_nothing_is_marked_while_nobody_follows() -> None:
    arena, say = ready()
    say()
    produce(arena, 2)
    assert not arena.core.state.journal.marks
    standby = Standby(arena, 1)
    produce(arena, 1)
    assert arena.core.state.journal.marks
    arena.post(events.FollowerLeft(standby.number))
    produce(arena, 1)
    assert not arena.core.state.journal.marks
    assert isinstance(arena.core, Core)


def test_an_entry_larger_than_a_message_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "PIECE_BYTES", 200)
    arena, say = ready()
    say(max_tokens=300)
    produce(arena, 150)
    standby = Standby(arena, 1)
    records = [one for command in arena.issued(commands.SendJournal) for one in command.records]
    assert len(records) > 3
    assert max(record.ByteSize() for record in records) < 250
    assert copy_of(standby) == journal_of(arena)
    produce(arena, 120)
    standby.tick()
    assert copy_of(standby) == journal_of(arena)
    cancel(arena, "client_gone")
    standby.tick()
    assert copy_of(standby) == journal_of(arena)
    # Where a leader is lost between two pieces, what has come is a beginning that does not claim to be the end.
    half = Replica(120.0)
    half.begin()
    whole = list(arena.issued(commands.SendJournal)[-1].records)
    half.take(journal_pb2.FollowResponse(term=7, sequence=1, records=whole[:2]), arena.now)
    (entry,) = half.inheritance(arena.now).entries
    assert 0 < len(entry.choices[0].token_ids) < 270
    assert not entry.choices[0].finished


def test_what_is_too_long_for_any_message_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "PIECE_BYTES", 600)
    monkeypatch.setattr(replication, "LIMIT_BYTES", 1000)
    arena, say = ready()
    say(max_tokens=40, prompt=900)
    say("r2", max_tokens=40)
    standby = Standby(arena, 1)
    produce(arena, 10)
    standby.tick()
    assert arena.core.state.counters["journal_left_out"] == 1
    assert set(copy_of(standby)) == {"r2"}


async def test_no_batch_is_larger_than_a_message() -> None:
    """Records of any size up to the limit, before and after small ones."""
    desk = FollowerDesk(Loop(Core("s", 1, Policy(), 0.0), cast("Any", None), ManualClock()), lambda: 1)
    batches = desk.serve("s2")
    first = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    removal = journal_pb2.JournalRemoval(request_id="r", cancelled="x" * (replication.LIMIT_BYTES - 64))
    large = journal_pb2.JournalRecord(removal=removal)
    small = journal_pb2.JournalRecord(removal=journal_pb2.JournalRemoval(request_id="s" * 1000))
    desk.send(commands.SendJournal([small, large, small, large], newcomer=1))
    sizes = [(await first).ByteSize()]
    sizes += [(await anext(batches)).ByteSize() for _ in range(3)]
    desk.send(commands.SendJournal([large, large]))
    sizes += [(await anext(batches)).ByteSize() for _ in range(2)]
    assert max(sizes) <= MAX_MESSAGE_BYTES
    assert desk.dropped == 0
    desk.close()
    await batches.aclose()


@pytest.mark.parametrize("early", [True, False])
def test_what_workers_died_of_is_refused_by_the_next_leader_for_what_is_left_of_its_time(early: bool) -> None:
    arena, say = ready(policy=Policy(quarantine_s=600.0))
    standby = Standby(arena, 1) if early else None
    say("deadly", prompt=20)
    state = arena.core.state
    state.requests["deadly"].deaths = 1
    arena.deliver_orders("w1")
    arena.workers["w1"]._end_engine()
    arena.step("w1")
    assert state.counters["quarantined"] == 1
    arena.now += 100.0
    standby = standby or Standby(arena, 1)
    standby.tick()
    arena.now += 100.0
    succeed(arena, standby)
    assert failures(say("again", prompt=20)) == ["request_quarantined"]
    assert not failures(say("fine", prompt=21))
    arena.advance(390.0)
    assert failures(say("again", prompt=20)) == ["request_quarantined"]
    arena.advance(20.0)
    assert not failures(say("again", prompt=20))
