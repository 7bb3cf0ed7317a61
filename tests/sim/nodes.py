"""The services as simulated processes: put together as their `__main__` does, on virtual time and simulated wires."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.catalogue import Catalogue
from gateway.leader import LeaderClient
from gateway.link import Link
from gateway.link import LinkConfig as GatewayLinkConfig
from gateway.session import Sessions
from gateway.session_config import SessionConfig
from gateway.vault import Vault
from llmos.errors import Unavailable
from llmos.etcd import EtcdClient, EtcdConfig
from llmos.internal.v1 import registry_pb2, requests_pb2, work_pb2, work_pb2_grpc
from llmos.v1 import fleet_pb2
from scheduler.config import SchedulerConfig
from scheduler.policy import Policy
from scheduler.process import SchedulerProcess, Wires
from scheduler.work_client import LinkConfig
from tests.sim.checks import Checks
from tests.sim.network import Network, SimServer
from tests.sim.quiet import Quiet
from tests.sim.vloop import Node, VirtualClock, VirtualLoop
from worker.backends import echo
from worker.core import WorkerCore
from worker.engine_process import Engine, EngineModel
from worker.models import HeldModel
from worker.registration import Registration
from worker.service import WorkService
from worker.shelf import Shelf
from worker.spans import ExecuteSpans

MODEL = "echo"
CONTEXT = 512
_ENGINE_RESTART_S = 0.3
_TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Memory:
    """How long and how much leaders remember of streams that are over."""

    ttl_s: float = 120.0
    limit_bytes: int = 1 << 27
    tenant_bytes: int = 1 << 25


@dataclass(frozen=True, slots=True)
class Ground:
    """What every node stands on."""

    loop: VirtualLoop
    network: Network
    checks: Checks
    etcd: EtcdConfig
    seed: str
    memory: Memory

    def rng(self, name: str) -> random.Random:
        """A node's own randomness."""
        return random.Random(f"{self.seed}/{name}")

    def etcd_client(self, rng: random.Random) -> EtcdClient:
        """A client whose channels are simulated."""
        return EtcdClient(self.etcd, VirtualClock(self.loop), rng, self.network.channel)

    def vault(self, name: str) -> Vault:
        """A gateway's. All of them have the same key."""
        return Vault([hashlib.blake2b(self.seed.encode(), digest_size=32).digest()], self.rng(f"{name}/vault"))


@dataclass
class SimProcess:
    """A node that can be started again under the same name, as its supervisor would."""

    ground: Ground
    name: str
    host: str
    node: Node = field(init=False)
    incarnation: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    on_kill: list[Callable[[], None]] = field(default_factory=list)
    retired: list[Node] = field(default_factory=list)

    def start(self) -> None:
        """A fresh process."""
        self.incarnation += 1
        self.forget()
        self.node = Node(self.name)
        self.stop = asyncio.Event()
        self.ground.network.hosts[self.host] = self.name
        self.ground.checks.started(self)
        self.ground.loop.spawn(self.node, self._live(f"{self.name}.{self.incarnation}"), self.name)

    async def _live(self, identity: str) -> None:
        try:
            await self.serve(identity)
        except Exception as error:
            self.ground.checks.fail("nothing breaks", f"{self.name} ended by itself: {type(error).__name__}: {error}")

    def forget(self) -> None:
        """The last process's objects are gone with it."""

    async def serve(self, identity: str) -> None:
        """The process's life."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL."""
        if self.node.dead:
            return
        self.ground.loop.kill(self.node)
        self.ground.network.drop_node(self.node)
        self.retired.append(self.node)
        for heard in self.on_kill:
            heard()
        self.on_kill.clear()


@dataclass(frozen=True)
class CalmConfig(SchedulerConfig):
    """Looks for silence less often: most of a quiet run would be that."""

    journal_ttl_s: float = 120.0

    def core_policy(self) -> Policy:
        return replace(super().core_policy(), journal_ttl_s=self.journal_ttl_s)

    def links(self) -> LinkConfig:
        return LinkConfig(silence_s=self.worker_silence_s, watch_s=0.25)


