"""The models that the simulation stands on behave as what they model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from llmos.etcd import messages as pb
from tests.sim.etcd_store import EtcdStore, LeaseNotFound
from tests.sim.vloop import START, Deadlock, Node, VirtualLoop


def put(store: EtcdStore, key: bytes, value: bytes = b"", lease: int = 0) -> None:
    store.put(pb.PutRequest(key=key, value=value, lease=lease))


def test_keys_of_a_lease_vanish_with_it_in_one_revision() -> None:
    store = EtcdStore()
    lease = store.grant(2, now=0.0).ID
    put(store, b"a", lease=lease)
    put(store, b"b", lease=lease)
    heard: list[tuple[int, int]] = []
    store.listeners.append(lambda revision, events: heard.append((revision, len(events))))
    store.expire(1.9)
    assert sorted(store.keys) == [b"a", b"b"]
    store.expire(2.0)
    assert store.keys == {}
    assert heard == [(4, 2)]
    with pytest.raises(LeaseNotFound):
        put(store, b"a", lease=lease)


def test_a_lie_renews_what_is_gone() -> None:
    store = EtcdStore()
    assert store.keep_alive(7, 0.0, lie=False).TTL == 0
    assert store.keep_alive(7, 0.0, lie=True).TTL > 0


def test_a_transaction_compares_and_writes_at_once() -> None:
    store = EtcdStore()
    absent = pb.Compare(key=b"k", target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=0)
    write = pb.RequestOp(request_put=pb.PutRequest(key=b"k", value=b"1"))
    read = pb.RequestOp(request_range=pb.RangeRequest(key=b"k"))
    assert store.txn(pb.TxnRequest(compare=[absent], success=[write])).succeeded
    again = store.txn(pb.TxnRequest(compare=[absent], success=[write], failure=[read]))
    assert not again.succeeded
    assert again.responses[0].response_range.kvs[0].create_revision == 2


def test_history_before_a_compaction_is_gone() -> None:
    store = EtcdStore()
    put(store, b"a")
    put(store, b"b")
    assert [revision for revision, _ in store.since(3)] == [3]
    store.compact()
    assert store.compacted == 3
    assert store.since(1) == []


def test_time_jumps_and_frozen_nodes_wait() -> None:
    loop = VirtualLoop()
    node, other = Node("frozen"), Node("other")
    seen: list[tuple[str, float]] = []

    async def tick(name: str) -> None:
        for _ in range(3):
            await asyncio.sleep(10)
            seen.append((name, loop.now - START))

    async def live() -> None:
        tasks = [loop.spawn(node, tick("frozen"), "a"), loop.spawn(other, tick("other"), "b")]
        await asyncio.sleep(15)
        loop.freeze(node)
        await asyncio.sleep(30)
        loop.thaw(node)
        await asyncio.wait(tasks)

    loop.run_until_complete(live())
    loop.finish([node, other])
    loop.close()
    assert [at for name, at in seen if name == "other"] == [10, 20, 30]
    assert [at for name, at in seen if name == "frozen"] == [10, 45, 55]


def test_what_is_killed_runs_no_more() -> None:
    loop = VirtualLoop()
    node = Node("killed")
    seen: list[str] = []

    async def work() -> AsyncIterator[None]:
        try:
            await asyncio.sleep(5)
            yield
        finally:
            seen.append("finally")

    async def run() -> None:
        async for _ in work():
            raise AssertionError("went on")

    async def live() -> None:
        loop.spawn(node, run(), "work")
        await asyncio.sleep(1)
        loop.kill(node)
        await asyncio.sleep(10)
        seen.append("checked")

    loop.run_until_complete(live())
    loop.finish([node])
    loop.close()
    assert seen == ["checked", "finally"]


def test_a_world_in_which_nothing_can_happen_is_noticed() -> None:
    loop = VirtualLoop()
    with contextlib.closing(loop), pytest.raises(Deadlock):
        loop.run_until_complete(loop.create_future())
