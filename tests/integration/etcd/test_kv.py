"""Keys and transactions on a real etcd."""

from __future__ import annotations

import pytest

from llmos.errors import EtcdError, LeaseLost
from llmos.etcd import Compare, Delete, EtcdClient, Get, Put


async def test_put_get_delete(client: EtcdClient) -> None:
    assert await client.get("/a/1") is None
    created = await client.put("/a/1", b"one")
    changed = await client.put("/a/1", b"uno")
    found = await client.get("/a/1")
    assert found is not None
    assert (found.key, found.value, found.version, found.lease) == ("/a/1", b"uno", 2, 0)
    assert (found.create_revision, found.mod_revision) == (created, changed)
    assert await client.delete("/a/1") is True
    assert await client.delete("/a/1") is False


async def test_prefix_selects_only_what_starts_with_it(client: EtcdClient) -> None:
    for key in ("/a/1", "/a/2", "/a", "/b/1", "/a0"):
        last = await client.put(key, key.encode())
    found, revision = await client.get_prefix("/a/")
    assert [kv.key for kv in found] == ["/a/1", "/a/2"]
    assert revision == last
    everything, _ = await client.get_prefix("")
    assert len(everything) == 5
    assert await client.delete_prefix("/a/") == 2
    assert [kv.key for kv in (await client.get_prefix(""))[0]] == ["/a", "/a0", "/b/1"]


async def test_txn_runs_one_branch_in_one_revision(client: EtcdClient) -> None:
    revision = await client.put("k", b"1")
    won = await client.txn(
        [
            Compare("k", "value", "==", b"1"),
            Compare("k", "version", "==", 1),
            Compare("k", "mod_revision", "<", revision + 1),
            Compare("k", "create_revision", ">", revision - 1),
            Compare("k", "lease", "==", 0),
            Compare("absent", "version", "!=", 1),
        ],
        [Put("k", b"2"), Put("l", b"3"), Get("l")],
        [Delete("k")],
    )
    assert won.succeeded
    assert [[kv.value for kv in row] for row in won.rows] == [[], [], [b"3"]]
    found, _ = await client.get_prefix("")
    assert [(kv.key, kv.value, kv.mod_revision) for kv in found] == [
        ("k", b"2", won.revision),
        ("l", b"3", won.revision),
    ]
    lost = await client.txn([Compare("k", "value", "==", b"1")], [Put("k", b"9")], [Get("", prefix=True)])
    assert not lost.succeeded
    assert [kv.key for kv in lost.rows[0]] == ["k", "l"]


async def test_compare_and_swap_takes_the_last_change_only(client: EtcdClient) -> None:
    assert await client.compare_and_swap("k", 0, b"first")
    assert not await client.compare_and_swap("k", 0, b"second")
    found = await client.get("k")
    assert found is not None
    assert found.value == b"first"
    assert await client.compare_and_swap("k", found.mod_revision, b"second")
    assert not await client.compare_and_swap("k", found.mod_revision, b"third")
    found = await client.get("k")
    assert found is not None
    assert found.value == b"second"


async def test_what_etcd_refuses_is_a_typed_error(client: EtcdClient) -> None:
    with pytest.raises(LeaseLost):
        await client.put("k", b"v", lease_id=12345)
    with pytest.raises(EtcdError, match="key is not provided"):
        await client.put("", b"v")
