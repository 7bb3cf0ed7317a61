"""Nice and drain: what operators order, and what becomes of what runs."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from scheduler import commands, events
from tests.unit.scheduler.arena import Arena, make_request

BATCH = request_pb2.PRIORITY_CLASS_BATCH
INTERACTIVE = request_pb2.PRIORITY_CLASS_INTERACTIVE


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    arena.connect()
    return arena


def order(arena: Arena, worker_id: str, *, undo: bool = False) -> None:
    arena.post(events.DrainOrdered(worker_id, undo))


def dispatches(arena: Arena) -> list[tuple[str, int]]:
    """Worker and attempt of every dispatch."""
    return [(c.worker_id, c.epoch.attempt) for c in arena.issued(commands.StartAttempt)]


def drain_orders(arena: Arena) -> list[bool]:
    """`undo` of every order to drain."""
    orders = [c.command for c in arena.issued(commands.Order)]
    return [o.drain.undo for o in orders if o.WhichOneof("order") == "drain"]


def test_what_runs_on_a_drained_worker_moves_on_with_the_same_tokens(arena: Arena) -> None:
    clients = [arena.submit(make_request(f"r{n}", max_tokens=40)) for n in range(3)]
    for _ in range(5):
        arena.deliver_orders("w1")
        arena.step("w1")
    arena.add_worker("w2")
    order(arena, "w1")
    arena.advance(0.0)
    assert not arena.core.state.workers["w1"].running
    assert sorted(dispatches(arena))[-3:] == [("w2", 2)] * 3
    arena.run()
    assert all(client.finished == [True] and len(client.tokens[0]) == 40 for client in clients)
    assert arena.core.state.counters["migrations"] == 3
    arena.check_idle()


def test_the_last_worker_of_a_model_finishes_what_it_has(arena: Arena) -> None:
    first = arena.submit(make_request("r1", max_tokens=20))
    arena.deliver_orders("w1")
    order(arena, "w1")
    second = arena.submit(make_request("r2", max_tokens=5))
    arena.run(30)
    assert first.finished == [True]
    assert second.tokens == [[]]
    assert dispatches(arena) == [("w1", 1)]
    arena.add_worker("w2")
    arena.run()
    assert second.finished == [True]


def test_it_moves_as_soon_as_another_worker_has_room(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=200))
    order(arena, "w1")
    for _ in range(5):
        arena.deliver_orders("w1")
        arena.step("w1")
        arena.advance(0.05)
    assert dispatches(arena) == [("w1", 1)]
    arena.add_worker("w2")
    arena.advance(0.05)
    assert dispatches(arena) == [("w1", 1), ("w2", 2)]
    arena.run()
    assert client.finished == [True]


def test_it_stays_where_only_other_numerics_are_to_be_had(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    arena.deliver_orders("w1")
    arena.step("w1")
    other = arena.add_worker("w2")
    other.numerics = "another"
    arena.detach("w2")
    arena.attach("w2")
    order(arena, "w1")
    arena.run()
    assert client.finished == [True]
    assert dispatches(arena) == [("w1", 1)]


def test_undo_takes_a_worker_back_once_it_agrees(arena: Arena) -> None:
    order(arena, "w1")
    client = arena.submit(make_request("r1"))
    arena.run(5)
    assert client.tokens == [[]]
    order(arena, "w1", undo=True)
    assert arena.core.state.workers["w1"].draining
    arena.run()
    assert client.finished == [True]
    assert drain_orders(arena) == [False, True]


def test_a_frame_from_before_the_order_does_not_undo_it(arena: Arena) -> None:
    order(arena, "w1")
    arena.step("w1")
    assert arena.core.state.workers["w1"].draining


def test_a_worker_that_was_away_is_told_when_it_comes_back(arena: Arena) -> None:
    arena.detach("w1")
    order(arena, "w1")
    arena.attach("w1")
    client = arena.submit(make_request("r1"))
    arena.run(5)
    assert client.tokens == [[]]
    assert arena.workers["w1"].draining


def test_a_new_leader_learns_of_it_and_work_goes_on_where_it_is(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=60))
    arena.deliver_orders("w1")
    order(arena, "w1")
    for _ in range(3):
        arena.deliver_orders("w1")
        arena.step("w1")
    arena.deliver_output()
    arena.new_leader(8)
    arena.attach("w1")
    arena.connect()
    assert arena.core.state.workers["w1"].draining
    fresh = arena.submit(make_request("r2"))
    arena.run(100)
    assert client.finished == [True]
    assert fresh.tokens == [[]]


def test_a_waiting_request_is_overtaken_once_it_is_moved_down() -> None:
    arena = Arena()
    arena.add_worker("w1", blocks=16)
    arena.post(events.MembersListed())
    arena.connect()
    for name in ("all", "first", "second"):
        arena.submit(make_request(name, prompt=64 * 15, max_tokens=64))
    arena.post(events.Reprioritized("first", BATCH))
    arena.run(400)
    started = [c.request.request_id for c in arena.issued(commands.StartAttempt)]
    assert started == ["all", "second", "first"]


def test_a_running_request_takes_its_new_class_to_the_worker(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=30))
    arena.deliver_orders("w1")
    arena.post(events.Reprioritized("r1", INTERACTIVE))
    arena.deliver_orders("w1")
    assert arena.workers["w1"].running["r1"].request.priority == INTERACTIVE
    arena.add_worker("w2")
    arena.kill("w1")
    assert arena.issued(commands.StartAttempt)[-1].priority == INTERACTIVE  # type: ignore[attr-defined]


def test_a_request_that_is_gone_is_left_alone(arena: Arena) -> None:
    assert arena.post(events.Reprioritized("nobody", BATCH)) == []
    assert arena.post(events.DrainOrdered("nobody", False)) == []
