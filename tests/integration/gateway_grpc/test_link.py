"""The stream to the leader: found, followed, and survived."""

from __future__ import annotations

import asyncio

import pytest

from gateway.session_config import SessionConfig
from gateway.types import Delta, Event
from llmos.errors import DeadlineExceeded, Overloaded, Unavailable
from llmos.internal.v1 import request_pb2
from tests.fakes.clock import ManualClock
from tests.fakes.scheduler import LENGTH, FakeScheduler, output, resumed
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import WAIT_S, collect, ends, eventually, running, text_of, tokens_of

ANSWER = "a é 世 b"


def answer_all(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
    """Send what is missing of ANSWER, byte by byte."""
    tokens = list(ANSWER.encode())
    start = len(resumed(request))
    for index in range(start, len(tokens)):
        finish = LENGTH if index == len(tokens) - 1 else 0
        scheduler.send(
            output(request.request_id, index, tokens[index : index + 1], epoch=(scheduler.term, 1), finish=finish)
        )


async def read(events: object, count: int) -> list[Event]:
    """The next events."""
    async with asyncio.timeout(WAIT_S):
        return [await anext(events) for _ in range(count)]  # type: ignore[call-overload]


async def test_output_becomes_events(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        events = await collect(await gateway.chat("hello", max_tokens=len(ANSWER.encode()), seed=7))
        started, done = ends(events)
        assert text_of(events) == ANSWER
        assert (started.seed, started.model, started.prompt_tokens) == (7, "echo", 5)
        assert (done.prompt_tokens, done.completion_tokens) == (5, len(ANSWER.encode()))
        request = scheduler.submits[0]
        assert list(request.token_ids) == list(b"hello")
        assert request.request_id == started.request_id
        assert request.trace.traceparent
        assert request.deadline_ms > 0
        await scheduler.until(lambda: scheduler.acknowledged == len(ANSWER.encode()))
        await scheduler.until(lambda: "text_completion echo" in {span.name for span in scheduler.spans})
    names = {span.name: span for span in scheduler.spans}
    root, waiting, stream = names["text_completion echo"], names["first_output"], names["stream"]
    for name in ("tokenize", "first_output", "stream"):
        assert names[name].parent_span_id == root.span_id
    assert names["tokenize"].end_unix_ns <= waiting.start_unix_ns
    assert waiting.end_unix_ns == stream.start_unix_ns
    assert stream.end_unix_ns == root.end_unix_ns
    assert all(span.attributes["llmos.request_id"] == started.request_id for span in scheduler.spans)


async def test_a_scheduler_that_does_not_lead_names_the_one_that_does(new_scheduler: NewScheduler) -> None:
    leader, leader_address = await new_scheduler(answer=answer_all)
    _, standby_address = await new_scheduler(leads=False, leader_address=leader_address)
    async with running(standby_address) as gateway:
        await gateway.ready()
        assert leader.attached


async def test_a_dead_address_is_passed_over(new_scheduler: NewScheduler) -> None:
    dead, dead_address = await new_scheduler()
    await dead.stop()
    _, address = await new_scheduler()
    async with running(dead_address, address) as gateway:
        await gateway.ready()


async def test_the_same_bytes_across_a_change_of_leader(new_scheduler: NewScheduler) -> None:
    new, new_address = await new_scheduler(term=2, answer=answer_all)
    old, old_address = await new_scheduler(term=1)
    async with running(old_address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=len(ANSWER.encode()))
        request = await old.next_submit()
        # The break falls into the middle of a character.
        old.send(output(request.request_id, 0, list(ANSWER.encode()[:3])))
        events = stream.events()
        head = await read(events, 2)
        old.resign(new_address)
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
        assert text_of([*head, *rest]) == ANSWER
        assert tokens_of([*head, *rest]) == list(ANSWER.encode())
        assert resumed(new.submits[0]) == list(ANSWER.encode()[:3])
        assert new.submits[0].sampling.seed == request.sampling.seed
        assert new.submits[0].token_ids == request.token_ids
        assert new.hellos[0].highest_term == 1


@pytest.mark.parametrize("silent", [True, False])
async def test_a_leader_is_left_as_soon_as_another_one_leads(new_scheduler: NewScheduler, silent: bool) -> None:
    """Long before it counts as frozen; and one that still talks, but has lost its seat, too."""
    old, old_address = await new_scheduler(term=3)
    new, new_address = await new_scheduler(term=4, leads=False, answer=answer_all)
    patience = {"probe_every_s": 0.05, "probe_timeout_s": 600.0, "ask_every_s": 0.05}
    async with TcpRelay(old_address) as relay, running(relay.address, new_address, **patience) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=len(ANSWER.encode()))
        request = await old.next_submit()
        old.send(output(request.request_id, 0, list(ANSWER.encode()[:3])))
        events = stream.events()
        head = await read(events, 2)
        if silent:
            relay.fall_silent()
        new.leads = True
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
        assert text_of([*head, *rest]) == ANSWER
        assert (gateway.link.term, new.hellos[0].highest_term) == (4, 3)


async def test_a_scheduler_that_leads_in_an_older_term_is_no_reason_to_leave(new_scheduler: NewScheduler) -> None:
    old, old_address = await new_scheduler(term=1)
    _, address = await new_scheduler(term=2, answer=answer_all)
    async with running(address, old_address, ask_every_s=0.01) as gateway:
        await eventually(lambda: gateway.link.term == 2)
        before, asked = gateway.link.counters()["connects"], old.asked
        await eventually(lambda: old.asked >= asked + 3)
        events = await collect(await gateway.chat("hello", max_tokens=len(ANSWER.encode())))
        assert text_of(events) == ANSWER
        assert gateway.link.counters()["connects"] == before


async def test_a_leader_that_falls_silent_is_left_for_the_next_one(new_scheduler: NewScheduler) -> None:
    frozen, frozen_address = await new_scheduler(term=1)
    new, new_address = await new_scheduler(term=2, leads=False, answer=answer_all)
    patience = {"hello_timeout_s": 0.5, "probe_every_s": 0.05, "probe_timeout_s": 0.5}
    async with TcpRelay(frozen_address) as relay, running(relay.address, new_address, **patience) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=len(ANSWER.encode()))
        name = (await frozen.next_submit()).request_id
        frozen.send(output(name, 0, list(ANSWER.encode()[:3])))
        events = stream.events()
        head = await read(events, 2)
        relay.fall_silent()
        new.leads = True
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
        assert text_of([*head, *rest]) == ANSWER
        assert gateway.link.term == 2


