"""Saying no at once: predictions, bounds, shedding, quotas; and what a refusal leaves behind, which is nothing."""

from __future__ import annotations

import itertools

import pytest

from llmos.internal.v1 import request_pb2
from scheduler import commands, events
from scheduler.forecast import Codel, Forecast
from scheduler.policy import Policy
from tests.fakes.contract import Client
from tests.unit.scheduler.arena import MODEL, VERSION, Arena, make_request

KEY = (MODEL, VERSION)
STEP_S = 0.05


def busy(policy: Policy | None = None, waiting: int = 20, blocks: int = 2) -> Arena:
    """A worker that makes 20 tokens a second per block, known to the forecast; `waiting` requests of 20 tokens."""
    arena = Arena(policy or Policy(queue_limit=10_000))
    arena.connect()
    arena.add_worker("w1", blocks=blocks)
    arena.post(events.MembersListed())
    for number in range(6 * blocks):
        arena.submit(make_request(f"warm/{number}", prompt=10, max_tokens=10))
    arena.run(2000)
    for number in range(waiting + blocks):
        arena.submit(make_request(f"w/{number}", prompt=10, max_tokens=10))
    arena.deliver_output()
    return arena


def turn(arena: Arena, steps: int) -> None:
    for _ in range(steps):
        arena.deliver_orders("w1")
        arena.step("w1")
        arena.deliver_output()
        arena.advance(STEP_S)


def refusal(arena: Arena, request: request_pb2.Request) -> request_pb2.Failure | None:
    before = len(arena.issued(commands.SendFailure))
    arena.submit(request)
    arena.deliver_output()
    failures = arena.issued(commands.SendFailure)[before:]
    for failure in failures:
        assert isinstance(failure, commands.SendFailure)
        if failure.failure.request_id == request.request_id:
            return failure.failure
    return None


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_one_that_can_is_met() -> None:
    arena = busy(waiting=40)
    late = refusal(arena, make_request("late", prompt=10, max_tokens=10, deadline_ms=3000))
    assert late is not None
    assert late.code == "overloaded"
    assert 5_000 <= late.retry_after_ms <= 15_000
    in_time = arena.submit(make_request("in time", prompt=10, max_tokens=10, deadline_ms=14_000))
    turn(arena, 400)
    assert in_time.finished == [True]
    assert refusal(arena, make_request("again", prompt=10, max_tokens=10, deadline_ms=3000)) is None


def test_a_class_has_a_bound_of_its_own() -> None:
    arena = busy(Policy(queue_limit=10_000, ttft_bounds_s=(5.0, 5.0, 100.0)), waiting=40)
    assert refusal(arena, make_request("standard")) is not None
    assert refusal(arena, make_request("batch", priority=3)) is None
    assert refusal(arena, make_request("interactive", priority=1)) is None, "what is below is not ahead of it"
    assert refusal(arena, make_request("modest", tenant="another")) is None, "a tenant's queue delays that tenant"


def test_nothing_known_refuses_nobody() -> None:
    arena = Arena(Policy(queue_limit=10_000))
    arena.connect()
    arena.add_worker("w1", blocks=1)
    arena.post(events.MembersListed())
    for number in range(100):
        assert refusal(arena, make_request(f"r/{number}", deadline_ms=1000)) is None


def test_what_comes_too_late_for_its_deadline_is_not_computed() -> None:
    arena = busy(waiting=0, blocks=1)
    turn(arena, 20)
    arena.submit(make_request("long", prompt=10, max_tokens=50))
    tight = arena.submit(make_request("tight", prompt=10, max_tokens=40, deadline_ms=3000))
    turn(arena, 70)
    assert tight.error == "overloaded"
    assert arena.core.state.counters["shed"] == 1
    assert "tight" not in {
        c.dispatch.request.request_id for c in arena.commands if isinstance(c, commands.StartAttempt)
    }


def test_a_request_that_never_had_time_to_finish_still_begins() -> None:
    arena = busy(waiting=0, blocks=8)
    turn(arena, 20)
    client = arena.submit(make_request("long", prompt=10, max_tokens=200, deadline_ms=2000))
    turn(arena, 10)
    assert client.tokens[0]


def test_codel_sheds_from_the_queue_that_stays_long() -> None:
    policy = Policy(queue_limit=10_000, ttft_bounds_s=(4.0, 4.0, 4.0), codel_interval_s=0.5)
    arena = busy(policy, waiting=0)
    turn(arena, 20)
    for number in range(60):
        live = make_request(f"greedy/{number}", prompt=10, max_tokens=10, tenant="greedy")
        arena.core.state.policy = policy
        arena.submit(live)
    for number in range(20):
        arena.submit(make_request(f"modest/{number}", prompt=1, max_tokens=2, tenant="modest"))
        turn(arena, 20)
    errors = {name: client.error for name, client in arena.gateways["g1"].clients.items()}
    assert not any(error for name, error in errors.items() if name.startswith("modest"))


