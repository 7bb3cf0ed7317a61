"""The worker's record in a real etcd."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from llmos.clock import SystemClock
from llmos.etcd import EtcdClient, EtcdConfig
from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from tests.fakes.etcd_server import EtcdServer
from tests.integration.worker.conftest import StartWorker
from tests.integration.worker.processes import WorkerProcess
from tests.integration.worker.scheduler_client import SchedulerClient, dispatch, expected

RECORDINGS = Path(__file__).parents[2] / "fakes" / "recordings"
PREFIX = "/llmos/v1/workers/"
TTL_S = 2


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as running:
        yield running


def flags(etcd: EtcdServer) -> tuple[str, ...]:
    return "--etcd-endpoints", etcd.address, "--lease-ttl-s", str(TTL_S)


def client_of(etcd: EtcdServer) -> EtcdClient:
    return EtcdClient(EtcdConfig(endpoints=(etcd.address,)), SystemClock(), random.Random(7))


async def record_of(client: EtcdClient, worker: WorkerProcess, timeout_s: float = 30.0) -> registry_pb2.WorkerRecord:
    """The worker's record, once it is there."""
    async with asyncio.timeout(timeout_s):
        async for batch in client.watch(PREFIX + worker.id):
            for event in batch.events:
                if event.value is not None:
                    return json_format.Parse(event.value, registry_pb2.WorkerRecord())
    raise AssertionError("the watch ended")


async def absent(client: EtcdClient, worker: WorkerProcess, timeout_s: float) -> None:
    """Wait until the record is gone."""
    async with asyncio.timeout(timeout_s):
        async for batch in client.watch(PREFIX + worker.id):
            if not batch.events or batch.events[-1].value is None:
                return


async def test_the_record_shows_totals_and_models(etcd: EtcdServer, start_worker: StartWorker) -> None:
    recording = str(RECORDINGS / "gpu-24gb.json")
    more = ("--probe-recording", recording, "--model", "small,big=40GiB", "--pool", "edge")
    async with start_worker(*flags(etcd), *more) as worker, client_of(etcd) as client:
        record = await record_of(client, worker)
        assert record.worker_id == worker.id
        assert record.address == worker.address
        assert (record.pid, record.backend, record.pool) == (worker.process.pid, "echo", "edge")
        assert record.capacity.devices[0].kind == fleet_pb2.DEVICE_KIND_GPU
        assert record.capacity.devices[0].memory_bytes == 24564 * 2**20
        assert {model.model.name: model.weight_bytes for model in record.models} == {"small": 0, "big": 40 * 2**30}
        shown = etcd.ctl("get", "--prefix", PREFIX)
        assert '"memory_bytes":"25757220864"' in shown.replace(" ", "")


async def test_a_killed_workers_record_is_gone_within_its_lease(etcd: EtcdServer, start_worker: StartWorker) -> None:
    async with start_worker(*flags(etcd)) as worker, client_of(etcd) as client:
        await record_of(client, worker)
        worker.signal(signal.SIGKILL)
        await absent(client, worker, TTL_S + 1)


async def test_a_clean_shutdown_takes_the_record_out(etcd: EtcdServer, start_worker: StartWorker) -> None:
    async with start_worker(*flags(etcd), "--lease-ttl-s", "60") as worker, client_of(etcd) as client:
        await record_of(client, worker)
        worker.signal(signal.SIGTERM)
        assert await worker.exit_status() == 0
        assert await client.get(PREFIX + worker.id) is None


async def test_serving_goes_on_without_etcd_and_the_record_comes_back(
    etcd: EtcdServer, start_worker: StartWorker
) -> None:
    async with start_worker(*flags(etcd)) as worker, SchedulerClient(worker.address) as scheduler:
        async with client_of(etcd) as client:
            before = await record_of(client, worker)
        await scheduler.load()
        etcd.stop()
        await scheduler.until(lambda: "registering again" in worker.log())
        scheduler.send(dispatch("a"))
        assert await scheduler.done("a") == [expected(16)]
        await asyncio.to_thread(etcd.start)
        async with client_of(etcd) as client:
            assert await record_of(client, worker, timeout_s=10.0) == before


async def test_a_worker_starts_while_etcd_is_down(etcd: EtcdServer, start_worker: StartWorker) -> None:
    etcd.stop()
    async with start_worker(*flags(etcd)) as worker, SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a"))
        assert await scheduler.done("a") == [expected(16)]
        await asyncio.to_thread(etcd.start)
        async with client_of(etcd) as client:
            await record_of(client, worker, timeout_s=10.0)


async def test_a_frozen_worker_loses_its_record_and_gets_it_back(etcd: EtcdServer, start_worker: StartWorker) -> None:
    async with start_worker(*flags(etcd)) as worker, client_of(etcd) as client:
        await record_of(client, worker)
        worker.signal(signal.SIGSTOP)
        await absent(client, worker, TTL_S + 1)
        os.kill(worker.process.pid, signal.SIGCONT)
        await record_of(client, worker)
