"""One leader at a time, and each with a higher term."""

from __future__ import annotations

import asyncio

import pytest

from llmos.errors import LeaseLost
from llmos.etcd import Compare, Election, EtcdClient, Leader, Put
from tests.fakes.etcd_server import EtcdServer
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.etcd.conftest import OpenClient

_KEY = "/llmos/leader"


async def test_hand_over_by_resignation_raises_the_term(client: EtcdClient) -> None:
    async with await client.lease(10) as first_lease, await client.lease(10) as second_lease:
        first, second = Election(client, _KEY, b"first"), Election(client, _KEY, b"second")
        first_term = await first.campaign(first_lease)
        waiting = asyncio.create_task(second.campaign(second_lease))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.3)
        await first.resign()
        async with asyncio.timeout(20):
            second_term = await waiting
        assert second_term > first_term
        assert (first.term, second.term) == (first_term, second_term)
        found = await client.get(_KEY)
        assert found is not None
        assert (found.value, found.create_revision, found.lease) == (b"second", second_term, second_lease.id)
        await first.resign()
        assert await client.get(_KEY) is not None, "resigning after the end touched the successor"


async def test_many_candidates_lead_one_after_the_other(client: EtcdClient) -> None:
    terms: list[int] = []
    leading = 0

    async def lead(name: str) -> None:
        nonlocal leading
        async with await client.lease(10) as lease:
            election = Election(client, _KEY, name.encode())
            terms.append(await election.campaign(lease))
            leading += 1
            assert leading == 1
            await client.get(_KEY)
            leading -= 1
            await election.resign()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(lead(str(number)))
    assert len(terms) == 8
    assert terms == sorted(set(terms))


async def test_observer_sees_every_leader(client: EtcdClient) -> None:
    observer = Election(client, _KEY, b"").observe()
    assert await anext(observer) is None
    async with await client.lease(10) as lease:
        election = Election(client, _KEY, b"a")
        term = await election.campaign(lease)
        assert await anext(observer) == Leader(b"a", term)
        await election.resign()
        assert await anext(observer) is None
        again = await election.campaign(lease)
        assert again > term
        assert await anext(observer) == Leader(b"a", again)
    assert await anext(observer) is None
    await observer.aclose()


async def test_holder_learns_that_its_lease_is_lost(server: EtcdServer, client: EtcdClient) -> None:
    lease = await client.lease(2)
    election = Election(client, _KEY, b"a")
    await election.campaign(lease)
    await asyncio.to_thread(server.freeze)
    with pytest.raises(LeaseLost):
        async with asyncio.timeout(30):
            await election.hold()
    await asyncio.to_thread(server.thaw)


async def test_holder_learns_that_its_key_was_taken(client: EtcdClient) -> None:
    """A renewal can be reported for a lease that is gone; the key tells the truth."""
    async with await client.lease(10) as lease:
        election = Election(client, _KEY, b"a")
        term = await election.campaign(lease)
        holding = asyncio.create_task(election.hold())
        await client.put(_KEY, b"same key, same leader", lease.id)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(holding), 0.3)
        await client.txn([Compare(_KEY, "create_revision", "==", term)], [Put("/x", b""), Put(_KEY, b"", 0)])
        assert await client.delete(_KEY)
        with pytest.raises(LeaseLost):
            async with asyncio.timeout(20):
                await holding
        assert not lease.is_lost()


async def test_victory_whose_answer_was_lost_is_recognised(client: EtcdClient) -> None:
    async with await client.lease(10) as lease:
        won = await client.put(_KEY, b"a", lease.id)
        async with asyncio.timeout(20):
            assert await Election(client, _KEY, b"a").campaign(lease) == won


async def test_campaign_ends_with_its_lease(client: EtcdClient) -> None:
    async with await client.lease(10) as first_lease:
        await Election(client, _KEY, b"first").campaign(first_lease)
        second_lease = await client.lease(10)
        waiting = asyncio.create_task(Election(client, _KEY, b"second").campaign(second_lease))
        await asyncio.sleep(0)
        await second_lease.revoke()
        with pytest.raises(LeaseLost):
            async with asyncio.timeout(20):
                await waiting
        with pytest.raises(LeaseLost):
            await Election(client, _KEY, b"second").campaign(second_lease)


async def test_next_leader_only_after_the_frozen_one_gave_up(server: EtcdServer, open_client: OpenClient) -> None:
    """The old leader alone is cut off. When the next one leads, the old one's own clock has told it to stop."""
    async with (
        TcpRelay(server.address) as relay,
        open_client(relay.address, call_timeout_s=1.0) as cut_off,
        open_client() as client,
        await client.lease(5) as next_lease,
    ):
        lease = await cut_off.lease(2)
        old_term = await Election(cut_off, _KEY, b"old").campaign(lease)
        waiting = asyncio.create_task(Election(client, _KEY, b"next").campaign(next_lease))
        relay.fall_silent()
        async with asyncio.timeout(30):
            new_term = await waiting
        assert lease.deadline() <= client.clock.monotonic()
        assert lease.is_lost()
        assert new_term > old_term


async def test_campaign_waits_for_a_server_that_restarts(server: EtcdServer, client: EtcdClient) -> None:
    async with await client.lease(20) as lease:
        server.stop()
        waiting = asyncio.create_task(Election(client, _KEY, b"a").campaign(lease))
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(20):
            term = await waiting
        found = await client.get(_KEY)
        assert found is not None
        assert found.create_revision == term
