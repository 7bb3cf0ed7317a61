"""An etcd for the whole module, and workers with the echo backend."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.integration.worker.processes import WorkerProcess, worker_process

StartWorker = Callable[..., AbstractAsyncContextManager[WorkerProcess]]


@pytest.fixture
def start_worker(tmp_path: Path) -> StartWorker:
    """`async with start_worker(*flags) as worker`: an echo worker, without etcd unless the flags name one."""

    @contextlib.asynccontextmanager
    async def start(*flags: str) -> AsyncIterator[WorkerProcess]:
        etcd = () if "--etcd-endpoints" in flags else ("--etcd-endpoints", "")
        async with worker_process(tmp_path, "--backend", "echo", *etcd, *flags) as worker:
            yield worker

    return start


@pytest.fixture
async def worker(start_worker: StartWorker) -> AsyncIterator[WorkerProcess]:
    """A worker at 50 tokens per second and stream."""
    async with start_worker("--echo-tokens-per-second", "50") as running:
        yield running
