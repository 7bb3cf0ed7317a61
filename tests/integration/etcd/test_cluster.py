"""Three members: losing one is not noticed, losing two is survived."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.clock import SystemClock
from llmos.errors import EtcdUnavailable
from llmos.etcd import EtcdClient, EtcdConfig
from tests.fakes.etcd_server import EtcdCluster
from tests.integration.etcd.collect import Collector, eventually


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path) as running:
        yield running


def client_of(endpoints: tuple[str, ...]) -> EtcdClient:
    config = EtcdConfig(endpoints=endpoints, call_timeout_s=3.0, watch_idle_s=0.5)
    return EtcdClient(config, clock=SystemClock(), rng=random.Random(7))


async def test_leader_killed(cluster: EtcdCluster) -> None:
    leader = await asyncio.to_thread(cluster.leader)
    endpoints = (leader.address, *(one for one in cluster.addresses if one != leader.address))
    async with client_of(endpoints) as client, Collector(client.watch("/w/")) as seen, await client.lease(5) as lease:
        await client.put("/w/held", b"v", lease.id)
        await seen.until("/w/held", b"v")
        await asyncio.to_thread(leader.stop)
        written = [await client.put("/w/n", str(number).encode(), timeout_s=20) for number in range(20)]
        await seen.until("/w/n", b"19")
        assert await client.compare_and_swap("/w/cas", 0, b"v", timeout_s=20)
        revisions = [event.mod_revision for event in seen.history]
        assert revisions == sorted(set(revisions))
        assert set(written) <= set(revisions)
        assert seen.snapshots == 1
        assert not lease.is_lost()


async def test_member_without_its_cluster_is_no_help(cluster: EtcdCluster, caplog: pytest.LogCaptureFixture) -> None:
    """Two of three freeze: the last one must not pretend. All goes on when they are back."""
    caplog.set_level(logging.INFO, "llmos.etcd")
    first, *others = cluster.members
    async with client_of((first.address,)) as client, Collector(client.watch("/w/")) as seen:
        await client.put("/w/a", b"1")
        await seen.until("/w/a", b"1")
        for other in others:
            await asyncio.to_thread(other.freeze)
        with pytest.raises(EtcdUnavailable):
            await client.get("/w/a")
        with pytest.raises(EtcdUnavailable):
            await client.compare_and_swap("/w/b", 0, b"never sent", timeout_s=0.5)
        await eventually(lambda: "no leader" in caplog.text)
        for other in others:
            await asyncio.to_thread(other.thaw)
        await client.put("/w/a", b"2", timeout_s=20)
        await seen.until("/w/a", b"2")
        assert await client.get("/w/b") is None
        assert seen.snapshots == 1
