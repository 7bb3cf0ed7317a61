"""A real etcd, real schedulers in this process, and clients of both."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from llmos.clock import SystemClock
from llmos.etcd import EtcdClient, EtcdConfig
from scheduler.config import SchedulerConfig
from scheduler.process import SchedulerProcess
from tests.fakes.etcd_server import EtcdServer

OpenScheduler = Callable[..., AbstractAsyncContextManager[SchedulerProcess]]


@pytest.fixture
def etcd_server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as running:
        yield running


@pytest.fixture
async def etcd(etcd_server: EtcdServer) -> AsyncIterator[EtcdClient]:
    config = EtcdConfig(endpoints=(etcd_server.address,))
    async with EtcdClient(config, clock=SystemClock(), rng=random.Random(7)) as client:
        yield client


@pytest.fixture
def open_scheduler(etcd_server: EtcdServer) -> OpenScheduler:
    """Run a scheduler: `async with open_scheduler("s1") as scheduler`. Takes any field of SchedulerConfig."""

    @contextlib.asynccontextmanager
    async def opened(scheduler_id: str = "s1", **fields: Any) -> AsyncIterator[SchedulerProcess]:
        fields = {"port": 0, "lease_ttl_s": 2.0, "etcd_endpoints": (etcd_server.address,), **fields}
        process = SchedulerProcess(SchedulerConfig(id=scheduler_id, **fields), SystemClock(), random.Random(3))
        stop = asyncio.Event()
        task = asyncio.create_task(process.serve(stop))
        try:
            await until(lambda: process.port > 0 or task.done())
            yield process
            assert process.seat.reign is None or process.seat.reign.loop.errors == 0
        finally:
            stop.set()
            async with asyncio.timeout(15):
                await task

    return opened


@pytest.fixture
async def scheduler(open_scheduler: OpenScheduler) -> AsyncIterator[SchedulerProcess]:
    async with open_scheduler() as process:
        yield process


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition that nothing signals."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - a test may wait for anything
            await asyncio.sleep(0.01)


def address(scheduler: SchedulerProcess) -> str:
    """Where it listens."""
    return f"127.0.0.1:{scheduler.port}"
