"""Leaders that change under running requests."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from scheduler import commands, events
from scheduler.fairness import rank_of
from tests.unit.scheduler.arena import Arena, make_request, token

BATCH = request_pb2.PRIORITY_CLASS_BATCH


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    return arena


def produce(arena: Arena, worker_id: str, steps: int) -> None:
    arena.deliver_orders(worker_id)
    for _ in range(steps):
        arena.step(worker_id)
    arena.deliver_output()


def last_dispatch(arena: Arena) -> commands.StartAttempt:
    start = arena.issued(commands.StartAttempt)[-1]
    assert isinstance(start, commands.StartAttempt)
    return start


def test_new_leader_takes_over_with_the_same_worker(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    arena.add_worker("w2")
    produce(arena, "w1", 5)
    arena.step("w1")
    arena.new_leader(term=9)
    arena.attach("w1")
    arena.attach("w2")
    assert arena.core.state.claims == {"r1": "w1"}
    arena.connect()
    start = last_dispatch(arena)
    assert start.worker_id == "w1"
    assert start.dispatch.epoch == request_pb2.Epoch(term=9, attempt=1)
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(20)]]


def test_cancel_reaches_an_attempt_that_only_its_worker_knows_of(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=500))
    arena.add_worker("w2")
    arena.deliver_orders("w1")
    arena.new_leader(term=9)
    arena.attach("w1")
    assert arena.core.state.claims == {"r1": "w1"}
    arena.gateways["g1"].clients["r1"].cancelled = True
    arena.connect()
    arena.cancel("r1")
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running


def test_resumed_requests_wait_for_the_worker_that_runs_them(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    arena.add_worker("w2")
    produce(arena, "w1", 5)
    arena.new_leader(term=9)
    arena.attach("w2")
    arena.connect()
    arena.advance(0.5)
    assert len(arena.issued(commands.StartAttempt)) == 1
    arena.attach("w1")
    assert last_dispatch(arena).worker_id == "w1"
    arena.run()
    assert client.finished == [True]


def test_a_dead_worker_holds_up_a_new_leader_only_so_long(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    arena.add_worker("w2")
    produce(arena, "w1", 5)
    arena.new_leader(term=9)
    arena.attach("w2")
    arena.connect()
    arena.advance(2.9)
    assert not arena.core.state.settled
    arena.advance(0.3)
    assert last_dispatch(arena).worker_id == "w2"
    arena.run()
    assert client.finished == [True]


def test_new_leader_cancels_what_nobody_claims(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=500))
    arena.deliver_orders("w1")
    arena.new_leader(term=9)
    arena.attach("w1")
    arena.deliver_orders("w1")
    assert "r1" in arena.workers["w1"].running or arena.core.state.settled
    arena.advance(1.1)
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running


def test_new_leader_gives_each_gateway_its_first_catalogue_when_it_knows_the_workers() -> None:
    arena = Arena()
    arena.connect()
    arena.new_leader(term=9)
    gateway = arena.connect()
    gateway.catalogue = None
    arena.advance(0.5)
    assert gateway.catalogue is None
    arena.add_worker("w1")
    assert gateway.catalogue is not None
    assert [model.name for model in gateway.catalogue.models] == ["m"]


def move(arena: Arena, priority: request_pb2.PriorityClass.ValueType) -> None:
    arena.post(events.Reprioritized("r1", priority))


def test_a_new_leader_runs_a_request_in_the_class_that_it_was_moved_to(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    produce(arena, "w1", 3)
    move(arena, BATCH)
    arena.deliver_output()
    arena.new_leader(term=9)
    arena.connect()
    arena.attach("w1")
    assert arena.core.state.requests["r1"].rank == rank_of(BATCH)
    assert last_dispatch(arena).dispatch.request.priority == BATCH
    arena.run()
    assert client.finished == [True]


def test_a_gateway_that_was_away_is_told_of_the_class_when_it_returns(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    produce(arena, "w1", 3)
    move(arena, BATCH)  # on its way when the stream breaks
    arena.connect()
    arena.deliver_output()
    assert client.request.priority == BATCH
    assert arena.core.state.requests["r1"].rank == rank_of(BATCH)
    arena.connect()
    arena.deliver_output()
    assert len(arena.issued(commands.SendClass)) == 2, "nothing to say to a gateway that knows"


def test_raised_term_keeps_what_runs(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=10))
    produce(arena, "w1", 3)
    arena.post(events.TermRaised(11))
    produce(arena, "w1", 2)
    assert len(client.tokens[0]) == 5
    arena.add_worker("w2")
    arena.kill("w1")
    assert last_dispatch(arena).dispatch.epoch == request_pb2.Epoch(term=11, attempt=2)
    arena.run()
    assert client.finished == [True]