async def test_a_lower_term_is_never_listened_to(new_scheduler: NewScheduler) -> None:
    leader, leader_address = await new_scheduler(term=5)
    stale, stale_address = await new_scheduler(term=1, leads=False)
    async with running(leader_address, stale_address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=1)
        name = (await leader.next_submit()).request_id
        tried = len(stale.hellos)
        stale.leads = True
        leader.resign(stale_address)
        await stale.until(lambda: len(stale.hellos) > tried + 2)
        leader.leads = True
        await leader.next_submit()
        leader.send(output(name, 0, "a", epoch=(5, 2), finish=LENGTH))
        assert text_of(await collect(stream)) == "a"
        assert stale.hellos[-1].highest_term == 5
        assert stale.submits == []


async def test_a_broken_stream_to_the_same_leader_is_taken_up_again(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=4)
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "ab"))
        events = stream.events()
        head = await read(events, 2)
        scheduler.drop()
        again = await scheduler.next_submit()
        assert (again.request_id, resumed(again)) == (name, list(b"ab"))
        scheduler.send(output(name, 2, "cd", epoch=(1, 2), finish=LENGTH))
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
        assert text_of([*head, *rest]) == "abcd"


async def test_repeated_and_old_output_is_dropped_and_counted(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=4)
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "a", epoch=(1, 2)))
        scheduler.send(output(name, 0, "a", epoch=(1, 2)), sequence=1)
        scheduler.send(output(name, 0, "a", epoch=(1, 2)), sequence=2)
        scheduler.send(output(name, 1, "X", epoch=(1, 1)))
        scheduler.send(output("nobody", 0, "X"))
        scheduler.send(output(name, 1, "bcd", epoch=(1, 2), finish=LENGTH))
        assert text_of(await collect(stream)) == "abcd"
        counts = gateway.sessions.counters()
        assert counts["outputs_duplicate"] == 1
        assert counts["outputs_stale"] == 1
        assert counts["outputs_unknown"] == 1
        assert gateway.link.counters()["frames_duplicate"] == 1
        assert gateway.link.counters()["connects"] == 1


