"""Counters of service outlive a leader; etcd away costs nothing but freshness."""

from __future__ import annotations

import asyncio
import contextlib

from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2
from scheduler import registry, service_log
from tests.fakes.contract import MODEL, VERSION, make_request
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until

KEY = (MODEL, VERSION)


async def record(etcd: EtcdClient) -> registry_pb2.ServiceRecord:
    found = await etcd.get(registry.SERVICE)
    return registry_pb2.ServiceRecord() if found is None else registry.service_record(found.value)


async def written(etcd: EtcdClient, tenant: str) -> float:
    """A tenant's counter in etcd."""
    return sum(entry.virtual_tokens for entry in (await record(etcd)).tenants if entry.tenant == tenant)


async def test_a_new_leader_starts_from_the_counters(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        leader = await first.enter_async_context(open_scheduler("s1"))
        await until(lambda: leader.seat.reign is not None)
        standby = await stack.enter_async_context(open_scheduler("s2"))
        await stack.enter_async_context(worker_in(etcd, "w1"))
        gateway = await stack.enter_async_context(FakeGateway("g1", [address(leader), address(standby)]))
        await gateway.ready()
        client = await gateway.submit(make_request("r1", prompt=40, max_tokens=60, tenant="a"))
        await gateway.ended(client)
        reign = leader.seat.reign
        assert reign is not None
        account = reign.core.state.waiting.queue(KEY).account(1, "a", 1)
        assert account.virtual == 100.0
        async with asyncio.timeout(20):
            while await written(etcd, "a") != 100.0:  # noqa: ASYNC110 - nothing signals what comes to lie in etcd
                await asyncio.sleep(0.05)
        assert (await record(etcd)).term == reign.term
        await first.aclose()
        await until(lambda: standby.seat.reign is not None)
        heir = standby.seat.reign
        assert heir is not None
        await gateway.ready()
        client = await gateway.submit(make_request("r2", prompt=10, max_tokens=10, tenant="a"))
        await gateway.ended(client)
        account = heir.core.state.waiting.queue(KEY).account(1, "a", 1)
        await until(lambda: account.virtual == 120.0)


async def test_only_the_leader_of_the_term_writes(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with open_scheduler("s1") as leader:
        await until(lambda: leader.seat.reign is not None)
        reign = leader.seat.reign
        assert reign is not None
        counters = [registry_pb2.TenantService(model=MODEL, tenant="a", virtual_tokens=5)]
        stale = service_log.ServiceLog(etcd, lambda: reign.term - 1, lambda: counters, lambda event: None)
        right = service_log.ServiceLog(etcd, lambda: reign.term, lambda: counters, lambda event: None)
        assert not await stale.write(counters)
        assert await etcd.get(registry.SERVICE) is None
        assert await right.write(counters)
        assert await etcd.get(registry.SERVICE) is not None
