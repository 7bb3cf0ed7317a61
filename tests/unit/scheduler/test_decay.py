"""Workers that leak are started afresh in time, one after another, and never the last one before it must be."""

from __future__ import annotations

import random

import pytest

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events, views
from tests.unit.scheduler.arena import Arena, make_request

FILES = fleet_pb2.RESOURCE_KIND_FILES
LIMIT = 1000


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.add_worker("w1")
    arena.add_worker("w2")
    arena.post(events.MembersListed())
    arena.connect()
    return arena


def says(arena: Arena, worker_id: str, used: float, kind: fleet_pb2.ResourceKind.ValueType = FILES) -> None:
    use = fleet_pb2.ResourceUse(kind=kind, used=int(used), limit=LIMIT)
    arena.post(events.WorkerFrame(worker_id, work_pb2.WorkFrame(uses=[use])))


def afresh(arena: Arena) -> list[tuple[str, int]]:
    """Worker and reason of every order to be started afresh."""
    orders = [order for order in arena.issued(commands.Order) if isinstance(order, commands.Order)]
    return [(o.worker_id, o.command.drain.reason) for o in orders if o.command.drain.restart]


def grow(
    arena: Arena, per_s: float, *workers: str, seconds: int = 60, start: float = 300.0, noise: float = 20.0
) -> float:
    """Until somebody is started afresh; the highest use that was said."""
    rng, used = random.Random(1), start
    for half in range(2 * seconds):
        for worker_id in workers:
            used = start + per_s * half / 2 + rng.uniform(0, noise)
            says(arena, worker_id, used)
        if afresh(arena):
            break
        arena.advance(0.5)
    return used


def test_a_leak_is_acted_on_before_the_limit_and_what_runs_moves_on(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=40))
    leaking = next(c.worker_id for c in arena.issued(commands.StartAttempt) if isinstance(c, commands.StartAttempt))
    arena.deliver_orders(leaking)
    used = grow(arena, 10.0, leaking)
    assert afresh(arena) == [(leaking, fleet_pb2.DRAIN_REASON_FILES)]
    assert 500 <= used < 800
    arena.advance(0.1)
    assert not arena.core.state.workers[leaking].running
    arena.run()
    assert client.finished == [True]
    assert arena.core.state.counters["started_afresh"] == 1


def test_noise_without_growth_changes_nothing(arena: Arena) -> None:
    grow(arena, 0.0, "w1", "w2", seconds=300, start=600.0, noise=150.0)
    assert afresh(arena) == []
    assert all(not use.growth_per_s for node in arena.core.state.workers.values() for use in node.decay.uses.values())


def test_growth_far_from_the_limit_is_shown_and_left_alone(arena: Arena) -> None:
    grow(arena, 1.0, "w1", seconds=60, start=100.0, noise=2.0)
    assert afresh(arena) == []
    (use,) = arena.core.state.workers["w1"].decay.uses.values()
    assert use.growth_per_s == pytest.approx(1.0, rel=0.2)
    assert use.left_s == pytest.approx(840, rel=0.2)


def test_one_at_a_time_and_the_last_one_only_when_it_must_be(arena: Arena) -> None:
    grow(arena, 10.0, "w1", "w2")
    (first, _) = afresh(arena)[0]
    other = "w2" if first == "w1" else "w1"
    for half in range(40):
        says(arena, other, 700 + 10.0 * half / 2)
        arena.advance(0.5)
    assert [worker for worker, _ in afresh(arena)] == [first], "the last worker of its model goes on"
    says(arena, other, 960)
    arena.advance(1.1)
    says(arena, other, 960)
    assert [worker for worker, _ in afresh(arena)] == [first, other]


def test_what_was_promised_to_models_is_no_leak(arena: Arena) -> None:
    worker = arena.core.state.workers["w1"]
    slot = next(iter(worker.slots.values()))
    slot.device, slot.budget = worker.record.capacity.devices[0].id, 700
    for half in range(120):
        says(arena, "w1", 200 + 6 * half, fleet_pb2.RESOURCE_KIND_MEMORY)
        arena.advance(0.5)
        if worker.restart is not None:
            break
    assert worker.restart is not None
    assert 700 <= 200 + 6 * half < 800


def says_gpu(arena: Arena, used: float, device: str = "GPU-1") -> None:
    kind = fleet_pb2.RESOURCE_KIND_GPU_MEMORY
    use = fleet_pb2.ResourceUse(kind=kind, device_id=device, used=int(used), limit=LIMIT)
    other = fleet_pb2.ResourceUse(kind=kind, device_id="GPU-2", used=100, limit=LIMIT)
    arena.post(events.WorkerFrame("w1", work_pb2.WorkFrame(uses=[use, other])))


def test_a_leak_of_a_graphics_processors_memory_is_acted_on_beyond_what_models_were_given(arena: Arena) -> None:
    worker = arena.core.state.workers["w1"]
    slot = next(iter(worker.slots.values()))
    slot.device, slot.budget = "GPU-1", 700
    for half in range(120):
        says_gpu(arena, 200 + 6 * half)
        arena.advance(0.5)
        if worker.restart is not None:
            break
    assert worker.restart is not None
    assert worker.restart.reason == fleet_pb2.DRAIN_REASON_GPU_MEMORY
    assert "of a graphics processor's memory" in worker.restart.detail
    assert 700 <= 200 + 6 * half < 850
    assert set(worker.decay.uses) == {(fleet_pb2.RESOURCE_KIND_GPU_MEMORY, name) for name in ("GPU-1", "GPU-2")}


def test_a_graphics_processor_that_models_fill_is_no_leak(arena: Arena) -> None:
    worker = arena.core.state.workers["w1"]
    slot = next(iter(worker.slots.values()))
    slot.device, slot.budget = "GPU-1", 900
    says_gpu(arena, 10)
    for half in range(240):
        says_gpu(arena, min(940, 200 + 20 * half))
        arena.advance(0.5)
    assert worker.restart is None, "full, and steady"


def test_people_see_why(arena: Arena) -> None:
    grow(arena, 10.0, "w1")
    state = arena.core.state
    me = views.registry_pb2.SchedulerRecord(scheduler_id="s1")
    node = next(node for node in views.nodes(state, [], me) if node.id == "w1")
    assert node.state == fleet_pb2.NODE_STATE_DRAINING
    assert node.drain_reason == fleet_pb2.DRAIN_REASON_FILES
    assert "of 1,000 file descriptors" in node.drain_detail
    assert node.uses[0].growth_per_s == pytest.approx(10.0, rel=0.3)


def test_the_order_is_given_again_to_a_worker_that_did_not_hear_it(arena: Arena) -> None:
    grow(arena, 10.0, "w1")
    arena.detach("w1")
    arena.attach("w1")
    assert [worker for worker, _ in afresh(arena)] == ["w1", "w1"]


def test_a_worker_that_began_beyond_its_limit_would_be_there_again(arena: Arena) -> None:
    for half in range(60):
        says(arena, "w1", 5000 + 10 * half)
        arena.advance(0.5)
    assert afresh(arena) == []
