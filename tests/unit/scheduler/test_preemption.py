"""A higher class takes a lower one's place at once, and nobody is sent away for ever; classes that people change."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2
from scheduler import commands, events
from scheduler.policy import Policy
from tests.unit.scheduler.arena import Arena, make_request, token

INTERACTIVE, STANDARD, BATCH = 1, 2, 3


def full(policy: Policy | None = None, blocks: int = 4, batch: int = 4) -> Arena:
    """A worker whose blocks are all taken by batch requests that have some tokens."""
    arena = Arena(policy)
    arena.connect()
    arena.add_worker("w1", blocks=blocks)
    arena.post(events.MembersListed())
    for number in range(batch):
        arena.submit(make_request(f"b{number}", max_tokens=40, priority=BATCH, tenant=f"t{number % 2}"))
    for _ in range(5):
        arena.deliver_orders("w1")
        arena.step("w1")
    arena.deliver_output()
    return arena


def running(arena: Arena) -> set[str]:
    return {name for worker in arena.core.state.workers.values() for name in worker.running}


def test_a_higher_class_takes_a_place_in_the_same_tick_and_the_victim_resumes() -> None:
    arena = full()
    before = len(arena.commands)
    urgent = arena.submit(make_request("i", max_tokens=3, priority=INTERACTIVE))
    kinds = [
        command.command.WhichOneof("order") if isinstance(command, commands.Order) else "dispatch"
        for command in arena.commands[before:]
        if isinstance(command, (commands.Order, commands.StartAttempt))
    ]
    assert kinds == ["cancel", "dispatch"]
    assert "i" in running(arena)
    assert arena.core.state.counters["preemptions"] == 1
    arena.run()
    assert urgent.finished == [True]
    for number in range(4):
        client = arena.gateways["g1"].clients[f"b{number}"]
        assert client.tokens == [[token(f"b{number}", 0, i) for i in range(40)]]
    assert arena.core.state.counters["retries"] == arena.core.state.counters["migrations"] == 0
    arena.check_idle()


def test_equals_and_higher_ones_keep_their_place() -> None:
    arena = full()
    arena.submit(make_request("b-late", max_tokens=3, priority=BATCH))
    assert arena.core.state.counters["preemptions"] == 0
    arena.submit(make_request("i", max_tokens=40, priority=INTERACTIVE))
    arena.submit(make_request("s", max_tokens=40, priority=STANDARD))
    assert running(arena) >= {"i", "s"}
    for number in range(3):
        arena.submit(make_request(f"s{number}", max_tokens=40, priority=STANDARD))
    assert running(arena) == {"i", "s", "s0", "s1"}


def test_as_many_give_way_as_are_needed_and_no_more() -> None:
    arena = full()
    arena.submit(make_request("wide", prompt=100, max_tokens=60, priority=INTERACTIVE))
    assert "wide" in running(arena)
    assert arena.core.state.counters["preemptions"] == 3
    arena.submit(make_request("too wide", prompt=190, max_tokens=60, priority=INTERACTIVE))
    assert arena.core.state.counters["preemptions"] == 3


def test_the_tenant_furthest_ahead_gives_way_with_what_has_least_progress() -> None:
    arena = full(batch=3)
    arena.submit(make_request("young", max_tokens=40, priority=BATCH, tenant="t0"))
    arena.submit(make_request("i", max_tokens=3, priority=INTERACTIVE))
    assert running(arena) == {"b0", "b1", "b2", "i"}


def test_nobody_is_sent_away_for_ever() -> None:
    arena = full(Policy(max_preemptions=2), blocks=1, batch=1)
    for number in range(6):
        arena.submit(make_request(f"i{number}", max_tokens=2, priority=INTERACTIVE))
        for _ in range(2):
            arena.deliver_orders("w1")
            arena.step("w1")
            arena.deliver_output()
    assert arena.core.state.counters["preemptions"] == 2
    arena.run(400)
    assert all(client.finished == [True] for client in arena.gateways["g1"].clients.values())


def test_a_class_behind_its_share_keeps_its_place() -> None:
    arena = full(Policy(head_start_tokens=20.0, max_preemptions=10**6), blocks=1, batch=1)
    client = arena.gateways["g1"].clients["b0"]
    for number in range(400):
        arena.submit(make_request(f"i{number}", max_tokens=2, priority=INTERACTIVE))
        arena.deliver_orders("w1")
        arena.step("w1")
        arena.deliver_output()
        arena.advance(0.05)
    interactive = sum(len(c.tokens[0]) for c in arena.gateways["g1"].clients.values()) - len(client.tokens[0])
    assert client.finished == [True] or len(client.tokens[0]) >= 0.05 * interactive - 25


def test_a_waiting_request_moves_to_another_class() -> None:
    arena = full()
    waiting = arena.submit(make_request("b-late", max_tokens=3, priority=BATCH))
    assert "b-late" not in running(arena)
    arena.post(events.Reprioritized("b-late", request_pb2.PRIORITY_CLASS_INTERACTIVE))
    assert "b-late" in running(arena)
    starts = [c for c in arena.commands if isinstance(c, commands.StartAttempt)]
    assert starts[-1].dispatch.request.priority == request_pb2.PRIORITY_CLASS_INTERACTIVE
    arena.run()
    assert waiting.finished == [True]
    arena.check_idle()


def test_a_running_request_moves_and_its_worker_is_told() -> None:
    arena = full()
    arena.post(events.Reprioritized("b0", request_pb2.PRIORITY_CLASS_INTERACTIVE))
    (order,) = [
        c.command for c in arena.commands if isinstance(c, commands.Order) and c.command.HasField("set_priority")
    ]
    assert (order.set_priority.request_id, order.set_priority.epoch.attempt) == ("b0", 1)
    for number in range(6):
        arena.submit(make_request(f"s{number}", max_tokens=3, priority=STANDARD))
    assert "b0" in running(arena)
    arena.post(events.Reprioritized("nobody", request_pb2.PRIORITY_CLASS_BATCH))
    arena.run()
    arena.check_idle()
