"""Adapters: loaded where a request needs one, dropped where none has for longest, never without their base."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.ledger import Allocation, Unfit, plan
from scheduler.policy import Policy
from tests.unit.scheduler.arena import GIB, MODEL, Arena, make_record, make_request


def asking(request_id: str, adapter: str, **fields: object) -> request_pb2.Request:
    return make_request(request_id, adapter=adapter, **fields)


def orders(arena: Arena, kind: str) -> list[tuple[str, str]]:
    """Worker and model of every order of a kind."""
    issued = [command for command in arena.commands if isinstance(command, commands.Order)]
    chosen = [command for command in issued if command.command.WhichOneof("order") == kind]
    return [(command.worker_id, getattr(command.command, kind).model) for command in chosen]


def started(arena: Arena) -> list[tuple[str, str]]:
    """Worker and adapter of every attempt."""
    found = [command for command in arena.commands if isinstance(command, commands.StartAttempt)]
    return [(command.worker_id, command.dispatch.request.adapter) for command in found]


def test_an_adapter_is_offered_with_its_base_and_loaded_when_somebody_asks() -> None:
    arena = Arena()
    gateway = arena.connect()
    arena.add_worker("w1", loaded=False, adapters=("a", "b"))
    assert orders(arena, "load") == [("w1", MODEL)]
    assert gateway.catalogue is None or not gateway.catalogue.models
    arena.deliver_orders("w1")
    arena.step("w1")
    arena.advance(1.5)
    assert gateway.catalogue is not None
    assert {model.name: model.base_model for model in gateway.catalogue.models} == {"a": MODEL, "b": MODEL, MODEL: ""}
    clients = [arena.submit(asking("r1", "b")), arena.submit(asking("r2", "b")), arena.submit(make_request("r3"))]
    assert started(arena) == [("w1", "")]
    arena.run()
    assert orders(arena, "load") == [("w1", MODEL), ("w1", "b")]
    assert all(client.finished == [True] for client in clients)
    arena.check_idle()


def test_what_is_no_adapter_of_the_model_is_not_found() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", adapters=("a",))
    arena.advance(1.5)
    strangers = [asking("r1", "nobody"), asking("r2", MODEL), asking("r3", "a", model="other")]
    clients = [arena.submit(request) for request in strangers]
    arena.deliver_output()
    assert [client.error for client in clients] == ["model_not_found"] * 3


def test_the_one_used_longest_ago_gives_way() -> None:
    arena = Arena(Policy(adapter_slots=2))
    arena.connect()
    arena.add_worker("w1", adapters=("a", "b", "c"))
    for number, adapter in enumerate(("a", "b", "a", "c", "a", "b")):
        arena.submit(asking(f"r{number}", adapter))
        arena.run()
    assert [model for _, model in orders(arena, "load")] == ["a", "b", "c", "b"]
    assert [model for _, model in orders(arena, "unload")] == ["b", "c"]
    arena.check_idle()


def test_one_that_runs_is_not_dropped() -> None:
    arena = Arena(Policy(adapter_slots=1))
    arena.connect()
    arena.add_worker("w1", adapters=("a", "b"))
    long, short = arena.submit(asking("r1", "a", max_tokens=60)), arena.submit(asking("r2", "b"))
    other = arena.submit(make_request("r3"))
    arena.run(steps=20)
    assert (long.open, short.open, other.open) == (True, True, False)
    arena.run()
    assert long.finished == short.finished == [True]
    assert orders(arena, "load") == [("w1", "a"), ("w1", "b")]


@pytest.mark.parametrize("waiting", [1, 20])
def test_requests_whose_adapter_cannot_be_loaded_hold_nobody_up(waiting: int) -> None:
    arena = Arena(Policy(adapter_slots=1, lookahead=4, bypass_limit=8))
    arena.connect()
    arena.add_worker("w1", adapters=("a", "b"))
    arena.advance(1.5)
    long = arena.submit(asking("long", "a", max_tokens=400))
    arena.run(steps=4)
    lacking = [arena.submit(asking(f"b{i}", "b", max_tokens=1)) for i in range(waiting)]
    for number in range(20):
        plain = arena.submit(make_request(f"r{number}", max_tokens=1))
        arena.run(steps=3)
        assert plain.finished == [True]
    assert long.open
    assert all(client.open for client in lacking)
    arena.cancel("long")
    arena.run()
    assert all(client.finished == [True] for client in lacking)
    begun = [command.dispatch.request.request_id for command in arena.issued(commands.StartAttempt)]
    assert [name for name in begun if name.startswith("b")] == [f"b{i}" for i in range(waiting)]
    assert not arena.core.state.waiting.keys()
    arena.check_idle()


def test_what_waits_for_an_adapter_can_leave() -> None:
    arena = Arena(Policy(adapter_slots=1))
    arena.connect()
    arena.add_worker("w1", adapters=("a", "b"))
    arena.advance(1.5)
    arena.submit(asking("long", "a", max_tokens=60))
    arena.run(steps=4)
    gone, late = arena.submit(asking("gone", "b")), arena.submit(asking("late", "b", deadline_ms=500))
    arena.cancel("gone")
    arena.run()
    assert late.error == "deadline_exceeded"
    assert (gone.finished, orders(arena, "load")) == ([False], [("w1", "a")])
    assert not arena.core.state.waiting.keys()
    arena.check_idle()


def test_adapters_do_not_take_turns_while_a_large_request_waits_for_room() -> None:
    arena = Arena(Policy(adapter_slots=1, bypass_limit=8))
    arena.connect()
    arena.add_worker("w1", blocks=4, adapters=("a", "b"))
    arena.advance(1.5)
    plain = [arena.submit(make_request(f"p{i}", max_tokens=4 + 3 * i)) for i in range(4)]
    arena.run(steps=2)
    large = [arena.submit(asking(name, name, max_tokens=200)) for name in ("a", "b")]
    for number in range(60):
        plain.append(arena.submit(make_request(f"q{number}", max_tokens=4)))
        arena.run(steps=2)
    arena.run(steps=600)
    assert orders(arena, "load") == [("w1", "a"), ("w1", "b")]
    assert all(client.finished == [True] for client in plain + large)
    arena.check_idle()


def test_another_worker_loads_it_when_the_first_one_is_full() -> None:
    arena = Arena()
    arena.connect()
    for name in ("w1", "w2", "w3"):
        arena.add_worker(name, blocks=1, adapters=("a",) if name != "w3" else ())
    clients = [arena.submit(asking("r1", "a", max_tokens=50))]
    arena.run(steps=3)
    clients += [arena.submit(asking("r2", "a", max_tokens=50)), arena.submit(make_request("r3"))]
    arena.run()
    assert sorted(worker for worker, _ in orders(arena, "load")) == ["w1", "w2"]
    assert sorted(worker for worker, adapter in started(arena) if adapter) == ["w1", "w2"]
    assert all(client.finished == [True] for client in clients)


def test_attempts_move_to_where_the_adapter_can_be_loaded() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", adapters=("a",))
    client = arena.submit(asking("r1", "a", max_tokens=50))
    arena.run(steps=10)
    arena.add_worker("w2", adapters=("a",))
    arena.kill("w1")
    arena.run()
    assert client.finished == [True]
    assert [worker for worker, _ in started(arena)] == ["w1", "w2"]


def test_a_new_leader_takes_up_requests_with_adapters() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", adapters=("a",))
    client = arena.submit(asking("r1", "a", max_tokens=50))
    arena.run(steps=10)
    arena.new_leader(8)
    arena.connect()
    arena.attach("w1")
    arena.advance(2)
    arena.run()
    assert client.finished == [True]
    assert orders(arena, "load") == [("w1", "a")]


def test_what_fails_to_load_everywhere_ends_its_requests() -> None:
    arena = Arena()
    arena.connect()
    worker = arena.add_worker("w1", adapters=("a",))
    client = arena.submit(asking("r1", "a"))
    frame = worker.step()
    for model in frame.models:
        if model.name == "a":
            model.state = fleet_pb2.MODEL_STATE_FAILED
    arena.post(events.WorkerFrame("w1", frame))
    arena.advance(1.5)
    arena.deliver_output()
    assert client.error == "unavailable"
    arena.check_idle()


def test_an_adapter_that_comes_into_the_record_later_is_offered_and_loaded() -> None:
    arena = Arena()
    gateway = arena.connect()
    worker = arena.add_worker("w1", adapters=("a",))
    arena.advance(1.5)
    worker.adapters["b"] = False
    arena.post(events.WorkerRegistered(make_record("w1", adapters=("a", "b"))))
    assert gateway.catalogue is not None
    assert [model.name for model in gateway.catalogue.models] == ["a", "b", MODEL]
    client = arena.submit(asking("r1", "b"))
    arena.run()
    assert client.finished == [True]
    assert orders(arena, "load") == [("w1", "b")]


def test_memory_is_kept_for_the_largest_adapters() -> None:
    record = make_record("w", memory=4 * GIB, adapters=tuple("abc"))
    for number, model in enumerate(record.models[1:]):
        model.weight_bytes = (number + 1) * GIB // 2
    base, *adapters = plan(record, 2048, 2)
    assert isinstance(base, Allocation)
    assert base.budget_bytes == 4 * GIB - (3 + 2) * GIB // 2
    assert [type(decision) for decision in adapters] == [Allocation] * 3
    tight = plan(record, 2048, 3)
    assert sum(d.budget_bytes for d in tight if isinstance(d, Allocation) and d.model == MODEL) == 1 * GIB


def test_a_base_that_leaves_no_room_has_no_adapters() -> None:
    record = make_record("w", memory=GIB, adapters=("a",))
    base, adapter = plan(record, 2048, 2)
    assert isinstance(base, Allocation)
    assert isinstance(adapter, Unfit)
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", memory=GIB, loaded=False, adapters=("a",))
    arena.deliver_orders("w1")
    arena.step("w1")
    client = arena.submit(asking("r1", "a"))
    arena.advance(1.5)
    arena.deliver_output()
    assert client.error in ("model_not_found", "unavailable")
