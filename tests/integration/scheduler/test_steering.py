"""Nice, drain and load through a real gateway with keys, and what of it outlives the leader."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as pb
from scheduler.process import SchedulerProcess
from tests.fakes.worker import FakeWorker
from tests.integration.gateway_grpc.gateway import WAIT_S, Gateway, eventually, running
from tests.integration.scheduler.conftest import OpenScheduler, address, until

INTERACTIVE, STANDARD, BATCH = (
    fleet_pb2.PRIORITY_CLASS_INTERACTIVE,
    fleet_pb2.PRIORITY_CLASS_STANDARD,
    fleet_pb2.PRIORITY_CLASS_BATCH,
)
ALICE, BOB, OPERATOR = ((("authorization", f"Bearer {name}"),) for name in ("alice", "bob", "ops"))
DENIED, MISSING, INVALID = (
    (grpc.StatusCode.PERMISSION_DENIED, "permission_denied"),
    (grpc.StatusCode.NOT_FOUND, "not_found"),
    (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request"),
)
_LONG_S = 100.0
"""A deadline that no test here is to meet."""


@pytest.fixture
async def worker(etcd: EtcdClient) -> AsyncIterator[FakeWorker]:
    """A worker whose model a gateway can tokenize for."""
    worker = FakeWorker("w1", step_s=0.05)
    record = worker.record

    def complete() -> registry_pb2.WorkerRecord:
        changed = record()
        changed.models[0].model.vocab_size = 50_000
        changed.models[0].model.capabilities.append("completion")
        return changed

    worker.record = complete  # type: ignore[method-assign]
    async with worker:
        await worker.register(etcd)
        yield worker


@contextlib.asynccontextmanager
async def asking(gateway: Gateway, name: str, metadata: Any = ALICE) -> AsyncIterator[Any]:
    """A stream that has begun and goes on for 50 s."""
    request = pb.StreamCompleteRequest(model="m", text="hi", params=pb.GenerationParams(max_tokens=1000))
    call = gateway.inference.StreamComplete(request, metadata=(*metadata, ("x-request-id", name)), timeout=_LONG_S)
    for _ in range(2):
        await call.read()
    try:
        yield call
    finally:
        call.cancel()


async def refused(call: Any) -> tuple[Any, str]:
    """Status and error code of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), str(dict(tuple(caught.value.trailing_metadata()))["llmos-error-code"])


def nice(gateway: Gateway, name: str, to: int, who: Any) -> Any:
    request = fleet_pb2.SetRequestPriorityRequest(request_id=name, priority=to)  # type: ignore[arg-type]
    return gateway.fleet.SetRequestPriority(request, metadata=who, timeout=WAIT_S)


def drain(gateway: Gateway, node: str, who: Any, *, undo: bool = False) -> Any:
    return gateway.fleet.DrainNode(fleet_pb2.DrainNodeRequest(node_id=node, undo=undo), metadata=who, timeout=WAIT_S)


async def classes(gateway: Gateway) -> dict[str, int]:
    """Class of every request by its inner id."""
    listing = await gateway.fleet.ListRequests(fleet_pb2.ListRequestsRequest(), metadata=BOB, timeout=WAIT_S)
    return {row.request_id: int(row.priority) for row in listing.requests}