def test_codel_waits_for_an_interval_and_then_sheds_faster_and_faster() -> None:
    codel = Codel()
    assert not codel.drops(5.0, 1.0, 1.0, 0.0)
    assert not codel.drops(5.0, 1.0, 1.0, 0.9)
    times = [n / 100 for n in range(100, 600) if codel.drops(5.0, 1.0, 1.0, n / 100)]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 1.0
    assert pauses == sorted(pauses, reverse=True)
    assert pauses[-1] < 0.5
    assert not codel.drops(0.5, 1.0, 1.0, 6.0)
    assert not codel.drops(5.0, 1.0, 1.0, 6.1)


def test_time_without_a_queue_says_nothing_of_speed() -> None:
    forecast = Forecast()
    for tick in range(100):
        forecast.observe(10.0 * tick, 5, 0.05 * tick)
    assert forecast.rate == pytest.approx(200)
    for tick in range(100, 1000):
        forecast.observe(1000.0, 0, 0.05 * tick)
    assert forecast.rate == pytest.approx(200)


def test_the_queue_is_bounded_in_tokens() -> None:
    arena = Arena(Policy(queue_token_limit=1000))
    arena.connect()
    arena.add_worker("w1", blocks=1)
    arena.post(events.MembersListed())
    refused = [refusal(arena, make_request(f"r/{n}", prompt=50, max_tokens=10)) for n in range(30)]
    assert [failure is None for failure in refused] == [True] * 17 + [False] * 13
    assert arena.core.state.waiting.tokens <= 1000


def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    arena = Arena(Policy(queue_limit=10))
    arena.connect()
    arena.add_worker("w1", blocks=1)
    arena.post(events.MembersListed())
    for number in range(11):
        assert refusal(arena, make_request(f"greedy/{number}", tenant="greedy")) is None
    assert refusal(arena, make_request("greedy/last", tenant="greedy")) is not None
    assert refusal(arena, make_request("modest", tenant="modest")) is None
    assert refusal(arena, make_request("urgent", tenant="greedy", priority=1)) is None
    assert refusal(arena, make_request("batch", tenant="third", priority=3)) is not None
    clients = arena.gateways["g1"].clients.items()
    assert sum(client.error == "overloaded" for name, client in clients if name.startswith("greedy/")) == 3
    assert len(arena.core.state.waiting) == 10


def quota(name: str, *, requests: int = 0, tokens: int = 0, **fields: object) -> request_pb2.Request:
    request = make_request(name, **fields)
    request.quota.CopyFrom(request_pb2.TenantQuota(max_requests=requests, tokens_per_minute=tokens))
    return request


def test_a_quota_of_requests() -> None:
    arena = busy(waiting=0)
    clients: list[Client] = [arena.submit(quota(f"r/{n}", requests=2)) for n in range(2)]
    failure = refusal(arena, quota("r/2", requests=2))
    assert failure is not None
    assert (failure.code, failure.retry_after_ms) == ("quota_exceeded", 1000)
    assert "max_requests" in failure.message
    assert refusal(arena, quota("other", requests=2, tenant="other")) is None
    arena.run()
    assert all(client.finished == [True] for client in clients)
    assert refusal(arena, quota("r/3", requests=2)) is None


def test_a_quota_of_tokens_fills_up_evenly() -> None:
    arena = busy(waiting=0, blocks=8)
    assert refusal(arena, quota("r/0", tokens=600, prompt=300, max_tokens=100)) is None
    arena.run()
    failure = refusal(arena, quota("r/1", tokens=600, prompt=300, max_tokens=10))
    assert failure is not None
    assert failure.code == "quota_exceeded"
    assert "tokens_per_minute" in failure.message
    assert 0 < failure.retry_after_ms <= 10_000
    arena.advance(failure.retry_after_ms / 1000 + 0.01)
    assert refusal(arena, quota("r/2", tokens=600, prompt=300, max_tokens=10)) is None
    assert refusal(arena, quota("r/3", tokens=600, prompt=300, max_tokens=10)) is not None, "the first one waits yet"


def test_a_prompt_larger_than_its_quota_passes_when_the_bucket_is_full() -> None:
    arena = busy(waiting=0, blocks=20)
    assert refusal(arena, quota("r/0", tokens=100, prompt=300)) is None
    assert refusal(arena, quota("r/1", tokens=100, prompt=1)) is not None


def test_refusals_leave_nothing_behind() -> None:
    arena = busy(Policy(queue_limit=20), waiting=20)
    state = arena.core.state
    before = (len(state.timers), len(state.tombstones), len(state.last_attempts), len(state.requests))
    for number in range(300):
        assert refusal(arena, make_request(f"r/{number}", deadline_ms=60_000)) is not None
        assert refusal(arena, quota(f"q/{number}", tokens=600, deadline_ms=60_000)) is not None
    assert (len(state.timers), len(state.tombstones), len(state.last_attempts), len(state.requests)) == before
    assert sum(len(one.accounts) for queue in state.waiting.queues() for one in queue.classes) == 1
    arena.run(2000)
    arena.advance(120.0)
    arena.advance(2.0)
    arena.check_idle()
    assert len(state.quotas) == 0