@pytest.mark.parametrize(
    ("piece", "count"), [((2, "c"), "outputs_gap"), ((1, [999]), "outputs_corrupt"), ((1, "x" * 99), "outputs_corrupt")]
)
async def test_what_is_lost_or_damaged_is_asked_for_again(
    new_scheduler: NewScheduler, piece: tuple[int, str | list[int]], count: str
) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=4)
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "a"))
        scheduler.send(output(name, *piece))
        again = await scheduler.next_submit()
        assert (again.request_id, resumed(again)) == (name, list(b"a"))
        scheduler.send(output(name, 1, "bcd", finish=LENGTH))
        assert text_of(await collect(stream)) == "abcd"
        assert gateway.sessions.counters()[count] == 1


async def test_lost_frames_make_every_request_be_asked_for(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        streams = [await gateway.chat(max_tokens=2) for _ in range(2)]
        names = [(await scheduler.next_submit()).request_id for _ in streams]
        scheduler.send(sequence=5)
        assert [(await scheduler.next_submit()).request_id for _ in streams] == names
        scheduler.send(*(output(name, 0, "ab", finish=LENGTH) for name in names))
        assert [text_of(await collect(stream)) for stream in streams] == ["ab", "ab"]
        assert gateway.link.counters()["frames_missed"] == 4


async def test_lost_output_that_never_comes_ends_in_a_typed_error(new_scheduler: NewScheduler) -> None:
    def answer(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
        scheduler.send(output(request.request_id, 3, "x"))

    scheduler, address = await new_scheduler(answer=answer)
    async with running(address, session=SessionConfig(gap_limit=2)) as gateway:
        await gateway.ready()
        stream = await gateway.chat()
        with pytest.raises(Unavailable):
            await collect(stream)
        await scheduler.until(lambda: scheduler.cancels)
        assert len(scheduler.submits) == 3


async def test_a_client_that_goes_away_takes_its_request_with_it(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat()
        name = (await scheduler.next_submit()).request_id
        await stream.aclose()
        await stream.aclose()
        await scheduler.until(lambda: scheduler.cancels)
        assert [(cancel.request_id, cancel.reason) for cancel in scheduler.cancels] == [(name, "client_gone")]
        assert gateway.sessions.counters()["running"] == 0


async def test_a_cancellation_without_a_leader_reaches_the_next_one(new_scheduler: NewScheduler) -> None:
    old, old_address = await new_scheduler(term=1)
    new, new_address = await new_scheduler(term=2, leads=False)
    async with running(old_address, new_address) as gateway:
        await gateway.ready()
        stream = await gateway.chat()
        name = (await old.next_submit()).request_id
        await old.stop()
        await eventually(lambda: not gateway.link.connected)
        await stream.aclose()
        new.leads = True
        await new.until(lambda: new.cancels)
        assert new.cancels[0].request_id == name
        assert new.submits == []


async def test_without_a_leader_streams_end_in_a_typed_error(new_scheduler: NewScheduler) -> None:
    clock = ManualClock()
    scheduler, address = await new_scheduler()
    async with running(address, session=SessionConfig(leader_grace_s=0.05), clock=clock) as gateway:
        await gateway.ready()
        stream = await gateway.chat()
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "ab"))
        events = stream.events()
        await read(events, 2)
        await scheduler.stop()
        with pytest.raises(Unavailable):
            await read(events, 1)
        clock.advance(1)
        with pytest.raises(Unavailable):
            await gateway.chat()


async def test_a_leader_that_comes_back_in_time_ends_the_grace(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address, session=SessionConfig(leader_grace_s=0.01)) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=1)
        name = (await scheduler.next_submit()).request_id
        gateway.sessions.on_lost()
        assert [submit.request.request_id for submit in gateway.sessions.on_connected(1)] == [name]
        await asyncio.sleep(0.03)  # longer than the grace
        scheduler.send(output(name, 0, "a", finish=LENGTH))
        assert text_of(await collect(stream)) == "a"


