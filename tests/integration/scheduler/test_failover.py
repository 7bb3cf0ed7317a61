"""Leaders that die, freeze or lose etcd; standbys that take over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from llmos.etcd import EtcdClient
from llmos.rpc import open_channel
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler import registry
from scheduler.process import SchedulerProcess
from tests.fakes.contract import make_request
from tests.fakes.etcd_server import EtcdServer
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until


class Child:
    """`python -m scheduler` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextlib.asynccontextmanager
async def child_scheduler(name: str, etcd_address: str, folder: Path) -> AsyncIterator[Child]:
    """Started, serving, and killed at the end."""
    ready = folder / f"{name}.json"
    arguments = ["--id", name, "--port", "0", "--etcd-endpoints", etcd_address, "--ready-file", str(ready)]
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scheduler", *arguments, "--lease-ttl-s", "2", stdout=log, stderr=log
        )
    try:
        await until(lambda: ready.exists() or process.returncode is not None, 30.0)
        yield Child(process, json.loads(ready.read_text())["port"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_standby_says_who_leads_and_takes_over_when_the_leader_leaves(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        leader = await first.enter_async_context(open_scheduler("s1"))
        await until(lambda: leader.seat.reign is not None)
        standby = await stack.enter_async_context(open_scheduler("s2"))
        await until(lambda: standby.seat.leader_address == address(leader))
        worker = await stack.enter_async_context(worker_in(etcd, "w1", step_s=0.01))
        gateway = await stack.enter_async_context(FakeGateway("g1", [address(standby), address(leader)]))
        await gateway.ready()
        assert gateway.not_leader[0] == address(leader)
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=120)) for i in range(8)]
        await gateway.until(lambda: all(len(client.tokens[0]) > 5 for client in clients))
        before = gateway.term
        await first.aclose()
        await gateway.ended(*clients)
        assert [client.finished for client in clients] == [[True]] * 8
        assert gateway.term > before
        assert worker.terms[-1] == gateway.term
        assert standby.seat.reign is not None
        assert gateway.not_leader[-1] == address(standby), "a leader that leaves says who succeeds it"


async def test_leader_killed_under_streams(etcd_server: EtcdServer, etcd: EtcdClient, tmp_path: Path) -> None:
    async with (
        child_scheduler("s1", etcd_server.address, tmp_path) as leader,
        child_scheduler("s2", etcd_server.address, tmp_path) as standby,
        worker_in(etcd, "w1", step_s=0.02),
        worker_in(etcd, "w2", step_s=0.02),
        FakeGateway("g1", [leader.address, standby.address]) as gateway,
    ):
        await gateway.ready()
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=300)) for i in range(16)]
        await gateway.until(lambda: all(len(client.tokens[0]) > 3 for client in clients))
        leading = await leader_of(etcd)
        (leader if leading == "s1" else standby).signal(signal.SIGKILL)
        await gateway.ended(*clients, timeout_s=60)
        assert [client.finished for client in clients] == [[True]] * 16
        assert await leader_of(etcd) != leading


async def test_frozen_leader_is_refused_when_it_wakes(
    etcd_server: EtcdServer, etcd: EtcdClient, tmp_path: Path
) -> None:
    async with (
        child_scheduler("s1", etcd_server.address, tmp_path) as frozen,
        worker_in(etcd, "w1", step_s=0.02) as worker,
        FakeGateway("g1", [frozen.address]) as gateway,
    ):
        await gateway.ready()
        async with child_scheduler("s2", etcd_server.address, tmp_path) as heir:
            gateway.schedulers.append(heir.address)
            clients = [await gateway.submit(make_request(f"r{i}", max_tokens=400)) for i in range(8)]
            await gateway.until(lambda: all(len(client.tokens[0]) > 3 for client in clients))
            frozen.signal(signal.SIGSTOP)
            await until(lambda: len(worker.terms) == 2, 30.0)
            await gateway.disconnect()
            await gateway.until(lambda: gateway.term == worker.terms[-1])
            frozen.signal(signal.SIGCONT)
            await gateway.ended(*clients, timeout_s=60)
            assert [client.finished for client in clients] == [[True]] * 8
            assert worker.terms == sorted(worker.terms)
            assert await leader_of(etcd) == "s2"
            async with open_channel(frozen.address) as channel:
                await until_refused(channel)


async def leader_of(etcd: EtcdClient) -> str:
    """Id of the scheduler whose record is the election's value."""
    found = await etcd.get(registry.LEADER)
    return registry.scheduler_record(found.value).scheduler_id if found is not None else ""


