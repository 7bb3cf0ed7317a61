"""Runs a fleet: start its processes in order, keep each of them running, stop them in reverse.

A member that ends or hangs is started again by its keeper, on the ports that others know; the fleet goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec

from llmos.clock import SystemClock
from llmos.errors import ConfigError, LlmosError, SetupError
from llmos.fleet import etcd_server
from llmos.fleet.eyes import Eyes, ServiceEyes
from llmos.fleet.identity import identify
from llmos.fleet.keeper import Care, Keeper, Post
from llmos.fleet.lock import FleetLock
from llmos.fleet.member import RunningMember, all_ready
from llmos.fleet.options import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, HOST, FleetOptions, make_folders
from llmos.fleet.plan import Plan
from llmos.fleet.probe import http_status
from llmos.fleet.rolling import Orders
from llmos.fleet.shutdown import clear_stale
from llmos.fleet.state import FleetState, Restart, Role, remove_state, write_state

log = logging.getLogger(__name__)

Report = Callable[[str], None]
OnReady = Callable[[FleetState], Awaitable[None]]

STOP_GRACE_S: Mapping[Role, float] = {"gateway": 10.0, "worker": 15.0, "scheduler": 5.0, "etcd": 5.0}
"""Seconds that each role gets to end after SIGTERM, in the order in which they are stopped."""
_HURRY_S: Mapping[Role, float] = {"gateway": 5.0, "worker": 1.0}
"""Seconds until they are told to hurry; shorter than in a cluster, because somebody waits at the keyboard, and nobody
listens to workers any more."""
_ETCD_TRIES = 3
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
_BACKLOG = 2048
"""Connections that wait while a gateway is restarted."""


class Supervisor:
    """Owns the processes of one fleet. `report` gets each step of the start, `notify` whatever happens to a member
    later; `grace_s` is in stop order."""

    def __init__(
        self,
        options: FleetOptions,
        plan: Plan,
        report: Report,
        grace_s: Mapping[Role, float] = STOP_GRACE_S,
        *,
        notify: Report = log.warning,
        care: Care | None = None,
        eyes: Eyes | None = None,
    ) -> None:
        self._options = options
        self._plan = plan
        self._report = report
        self._grace_s = grace_s
        self._notify = notify
        self._care = care or Care(start_s=options.start_timeout_s)
        self._eyes = eyes or ServiceEyes(self._running)
        self._clock = SystemClock()
        self._keepers: list[Keeper] = []
        self._sockets: list[socket.socket] = []
        me = identify(os.getpid())
        if me is None:
            raise SetupError("this process cannot find itself in the process table")
        models = tuple(name.partition("=")[0] for name in options.model.split(",") if name)
        self._state = FleetState(phase="starting", supervisor=me, models=models, etcd_endpoints=options.etcd)

    async def run(self, stop: asyncio.Event, on_ready: OnReady) -> None:
        """Start the fleet, call `on_ready`, serve until `stop` is set, leave no process.

        Raises Conflict if the data folder has a fleet, SetupError if a process does not come up, and what
        `on_ready` raises.
        """
        make_folders(self._options)
        with FleetLock(self._options.data_dir):
            clear_stale(self._options.data_dir)
            try:
                await self._serve(stop, on_ready)
            except LlmosError as error:
                self._write(phase="failed", error=error.message)
                raise
            finally:
                await self._stop_all()
                if self._state.phase == "failed":
                    self._write()
                else:
                    remove_state(self._options.data_dir)

    async def _serve(self, stop: asyncio.Event, on_ready: OnReady) -> None:
        if not await _unless(stop, self._start()):
            return
        works = [keeper.run() for keeper in self._keepers]
        works.append(Orders(self._options.data_dir).run(self._keepers, self._show))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            if await _unless(stop, on_ready(self._state)):
                await _first_end(stop, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._write(phase="stopping")

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await self._start_members()
        except TimeoutError as error:
            raise SetupError(
                f"the fleet was not ready after {self._options.start_timeout_s:g} s while {self._state.step}; "
                f"its logs are in {self._options.log_dir}"
            ) from error
        for keeper in self._keepers:
            keeper.serves()
        self._write(phase="ready", step="")

    async def _start_members(self) -> None:
        grpc_port = edge_port(self._options.grpc_port, DEFAULT_GRPC_PORT, "--grpc-port")
        listeners = self._listen()
        if not self._options.etcd:
            await self._start_etcd()
        self._step("starting schedulers")
        schedulers = [await self._launch(self._scheduler(number)) for number in range(self._options.schedulers)]
        await all_ready([keeper.member for keeper in schedulers])
        addresses = [f"{HOST}:{keeper.member.ports['port']}" for keeper in schedulers]
        self._step("starting workers and gateways")
        workers = [await self._launch(self._worker(number)) for number in range(self._options.workers)]
        gateways = [
            await self._launch(self._gateway(number, addresses, listener, 0 if number else grpc_port))
            for number, listener in enumerate(listeners)
        ]
        await all_ready([keeper.member for keeper in (*gateways, *workers)])
        self._step("loading models")
        await self._until_served([keeper.member for keeper in gateways])

    def _listen(self) -> list[socket.socket]:
        """A listening socket for each gateway's HTTP. They are kept here, so that while a gateway is restarted, after a
        crash or by order, connections wait for the next one instead of being refused."""
        first = edge_port(self._options.http_port, DEFAULT_HTTP_PORT, "--http-port")
        for number in range(self._options.gateways):
            self._sockets.append(socket.create_server((HOST, 0 if number else first), backlog=_BACKLOG))
        return self._sockets

    def _scheduler(self, number: int) -> Post:
        name, etcd = f"scheduler-{number + 1}", self._state.etcd_endpoints
        return self._post(name, "scheduler", lambda ports: self._plan.scheduler(name, etcd, ports.get("port", 0)))

    def _worker(self, number: int) -> Post:
        """Its port is in its record, where schedulers look; any will do."""
        name, etcd = f"worker-{number + 1}", self._state.etcd_endpoints
        return self._post(name, "worker", lambda ports: self._plan.worker(name, etcd))

    def _gateway(self, number: int, schedulers: Sequence[str], listener: socket.socket, grpc_port: int) -> Post:
        name, inherited = f"gateway-{number + 1}", listener.fileno()

        def command(ports: Mapping[str, int]) -> list[str]:
            return self._plan.gateway(name, schedulers, inherited, ports.get("grpc_port", grpc_port))

        return self._post(name, "gateway", command, (inherited,))

    def _post(
        self,
        name: str,
        role: Role,
        command: Callable[[Mapping[str, int]], list[str]],
        descriptors: tuple[int, ...] = (),
    ) -> Post:
        ready_file = self._options.ready_dir / f"{name}.json"
        return Post(name, role, command, self._options.log_dir / f"{name}.log", ready_file, descriptors)

    async def _start_etcd(self) -> None:
        self._step("starting etcd")
        program = etcd_server.find_etcd()
        for attempt in range(1, _ETCD_TRIES + 1):
            client_port, peer_port = etcd_server.free_ports(2)
            command = etcd_server.etcd_command(program, self._options.data_dir / "etcd", client_port, peer_port)
            log_file = self._options.log_dir / "etcd.log"
            keeper = await self._launch(Post("etcd", "etcd", partial(_same, command), log_file, None))
            try:
                await _until_status(f"http://{HOST}:{client_port}/health", keeper.member)
                break
            except SetupError:
                # Somebody may have taken a port between our look and etcd's start.
                self._keepers.remove(keeper)
                if attempt == _ETCD_TRIES:
                    raise
        keeper.member.ports = {"port": client_port}
        self._write(etcd_endpoints=(f"{HOST}:{client_port}",))
        await etcd_server.forget_members(f"{HOST}:{client_port}")

    async def _launch(self, post: Post) -> Keeper:
        keeper = Keeper(post, self._care, self._eyes, self._clock, self._notify, self._write)
        self._keepers.append(keeper)
        await keeper.start()
        self._write()
        return keeper

    async def _until_served(self, gateways: Sequence[RunningMember]) -> None:
        """Wait until every gateway answers 200 on /ready: it has a leader and a model."""
        for gateway in gateways:
            url = f"http://{HOST}:{gateway.ports['http_port']}/ready"
            while await asyncio.to_thread(http_status, url, _PROBE_TIMEOUT_S) != 200:
                for keeper in self._keepers:
                    keeper.member.check_running()
                await asyncio.sleep(_POLL_S)
        first = gateways[0].ports
        self._write(http_url=f"http://{HOST}:{first['http_port']}", grpc_address=f"{HOST}:{first['grpc_port']}")

    def _running(self) -> list[RunningMember]:
        return [keeper.member for keeper in self._keepers if keeper.status == "running"]

    async def _stop_all(self) -> None:
        for role, grace_s in self._grace_s.items():
            keepers = [keeper for keeper in self._keepers if keeper.post.role == role]
            await asyncio.gather(*(keeper.stop(grace_s, _HURRY_S.get(role)) for keeper in keepers))
            self._keepers = [keeper for keeper in self._keepers if keeper not in keepers]
        for listener in self._sockets:
            listener.close()

    def _show(self, restart: Restart) -> None:
        if restart.error:
            self._notify(f"restart ended early: {restart.error}")
        else:
            log.info(
                "restart: %d of %d done%s", restart.done, restart.total, restart.member and f", {restart.member} next"
            )
        self._write(restart=restart)

    def _step(self, step: str) -> None:
        self._report(step)
        self._write(step=step)

    def _write(self, **changes: object) -> None:
        members = tuple(keeper.describe() for keeper in self._keepers)
        self._state = msgspec.structs.replace(self._state, **{"members": members, **changes})
        try:
            write_state(self._options.data_dir, self._state)
        except OSError as error:  # a full disk must not end what runs
            log.error("the fleet's state can't be written, `llmos nodes` shows an older one: %s", error)


async def _unless(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Run `work` to its end, or cancel it when `stop` is set. Whether it ended by itself."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def _until_status(url: str, member: RunningMember) -> None:
    while await asyncio.to_thread(http_status, url, _PROBE_TIMEOUT_S) != 200:
        member.check_running()
        await asyncio.sleep(_POLL_S)


async def _first_end(stop: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for `stop`. A task that ends before is a bug, and is raised."""
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        stopped.cancel()


def _same(command: list[str], ports: Mapping[str, int]) -> list[str]:
    """etcd's command line, ports included, is settled before its first start."""
    del ports
    return command


def edge_port(wanted: int | None, default: int, flag: str) -> int:
    """The port to listen on; 0: any. A given one that is taken raises ConfigError, the default one gives way."""
    if wanted is None:
        return default if etcd_server.is_free(default) else 0
    if wanted and not etcd_server.is_free(wanted):
        raise ConfigError(f"port {wanted} on {HOST} is taken: choose another with {flag}, or 0 for any", param=flag)
    return wanted