async def test_a_deadline_ends_the_stream_and_the_computation(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address, session=SessionConfig(max_request_s=0.05)) as gateway:
        await gateway.ready()
        stream = await gateway.chat()
        with pytest.raises(DeadlineExceeded):
            await collect(stream)
        await scheduler.until(lambda: scheduler.cancels)
        assert scheduler.cancels[0].reason == "deadline"


async def test_before_the_first_leader_requests_are_refused(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(leads=False)
    async with running(address) as gateway:
        assert not gateway.sessions.ready()
        with pytest.raises(Unavailable) as refused:
            await gateway.chat()
        assert refused.value.retry_after_s


async def test_a_request_made_between_two_leaders_waits_for_the_second(new_scheduler: NewScheduler) -> None:
    old, old_address = await new_scheduler(term=1)
    new, new_address = await new_scheduler(term=2, leads=False, answer=answer_all)
    async with running(old_address, new_address) as gateway:
        await gateway.ready()
        await old.stop()
        await eventually(lambda: not gateway.link.connected)
        stream = await gateway.chat(max_tokens=len(ANSWER.encode()))
        new.leads = True
        assert text_of(await collect(stream)) == ANSWER


async def test_a_stop_string_ends_the_choice_upstream(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(stop=("END",), n=2)
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "aENDxx"), output(name, 0, "bE", choice=1))
        scheduler.send(output(name, 6, "x"), output(name, 2, "x", choice=1, finish=LENGTH))
        events = await collect(stream)
        assert (text_of(events, 0), text_of(events, 1)) == ("a", "bEx")
        assert {event.choice: event.finish for event in events if isinstance(event, Delta) and event.finish} == {
            0: "stop",
            1: "length",
        }
        assert ends(events)[1].completion_tokens == 4 + 3
        await scheduler.until(lambda: scheduler.finishes)
        assert [(finish.choice, finish.keep_until) for finish in scheduler.finishes] == [(0, 4)]


async def test_failures_reach_the_client_as_its_own_errors(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        for code, expected in (("overloaded", Overloaded), ("attempt_lost", Unavailable)):
            stream = await gateway.chat()
            name = (await scheduler.next_submit()).request_id
            failure = request_pb2.Failure(request_id=name, code=code, message="secret-host:1", retry_after_ms=1500)
            scheduler.send(failures=[failure])
            with pytest.raises(expected) as failed:
                await collect(stream)
            assert failed.value.retry_after_s == 1.5


async def test_a_late_failure_of_an_old_attempt_changes_nothing(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=2)
        name = (await scheduler.next_submit()).request_id
        scheduler.send(output(name, 0, "a", epoch=(1, 2)))
        old = request_pb2.Failure(request_id=name, epoch=request_pb2.Epoch(term=1, attempt=1), code="unavailable")
        scheduler.send(failures=[old])
        scheduler.send(output(name, 1, "b", epoch=(1, 2), finish=LENGTH))
        assert text_of(await collect(stream)) == "ab"
