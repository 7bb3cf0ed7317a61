"""A fleet of real processes in the shape that a scenario asks for; healed, not restarted, between scenarios."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psutil

from llmos.certs import make_certificates
from llmos.config import TlsConfig
from llmos.rpc import open_channel
from llmos.v1 import fleet_pb2
from llmos.v1.fleet_pb2_grpc import FleetStub
from tests.fakes.certificates import service_tls, tls_flags
from tests.fakes.etcd_server import EtcdCluster, EtcdServer, free_port
from tests.faults.apart import Apart
from tests.faults.kernel import SmallDisk
from tests.faults.ledger import HOME, Ledger
from tests.faults.proxy import FaultProxy
from tests.faults.scenario import Load, Shape
from tests.faults.services import ROOT, Service

STORE, MODEL = HOME / "store", "tiny"
"""The real model of shapes that ask for one, and its name (see `doubles/model.py`)."""
_TORCH_BYTES = 2 << 30
_CALL_S = 5.0
_POLL_S = 0.05


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """The first true value of `condition`, which may be a coroutine function. Raises TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                value = condition()
                if asyncio.iscoroutine(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}") from error


@dataclass(frozen=True, slots=True)
class Places:
    """Where a service listens, where its peers reach it, where it reaches etcd."""

    port: int
    public: str
    etcd: str
    host: str = "127.0.0.1"