async def test_keys_decide_who_may_nice_drain_and_look(scheduler: SchedulerProcess, worker: FakeWorker) -> None:
    nobody = (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    async with running(address(scheduler)) as gateway:
        await gateway.ready()
        async with asking(gateway, "mine"):
            for who in ((), (("authorization", "Bearer wrong"),)):
                assert await refused(nice(gateway, "mine", BATCH, who)) == nobody
                assert await refused(drain(gateway, "w1", who)) == nobody
                assert await refused(gateway.fleet.GetLoad(fleet_pb2.GetLoadRequest(), metadata=who)) == nobody
            assert await refused(nice(gateway, "alice/mine", BATCH, BOB)) == DENIED
            assert await refused(nice(gateway, "mine", INTERACTIVE, ALICE)) == DENIED
            assert await refused(nice(gateway, "other", BATCH, ALICE)) == MISSING
            assert await refused(nice(gateway, "other", BATCH, OPERATOR)) == MISSING
            assert await refused(nice(gateway, "", BATCH, OPERATOR)) == INVALID
            assert await refused(nice(gateway, "mine", 0, OPERATOR)) == INVALID
            assert await refused(drain(gateway, "w1", ALICE)) == DENIED
            assert await refused(drain(gateway, "w9", ALICE)) == DENIED
            assert await refused(drain(gateway, "w1", ALICE, undo=True)) == DENIED
            assert await refused(drain(gateway, "w9", OPERATOR)) == MISSING
            assert await refused(drain(gateway, "", OPERATOR)) == INVALID
            assert not worker.sim.draining
            assert await classes(gateway) == {"alice/mine": STANDARD}
            assert (await nice(gateway, "mine", BATCH, ALICE)).before == STANDARD
            assert await refused(nice(gateway, "mine", STANDARD, ALICE)) == DENIED
            assert (await nice(gateway, "alice/mine", INTERACTIVE, OPERATOR)).before == BATCH
            load = await gateway.fleet.GetLoad(fleet_pb2.GetLoadRequest(), metadata=BOB, timeout=WAIT_S)
            assert [(q.priority, q.tenant, q.running) for q in load.queues if q.running] == [(INTERACTIVE, "alice", 1)]
            assert (await drain(gateway, "w1", OPERATOR)).running == 1
            await until(lambda: worker.sim.draining)
            assert (await drain(gateway, "w1", OPERATOR, undo=True)).running == 1
            await until(lambda: not worker.sim.draining)


async def test_a_changed_class_outlives_the_leader(
    open_scheduler: OpenScheduler, worker: FakeWorker, etcd: EtcdClient
) -> None:
    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as stack:
        leader = await first.enter_async_context(open_scheduler("s1"))
        await until(lambda: leader.seat.reign is not None)
        standby = await stack.enter_async_context(open_scheduler("s2"))
        gateway = await stack.enter_async_context(running(address(leader), address(standby)))
        await gateway.ready()
        await stack.enter_async_context(asking(gateway, "moved"))
        await stack.enter_async_context(asking(gateway, "other"))
        await nice(gateway, "alice/moved", BATCH, OPERATOR)
        await until(lambda: worker.sim.running["alice/moved"].request.priority == BATCH)
        term = gateway.link.term
        await first.aclose()
        await eventually(lambda: gateway.link.connected and gateway.link.term > term)
        await until(lambda: len(worker.sim.running) == 2 and worker.terms[-1] > term)
        assert await classes(gateway) == {"alice/moved": BATCH, "alice/other": STANDARD}
        await until(lambda: worker.sim.running["alice/moved"].epoch[0] > term)
        assert worker.sim.running["alice/moved"].request.priority == BATCH


async def test_only_operators_promise_and_anybody_may_ask_why(scheduler: SchedulerProcess, worker: FakeWorker) -> None:
    spec = fleet_pb2.Allocation(name="p", model=fleet_pb2.ModelReplicas(model="m", min_replicas=1))

    def promise(who: Any) -> Any:
        request = fleet_pb2.SetAllocationRequest(allocation=spec)
        return gateway.fleet.SetAllocation(request, metadata=who, timeout=WAIT_S)

    def withdraw(who: Any) -> Any:
        return gateway.fleet.DeleteAllocation(fleet_pb2.DeleteAllocationRequest(name="p"), metadata=who, timeout=WAIT_S)

    def promises(who: Any) -> Any:
        return gateway.fleet.ListAllocations(fleet_pb2.ListAllocationsRequest(), metadata=who, timeout=WAIT_S)

    def explain(name: str, who: Any) -> Any:
        return gateway.fleet.Explain(fleet_pb2.ExplainRequest(id=name), metadata=who, timeout=WAIT_S)

    nobody = (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    async with running(address(scheduler)) as gateway:
        await gateway.ready()
        for call in (promise(()), withdraw(()), promises(()), explain("m", ())):
            assert await refused(call) == nobody
        assert await refused(promise(ALICE)) == DENIED
        assert (await promise(OPERATOR)).allocation.revision
        assert await refused(withdraw(ALICE)) == DENIED
        assert [status.allocation.name for status in (await promises(ALICE)).allocations] == ["p"]
        assert (await explain("p", ALICE)).kind == "allocation"
        assert (await explain("m", BOB)).kind == "model"
        async with asking(gateway, "mine"):
            assert (await explain("mine", ALICE)).kind == "request"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await explain("nothing", ALICE)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        assert "'nothing'" in str(unknown.value.details())
        assert await refused(explain("", ALICE)) == INVALID
        assert (await withdraw(OPERATOR)).was_there
        assert not (await withdraw(OPERATOR)).was_there
