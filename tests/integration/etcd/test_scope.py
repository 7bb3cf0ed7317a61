"""What a client leaves behind: nothing."""

from __future__ import annotations

import asyncio
import contextlib

from llmos.etcd import Election
from tests.fakes.etcd_server import EtcdServer
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.etcd.collect import eventually
from tests.integration.etcd.conftest import OpenClient


async def test_no_task_outlives_the_client(server: EtcdServer, open_client: OpenClient) -> None:
    before = asyncio.all_tasks()
    async with open_client() as client:
        await client.lease(5)
        watch = client.watch("/w/")
        await anext(watch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(watch)
        observer = Election(client, "/leader", b"").observe()
        assert await anext(observer) is None
    await _only(before)


async def test_no_task_outlives_a_client_of_a_frozen_server(server: EtcdServer, open_client: OpenClient) -> None:
    async with TcpRelay(server.address) as relay:
        async with open_client(relay.address, call_timeout_s=0.3, watch_idle_s=0.1) as client:
            await client.lease(5)
            watch = client.watch("/w/")
            await anext(watch)
            before = asyncio.all_tasks()
            relay.fall_silent()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await anext(watch)
        await _only(before)


async def _only(before: set[asyncio.Task[object]]) -> None:
    """gRPC's own tasks may see the end of their calls a moment later; ours must be over."""
    await eventually(lambda: not any("_cygrpc" in repr(task) for task in asyncio.all_tasks() - before))
    assert asyncio.all_tasks() <= before
