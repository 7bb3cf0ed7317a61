"""With several endpoints, one of them dead or frozen, everything works through the other."""

from __future__ import annotations

import asyncio

import pytest

from llmos.errors import EtcdUnavailable
from llmos.etcd import Compare, Election, EtcdClient, Put
from tests.fakes.etcd_server import EtcdServer, free_port
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.etcd.collect import Collector, eventually
from tests.integration.etcd.conftest import OpenClient


async def use_everything(client: EtcdClient) -> None:
    """Each operation as the first one of its kind."""
    async with Collector(client.watch("/f/")) as seen:
        assert (await client.txn([Compare("/f/t", "version", "==", 0)], [Put("/f/t", b"1")])).succeeded
        assert await client.compare_and_swap("/f/c", 0, b"2")
        async with await client.lease(5) as lease:
            await client.put("/f/p", b"3", lease.id)
            await seen.until("/f/p", b"3")
            assert await Election(client, "/f/leader", b"me").campaign(lease) > 0
        await seen.until("/f/p", None)
        found = await client.get("/f/t")
        assert found is not None
        assert await client.delete("/f/t")
        await seen.until("/f/t", None)
        assert seen.state == {"/f/c": b"2"}


async def test_first_endpoint_dead(server: EtcdServer, open_client: OpenClient) -> None:
    """Everything works through the other one."""
    async with open_client(f"127.0.0.1:{free_port()}", server.address) as client:
        await use_everything(client)


async def test_first_endpoint_frozen_from_the_start(server: EtcdServer, open_client: OpenClient) -> None:
    """It accepts connections and never answers, as a stopped process does."""
    async with (
        TcpRelay(server.address, silent=True) as frozen,
        open_client(frozen.address, server.address) as client,
    ):
        await use_everything(client)


async def test_second_endpoint_frozen_does_not_matter(server: EtcdServer, open_client: OpenClient) -> None:
    async with (
        TcpRelay(server.address, silent=True) as frozen,
        open_client(server.address, frozen.address) as client,
    ):
        await use_everything(client)


async def test_endpoint_freezes_under_a_watch_and_a_lease(server: EtcdServer, open_client: OpenClient) -> None:
    async with (
        TcpRelay(server.address) as first,
        open_client(first.address, server.address, call_timeout_s=1.0, watch_idle_s=0.3) as client,
        open_client() as writer,
        Collector(client.watch("/f/")) as seen,
        await client.lease(3) as lease,
    ):
        await seen.until("/f/held", None)
        await client.put("/f/held", b"v", lease.id)
        await seen.until("/f/held", b"v")
        first.fall_silent()
        await writer.put("/f/a", b"1")
        await seen.until("/f/a", b"1")
        assert await client.get("/f/a") is not None
        held_until = lease.deadline()
        await eventually(lambda: client.clock.monotonic() >= held_until)
        assert not lease.is_lost()
        assert seen.snapshots == 1
        assert [event.key for event in seen.history] == ["/f/held", "/f/a"]


async def test_silent_watch_leaves_by_itself(server: EtcdServer, open_client: OpenClient) -> None:
    """The client does nothing but watch: no other call finds out that the endpoint is frozen."""
    async with (
        TcpRelay(server.address) as first,
        open_client(first.address, server.address, call_timeout_s=0.5, watch_idle_s=0.2) as client,
        open_client() as writer,
        Collector(client.watch("/f/")) as seen,
    ):
        await writer.put("/f/a", b"1")
        await seen.until("/f/a", b"1")
        first.fall_silent()
        await writer.put("/f/a", b"2")
        await seen.until("/f/a", b"2")
        assert seen.snapshots == 1


async def test_no_endpoint_answers_within_the_deadline(open_client: OpenClient) -> None:
    dead = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    async with open_client(*dead, call_timeout_s=0.3) as client:
        with pytest.raises(EtcdUnavailable):
            await client.put("k", b"v")
        with pytest.raises(EtcdUnavailable):
            await client.txn([], [Put("k", b"v")])
        with pytest.raises(EtcdUnavailable):
            await client.lease(5)


async def test_frozen_endpoint_alone_ends_in_an_error_not_a_hang(server: EtcdServer, open_client: OpenClient) -> None:
    async with (
        TcpRelay(server.address, silent=True) as frozen,
        open_client(frozen.address, call_timeout_s=0.3) as client,
    ):
        with pytest.raises(EtcdUnavailable):
            await client.get("k")


async def test_txn_is_not_sent_again_once_it_may_have_been_applied(server: EtcdServer, open_client: OpenClient) -> None:
    """The member freezes right after it showed to be alive; the transaction hangs on it, and stays the only one."""
    async with (
        TcpRelay(server.address) as first,
        open_client(first.address, server.address, call_timeout_s=0.6) as client,
        open_client() as other,
    ):
        await client.get("warm")
        first.fall_silent()
        with pytest.raises(EtcdUnavailable, match="unknown"):
            await client.txn([], [Put("k", b"v")])
        assert await other.get("k") is None
        first.speak()
        await client.put("after", b"v", timeout_s=10)
        found = await other.get("k")
        assert found is None or found.version == 1, "applied twice"


async def test_call_in_flight_when_the_client_closes_fails_instead_of_hanging(
    server: EtcdServer, open_client: OpenClient
) -> None:
    async with TcpRelay(server.address, silent=True) as frozen:
        async with open_client(frozen.address, call_timeout_s=20.0) as client:
            calling = asyncio.create_task(client.get("k"))
            await asyncio.sleep(0)
        with pytest.raises(EtcdUnavailable):
            await calling


async def test_restart_during_a_call_is_waited_out(server: EtcdServer, client: EtcdClient) -> None:
    await client.put("k", b"v")
    server.stop()
    restarting = asyncio.create_task(asyncio.to_thread(server.start))
    found = await client.get("k", timeout_s=20)
    await restarting
    assert found is not None
