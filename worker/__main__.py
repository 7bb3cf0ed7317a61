"""`python -m worker`: the RPC process of a worker. It starts the engine process, serves, registers, drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from functools import partial

from llmos import cgroups
from llmos.addresses import host_port
from llmos.clock import Clock, SystemClock
from llmos.config import from_command_line
from llmos.errors import LlmosError
from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2, work_pb2, work_pb2_grpc
from llmos.lifetime import EXIT_RESTART, Stop, first_of, run_until_signal
from llmos.ready import write_ready
from llmos.rpc import RpcServer
from llmos.store import Store, default_store_path
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2
from worker import compute, nvml
from worker.adapters import AdapterWatch, hold_with_adapters
from worker.config import WorkerConfig
from worker.core import WorkerCore
from worker.engine_link import EngineLink
from worker.engine_process import EngineSetup
from worker.gpu_use import Gauge, GpuWatch, RecordedGauge, local_gauge
from worker.models import HeldModel
from worker.probe import Probe, RecordedProbe, local_probe
from worker.registration import Registration
from worker.service import WorkService
from worker.shelf import Shelf
from worker.spans import ExecuteSpans
from worker.vitals import Vitals

log = logging.getLogger(__name__)

_TICK_S = 0.5
_POLL_S = 0.02
_LOOK_S = 2.0
"""Between looks into the store for adapters that were imported meanwhile."""
_GRACE_S = 1.0
_SPARE_AFTER_S = 30.0
"""A worker that just started has better things to compute than a spare's imports."""


class WorkerProcess:
    """A worker's life: `serve` starts it, waits for the signal, drains and leaves."""

    def __init__(self, config: WorkerConfig, clock: Clock, rng: random.Random) -> None:
        self._config = config
        self._clock = clock
        self._rng = rng
        self._drain_s = config.drain_s
        self._id = config.id or f"worker-{secrets.token_hex(4)}"

    async def serve(self, stop: Stop) -> None:
        """Run until `stop` is set; then let what runs move on or end, within the configured time. Raises SetupError."""
        config = self._config
        gpu, held = await asyncio.to_thread(_hold, config)
        capacity = await asyncio.to_thread(_probe(config, gpu).measure)
        telemetry = Telemetry("worker", self._id, clock=self._clock, otlp_endpoint=config.otlp_endpoint)
        spans = ExecuteSpans(telemetry)
        shelf = Shelf(held, capacity)
        core = WorkerCore(self._id, shelf, spans, self._clock, orphan_s=config.orphan_s)
        spare_after_s = _SPARE_AFTER_S if config.spare_engine and config.backend == "torch" else None
        link = EngineLink(
            _setup(config, held, gpu), core, clock=self._clock, rng=self._rng, spare_after_s=spare_after_s
        )
        core.connect(link)
        core.on_restart = partial(self._start_afresh, stop)
        gpus = GpuWatch(_gauge(config, gpu))
        pids = lambda: (os.getpid(), link.pid, link.spare_pid)  # noqa: E731 - two of them change
        vitals = Vitals(capacity.memory_bytes, pids, gpus=lambda: gpus.last)
        server = RpcServer(config.host, config.port, tls=config.tls)
        server.add(work_pb2_grpc.add_WorkServicer_to_server, WorkService(core, held), "llmos.internal.v1.Work")
        try:
            async with _beside(stop, link.run(), _tick(core, vitals), gpus.run()):
                if await _first(link.ready, stop):
                    await server.start()
                    async with self._registered(server.port, capacity, held, shelf, stop):
                        log.info("worker %s serves on port %d", self._id, server.port)
                        write_ready(config.ready_file, self._id, port=server.port)
                        await stop.wait()
                        await self._drain(core, stop)
                    core.leave()
                    await server.stop(_GRACE_S)
        finally:
            await link.close()
            await asyncio.to_thread(telemetry.shutdown, _GRACE_S)

    def _start_afresh(self, stop: Stop, order: work_pb2.Drain) -> None:
        """The scheduler has seen that something runs out here: end, and let whoever supervises this start it again."""
        if not stop.is_set():
            log.warning("to be started afresh: %s", order.detail)
            self._drain_s = order.within_ms / 1000
            stop.status = EXIT_RESTART
            stop.set()

    async def _drain(self, core: WorkerCore, stop: Stop) -> None:
        """Until nothing runs here, the time is up, or a second signal comes; what is left then goes on elsewhere."""
        log.info("draining for at most %.0f s", self._drain_s)
        core.drain()
        deadline = self._clock.monotonic() + self._drain_s
        while not (core.idle or stop.hurry.is_set() or self._clock.monotonic() >= deadline):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    @contextlib.asynccontextmanager
    async def _registered(
        self, port: int, capacity: fleet_pb2.Capacity, held: list[HeldModel], shelf: Shelf, stop: asyncio.Event
    ) -> AsyncIterator[None]:
        etcd = self._config.etcd()
        if etcd is None:
            yield
            return
        record = registry_pb2.WorkerRecord(
            worker_id=self._id,
            address=self._config.advertise or host_port(self._config.host, port),
            host=socket.gethostname(),
            pid=os.getpid(),
            backend=self._config.backend,
            capacity=capacity,
            models=[model.record for model in held],
            pool=self._config.pool,
            started_unix_s=self._clock.unix_ns() // 10**9,
        )
        async with EtcdClient(etcd, self._clock, self._rng) as client:
            registration = Registration(client, record, lease_ttl_s=self._config.lease_ttl_s, rng=self._rng)
            works = [registration.run()]
            if self._config.backend == "torch":
                works.append(_watch_adapters(AdapterWatch(Store(self._config.store), held), shelf, registration))
            async with _beside(stop, *works):
                yield


