"""Rates and percentiles, and what the core feeds them with."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.load_view import load
from scheduler.meters import Flow, Histogram
from tests.unit.scheduler.arena import MODEL, Arena, make_request

INTERACTIVE = request_pb2.PRIORITY_CLASS_INTERACTIVE


def test_a_flow_is_the_slope_of_its_last_ten_seconds() -> None:
    flow = Flow(0, 0.0)
    assert flow.rate(5, 0.0) == 0.0
    for second in range(1, 30):
        flow.sample(second * (10 if second < 15 else 100), float(second))
    assert flow.rate(2900, 29.0) == pytest.approx(100, rel=0.01)


def test_percentiles_are_right_to_a_twentieth() -> None:
    times = Histogram()
    for number in range(1, 1001):
        times.add(number / 1000, 5.0)
    for share, found in zip((0.5, 0.95, 0.99), times.quantiles((0.5, 0.95, 0.99), 6.0), strict=True):
        assert found == pytest.approx(share, rel=0.06)


def test_a_weight_stands_for_so_many_times() -> None:
    times = Histogram()
    times.add(0.010, 0.0, 99)
    times.add(9.0, 0.0)
    p50, p999 = times.quantiles((0.5, 0.999), 0.0)
    assert p50 == pytest.approx(0.010, rel=0.06)
    assert p999 == pytest.approx(9.0, rel=0.06)


def test_times_are_forgotten_after_a_minute() -> None:
    times = Histogram()
    times.add(1.0, 0.0)
    assert times.quantiles((0.5,), 55.0)[0] > 0
    assert times.quantiles((0.5,), 75.0) == [0.0]


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e9])
def test_no_time_is_out_of_range(seconds: float) -> None:
    times = Histogram()
    times.add(seconds, 0.0)
    assert times.quantiles((0.5,), 0.0)[0] > 0


def snapshot(arena: Arena) -> fleet_pb2.GetLoadResponse:
    return load(arena.core.state, [], arena.now)


def test_load_shows_queues_models_and_workers() -> None:
    arena = Arena()
    arena.add_worker("w1", blocks=16)
    arena.post(events.MembersListed())
    arena.connect()
    arena.submit(make_request("r1", prompt=960, max_tokens=60, tenant="a", priority=INTERACTIVE, tenant_weight=4))
    arena.submit(make_request("r2", prompt=960, max_tokens=60, tenant="b"))
    arena.run(45)
    shown = snapshot(arena)
    queues = {(queue.tenant, queue.priority): queue for queue in shown.queues}
    a, b = queues["a", fleet_pb2.PRIORITY_CLASS_INTERACTIVE], queues["b", fleet_pb2.PRIORITY_CLASS_STANDARD]
    assert (a.running, a.waiting, a.weight) == (1, 0, 4)
    assert (b.running, b.waiting, b.weight, b.waiting_tokens) == (0, 1, 1, 1020)
    assert a.tokens_per_s > 20
    (model,) = shown.models
    assert (model.name, model.replicas, model.waiting, model.running) == (MODEL, 1, 1, 1)
    assert model.tokens_per_s == pytest.approx(20, rel=0.1)
    assert model.gap.p50_ms == pytest.approx(50, rel=0.1)
    assert model.ttft.p50_ms > 0
    (worker,) = shown.workers
    assert (worker.node_id, worker.running) == ("w1", 1)
    assert worker.tokens_per_s == pytest.approx(20, rel=0.1)
    assert worker.steps_per_s == pytest.approx(20, rel=0.1)


def test_a_migration_shows_in_the_gaps() -> None:
    arena = Arena()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    arena.connect()
    arena.submit(make_request("r1", max_tokens=6))
    for _ in range(3):
        arena.deliver_orders("w1")
        arena.step("w1")
        arena.advance(0.01)
    arena.kill("w1")
    arena.advance(5.0)
    arena.add_worker("w2")
    arena.run()
    assert snapshot(arena).models[0].gap.p99_ms == pytest.approx(5000, rel=0.1)


def test_idle_tenants_are_forgotten() -> None:
    arena = Arena()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    arena.connect()
    for number in range(20):
        arena.submit(make_request(f"r{number}", tenant=f"t{number}"))
    arena.run()
    for _ in range(70):
        arena.advance(1.0)
    assert not arena.core.state.meters.cells
    assert not snapshot(arena).queues
