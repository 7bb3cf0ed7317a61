"""A watch delivers every change once, whatever happens to the server."""

from __future__ import annotations

import asyncio

import pytest

from llmos.etcd import Compare, Delete, EtcdClient, Put, WatchEvent
from tests.fakes.etcd_server import EtcdServer
from tests.fakes.tcp_relay import TcpRelay
from tests.integration.etcd.collect import Collector
from tests.integration.etcd.conftest import OpenClient


def as_pairs(events: list[WatchEvent]) -> list[tuple[str, bytes | None]]:
    return [(event.key, event.value) for event in events]


async def test_first_batch_is_a_snapshot_then_come_changes(client: EtcdClient) -> None:
    before = await client.put("/w/a", b"1")
    async with client.watch("/w/") as watch:
        snapshot = await anext(watch)
        assert snapshot.snapshot
        assert snapshot.revision == before
        assert as_pairs(snapshot.events) == [("/w/a", b"1")]
        await client.put("/v/x", b"other prefix")
        after = await client.put("/w/b", b"2")
        batch = await anext(watch)
        assert not batch.snapshot
        assert batch.revision == after
        assert batch.events == [WatchEvent("/w/b", b"2", after, create_revision=after)]
        await client.delete("/w/a")
        assert as_pairs((await anext(watch)).events) == [("/w/a", None)]


async def test_snapshot_of_nothing_is_delivered(client: EtcdClient) -> None:
    async with client.watch("/w/") as watch:
        batch = await anext(watch)
    assert batch.snapshot
    assert batch.events == []


async def test_start_revision_replays_without_a_snapshot(client: EtcdClient) -> None:
    first = await client.put("/w/a", b"1")
    await client.put("/w/a", b"2")
    await client.put("/w/a", b"3")
    events: list[WatchEvent] = []
    async with client.watch("/w/", start_revision=first + 1) as watch:
        while len(events) < 2:
            batch = await anext(watch)
            assert not batch.snapshot
            events += batch.events
    assert as_pairs(events) == [("/w/a", b"2"), ("/w/a", b"3")]


async def test_a_transaction_is_one_batch(client: EtcdClient) -> None:
    await client.put("/w/old", b"")
    async with client.watch("/w/") as watch:
        await anext(watch)
        done = await client.txn(
            [Compare("/w/new", "version", "==", 0)], [Put("/w/new", b"1"), Delete("/w/old"), Put("/w/third", b"3")]
        )
        batch = await anext(watch)
    assert batch.revision == done.revision
    assert sorted(as_pairs(batch.events)) == [("/w/new", b"1"), ("/w/old", None), ("/w/third", b"3")]


async def test_watch_key_ignores_longer_keys(client: EtcdClient) -> None:
    async with client.watch_key("/w/a") as watch:
        await anext(watch)
        await client.put("/w/ab", b"no")
        await client.put("/w/a", b"yes")
        assert as_pairs((await anext(watch)).events) == [("/w/a", b"yes")]


async def test_cancelled_wait_loses_nothing(client: EtcdClient) -> None:
    async with client.watch("/w/") as watch:
        await anext(watch)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(watch)
        await client.put("/w/a", b"1")
        assert as_pairs((await anext(watch)).events) == [("/w/a", b"1")]


async def test_watch_ends_when_closed_under_a_waiting_reader(client: EtcdClient) -> None:
    watch = client.watch("/w/")
    await anext(watch)
    waiting = asyncio.create_task(anext(watch, None))
    await asyncio.sleep(0)
    await watch.aclose()
    assert await waiting is None


async def test_server_killed_and_restarted_misses_none_and_repeats_none(
    server: EtcdServer, open_client: OpenClient
) -> None:
    """SIGKILL in the middle of a stream of changes, several times."""
    async with (
        open_client(call_timeout_s=10.0) as writer,
        open_client() as client,
        Collector(client.watch("/w/")) as seen,
    ):
        await seen.until("/w/n", None)
        written: list[int] = []
        for number in range(60):
            if number % 20 == 10:
                await asyncio.to_thread(server.restart)
            written.append(await writer.put("/w/n", str(number).encode()))
        await seen.until("/w/n", b"59")
        revisions = [event.mod_revision for event in seen.history]
        assert revisions == sorted(set(revisions)), "a change came twice or out of order"
        assert set(written) <= set(revisions), "a change was missed"
        assert seen.snapshots == 1, "it relisted although nothing was compacted"


async def test_changes_made_while_disconnected_are_delivered(server: EtcdServer, open_client: OpenClient) -> None:
    async with (
        TcpRelay(server.address) as relay,
        open_client(relay.address) as client,
        open_client() as writer,
        Collector(client.watch("/w/")) as seen,
    ):
        await seen.until("/w/a", None)
        await writer.put("/w/a", b"1")
        await seen.until("/w/a", b"1")
        relay.fall_silent()
        relay.cut()
        await writer.put("/w/a", b"2")
        await writer.delete("/w/a")
        await writer.put("/w/b", b"3")
        relay.speak()
        await seen.until("/w/b", b"3")
        assert as_pairs(seen.history) == [("/w/a", b"1"), ("/w/a", b"2"), ("/w/a", None), ("/w/b", b"3")]


async def test_watch_below_compaction_relists_and_misses_none(server: EtcdServer, open_client: OpenClient) -> None:
    """The watcher is cut off, history moves on and is compacted, the watcher comes back."""
    async with (
        TcpRelay(server.address) as relay,
        open_client(relay.address) as client,
        open_client() as writer,
        Collector(client.watch("/w/")) as seen,
    ):
        await writer.put("/w/gone", b"1")
        await writer.put("/w/kept", b"1")
        await seen.until("/w/kept", b"1")
        relay.fall_silent()
        relay.cut()
        await writer.delete("/w/gone")
        await writer.put("/w/kept", b"2")
        await writer.put("/w/new", b"1")
        await asyncio.to_thread(server.compact)
        relay.speak()
        await seen.until("/w/new", b"1")
        assert seen.snapshots == 2
        assert seen.state == {"/w/kept": b"2", "/w/new": b"1"}
        await writer.put("/w/after", b"1")
        await seen.until("/w/after", b"1")
        assert as_pairs(seen.history)[-1] == ("/w/after", b"1")
        assert seen.snapshots == 2


async def test_start_below_compaction_relists(server: EtcdServer, client: EtcdClient) -> None:
    first = await client.put("/w/a", b"1")
    await client.put("/w/a", b"2")
    last = await client.put("/w/b", b"3")
    await asyncio.to_thread(server.compact)
    async with client.watch("/w/", start_revision=first) as watch:
        batch = await anext(watch)
        assert batch.snapshot
        assert batch.revision == last
        assert as_pairs(batch.events) == [("/w/a", b"2"), ("/w/b", b"3")]


async def test_wiped_store_is_noticed(server: EtcdServer, open_client: OpenClient) -> None:
    """A store that was deleted counts from 1 again; waiting for the next revision would wait for ever."""
    async with (
        open_client(call_timeout_s=10.0) as writer,
        open_client() as client,
        Collector(client.watch("/w/")) as seen,
    ):
        for number in range(20):
            await writer.put("/w/a", str(number).encode())
        await seen.until("/w/a", b"19")
        await asyncio.to_thread(server.wipe)
        await asyncio.to_thread(server.start)
        await seen.until("/w/a", None)
        await writer.put("/w/b", b"new")
        await seen.until("/w/b", b"new")
        assert seen.state == {"/w/b": b"new"}