class Fleet:
    """`async with Fleet(shape, ledger) as fleet:` starts it and leaves nothing."""

    def __init__(self, shape: Shape, ledger: Ledger) -> None:
        self.shape = shape
        self.ledger = ledger
        self.services: list[Service] = []
        self.proxies: dict[str, FaultProxy] = {}
        """By name of the service that they stand before; `etcd` too."""
        self.etcd: list[EtcdServer] = []
        self.disk: SmallDisk | None = None
        self._undo = contextlib.AsyncExitStack()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._etcd_addresses: list[str] = []
        self.undisturbed: dict[tuple[Load, int], list[dict[int, str]]] = {}
        """What streams say when nothing happens, by load and seed; of real models, once for each fleet."""
        self.apart: Apart | None = None
        self._tls: TlsConfig | None = None
        self._exported: tuple[str, ...] = ()
        """Flags that say where spans go."""

    async def __aenter__(self) -> Fleet:
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every process, in whatever state it is."""
        for channel in self._channels.values():
            await channel.close()
        if self.disk is not None:
            self.disk.clear()
        for service in reversed(self.services):
            await asyncio.to_thread(service.end)
        for member in self.etcd:
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                member.thaw()
            await asyncio.to_thread(member.stop)
        await self._undo.aclose()

    def of(self, role: str) -> list[Service]:
        """Services of a role."""
        return [service for service in self.services if service.role == role]

    def named(self, name: str) -> Service:
        """By its name, such as `worker-1`."""
        return next(service for service in self.services if service.name == name)

    @property
    def urls(self) -> list[str]:
        """Base addresses of the gateways."""
        scheme = "http" if self._tls is None else "https"
        return [f"{scheme}://127.0.0.1:{service.ready['http_port']}" for service in self.of("gateway")]

    @property
    def trust(self) -> ssl.SSLContext | bool:
        """What HTTP clients verify with."""
        return True if self._tls is None else ssl.create_default_context(cafile=str(self._tls.ca_file))

    def stub(self, gateway: Service) -> Any:
        """The Fleet service of a gateway."""
        address = f"127.0.0.1:{gateway.ready['grpc_port']}"
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._tls)
        return FleetStub(self._channels[address])

    async def load(self) -> fleet_pb2.GetLoadResponse | None:
        """What the leader says; None while nobody answers."""
        for gateway in self.of("gateway"):
            with contextlib.suppress(grpc.aio.AioRpcError, KeyError):
                if gateway.alive:
                    return await self.stub(gateway).GetLoad(fleet_pb2.GetLoadRequest(), timeout=_CALL_S)  # type: ignore[no-any-return]
        return None

    async def requests(self) -> list[fleet_pb2.RequestInfo]:
        """Requests that wait or run."""
        for gateway in self.of("gateway"):
            with contextlib.suppress(grpc.aio.AioRpcError, KeyError):
                if gateway.alive:
                    answer = await self.stub(gateway).ListRequests(fleet_pb2.ListRequestsRequest(), timeout=_CALL_S)
                    return list(answer.requests)
        return []

    async def leader(self) -> Service:
        """The scheduler that leads, by its own answer."""

        async def named() -> Service | None:
            load = await self.load()
            if load is None:
                return None
            leading = {
                node.id
                for node in load.nodes
                if node.role == fleet_pb2.NODE_ROLE_SCHEDULER and node.state == fleet_pb2.NODE_STATE_READY
            }
            return next((one for one in self.of("scheduler") if one.id in leading), None)

        found = await until(named, "a leader")
        assert isinstance(found, Service)
        return found

    async def heal(self) -> None:
        """Undo what a scenario did: thaw, recall, replace; then wait until all is as at the start."""
        for proxy in self.proxies.values():
            proxy.heal()
        if self.apart is not None:
            await asyncio.to_thread(self.apart.mend)
        if self.disk is not None:
            self.disk.clear()
        await self.revive_etcd()
        fresh = []
        for service in self.services:
            if service.alive and not service.marked:
                await asyncio.to_thread(_calm, service)
            else:
                await asyncio.to_thread(service.end)
                service.spawn()
                fresh.append(service)
        for service in fresh:
            await asyncio.to_thread(service.wait_ready)
        await self.wait_whole()

    async def revive_etcd(self) -> None:
        """Thaw the members that are frozen, start those that are not there."""
        dead = []
        for member in self.etcd:
            with contextlib.suppress(ProcessLookupError, RuntimeError):
                member.thaw()
            if not _runs(member):
                member.stop()
                member.spawn()
                self.ledger.note("process", member.pid)
                dead.append(member)
        for member in dead:
            await asyncio.to_thread(member.wait_until_healthy)

    async def wait_whole(self, timeout_s: float = 60.0) -> None:
        """Until every gateway serves and the leader sees exactly our workers, ready.

        One that was put out is taken back once it has served a request: it gets some.
        """
        wanted = {service.id for service in self.of("worker")}

        async def whole() -> bool:
            for gateway in self.of("gateway"):
                try:
                    answer = await self.stub(gateway).GetLoad(fleet_pb2.GetLoadRequest(), timeout=_CALL_S)
                except grpc.aio.AioRpcError:
                    return False
                ready = {
                    node.id
                    for node in answer.nodes
                    if node.role == fleet_pb2.NODE_ROLE_WORKER and node.state == fleet_pb2.NODE_STATE_READY
                }
                model = next((one for one in answer.models), None)
                if ready != wanted or model is None or model.replicas < len(wanted):
                    if any(node.state == fleet_pb2.NODE_STATE_EJECTED for node in answer.nodes):
                        await self._try()
                    return False
            return True

        await until(whole, f"{len(wanted)} ready workers (logs: {self.ledger.folder})", timeout_s)

    async def _try(self) -> None:
        """A short request of no scenario."""
        model = MODEL if self.shape.torch else "echo"
        body = {"model": model, "prompt": "how are you", "max_tokens": 12}
        async with httpx.AsyncClient(timeout=_CALL_S, trust_env=False, verify=self.trust) as http:
            with contextlib.suppress(httpx.HTTPError):
                await http.post(f"{random.choice(self.urls)}/v1/completions", json=body)

    async def _start(self) -> None:
        if self.shape.apart:
            await asyncio.to_thread(self._set_apart)
        await asyncio.to_thread(self._start_etcd)
        if self.shape.torch:
            await asyncio.to_thread(_make_model)
        if self.shape.collector:
            port = free_port()
            self._exported = ("--otlp-endpoint", f"http://127.0.0.1:{port}")
            await self._add("collector", 0, "tests.faults.doubles.collector", lambda at: ["--port", str(port)])
        beside = "tests.faults.doubles." if self.shape.doubles else ""
        for number in range(self.shape.schedulers):
            await self._add("scheduler", number, f"{beside}scheduler", self._scheduler_flags)
        for number in range(self.shape.workers):
            await self._add("worker", number, "tests.faults.doubles.worker", self._worker_flags)
        for number in range(self.shape.gateways):
            wrap = ("prlimit", f"--nofile={self.shape.open_files}") if self.shape.open_files else ()
            await self._add("gateway", number, f"{beside}gateway", self._gateway_flags, wrap)
        for service in self.services:
            service.spawn()
        for service in self.services:
            await asyncio.to_thread(service.wait_ready)
        await self.wait_whole()

    def _set_apart(self) -> None:
        """Listening elsewhere than on loopback needs TLS."""
        names = [f"scheduler-{number}" for number in range(self.shape.schedulers)]
        names += [f"worker-{number}" for number in range(self.shape.workers)]
        self.apart = Apart(self.ledger, names)
        files = make_certificates(
            self.ledger.folder / "tls", self.apart.addresses, 1, datetime.datetime.now(datetime.UTC)
        )
        self._tls = service_tls(files)

    def _start_etcd(self) -> None:
        if self.shape.small_disk:
            self.disk = SmallDisk(self.ledger, self.ledger.folder, self.shape.small_disk)
        folder = self.ledger.folder / "etcd"
        if self.shape.members > 1:
            cluster = EtcdCluster(folder)
            self.etcd = cluster.members
            cluster.__enter__()
        else:
            self.etcd = [EtcdServer(folder, host=self.apart.root) if self.apart else EtcdServer(folder)]
            self.etcd[0].start()
        for member in self.etcd:
            self.ledger.note("process", member.pid)
        self._etcd_addresses = [member.address for member in self.etcd]

    async def _add(
        self,
        role: str,
        number: int,
        module: str,
        flags: Callable[[Places], list[str]],
        wrap: tuple[str, ...] = (),
    ) -> None:
        port, name = free_port(), f"{role}-{number}"
        place = self.apart.places.get(name) if self.apart else None
        host = place.address if place else "127.0.0.1"
        wrap = place.wrap if place else wrap
        public = await self._before(name, f"{host}:{port}") if role != "gateway" else ""
        etcd = [await self._before(f"etcd-{name}", self._etcd_addresses[0])] if role != "gateway" else []
        etcd = etcd if self.shape.proxied else self._etcd_addresses
        service = Service(
            role, number, module, lambda: flags(Places(port, public, ",".join(etcd), host)), self.ledger, wrap=wrap
        )
        service.address = public
        self.services.append(service)

    async def _before(self, name: str, target: str) -> str:
        """The address of a proxy before the target, if the shape has proxies."""
        if not self.shape.proxied:
            return target
        proxy = FaultProxy(target, port=free_port(), seed=random.Random(name).getrandbits(32))
        self.proxies[name] = await self._undo.enter_async_context(proxy)
        return proxy.address

    def _scheduler_flags(self, at: Places) -> list[str]:
        flags = ["--lease-ttl-s", "2", *self._listening(at)]
        return [*flags, *self._exported, *self.shape.scheduler_flags]

    def _listening(self, at: Places) -> list[str]:
        flags = ["--host", at.host, "--port", str(at.port), "--advertise", at.public, "--etcd-endpoints", at.etcd]
        return [*flags, *self._secured]

    @property
    def _secured(self) -> tuple[str, ...]:
        return tls_flags(self._tls) if self._tls is not None else ()

    def _worker_flags(self, at: Places) -> list[str]:
        flags = self._listening(at)
        flags += ["--echo-tokens-per-second", str(self.shape.speed)]
        if self.shape.torch:
            flags += ["--backend", "torch", "--model", MODEL, "--store", str(STORE), "--precision", "fp32"]
            flags += ["--threads", "1", "--spare-engine", "no", "--memory-limit", str(_TORCH_BYTES)]
        else:
            flags += ["--backend", "echo", "--model", "echo"]
        return [*flags, *self._exported, *self.shape.worker_flags]

    def _gateway_flags(self, at: Places) -> list[str]:
        schedulers = ",".join(service.address for service in self.of("scheduler"))
        key = self.ledger.folder / "streams.key"
        key.write_text("5a" * 32 + "\n")
        flags = ["--schedulers", schedulers, "--http-port", str(at.port), "--grpc-port", "0"]
        return [*flags, "--stream-key-file", str(key), *self._secured, *self._exported, *self.shape.gateway_flags]


def _make_model() -> None:
    """Once per machine: the tiny model is the same each time."""
    if not (STORE / "whole").exists():
        command = [sys.executable, "-m", "tests.faults.doubles.model", str(STORE)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
        (STORE / "whole").touch()


def _runs(member: EtcdServer) -> bool:
    try:
        return psutil.Process(member.pid).status() != psutil.STATUS_ZOMBIE
    except (RuntimeError, psutil.NoSuchProcess):
        return False


def _calm(service: Service) -> None:
    service.signal(signal.SIGCONT)
    for order in service.orders.iterdir():
        order.unlink()
