"""The ledger with real processes: promises in a real etcd, real workers that take their time to load."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llmos.errors import Conflict, LlmosError, ModelNotFound, NotFound, NotLeader, Unavailable
from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2
from llmos.rpc import error_from_rpc, open_channel
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler import registry
from scheduler.allocation.intent import Intent
from scheduler.process import SchedulerProcess
from tests.fakes.etcd_server import EtcdServer
from tests.integration.gateway_grpc.gateway import Gateway, running
from tests.integration.scheduler.conftest import OpenScheduler, until

pytestmark = pytest.mark.timeout(240)
GIB = 2**30
LOADED = fleet_pb2.MODEL_STATE_LOADED


class EchoWorkers:
    """Worker processes with the echo backend, killed at the end."""

    def __init__(self, folder: Path, etcd: str, undo: ExitStack) -> None:
        self._folder, self._etcd, self._undo = folder, etcd, undo

    def start(self, name: str, *models: str, memory: int = 4 * GIB, load_s: float = 0.2, speed: float = 0) -> None:
        command = [
            *(sys.executable, "-m", "worker", "--backend", "echo", "--id", name, "--etcd-endpoints", self._etcd),
            *(
                "--echo-load-s",
                str(load_s),
                "--echo-tokens-per-second",
                str(speed),
                "--memory-limit",
                str(memory),
                "--drain-s",
                "0.1",
                "--model",
                ",".join(models),
            ),
        ]
        log = (self._folder / f"{name}.log").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        self._undo.callback(log.close)
        self._undo.callback(process.wait, timeout=10)
        self._undo.callback(process.kill)


@pytest.fixture
def workers(tmp_path: Path, etcd_server: EtcdServer) -> Iterator[EchoWorkers]:
    with ExitStack() as undo:
        yield EchoWorkers(tmp_path, etcd_server.address, undo)


@pytest.fixture
async def quick(open_scheduler: OpenScheduler) -> AsyncIterator[SchedulerProcess]:
    """A scheduler that is in a hurry to unload."""
    async with open_scheduler("s1", replica_down_s=1.0, replica_idle_s=1.0, unload_drain_s=1.0) as process:
        await until(lambda: process.seat.reign is not None)
        yield process


class Fleet:
    """The Fleet API as a gateway calls it."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=10)
        except Exception as error:
            typed: LlmosError = error_from_rpc(error)  # type: ignore[arg-type]
            raise typed from error

    async def promise(self, allocation: fleet_pb2.Allocation) -> fleet_pb2.Allocation:
        answer = await self.call("SetAllocation", fleet_pb2.SetAllocationRequest(allocation=allocation))
        written: fleet_pb2.Allocation = answer.allocation
        return written

    async def loaded(self, model: str) -> list[str]:
        nodes = (await self.call("ListNodes", fleet_pb2.ListNodesRequest())).nodes
        return sorted(node.id for node in nodes for held in node.models if (held.name, held.state) == (model, LOADED))

    async def workers_of(self, name: str) -> list[str]:
        answer = await self.call("ListAllocations", fleet_pb2.ListAllocationsRequest())
        return [worker for one in answer.allocations if one.allocation.name == name for worker in one.workers]


@pytest.fixture
async def fleet(quick: SchedulerProcess) -> AsyncIterator[Fleet]:
    channel = open_channel(f"127.0.0.1:{quick.port}")
    yield Fleet(fleet_pb2_grpc.FleetStub(channel))
    await channel.close()


async def eventually(what: Callable[[], Any], expected: object) -> None:
    """Wait until the awaited value is the expected one."""
    async with asyncio.timeout(100):
        while await what() != expected:  # noqa: ASYNC110 - processes are waited for
            await asyncio.sleep(0.05)


def replicas(
    name: str, model: str, least: int, most: int, target_requests: int = 0, **more: Any
) -> fleet_pb2.Allocation:
    spec = fleet_pb2.ModelReplicas(model=model, min_replicas=least, max_replicas=most, target_requests=target_requests)
    return fleet_pb2.Allocation(name=name, model=spec, **more)


async def test_a_best_effort_job_gives_way_to_a_guaranteed_model(
    fleet: Fleet, workers: EchoWorkers, etcd: EtcdClient
) -> None:
    await fleet.promise(replicas("later", "b", 0, 1))
    workers.start("w1", "a=1GiB", "b=1GiB")
    await eventually(lambda: fleet.loaded("a"), ["w1"])
    job = fleet_pb2.JobResources(memory_bytes=GIB)
    spare = fleet_pb2.Allocation(name="soak", job=job, resource_class=fleet_pb2.RESOURCE_CLASS_BEST_EFFORT)
    await fleet.promise(spare)
    await eventually(lambda: fleet.workers_of("soak"), ["w1"])
    await until_written(etcd, lambda held: ("", "soak") in held)
    firm = replicas("later", "b", 1, 1, resource_class=fleet_pb2.RESOURCE_CLASS_GUARANTEED)
    await fleet.promise(firm)
    await eventually(lambda: fleet.loaded("b"), ["w1"])
    assert await fleet.workers_of("soak") == []
    assert await fleet.loaded("a") == ["w1"]
    await until_written(etcd, lambda held: ("b", "later") in held and ("", "soak") not in held)


async def until_written(etcd: EtcdClient, holds: Callable[[set[tuple[str, str]]], bool]) -> None:
    async def held() -> bool:
        row = await etcd.get(registry.ASSIGNMENTS + "w1")
        record = registry.read("", row.value, registry_pb2.AssignmentRecord()) if row is not None else None
        return record is not None and holds({(one.model, one.allocation) for one in record.assignments})

    await eventually(held, True)


