"""What a leader remembers of streams: claims, tombstones, limits, and how a client's return goes through the core."""

from __future__ import annotations

import asyncio

import pytest

from llmos.errors import NotFound, Unavailable
from llmos.internal.v1 import journal_pb2
from scheduler import commands, events
from scheduler.core import Core
from scheduler.inquiries import Inquiries
from scheduler.loop import Loop
from scheduler.policy import Policy
from scheduler.requests import LENGTH, LiveRequest
from tests.fakes.clock import ManualClock
from tests.unit.scheduler.arena import Arena, make_request, token


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.add_worker("w1")
    arena.connect("g1")
    arena.connect("g2")
    arena.post(events.MembersListed())
    return arena


FIRST_CLAIM = (7 << 20) + 1
"""In the term in which arenas begin."""


class Submitter:
    """Says what gateways say, blob and claim included."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def __call__(
        self,
        name: str = "r1",
        gateway: str = "g1",
        claim: int = 0,
        resume: list[int] | None = None,
        origin: str = "",
        **fields: object,
    ) -> list[commands.Command]:
        request = make_request(name, **{"max_tokens": 40, **fields})  # type: ignore[arg-type]
        if resume is not None:
            request.resume.add(choice=0, token_ids=resume)
        self.arena.gateways[gateway].clients.pop(name, None)
        stream_id = self.arena.gateways[gateway].stream_id
        return self.arena.post(events.Submitted(stream_id, request, b"sealed", origin, claim))


@pytest.fixture
def say(arena: Arena) -> Submitter:
    return Submitter(arena)


def take_up(arena: Arena, *names: str, tenant: str = "t") -> journal_pb2.JournalEntry | None:
    answers = arena.post(events.TakeUpAsked(1, tenant, names or ("r1",)))
    (answer,) = [answer for answer in answers if isinstance(answer, commands.AnswerTakeUp)]
    return answer.entry


def cancel(arena: Arena, reason: str, claim: int = 0, gateway: str = "g1") -> None:
    arena.post(events.Cancelled(arena.gateways[gateway].stream_id, "r1", reason, claim))


def produce(arena: Arena, tokens: int) -> None:
    """The worker goes on; what it says reaches the core."""
    for _ in range(tokens):
        arena.deliver_orders("w1")
        arena.step("w1")


def failures(issued: list[commands.Command]) -> list[str]:
    return [one.failure.code for one in issued if isinstance(one, commands.SendFailure)]


def tokens(entry: journal_pb2.JournalEntry | None) -> list[int]:
    assert entry is not None
    return list(entry.choices[0].token_ids)


def expected(count: int) -> list[int]:
    return [token("r1", 0, index) for index in range(count)]


def test_a_broken_stream_is_remembered_with_what_it_has(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 5)
    cancel(arena, "client_gone")
    assert not arena.core.state.requests
    entry = take_up(arena)
    assert tokens(entry) == expected(5)
    assert entry is not None and entry.sealed == b"sealed" and entry.claim == FIRST_CLAIM
    assert entry.phase == journal_pb2.JOURNAL_PHASE_BROKEN
    assert not entry.request.resume
    assert take_up(arena, tenant="u") is None
    assert take_up(arena, "r2") is None


def test_who_comes_back_goes_on_at_the_next_index_at_another_gateway(arena: Arena, say: Submitter) -> None:
    say(max_tokens=8)
    produce(arena, 5)
    cancel(arena, "client_gone")
    entry = take_up(arena)
    assert entry is not None
    issued = say(gateway="g2", claim=entry.claim, resume=tokens(entry), max_tokens=8)
    assert not failures(issued)
    produce(arena, 4)
    sent = [one.output for one in arena.issued(commands.SendOutput) if one.stream_id == arena.gateways["g2"].stream_id]
    assert [(output.index, list(output.token_ids)) for output in sent] == [
        (index, [token("r1", 0, index)]) for index in (5, 6, 7)
    ]
    again = take_up(arena)
    assert tokens(again) == expected(8)
    assert again is not None and again.phase == journal_pb2.JOURNAL_PHASE_ENDED


def test_why_a_choice_ended_outlives_gateways_and_leaders(arena: Arena, say: Submitter) -> None:
    request = make_request("r1", max_tokens=4, choices=2)
    request.resume.add(choice=0, token_ids=expected(4), finished=True, finish_reason=LENGTH)
    for _ in range(2):  # begun here, then taken up by a gateway that returns
        arena.post(events.Submitted(arena.gateways["g1"].stream_id, request, b"sealed", "", 0))
        entry = take_up(arena)
        assert entry is not None and entry.choices[0].finish_reason == LENGTH
        arena.disconnect("g1")
        arena.connect("g1")


def test_a_claim_that_an_earlier_leader_gave_is_not_given_again(arena: Arena, say: Submitter) -> None:
    say()
    say(gateway="g2", claim=FIRST_CLAIM)
    entry = take_up(arena)
    assert entry is not None and entry.claim == FIRST_CLAIM + 1


@pytest.mark.parametrize("reason", ["cancelled", "killed", "anything"])
def test_what_was_cancelled_is_never_taken_up(arena: Arena, say: Submitter, reason: str) -> None:
    say()
    produce(arena, 3)
    before = take_up(arena)
    assert before is not None
    cancel(arena, reason)
    assert take_up(arena) is None
    assert failures(say(gateway="g2", claim=before.claim, resume=tokens(before))) == ["cancelled"]


def test_a_cancel_under_a_stale_claim_ends_the_stream_where_it_is(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 3)
    entry = take_up(arena)
    assert entry is not None
    say(gateway="g2", claim=entry.claim, resume=tokens(entry))
    cancel(arena, "client_gone")
    assert "r1" in arena.core.state.requests, "a reader that is gone ends nobody else's stream"
    assert arena.core.state.counters["foreign_cancel"] == 1
    cancel(arena, "cancelled")
    assert "r1" not in arena.core.state.requests
    told = [one for one in arena.issued(commands.SendFailure) if one.stream_id == arena.gateways["g2"].stream_id]
    assert [one.failure.code for one in told] == ["cancelled"]
    assert take_up(arena) is None


def test_a_later_claim_goes_on_though_its_entry_gave_way(say: Submitter, arena: Arena) -> None:
    say()
    produce(arena, 3)
    entry = take_up(arena)
    cancel(arena, "client_gone")  # of the connection before; it comes late
    arena.core.state.journal.cancel("r1")
    assert failures(say(gateway="g2", claim=0)) == ["cancelled"]
    assert entry is not None and not failures(say(gateway="g2", claim=entry.claim, resume=tokens(entry)))
    assert "r1" in arena.core.state.requests


def test_who_loses_a_stream_is_told_under_which_claim(arena: Arena, say: Submitter) -> None:
    """Its gateway may have taken it up again before it hears of it, and must not end that."""
    say()
    for gateway, claim in (("g2", 1), ("g1", 2)):
        produce(arena, 1)
        entry = take_up(arena)
        say(gateway=gateway, claim=claim, resume=tokens(entry))
    told = [(one.stream_id, one.failure.claim) for one in arena.issued(commands.SendFailure)]
    assert told == [(arena.gateways[gateway].stream_id, claim) for gateway, claim in (("g1", 0), ("g2", 1))]


async def test_what_a_new_leader_does_not_know_yet_is_not_said_to_be_gone() -> None:
    clock = ManualClock()

    class Carrier:
        def carry(self, command: commands.Command) -> None:
            if isinstance(command, commands.AnswerTakeUp):
                inquiries.answer(command)

        def flush(self) -> None: ...

    loop = Loop(Core("s2", 8, Policy(), clock.monotonic()), Carrier(), clock)
    inquiries = Inquiries(loop)
    running = asyncio.create_task(loop.run())
    try:
        with pytest.raises(Unavailable) as early:
            await asyncio.wait_for(inquiries.take_up("t", ("r1",)), 10)
        assert early.value.retry_after_s
        clock.advance(Policy().settle_limit_s)
        with pytest.raises(NotFound):
            await asyncio.wait_for(inquiries.take_up("t", ("r1",)), 10)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_kill_reaches_a_stream_that_nobody_reads(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 3)
    cancel(arena, "client_gone")
    entry = take_up(arena)
    arena.post(events.Killed("r1"))
    assert entry is not None
    assert failures(say(claim=entry.claim, resume=[])) == ["cancelled"]


def test_a_claim_that_was_stopped_does_not_start_again(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 3)
    cancel(arena, "client_gone")
    assert failures(say()) == ["cancelled"]
    entry = take_up(arena)
    assert entry is not None
    cancel(arena, "client_gone", claim=entry.claim)  # overtakes its submission
    assert failures(say(claim=entry.claim, resume=[])) == ["cancelled"]
    later = take_up(arena)
    assert later is not None and later.claim == entry.claim + 1
    assert not failures(say(claim=later.claim, resume=[]))


def test_a_stream_that_runs_is_taken_from_its_gateway_which_is_told(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 4)
    entry = take_up(arena)
    assert entry is not None and entry.phase == journal_pb2.JOURNAL_PHASE_LIVE
    issued = say(gateway="g2", claim=entry.claim, resume=expected(2))
    (told,) = [one for one in issued if isinstance(one, commands.SendFailure)]
    assert (told.stream_id, told.failure.code) == (arena.gateways["g1"].stream_id, "cancelled")
    (missed,) = [one.output for one in issued if isinstance(one, commands.SendOutput)]
    assert (missed.index, list(missed.token_ids)) == (2, expected(4)[2:])
    assert not arena.issued(commands.AttemptOver)  # what runs goes on
    cancel(arena, "client_gone", claim=0)  # the old gateway hears of its client at last
    assert "r1" in arena.core.state.requests
    assert failures(say(claim=0, resume=[])) == ["cancelled"]
    assert failures(say(claim=entry.claim, resume=[])) == ["conflict"]


def test_the_later_of_two_claims_has_it_whichever_comes_first(arena: Arena, say: Submitter) -> None:
    say()
    first, second = take_up(arena), take_up(arena)
    assert first is not None and second is not None
    assert not failures(say(gateway="g2", claim=second.claim, resume=[]))[1:]
    assert failures(say(gateway="g1", claim=first.claim, resume=[])) == ["cancelled"]
    assert arena.core.state.requests["r1"].gateway_id == "g2"


def test_log_probabilities_that_are_not_known_are_computed_again(arena: Arena, say: Submitter) -> None:
    say(claim=0, resume=expected(3))
    live = arena.core.state.requests["r1"]
    live.request.sampling.logprobs = 1
    arena.deliver_orders("w1")
    entry = take_up(arena)
    assert entry is not None and len(entry.choices[0].logprobs) == 0
    say(gateway="g2", claim=entry.claim, resume=expected(1))
    assert arena.core.state.counters["diverged"] == 1
    assert live.choices[0].tokens == expected(1)


def test_memory_is_bounded_and_the_oldest_gives_way_first_those_of_a_greedy_tenant() -> None:
    arena = Arena(Policy(journal_bytes=9_000, journal_tenant_bytes=4_000))
    arena.add_worker("w1")
    arena.connect("g1")
    say = Submitter(arena)
    for number in range(12):
        say(f"greedy/{number}", max_tokens=4, tenant="greedy", prompt=100)
        if number % 4 == 0:
            say(f"modest/{number}", max_tokens=4, tenant="modest", prompt=100)
        produce(arena, 6)
    journal = arena.core.state.journal
    assert journal.bytes <= 9_000
    kept = [number for number in range(12) if journal.get(f"greedy/{number}") is not None]
    assert 0 < len(kept) < 12 and kept == list(range(12 - len(kept), 12))
    assert all(journal.get(f"modest/{number}") is not None for number in (0, 4, 8))
    assert arena.core.state.counters["journal_evicted"] == 12 - len(kept)
    arena.advance(121.0)
    assert (len(journal), journal.bytes) == (0, 0)


def test_what_ended_waits_its_time_and_a_return_begins_it_anew(arena: Arena, say: Submitter) -> None:
    say(max_tokens=3)
    produce(arena, 4)
    arena.advance(100.0)
    assert tokens(take_up(arena)) == expected(3)
    arena.advance(100.0)
    assert tokens(take_up(arena)) == expected(3)
    arena.advance(120.5)
    assert take_up(arena) is None


def test_a_request_that_was_sent_again_is_found_under_its_first_name(arena: Arena, say: Submitter) -> None:
    say()
    produce(arena, 2)
    cancel(arena, "client_gone")
    say("r1~again", origin="r1", resume=[1, 2])
    entry = take_up(arena)
    assert entry is not None and entry.request.request_id == "r1~again"
    assert len(arena.core.state.journal) == 1


def test_what_has_no_blob_is_not_remembered(arena: Arena) -> None:
    arena.submit(make_request("r1"))
    assert take_up(arena) is None
    arena.run()
    assert len(arena.core.state.journal) == 0


def stopped(arena: Arena, *, worker: bool) -> LiveRequest:
    """A new leader inherits a stream of two choices, ten tokens of the first of which were paid for; its gateway has
    found a stop string after eight."""
    request = make_request("r1", max_tokens=20, choices=2)
    entry = journal_pb2.JournalEntry(
        origin_id="r1", request=request, sealed=b"x", prompt_charged=True, phase=journal_pb2.JOURNAL_PHASE_LIVE
    )
    entry.choices.add(choice=0, token_ids=range(10), charged=10)
    entry.choices.add(choice=1, token_ids=range(5), charged=5)
    if worker:
        arena.add_worker("w1")
    arena.connect("g1")
    arena.post(events.MembersListed())
    arena.post(events.JournalInherited((entry,), ()))
    request.resume.add(choice=0, token_ids=range(8), finished=True)
    request.resume.add(choice=1, token_ids=range(5))
    arena.post(events.Submitted(arena.gateways["g1"].stream_id, request, b"x", "r1", 0))
    return arena.core.state.requests["r1"]


def test_what_comes_finished_has_its_rest_given_back() -> None:
    live = stopped(Arena(), worker=True)
    assert [choice.charged for choice in live.choices] == [8, 5]
    assert live.account is not None and live.account.virtual == -2
    assert live.refund == 0


def test_a_choice_may_end_before_the_model_is_known() -> None:
    arena = Arena()
    live = stopped(arena, worker=False)
    assert "r1" in arena.core.state.parked and live.account is None
    arena.post(events.ChoiceFinished(arena.gateways["g1"].stream_id, "r1", 1, 3))
    assert [choice.charged for choice in live.choices] == [8, 3]
    assert live.refund == 4