async def until_refused(channel: grpc.aio.Channel) -> None:
    """Wait until the scheduler behind `channel` knows that it does not lead."""
    stub = fleet_pb2_grpc.FleetStub(channel)
    async with asyncio.timeout(20):
        while True:
            try:
                await stub.ListNodes(fleet_pb2.ListNodesRequest(), timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    return
            await asyncio.sleep(0.05)


async def test_etcd_gone_and_back_fails_no_request(
    etcd_server: EtcdServer, etcd: EtcdClient, scheduler: SchedulerProcess
) -> None:
    async with (
        worker_in(etcd, "w1", step_s=0.01) as one,
        worker_in(etcd, "w2", step_s=0.01),
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        assert scheduler.seat.reign is not None
        reign, term = scheduler.seat.reign, gateway.term
        old = [await gateway.submit(make_request(f"old{i}", max_tokens=200)) for i in range(4)]
        await asyncio.to_thread(etcd_server.stop)
        await until(lambda: not may_write(scheduler) and one.lease is not None and one.lease.is_lost())
        await gateway.disconnect()
        fresh = [await gateway.submit(make_request(f"new{i}", max_tokens=50)) for i in range(4)]
        await gateway.ended(*old, *fresh)
        assert all(client.finished == [True] for client in (*old, *fresh))
        await asyncio.to_thread(etcd_server.start)
        await etcd.delete_prefix("/llmos/v1/workers/")
        await until(lambda: not any(worker.registered for worker in reign.core.state.workers.values()))
        again = [await gateway.submit(make_request(f"again{i}", max_tokens=20)) for i in range(4)]
        await gateway.ended(*again)
        assert all(client.finished == [True] for client in again)
        await one.register(etcd)
        await until(lambda: reign.core.state.workers["w1"].registered)
        await until_leading(etcd, "s1")
        assert scheduler.seat.reign is reign
        assert reign.term >= term


def may_write(scheduler: SchedulerProcess) -> bool:
    """Whether it may write intent."""
    return scheduler.leadership is not None and scheduler.leadership.may_write_intent


async def until_leading(etcd: EtcdClient, scheduler_id: str) -> None:
    """Wait until etcd names this leader and its record."""
    async with etcd.watch("/llmos/v1/") as watch, asyncio.timeout(20):
        async for _ in watch:
            record = await etcd.get(registry.SCHEDULERS + scheduler_id)
            if record is not None and await leader_of(etcd) == scheduler_id:
                return


async def test_leader_keeps_its_term_when_only_the_lease_is_lost(
    etcd_server: EtcdServer, etcd: EtcdClient, scheduler: SchedulerProcess
) -> None:
    await until(lambda: scheduler.seat.reign is not None)
    reign = scheduler.seat.reign
    assert reign is not None
    term = reign.term
    before = await etcd.get(registry.LEADER)
    assert before is not None
    await asyncio.to_thread(etcd_server.freeze)
    await until(lambda: not may_write(scheduler))
    await asyncio.to_thread(etcd_server.thaw)
    await until(lambda: may_write(scheduler))
    after = await etcd.get(registry.LEADER)
    assert after is not None
    assert after.lease != before.lease
    assert scheduler.seat.reign is reign
    assert reign.term >= term


async def test_gateway_that_has_seen_a_higher_term_ends_the_reign(
    scheduler: SchedulerProcess, etcd: EtcdClient
) -> None:
    async with worker_in(etcd, "w1"), FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        first = scheduler.seat.reign
        assert first is not None
        for i in range(8):
            await etcd.put(f"/elsewhere/{i}", b"")
        gateway.term = first.term + 5
        await gateway.disconnect()
        await until(lambda: scheduler.seat.reign is not None and scheduler.seat.reign is not first)
        assert scheduler.seat.reign is not None
        assert scheduler.seat.reign.term > first.term
        client = await gateway.submit(make_request("r1"))
        await gateway.ended(client)


@pytest.mark.parametrize("worker_term", [10**9])
async def test_worker_that_has_seen_a_higher_term_ends_the_reign(
    open_scheduler: OpenScheduler, etcd: EtcdClient, worker_term: int
) -> None:
    async with open_scheduler() as scheduler, worker_in(etcd, "w1") as worker:
        await until(lambda: bool(worker.terms))
        first = scheduler.seat.reign
        worker.sim.highest_term = worker_term
        worker.break_stream()
        await until(lambda: scheduler.seat.reign is not first)
        assert worker.refused > 0


async def test_gateway_that_saw_another_leader_returns_to_the_first_once_it_won_again(
    scheduler: SchedulerProcess, etcd: EtcdClient
) -> None:
    async with worker_in(etcd, "w1"), FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        reign = scheduler.seat.reign
        assert reign is not None
        reign.raise_term(reign.term + 9)
        await until(lambda: reign.term > gateway.term)
        # Between the two terms it followed another leader, whose term it does not go below.
        gateway.term += 5
        await gateway.disconnect()
        await gateway.ended(await gateway.submit(make_request("r1")))
        assert gateway.term == reign.term


async def test_a_leader_on_ipv6_can_be_connected_to(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    async with open_scheduler("s1", host="::1") as leader:
        await until(lambda: leader.seat.reign is not None)
        found = await etcd.get(registry.SCHEDULERS + "s1")
        assert found is not None
        told = registry.scheduler_record(found.value).address
        assert told == f"[::1]:{leader.port}"
        async with FakeGateway("g1", [told]) as gateway:
            await gateway.until(lambda: gateway.term > 0)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
