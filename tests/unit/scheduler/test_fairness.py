"""Who is served how much: the bounds in random runs, and single rules of the order."""

from __future__ import annotations

import os

import pytest

from llmos.internal.v1 import registry_pb2, request_pb2
from scheduler import charges, commands, events
from scheduler.policy import Policy
from scheduler.requests import LiveRequest
from scheduler.waiting import WaitingRoom
from tests.unit.scheduler.arena import MODEL, VERSION, Arena, make_request
from tests.unit.scheduler.fair_runs import Run

RUNS = int(os.environ.get("LLMOS_TEST_FAIR_RUNS", "60"))
FIRST = int(os.environ.get("LLMOS_TEST_FAIR_SEED", "0"))
KEY = (MODEL, VERSION)


@pytest.mark.timeout(1200)
def test_service_bounds_hold_in_random_runs() -> None:
    for seed in range(FIRST, FIRST + RUNS):
        Run(seed).go()


def start(arena: Arena) -> list[str]:
    return [c.dispatch.request.request_id for c in arena.commands if isinstance(c, commands.StartAttempt)]


def saturated(policy: Policy | None = None, blocks: int = 4) -> Arena:
    arena = Arena(policy)
    arena.connect()
    arena.add_worker("w1", blocks=blocks)
    arena.post(events.MembersListed())
    return arena


def produced(arena: Arena) -> dict[str, int]:
    """Tokens by the part of the request id before the slash."""
    found: dict[str, int] = {}
    for client in arena.gateways["g1"].clients.values():
        name = client.request.request_id.split("/")[0]
        found[name] = found.get(name, 0) + sum(map(len, client.tokens))
    return found


def turn(arena: Arena, steps: int) -> None:
    for _ in range(steps):
        arena.deliver_orders("w1")
        arena.step("w1")
        arena.deliver_output()
        arena.advance(0.05)


def test_weights_share_a_saturated_worker() -> None:
    arena = saturated(Policy(queue_limit=10_000))
    for number in range(400):
        arena.submit(make_request(f"light/{number}", max_tokens=5, tenant="light", tenant_weight=1))
        arena.submit(make_request(f"heavy/{number}", max_tokens=5, tenant="heavy", tenant_weight=4))
    turn(arena, 300)
    tokens = produced(arena)
    assert tokens["heavy"] / tokens["light"] == pytest.approx(4, rel=0.03)


def test_who_sends_more_does_not_get_more() -> None:
    arena = saturated(Policy(queue_limit=10_000))
    for number in range(500):
        arena.submit(make_request(f"greedy/{number}", max_tokens=5, tenant="greedy"))
    for number in range(100):
        arena.submit(make_request(f"modest/{number}", max_tokens=5, tenant="modest"))
    turn(arena, 150)
    tokens = produced(arena)
    assert tokens["modest"] == pytest.approx(tokens["greedy"], rel=0.1)


def test_classes_get_their_shares() -> None:
    arena = saturated(Policy(queue_limit=10_000, head_start_tokens=30.0, max_preemptions=0))
    for priority, name in enumerate(("interactive", "standard", "batch"), 1):
        for number in range(500):
            arena.submit(make_request(f"{name}/{number}", max_tokens=5, priority=priority))
    turn(arena, 500)
    tokens = produced(arena)
    total = sum(tokens.values())
    assert [tokens[name] / total for name in ("interactive", "standard", "batch")] == [
        pytest.approx(share, abs=0.02) for share in (0.8, 0.15, 0.05)
    ]


def test_what_waits_is_started_when_its_class_is_due_and_keeps_its_place() -> None:
    arena = saturated(Policy(queue_limit=10_000, head_start_tokens=30.0), blocks=1)
    arena.submit(make_request("batch", max_tokens=50, priority=3))
    for number in range(200):
        arena.submit(make_request(f"i/{number}", max_tokens=5, priority=1))
    arena.run(1500)
    assert all(not client.open for client in arena.gateways["g1"].clients.values())
    assert start(arena).index("i/199") > max(n for n, name in enumerate(start(arena)) if name == "batch")
    assert arena.core.state.requests == {}