@dataclass
class SimScheduler(SimProcess):
    """`scheduler.process.SchedulerProcess`."""

    process: SchedulerProcess | None = None

    def forget(self) -> None:
        self.process = None

    async def serve(self, identity: str) -> None:
        ground = self.ground
        wires = Wires(
            server=lambda host, port, tls: SimServer(ground.network, host, port),  # type: ignore[arg-type, return-value]
            channel=ground.network.channel,  # type: ignore[arg-type]
            etcd=lambda config, clock, rng: ground.etcd_client(rng),
            telemetry=lambda config, name, clock: Quiet(clock),
        )
        memory = ground.memory
        config = CalmConfig(
            id=identity,
            host=self.host,
            port=1,
            lease_ttl_s=2.0,
            no_worker_grace_s=30.0,
            journal_ttl_s=memory.ttl_s,
            journal_bytes=memory.limit_bytes,
            journal_tenant_bytes=memory.tenant_bytes,
        )
        self.process = SchedulerProcess(config, VirtualClock(ground.loop), ground.rng(identity), wires)
        ground.checks.scheduler(self.name, self.process)
        await self.process.serve(self.stop)
        ground.network.drop_node(self.node)
        ground.loop.kill(self.node)
        self.retired.append(self.node)


class SimEngine:
    """The engine process: the real `Engine` and echo backend; a step takes `step_s`. Implements `CommandSink`."""

    def __init__(self, ground: Ground, name: str, step_s: float, held: HeldModel) -> None:
        self.step_s = step_s
        self.factor = 1.0
        """How much slower than usual it is."""
        self.hangs_until = 0.0
        self._ground, self._name, self._held = ground, name, held
        self._inbox: list[work_pb2.Command] = []
        self._wake = asyncio.Event()
        self._up = False
        self._crash = asyncio.Event()

    def send(self, commands: Iterable[work_pb2.Command]) -> None:
        """See `CommandSink`."""
        if not self._up:
            raise Unavailable("The engine is starting.")
        for command in commands:
            copy = work_pb2.Command()
            copy.CopyFrom(command)
            self._inbox.append(copy)
        self._wake.set()

    def crash(self) -> None:
        """The engine process dies."""
        self._crash.set()

    async def run(self, core: WorkerCore) -> None:
        """Until cancelled; a crashed engine is started again."""
        while True:
            self._crash.clear()
            life = asyncio.create_task(self._live(core), name=f"{self._name}-engine")
            await self._crash.wait()
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            self._up = False
            self._inbox.clear()
            core.engine_lost("signal 9")
            await asyncio.sleep(_ENGINE_RESTART_S)

    async def _live(self, core: WorkerCore) -> None:
        loop, checks = self._ground.loop, self._ground.checks
        backend = echo.EchoBackend(clock=VirtualClock(loop))
        checks.engine(self._name, backend)
        spec = self._held.engine.spec()

        def transmit(message: work_pb2.AttachResponse) -> None:
            checks.stepped(self._name, message.frame)
            core.engine_frame(message.frame)

        engine = Engine(backend, {spec.name: spec}, transmit, clock=VirtualClock(loop))  # type: ignore[arg-type]
        self._up = True
        core.engine_ready(work_pb2.WorkerReport(numerics_fingerprint=echo.FINGERPRINT))
        while True:
            if not self._inbox and not engine.busy:
                self._wake.clear()
                await self._wake.wait()
            orders, self._inbox = self._inbox, []
            checks.obeyed(self._name, orders)
            engine.obey(orders)
            await asyncio.sleep(max(self.step_s * self.factor, self.hangs_until - loop.now))
            engine.step()