@contextlib.asynccontextmanager
async def _beside(stop: asyncio.Event, *works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run what never ends by itself beside the block. One that ends all the same sets `stop`, and is raised after it:
    a worker without its engine, its clock or its registration must not live on unnoticed."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _tick(core: WorkerCore, vitals: Vitals) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        core.uses = vitals.measure()
        core.tick()


async def _watch_adapters(watch: AdapterWatch, shelf: Shelf, registration: Registration) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            fresh = await asyncio.to_thread(watch.look)
        except (OSError, LlmosError) as error:
            log.warning("the store cannot be searched for adapters: %s", error)
            continue
        if fresh:
            log.info("adapters imported meanwhile: %s", ", ".join(model.name for model in fresh))
            # First the shelf: a scheduler that reads the record may order at once.
            shelf.add(fresh)
            registration.add(model.record for model in fresh)


async def _first(ready: asyncio.Event, stop: asyncio.Event) -> bool:
    """Wait for either; whether it was `ready`."""
    await first_of(ready, stop)
    return not stop.is_set()


def _hold(config: WorkerConfig) -> tuple[nvml.Gpu | None, list[HeldModel]]:
    """The graphics processor to compute on, if any, and the models. Raises ConfigError."""
    gpu = compute.choose(config.backend, config.device, compute.Place.parse(config.place))
    hold = partial(hold_with_adapters, config.backend, config.model, config.store, config.precision)
    held = hold(on_gpu=gpu is not None)
    if gpu is None or config.device != "auto":
        return gpu, held
    too_large = [one.name for one in held if one.record.weight_bytes + one.record.workspace_bytes > gpu.memory_bytes]
    if not too_large:
        return gpu, held
    log.warning("on the CPU: %s has too little memory for %s", gpu.name, too_large[0])
    return None, hold(on_gpu=False)


def _probe(config: WorkerConfig, gpu: nvml.Gpu | None) -> Probe:
    if config.probe_recording is not None:
        return RecordedProbe(config.probe_recording)
    disk = config.store or default_store_path()
    gpus = None if config.backend == "echo" else [] if gpu is None else [gpu]
    return local_probe(disk, memory_limit=config.memory_limit, gpus=gpus)


def _gauge(config: WorkerConfig, gpu: nvml.Gpu | None) -> Gauge | None:
    if config.gpu_use_recording is not None:
        return RecordedGauge(config.gpu_use_recording)
    uses_gpus = gpu is not None or config.backend == "echo"
    return local_gauge() if uses_gpus and config.probe_recording is None else None


def _setup(config: WorkerConfig, held: list[HeldModel], gpu: nvml.Gpu | None) -> EngineSetup:
    return EngineSetup(
        backend=config.backend,
        threads=config.threads or cgroups.whole_cores(cgroups.read()),
        tokens_per_second=config.echo_tokens_per_second,
        load_s=config.echo_load_s,
        leak_bytes=config.echo_leak_bytes,
        models=tuple(model.engine for model in held),
        log_level=config.log_level,
        precision=config.precision,
        gpu="" if gpu is None else gpu.uuid,
        store=str(config.store or ""),
    )


def main() -> int:
    """Entry point of the process. Returns its exit status."""
    config = from_command_line(WorkerConfig, "worker", "python -m worker")
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    process = WorkerProcess(config, SystemClock(), random.SystemRandom())
    return run_until_signal(process.serve)


if __name__ == "__main__":
    sys.exit(main())