def test_each_index_is_charged_once_over_migrations() -> None:
    arena = saturated()
    client = arena.submit(make_request("r", prompt=20, max_tokens=30))
    turn(arena, 10)
    account = arena.core.state.waiting.queue(KEY).account(1, "t", 1)
    arena.kill("w1")
    arena.add_worker("w1b", blocks=4)
    arena.run()
    assert client.finished == [True]
    assert len(start(arena)) == 2
    assert account.virtual == 50.0


def test_cached_tokens_cost_less_and_refused_ones_nothing() -> None:
    arena = saturated()
    arena.submit(make_request("r", prompt=100, max_tokens=30))
    arena.deliver_orders("w1")
    frame = arena.workers["w1"].step()
    frame.outputs[0].cached_tokens = 64
    arena.post(events.WorkerFrame("w1", frame))
    account = arena.core.state.waiting.queue(KEY).account(1, "t", 1)
    assert account.virtual == pytest.approx(100 - 0.9 * 64 + 1)
    turn(arena, 9)
    arena.post(events.ChoiceFinished(arena.gateways["g1"].stream_id, "r", 0, 4))
    assert account.virtual == pytest.approx(100 - 0.9 * 64 + 4)


def waiting(room: WaitingRoom, name: str, tenant: str, **fields: object) -> LiveRequest:
    live = LiveRequest.accept(make_request(name, tenant=tenant, **fields), "g", 1, KEY, 0.0)
    room.push(live, 0.0)
    return live


def test_idleness_saves_nothing_up() -> None:
    room = WaitingRoom(Policy())
    for number in range(20):
        waiting(room, f"busy/{number}", "busy", prompt=100)
    taken: list[str] = []

    def take(live: LiveRequest) -> bool:
        if len(taken) % 10 == 0 and taken and taken[-1] != "":
            taken.append("")
            return False
        taken.append(live.request.tenant)
        charges.started(live)
        return True

    room.admit(KEY, take, most=1)
    for number in range(10):
        waiting(room, f"late/{number}", "late", prompt=100)
    del taken[:]
    room.admit(KEY, take, most=1)
    assert sorted(taken[:10]) == ["busy"] * 5 + ["late"] * 5


def test_counters_survive_a_failover_within_their_bound() -> None:
    old = saturated(Policy(queue_limit=10_000))
    for number in range(50):
        old.submit(make_request(f"a/{number}", max_tokens=5, tenant="a"))
    turn(old, 30)
    record = registry_pb2.ServiceRecord(term=7, tenants=old.core.state.waiting.service())
    assert {(entry.tenant, entry.model) for entry in record.tenants} == {("", MODEL), ("a", MODEL)}
    room = WaitingRoom(Policy())
    first = waiting(room, "a", "a")
    room.inherit(list(record.tenants))
    newcomer = waiting(room, "b", "b")
    assert first.account is not None
    assert newcomer.account is not None
    assert first.account.virtual == newcomer.account.virtual == old.core.state.waiting.queue(KEY).classes[1].served
    assert room.queue(KEY).classes[1].virtual == pytest.approx(first.account.virtual / 15, rel=1e-4)


def test_tenants_are_bounded() -> None:
    room = WaitingRoom(Policy(tenants_limit=10))
    for number in range(50):
        room.discard(waiting(room, f"r{number}", f"t{number}"))
    kept = waiting(room, "kept", "kept")
    for number in range(50):
        waiting(room, f"q{number}", f"q{number}") if number % 5 == 0 else None
    assert len(room.queue(KEY).classes[1].accounts) <= 12
    assert kept.account is room.queue(KEY).account(1, "kept", 1)


def test_a_weight_that_changes_counts_from_then_on() -> None:
    room = WaitingRoom(Policy())
    waiting(room, "one", "t", tenant_weight=2)
    waiting(room, "two", "t", tenant_weight=8)
    waiting(room, "other", "u", tenant_weight=0)
    queue = room.queue(KEY)
    assert queue.classes[1].weights == 9
    assert queue.account(1, "u", 2**32 - 1).weight == 10_000
    assert request_pb2.Request().tenant_weight == 0