async def test_replicas_come_and_go_with_their_promise(fleet: Fleet, workers: EchoWorkers) -> None:
    for name in ("w1", "w2"):
        workers.start(name, "a=1GiB", load_s=0.5)
    await eventually(lambda: fleet.loaded("a"), ["w1", "w2"])
    written = await fleet.promise(replicas("p", "a", 1, 1))
    await eventually(lambda: fleet.workers_of("p"), ["w1"])
    answer = await fleet.call("Explain", fleet_pb2.ExplainRequest(id="a"))
    assert (answer.kind, {found.subject: found.code for found in answer.findings}["w1"]) == ("model", "running")
    await fleet.promise(replicas("p", "a", 2, 2, revision=written.revision))
    await eventually(lambda: fleet.loaded("a"), ["w1", "w2"])
    with pytest.raises(Conflict, match="changed meanwhile"):
        await fleet.promise(replicas("p", "a", 1, 2, revision=written.revision))
    with pytest.raises(Conflict, match="could never stand"):
        await fleet.promise(replicas("p", "a", 3, 3))
    with pytest.raises(ModelNotFound):
        await fleet.promise(replicas("q", "nobody", 1, 1))
    with pytest.raises(NotFound):
        await fleet.call("Explain", fleet_pb2.ExplainRequest(id="nobody"))
    assert (await fleet.call("DeleteAllocation", fleet_pb2.DeleteAllocationRequest(name="p"))).was_there
    assert not (await fleet.call("DeleteAllocation", fleet_pb2.DeleteAllocationRequest(name="p"))).was_there


async def keep_asking(gateway: Gateway, requests: int) -> None:
    """So many at a time: as one ends the next one comes. Fails if one of them does."""

    async def one_after_another() -> None:
        while True:
            stream = await gateway.chat(max_tokens=20)
            async with asyncio.timeout(60):
                async for _ in stream.events():
                    pass

    async with asyncio.TaskGroup() as group:
        for _ in range(requests):
            group.create_task(one_after_another())


async def test_replicas_follow_a_step_of_load_without_flapping(
    quick: SchedulerProcess, fleet: Fleet, workers: EchoWorkers
) -> None:
    """From one request at a time to 32, with four workers that are meant to run eight each, and back to one."""
    counts: list[int] = []

    async def loaded() -> int:
        now = len(await fleet.loaded("echo"))
        if not counts or now != counts[-1]:
            counts.append(now)
        return now

    await fleet.promise(replicas("p", "echo", 1, 4, target_requests=8))
    for name in ("w1", "w2", "w3", "w4"):
        workers.start(name, "echo=1GiB", load_s=2.0, speed=10)
    await eventually(loaded, 1)
    await eventually(lambda: _connected(fleet), 4)
    async with running(f"127.0.0.1:{quick.port}") as gateway:
        await gateway.ready()
        for requests, wanted, longer_s in ((32, 4, 8.0), (1, 1, 4.0)):
            began = time.monotonic()
            asking = asyncio.create_task(keep_asking(gateway, requests))
            await eventually(loaded, wanted)
            logging.getLogger(__name__).info("%d replicas after %.2f s", wanted, time.monotonic() - began)
            end = time.monotonic() + longer_s
            while time.monotonic() < end:
                assert await loaded() == wanted
                await asyncio.sleep(0.05)
            assert not asking.done()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    rise, fall = counts[: counts.index(4) + 1], counts[counts.index(4) :]
    assert rise == sorted(rise), f"replicas went while load rose: {counts}"
    assert fall == sorted(fall, reverse=True), f"replicas came while load fell: {counts}"


async def _connected(fleet: Fleet) -> int:
    return len(
        [
            node
            for node in (await fleet.call("ListNodes", fleet_pb2.ListNodesRequest())).nodes
            if node.role == fleet_pb2.NODE_ROLE_WORKER
        ]
    )


async def _written(intent: Intent) -> None:
    while intent.waiting:  # noqa: ASYNC110 - etcd is waited for
        await asyncio.sleep(0.01)


async def test_what_a_deposed_leader_still_writes_is_refused(
    fleet: Fleet, quick: SchedulerProcess, etcd: EtcdClient
) -> None:
    await fleet.promise(replicas("p", "a", 1, 1, pool="later"))
    row = await etcd.get(registry.ALLOCATIONS + "p")
    assert row is not None
    assert json.loads(row.value)["allocation"]["pool"] == "later"
    leader = await etcd.get(registry.LEADER)
    assert leader is not None
    late = Intent(etcd, lambda event: None, lambda: 1)
    term = leader.create_revision
    now = Intent(etcd, lambda event: None, lambda: term)
    record = registry_pb2.AssignmentRecord(worker_id="w9", assignments=[registry_pb2.Assignment(model="a")])
    for intent, written in ((late, False), (now, True)):
        intent.assign(record)
        writer = asyncio.create_task(intent.write())
        await asyncio.wait_for(_written(intent), 20)
        writer.cancel()
        assert (await etcd.get(registry.ASSIGNMENTS + "w9") is not None) == written
    assert (late.refused, now.refused) == (1, 0)
    with pytest.raises(NotLeader):
        await late.delete("p")


async def test_without_etcd_nothing_is_promised_and_models_stay(
    fleet: Fleet, workers: EchoWorkers, etcd_server: EtcdServer
) -> None:
    workers.start("w1", "a=1GiB")
    await eventually(lambda: fleet.loaded("a"), ["w1"])
    await asyncio.to_thread(etcd_server.stop)
    with pytest.raises(Unavailable, match="etcd"):
        await fleet.promise(replicas("p", "a", 1, 1))
    assert await fleet.loaded("a") == ["w1"]
    await asyncio.to_thread(etcd_server.start)
