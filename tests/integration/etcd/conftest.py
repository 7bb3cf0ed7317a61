"""A real etcd per test, and clients of it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from llmos.clock import SystemClock
from llmos.etcd import EtcdClient, EtcdConfig
from tests.fakes.etcd_server import EtcdServer

OpenClient = Callable[..., AbstractAsyncContextManager[EtcdClient]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as running:
        yield running


@pytest.fixture
def open_client(server: EtcdServer) -> OpenClient:
    """Open a client: `async with open_client() as client`. Takes endpoints and any field of EtcdConfig."""

    @contextlib.asynccontextmanager
    async def opened(*endpoints: str, **fields: object) -> AsyncIterator[EtcdClient]:
        config = EtcdConfig(endpoints=endpoints or (server.address,), **fields)  # type: ignore[arg-type]
        async with EtcdClient(config, clock=SystemClock(), rng=random.Random(7)) as client:
            yield client

    return opened


@pytest.fixture
async def client(open_client: OpenClient) -> AsyncIterator[EtcdClient]:
    async with open_client() as opened:
        yield opened
