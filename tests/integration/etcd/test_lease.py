"""The holder of a lease knows that it lost it no later than the server could give it away."""

from __future__ import annotations

import asyncio

import pytest

from llmos.errors import EtcdUnavailable, LeaseLost
from llmos.etcd import EtcdClient
from tests.fakes.etcd_server import EtcdServer
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.etcd.collect import Collector, eventually
from tests.integration.etcd.conftest import OpenClient

_TTL_S = 2


async def test_kept_alive_beyond_its_ttl(client: EtcdClient) -> None:
    async with await client.lease(_TTL_S) as lease:
        await client.put("k", b"v", lease.id)
        granted_until = lease.deadline()
        await eventually(lambda: client.clock.monotonic() >= granted_until)
        assert not lease.is_lost()
        assert lease.deadline() > granted_until
        found = await client.get("k")
        assert found is not None
        assert found.lease == lease.id
    assert await client.get("k") is None


async def test_expiry_removes_the_key_when_the_holder_vanishes(client: EtcdClient, open_client: OpenClient) -> None:
    async with open_client() as holder, Collector(client.watch("k")) as seen:
        lease = await holder.lease(_TTL_S)
        await holder.put("k", b"v", lease.id)
        await seen.until("k", b"v")
        await lease.close()
        assert lease.is_lost()
        await seen.until("k", None)
        with pytest.raises(LeaseLost):
            await holder.put("k", b"v", lease.id)


async def test_revoked_behind_the_holders_back(server: EtcdServer, client: EtcdClient) -> None:
    lease = await client.lease(_TTL_S)
    await asyncio.to_thread(server.ctl, "lease", "revoke", f"{lease.id:x}")
    async with asyncio.timeout(20):
        await lease.lost.wait()
    assert lease.is_lost()
    await lease.revoke()


async def test_leaving_the_client_ends_renewal_without_revoking(client: EtcdClient, open_client: OpenClient) -> None:
    async with open_client() as holder:
        lease = await holder.lease(30)
        await holder.put("k", b"v", lease.id)
    assert lease.lost.is_set()
    assert await client.get("k") is not None


async def test_survives_a_restart_of_the_server(server: EtcdServer, client: EtcdClient) -> None:
    async with await client.lease(6) as lease:
        await client.put("k", b"v", lease.id)
        before = lease.deadline()
        await asyncio.to_thread(server.restart)
        await eventually(lambda: lease.deadline() > before)
        assert not lease.is_lost()
        found = await client.get("k", timeout_s=10)
        assert found is not None
        assert found.lease == lease.id


async def test_server_frozen_longer_than_the_ttl(server: EtcdServer, open_client: OpenClient) -> None:
    """The holder gives up by its own clock while the server cannot say a word; all recovers after SIGCONT."""
    async with (
        open_client(call_timeout_s=1.0, watch_idle_s=0.3) as client,
        Collector(client.watch("/w/")) as seen,
    ):
        lease = await client.lease(_TTL_S)
        await client.put("/w/held", b"v", lease.id)
        await seen.until("/w/held", b"v")
        await asyncio.to_thread(server.freeze)
        async with asyncio.timeout(30):
            await lease.lost.wait()
        assert client.clock.monotonic() >= lease.deadline()
        with pytest.raises(EtcdUnavailable):
            await client.get("/w/held")
        await asyncio.to_thread(server.thaw)
        await seen.until("/w/held", None)
        await client.put("/w/after", b"v", timeout_s=10)
        await seen.until("/w/after", b"v")
        async with await client.lease(_TTL_S, timeout_s=10) as fresh:
            assert not fresh.is_lost()
        assert lease.is_lost(), "a lost lease came back"
        revisions = [event.mod_revision for event in seen.history]
        assert revisions == sorted(set(revisions))


async def test_holder_gives_up_before_the_server_gives_away(server: EtcdServer, open_client: OpenClient) -> None:
    """Only the holder is cut off: the server goes on, and hands the key to the next one in time."""
    async with (
        TcpRelay(server.address) as relay,
        open_client(relay.address, call_timeout_s=1.0) as holder,
        open_client() as client,
        client.watch("k") as watch,
    ):
        await anext(watch)
        lease = await holder.lease(_TTL_S)
        await holder.put("k", b"v", lease.id)
        assert (await anext(watch)).events[0].value == b"v"
        relay.fall_silent()
        async with asyncio.timeout(30):
            expired = await anext(watch)
        seen_at = client.clock.monotonic()
        assert [event.value for event in expired.events] == [None]
        assert lease.deadline() <= seen_at, "the server gave the lease away while the holder relied on it"
        assert lease.is_lost()
