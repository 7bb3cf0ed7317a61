"""What people see and order: nodes, requests, load, kill, nice, drain, traces; and files of models for gateways."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import pytest

from llmos.clock import SystemClock
from llmos.errors import InvalidRequest, LlmosError, NotFound, NotLeader, PermissionDenied
from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2, requests_pb2, requests_pb2_grpc
from llmos.rpc import error_from_rpc, open_channel
from llmos.telemetry import Telemetry, trace_headers, trace_id_hex
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler.process import SchedulerProcess
from tests.fakes.contract import make_request
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import FakeWorker, worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until

INTERACTIVE, STANDARD, BATCH = (
    fleet_pb2.PRIORITY_CLASS_INTERACTIVE,
    fleet_pb2.PRIORITY_CLASS_STANDARD,
    fleet_pb2.PRIORITY_CLASS_BATCH,
)
SERVICE = ()
OWNER = (("llmos-tenant", "t"), ("llmos-role", "user"))
STRANGER = (("llmos-tenant", "another"), ("llmos-role", "user"))
OPERATOR = (("llmos-tenant", "another"), ("llmos-role", "operator"))


def fleet(channel: grpc.aio.Channel) -> Any:
    return fleet_pb2_grpc.FleetStub(channel)


async def refusal(call: Any) -> LlmosError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def test_nodes_show_the_fleet(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with (
        open_scheduler("s1") as leader,
        worker_in(etcd, "w1", step_s=0.01),
        FakeGateway("g1", [address(leader)]) as gateway,
    ):
        await gateway.ready()
        await gateway.submit(make_request("r1", max_tokens=1000))
        async with open_scheduler("s2"):
            stub = fleet(gateway.channel)
            answer = await stub.ListNodes(fleet_pb2.ListNodesRequest())
            while len(answer.nodes) < 4:
                answer = await stub.ListNodes(fleet_pb2.ListNodesRequest())
        shown = [
            (node.id, fleet_pb2.NodeRole.Name(node.role), fleet_pb2.NodeState.Name(node.state)) for node in answer.nodes
        ]
        assert shown == [
            ("s1", "NODE_ROLE_SCHEDULER", "NODE_STATE_READY"),
            ("s2", "NODE_ROLE_SCHEDULER", "NODE_STATE_STANDBY"),
            ("g1", "NODE_ROLE_GATEWAY", "NODE_STATE_READY"),
            ("w1", "NODE_ROLE_WORKER", "NODE_STATE_READY"),
        ]
        worker = answer.nodes[3]
        assert worker.backend == "echo"
        assert worker.running == 1
        assert worker.models[0].total_blocks == 64
        assert worker.capacity.devices[0].id == "cpu"
        assert all(node.pid for node in answer.nodes[:2])
        assert answer.term == gateway.term


async def test_lost_worker_shows_as_lost_until_its_record_is_gone(
    scheduler: SchedulerProcess, etcd: EtcdClient
) -> None:
    async with FakeWorker("w1") as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        lease = await worker.register(etcd)
        await gateway.ready()
        worker.lease = None
        await worker.kill()
        stub = fleet(gateway.channel)
        states = set()
        while True:
            answer = await stub.ListNodes(fleet_pb2.ListNodesRequest())
            workers = [node for node in answer.nodes if node.role == fleet_pb2.NODE_ROLE_WORKER]
            if not workers:
                break
            states.add(workers[0].state)
            if workers[0].state == fleet_pb2.NODE_STATE_LOST:
                await lease.revoke()
        assert fleet_pb2.NODE_STATE_LOST in states


async def test_requests_are_listed_and_killed_by_who_may(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.01), FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        client = await gateway.submit(make_request("r1", prompt=7, max_tokens=1000))
        await gateway.until(lambda: len(client.tokens[0]) > 2)
        stub = fleet(gateway.channel)
        (row,) = (await stub.ListRequests(fleet_pb2.ListRequestsRequest())).requests
        assert (row.request_id, row.tenant, row.model, row.worker, row.attempt) == ("r1", "t", "m", "w1", 1)
        assert row.state == fleet_pb2.REQUEST_STATE_DECODE
        assert row.tokens_in == 7
        assert row.tokens_out > 2
        kill = fleet_pb2.KillRequestRequest(request_id="r1")
        assert isinstance(await refusal(stub.KillRequest(kill, metadata=STRANGER)), PermissionDenied)
        assert (await stub.KillRequest(kill, metadata=OPERATOR)).was_running
        await gateway.ended(client)
        assert client.error == "cancelled"
        assert not (await stub.KillRequest(kill)).was_running


async def test_standby_answers_not_leader(open_scheduler: OpenScheduler) -> None:
    async with open_scheduler("s1") as leader:
        await until(lambda: leader.seat.reign is not None)
        async with open_scheduler("s2") as standby, open_channel(address(standby)) as channel:
            stub = fleet(channel)
            for call in (
                stub.ListNodes(fleet_pb2.ListNodesRequest()),
                stub.GetLoad(fleet_pb2.GetLoadRequest()),
                stub.DrainNode(fleet_pb2.DrainNodeRequest(node_id="w1")),
                stub.SetRequestPriority(fleet_pb2.SetRequestPriorityRequest(request_id="r", priority=BATCH)),
            ):
                error = await refusal(call)
                assert error.code == NotLeader.code or "lead" in error.message


async def test_trace_of_a_migrated_request(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    telemetry = Telemetry("gateway", "g1", clock=SystemClock())
    root = telemetry.start("chat m", attributes={"llmos.request_id": "r1"})
    request = make_request("r1", max_tokens=100)
    request.trace.traceparent, request.trace.tracestate = trace_headers(root)
    async with (
        worker_in(etcd, "w1", step_s=0.01) as victim,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        client = await gateway.submit(request)
        await gateway.until(lambda: len(client.tokens[0]) > 5)
        execute = fleet_pb2.Span(
            trace_id=bytes.fromhex(trace_id_hex(root)), span_id=b"worker01", name="execute", service="worker"
        )
        async with worker_in(etcd, "w2") as heir:
            await until(lambda: bool(heir.terms))
            heir.spans.append(execute)
            await victim.kill()
            await gateway.ended(client)
            telemetry.finish(root)
            await gateway.send_spans(telemetry.drain())
            await until(lambda: len(scheduler.ring.get("r1")) == 10)
        spans = (await fleet(gateway.channel).GetTrace(fleet_pb2.GetTraceRequest(id="r1"))).spans
        by_trace = (await fleet(gateway.channel).GetTrace(fleet_pb2.GetTraceRequest(id=trace_id_hex(root)))).spans
        missing = await refusal(fleet(gateway.channel).GetTrace(fleet_pb2.GetTraceRequest(id="nothing")))
    assert isinstance(missing, NotFound)
    assert [span.span_id for span in spans] == [span.span_id for span in by_trace]
    stages = ["queue", "attempt", "prefill", "decode"]
    assert sorted(span.name for span in spans) == sorted(["chat m", "execute", *stages, *stages])
    (top,) = [span for span in spans if not span.parent_span_id and span.service == "gateway"]
    first, second = [span for span in spans if span.name == "attempt"]
    assert {first.parent_span_id, second.parent_span_id} == {top.span_id}
    assert list(second.linked_span_ids) == [first.span_id]
    assert first.error.startswith("worker lost")
    assert not second.error
    assert (first.attributes["llmos.worker"], second.attributes["llmos.worker"]) == ("w1", "w2")
    inner = [span for span in spans if span.name in ("prefill", "decode")]
    assert [span.parent_span_id for span in inner] == [first.span_id] * 2 + [second.span_id] * 2
    headers = heir.dispatches[0].trace.traceparent.split("-")
    assert headers[1:3] == [trace_id_hex(root), second.span_id.hex()]


async def test_blob_is_relayed_and_verified(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    good, lie = b"{}" * 5000, b"not what it says"
    worker = FakeWorker("w1")
    record = worker.record

    def with_files() -> registry_pb2.WorkerRecord:
        changed = record()
        changed.models[0].model.tokenizer_hash = hashlib.sha256(good).hexdigest()
        changed.models[0].model.chat_template_hash = "0" * 64
        return changed

    worker.record = with_files  # type: ignore[method-assign]
    worker.files = {hashlib.sha256(good).hexdigest(): good, "0" * 64: lie}
    async with worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await worker.register(etcd)
        await gateway.ready()
        stub: Any = requests_pb2_grpc.RequestsStub(gateway.channel)

        async def fetch(sha256: str) -> bytes:
            call = stub.FetchBlob(requests_pb2.FetchBlobRequest(sha256=sha256))
            return b"".join([answer.data async for answer in call])

        assert await fetch(hashlib.sha256(good).hexdigest()) == good
        worker.files.clear()
        assert await fetch(hashlib.sha256(good).hexdigest()) == good
        for wrong, code in (("0" * 64, "unavailable"), ("f" * 64, "not_found")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fetch(wrong)
            assert error_from_rpc(caught.value).code == code


async def test_a_request_changes_its_class_for_who_may(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.05) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        client = await gateway.submit(make_request("r1", max_tokens=1000))
        await gateway.until(lambda: len(client.tokens[0]) > 2)
        stub = fleet(gateway.channel)

        def move(to: int, who: Any = SERVICE, name: str = "r1") -> Any:
            request = fleet_pb2.SetRequestPriorityRequest(request_id=name, priority=to)  # type: ignore[arg-type]
            return stub.SetRequestPriority(request, metadata=who)

        assert isinstance(await refusal(move(BATCH, STRANGER)), PermissionDenied)
        assert isinstance(await refusal(move(INTERACTIVE, OWNER)), PermissionDenied)
        assert isinstance(await refusal(move(BATCH, OWNER, "r9")), NotFound)
        assert isinstance(await refusal(move(0, OPERATOR)), InvalidRequest)
        assert isinstance(await refusal(move(9, OPERATOR)), InvalidRequest)
        assert not [command for command in worker.commands if command.WhichOneof("order") == "set_priority"]
        assert (await move(BATCH, OWNER)).before == STANDARD
        await until(lambda: worker.sim.running["r1"].request.priority == BATCH)
        await gateway.until(lambda: client.request.priority == BATCH)
        (row,) = (await stub.ListRequests(fleet_pb2.ListRequestsRequest())).requests
        assert row.priority == BATCH
        assert isinstance(await refusal(move(STANDARD, OWNER)), PermissionDenied)
        assert (await move(INTERACTIVE, OPERATOR)).before == BATCH
        assert (await move(STANDARD)).before == INTERACTIVE


async def test_only_operators_drain_workers(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with (
        worker_in(etcd, "w1", step_s=0.05) as first,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        client = await gateway.submit(make_request("r1", max_tokens=900))
        await gateway.until(lambda: len(client.tokens[0]) > 2)
        async with worker_in(etcd, "w2") as second:
            await until(lambda: bool(second.terms))
            stub = fleet(gateway.channel)

            def drain(node: str, who: Any = OPERATOR, *, undo: bool = False) -> Any:
                return stub.DrainNode(fleet_pb2.DrainNodeRequest(node_id=node, undo=undo), metadata=who)

            for who in (OWNER, STRANGER):
                assert isinstance(await refusal(drain("w1", who)), PermissionDenied)
                assert isinstance(await refusal(drain("w9", who)), PermissionDenied)
                assert isinstance(await refusal(drain("w1", who, undo=True)), PermissionDenied)
            assert isinstance(await refusal(drain("w9")), NotFound)
            assert isinstance(await refusal(drain("s1")), NotFound), "no worker"
            assert not first.sim.draining
            assert (await drain("w1")).running == 1
            await gateway.until(lambda: client.epoch[1] == 2)
            assert [dispatch.request.request_id for dispatch in second.dispatches] == ["r1"]
            assert (await stub.GetLoad(fleet_pb2.GetLoadRequest())).counters["migrations"] == 1
            assert (await drain("w1", undo=True)).running == 0
            await until(lambda: not first.sim.draining)


async def test_load_shows_who_waits_and_who_runs(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with (
        worker_in(etcd, "w1", step_s=0.05, blocks=16) as worker,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        runs = await gateway.submit(make_request("r1", prompt=10, max_tokens=1000, tenant_weight=4))
        await gateway.until(lambda: len(runs.tokens[0]) > 2)
        await gateway.submit(make_request("r2", prompt=10, max_tokens=500, tenant="u", priority=BATCH))
        stub = fleet(gateway.channel)
        load = await stub.GetLoad(fleet_pb2.GetLoadRequest(), metadata=STRANGER)
        while len(load.queues) < 2 or not load.workers[0].tokens_per_s:
            load = await stub.GetLoad(fleet_pb2.GetLoadRequest(), metadata=STRANGER)
        assert [(q.priority, q.tenant, q.waiting, q.running, q.weight) for q in load.queues] == [
            (STANDARD, "t", 0, 1, 4),
            (BATCH, "u", 1, 0, 1),
        ]
        assert load.queues[1].waiting_tokens == 510
        assert load.queues[0].tokens_per_s > 0
        (model,) = load.models
        assert (model.name, model.replicas, model.waiting, model.running) == ("m", 1, 1, 1)
        assert 0 < model.gap.p50_ms <= model.gap.p99_ms
        assert [(w.node_id, w.running) for w in load.workers] == [("w1", 1)]
        assert {node.id for node in load.nodes} == {"s1", "g1", "w1"}
        assert load.term == gateway.term
        assert len(worker.dispatches) == 1
