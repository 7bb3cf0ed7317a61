"""A worker that is slow before its first token: noticed by its spans, hedged, and its late words fenced."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from unittest import mock

import pytest

from llmos.etcd import EtcdClient
from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from scheduler import deadlines
from scheduler.process import SchedulerProcess
from tests.fakes.contract import Client, make_request
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import FakeWorker, worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until

TOKENS = 10


@pytest.fixture(autouse=True)
def soon_known() -> Iterator[None]:
    with mock.patch.object(deadlines, "_LATE_LEAST", 4.0):
        yield


@contextlib.asynccontextmanager
async def three_workers(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> AsyncIterator[tuple[SchedulerProcess, list[FakeWorker], FakeGateway]]:
    """Workers whose first tokens have been seen, and requests that have earned hedges."""
    async with contextlib.AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(open_scheduler())
        workers = [await stack.enter_async_context(worker_in(etcd, f"w{i}", step_s=0.01)) for i in range(3)]
        gateway = await stack.enter_async_context(FakeGateway("g1", [address(scheduler)]))
        await gateway.ready()
        reign = scheduler.seat.reign
        assert reign is not None
        state = reign.core.state
        await until(lambda: sum(worker.usable for worker in state.workers.values()) == 3)
        for _ in range(200):
            state.budget.accepted()
        warm = [await gateway.submit(make_request(f"warm{i}", max_tokens=2)) for i in range(30)]
        await gateway.ended(*warm)
        for worker in workers:
            worker.dispatches.clear()
        yield scheduler, workers, gateway


async def submit(gateway: FakeGateway, count: int, first: int = 0) -> list[Client]:
    requests = [make_request(f"r{i}", max_tokens=TOKENS) for i in range(first, first + count)]
    for number, request in enumerate(requests, first + 1):
        request.trace.traceparent = f"00-{number:032x}-{number:016x}-01"
    return [await gateway.submit(request) for request in requests]


def cancelled(worker: FakeWorker) -> list[work_pb2.CancelAttempt]:
    return [one.cancel for one in worker.commands if one.WhichOneof("order") == "cancel"]


async def test_late_first_token_is_hedged(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with three_workers(open_scheduler, etcd) as (scheduler, workers, gateway):
        slow = workers[0]
        slow.sim.stall_after = 0
        clients: list[Client] = []
        while not slow.dispatches and len(clients) < 90:  # it may have seemed slow before
            clients += await submit(gateway, 9, len(clients))
            await gateway.ended(*clients)
        assert all(len(client.tokens[0]) == TOKENS for client in clients)
        reign = scheduler.seat.reign
        assert reign is not None
        state = reign.core.state
        late = [one.request.request_id for one in slow.dispatches]
        assert late
        assert state.counters["hedges"] == state.counters["hedges_won"] == len(late)
        assert state.counters["migrations"] == state.counters["stalls"] == 0
        await until(lambda: not slow.sim.running)
        assert {one.request_id for one in cancelled(slow)} == set(late)
        slow.sim.stall_after = None
        assert state.counters["stale_outputs"] == 0, "the loser computed nothing more"
        await until(lambda: len(attempts(scheduler, late[0])) == 2)
        lost, won = sorted(attempts(scheduler, late[0]), key=lambda span: span.start_unix_ns)
        assert (lost.attributes["llmos.hedge"], won.attributes["llmos.hedge"]) == ("lost", "won")
        assert won.attributes["llmos.reason"].startswith("hedge: attempt 1 has no token after")
        assert lost.error == "hedge: attempt 2 had the first token"
        assert lost.attributes["llmos.worker"] == "w0" != won.attributes["llmos.worker"]
        assert list(won.linked_span_ids) == [lost.span_id]
        assert not state.requests and not any(one.running for one in state.workers.values())


async def test_first_one_may_win_all_the_same(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with three_workers(open_scheduler, etcd) as (scheduler, workers, gateway):
        reign = scheduler.seat.reign
        assert reign is not None
        state = reign.core.state
        for worker in workers:
            worker.sim.stall_after = 0
        (client,) = await submit(gateway, 1)
        await until(lambda: state.counters["hedges"] == 1)
        first, second = (state.workers[one.worker_id].id for one in state.requests["r0"].running)
        by_id = {worker.id: worker for worker in workers}
        by_id[first].sim.stall_after = None
        await gateway.ended(client)
        await until(lambda: not by_id[second].sim.running)
        assert len(client.tokens[0]) == TOKENS
        assert state.counters["hedges_lost"] == 1
        assert [one.epoch.attempt for one in cancelled(by_id[second])] == [2]


def attempts(scheduler: SchedulerProcess, request_id: str) -> list[fleet_pb2.Span]:
    """Spans of a request's attempts, as `llmos trace` gets them."""
    return [span for span in scheduler.ring.get(request_id) if span.name == "attempt"]
