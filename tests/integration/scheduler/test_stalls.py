"""Attempts that stall: noticed by their spans, moved to another worker, with the reason on the attempt that is left."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from unittest import mock

import pytest

from llmos.etcd import EtcdClient
from llmos.v1 import fleet_pb2
from scheduler import deadlines, events
from scheduler.process import SchedulerProcess
from scheduler.span_watch import SpanWatch
from tests.fakes.contract import Client, make_request
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import FakeWorker, worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until

QUICK = deadlines.StageRule(prior=0.4, prior_weight=8.0, floor_s=0.3)
"""Bounds of an idle test machine, so that no test waits for seconds."""
TOKENS = 40


@pytest.fixture(autouse=True)
def quick_bounds() -> Iterator[None]:
    rules = dict.fromkeys(("prefill", "decode", "step"), QUICK) | {"prefill": deadlines.StageRule(10.0, 8.0, 0.5)}
    with mock.patch.dict(deadlines.RULES, rules):
        yield


@contextlib.asynccontextmanager
async def two_workers(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> AsyncIterator[tuple[SchedulerProcess, FakeWorker, FakeWorker, FakeGateway]]:
    async with (
        open_scheduler() as scheduler,
        worker_in(etcd, "w1", step_s=0.01) as one,
        worker_in(etcd, "w2", step_s=0.01) as two,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        reign = scheduler.seat.reign
        assert reign is not None
        await until(lambda: sum(worker.usable for worker in reign.core.state.workers.values()) == 2)
        yield scheduler, one, two, gateway


async def submit(gateway: FakeGateway, count: int) -> list[Client]:
    requests = [make_request(f"r{i}", max_tokens=TOKENS) for i in range(count)]
    for number, request in enumerate(requests, 1):
        request.trace.traceparent = f"00-{number:032x}-{number:016x}-01"
    return [await gateway.submit(request) for request in requests]


def check_moved(scheduler: SchedulerProcess, bad: FakeWorker, good: FakeWorker, clients: list[Client]) -> None:
    """Whatever the bad worker got went to the good one, and nothing came back."""
    reign = scheduler.seat.reign
    assert reign is not None
    moved = {one.request.request_id for one in bad.dispatches}
    assert moved
    assert len(bad.dispatches) == len(moved)
    assert moved <= {one.request.request_id for one in good.dispatches}
    assert all(all(client.finished) for client in clients)
    assert all(len(client.tokens[0]) == TOKENS for client in clients)
    assert not reign.core.state.requests


async def test_stalled_streams_move(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with two_workers(open_scheduler, etcd) as (scheduler, bad, good, gateway):
        bad.sim.stall_after = 7
        clients = await submit(gateway, 8)
        await gateway.ended(*clients)
        check_moved(scheduler, bad, good, clients)
        request_id = bad.dispatches[0].request.request_id
        await until(lambda: len(attempts(scheduler, request_id)) == 2)
        first, second = attempts(scheduler, request_id)
        assert first.error.startswith("stalled in decode")
        assert first.attributes["llmos.worker"] == "w1"
        assert second.attributes["llmos.worker"] == "w2"
        assert list(second.linked_span_ids) == [first.span_id]
        assert not second.error


async def test_attempt_without_a_first_token_moves(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with two_workers(open_scheduler, etcd) as (scheduler, bad, good, gateway):
        bad.sim.stall_after = 0
        clients = await submit(gateway, 4)
        await gateway.ended(*clients)
        check_moved(scheduler, bad, good, clients)


async def test_engine_that_hangs_loses_everything_and_comes_back(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> None:
    async with two_workers(open_scheduler, etcd) as (scheduler, bad, good, gateway):
        clients = await submit(gateway, 8)
        await gateway.until(lambda: all(len(client.tokens[0]) > 5 for client in clients))
        bad.sim.hung = True
        await gateway.ended(*clients)
        check_moved(scheduler, bad, good, clients)
        reign = scheduler.seat.reign
        assert reign is not None
        assert reign.core.state.counters["hangs"] == 1
        worker = reign.core.state.workers["w1"]
        assert not worker.usable
        bad.sim.hung = False
        await until(lambda: worker.usable)


async def test_last_worker_is_waited_for(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with (
        open_scheduler() as scheduler,
        worker_in(etcd, "w1", step_s=0.01) as only,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        clients = await submit(gateway, 2)
        await gateway.until(lambda: all(len(client.tokens[0]) > 5 for client in clients))
        reign = scheduler.seat.reign
        assert reign is not None
        told: list[events.AttemptStalled] = []
        post = reign.loop.post_now

        def listen(event: events.Event) -> None:
            if isinstance(event, events.AttemptStalled):
                told.append(event)
            post(event)

        with mock.patch.object(reign.loop, "post_now", listen):
            only.sim.hung = True
            await until(lambda: any(event.stage == "step" for event in told))
            only.sim.hung = False
            await gateway.ended(*clients)
        assert len(only.dispatches) == 2
        assert reign.core.state.workers["w1"].usable


async def test_without_the_watch_nothing_moves(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    """The spans are what notices: the same stall, their watch taken out, is never seen."""
    with mock.patch.object(SpanWatch, "look", lambda self: iter(())):
        async with two_workers(open_scheduler, etcd) as (_, bad, _, gateway):
            bad.sim.stall_after = 7
            clients = await submit(gateway, 8)
            with pytest.raises(TimeoutError):
                await gateway.ended(*clients, timeout_s=2.0)
            assert any(client.open for client in clients)
            bad.sim.stall_after = None
            await gateway.ended(*clients)


def attempts(scheduler: SchedulerProcess, request_id: str) -> list[fleet_pb2.Span]:
    """Spans of a request's attempts, as `llmos trace` gets them."""
    return [span for span in scheduler.ring.get(request_id) if span.name == "attempt"]