@dataclass
class SimWorker(SimProcess):
    """`worker.__main__.WorkerProcess`, its engine process beside it in the same node."""

    blocks: int = 16
    step_s: float = 0.03
    core: WorkerCore | None = None
    engine: SimEngine | None = None

    def forget(self) -> None:
        self.core = self.engine = None

    async def serve(self, identity: str) -> None:
        ground, rng = self.ground, self.ground.rng(identity)
        held = held_model()
        memory = self.blocks * echo.BLOCK_TOKENS * echo.KV_BYTES_PER_TOKEN
        device = fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=memory)
        capacity = fleet_pb2.Capacity(devices=[device])
        shelf = Shelf([held], capacity)
        core = self.core = WorkerCore(identity, shelf, ExecuteSpans(Quiet()), VirtualClock(ground.loop), orphan_s=6.0)
        engine = self.engine = SimEngine(ground, self.name, self.step_s, held)
        core.connect(engine)
        ground.checks.worker(self.name, core)
        port = self.incarnation
        server = SimServer(ground.network, self.host, port)
        server.add(work_pb2_grpc.add_WorkServicer_to_server, WorkService(core, [held]), "llmos.internal.v1.Work")
        record = registry_pb2.WorkerRecord(
            worker_id=identity,
            address=f"{self.host}:{port}",
            backend="echo",
            capacity=capacity,
            models=[held.record],
        )
        async with ground.etcd_client(rng) as client:
            registration = Registration(client, record, lease_ttl_s=3.0, rng=rng)
            tasks = [asyncio.create_task(engine.run(core)), asyncio.create_task(_tick(core))]
            await asyncio.sleep(0)
            await server.start()
            tasks.append(asyncio.create_task(registration.run()))
            await self.stop.wait()
            await self._drain(core)
            core.leave()
            await _end(tasks)
            await server.stop(0)
        ground.loop.kill(self.node)
        self.retired.append(self.node)

    async def _drain(self, core: WorkerCore) -> None:
        core.drain()
        deadline = self.ground.loop.now + 3.0
        while not core.idle and self.ground.loop.now < deadline:  # noqa: ASYNC110 - as the worker does it
            await asyncio.sleep(0.05)


@dataclass
class SimGateway(SimProcess):
    """`gateway.__main__.GatewayProcess` without its HTTP and gRPC edges: clients call its sessions."""

    schedulers: tuple[str, ...] = ()
    sessions: Sessions | None = None
    link: Link | None = None

    def forget(self) -> None:
        self.sessions = self.link = None

    async def serve(self, identity: str) -> None:
        ground, rng = self.ground, self.ground.rng(identity)
        clock = VirtualClock(ground.loop)
        node = fleet_pb2.Node(id=identity, role=fleet_pb2.NODE_ROLE_GATEWAY, pid=1, host=self.host)
        link = self.link = Link(
            GatewayLinkConfig(self.schedulers),
            node,
            connect=ground.network.channel,  # type: ignore[arg-type]
            clock=clock,
            rng=rng,
        )
        leader = LeaderClient(link.leader_channel)
        sessions = self.sessions = Sessions(
            link,
            Catalogue(leader.fetch_blob),
            SessionConfig(buffer_bytes=16_384),
            clock=clock,
            telemetry=Quiet(),
            leader=leader,
            rng=rng,
            vault=ground.vault(identity),
        )
        running = asyncio.create_task(link.run(ground.checks.gateway(self.name, link, sessions)), name=self.name)
        await self.stop.wait()
        sessions.retire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                await sessions.idle()
        sessions.close()
        await asyncio.sleep(0.3)
        await _end([running])
        self.kill()


def held_model() -> HeldModel:
    """A small echo model."""
    catalogue = requests_pb2.CatalogueModel(
        name=MODEL,
        version=echo.FINGERPRINT,
        context_length=CONTEXT,
        vocab_size=echo.VOCABULARY,
        capabilities=["completion"],
    )
    record = registry_pb2.ModelRecord(model=catalogue, kv_bytes_per_token=echo.KV_BYTES_PER_TOKEN)
    return HeldModel(record, EngineModel(name=MODEL, version=echo.FINGERPRINT, context_length=CONTEXT))


async def _tick(core: WorkerCore) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        core.tick()


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
