"""Runs a fleet: start its processes in order, watch over them, stop them in reverse.

A member that dies is reported, not restarted: the fleet goes on with the others.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from llmos.errors import ConfigError, LlmosError, SetupError
from llmos.fleet import etcd_server
from llmos.fleet.identity import identify
from llmos.fleet.lock import FleetLock
from llmos.fleet.member import RunningMember, all_ready
from llmos.fleet.options import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT, HOST, FleetOptions, make_folders
from llmos.fleet.plan import Plan
from llmos.fleet.probe import http_status
from llmos.fleet.shutdown import clear_stale
from llmos.fleet.state import FleetState, Role, remove_state, write_state

log = logging.getLogger(__name__)

Report = Callable[[str], None]
OnReady = Callable[[FleetState], Awaitable[None]]

STOP_GRACE_S: Mapping[Role, float] = {"gateway": 10.0, "worker": 15.0, "scheduler": 5.0, "etcd": 5.0}
"""Seconds that each role gets to end after SIGTERM, in the order in which they are stopped."""
_ETCD_TRIES = 3
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 2.0


class Supervisor:
    """Owns the processes of one fleet. `report` gets each step of the start; `grace_s` is in stop order."""

    def __init__(
        self, options: FleetOptions, plan: Plan, report: Report, grace_s: Mapping[Role, float] = STOP_GRACE_S
    ) -> None:
        self._options = options
        self._plan = plan
        self._report = report
        self._grace_s = grace_s
        self._members: list[RunningMember] = []
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
        watchers = [asyncio.create_task(self._watch(member)) for member in self._members]
        try:
            if await _unless(stop, on_ready(self._state)):
                await stop.wait()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
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
        self._write(phase="ready", step="")

    async def _start_members(self) -> None:
        http_port, grpc_port = _edge_ports(self._options)
        if not self._options.etcd:
            await self._start_etcd()
        etcd = self._state.etcd_endpoints
        self._step("starting schedulers")
        schedulers = await self._start_role(
            "scheduler", self._options.schedulers, lambda name, _: self._plan.scheduler(name, etcd)
        )
        await all_ready(schedulers)
        addresses = [f"{HOST}:{member.ports['port']}" for member in schedulers]
        self._step("starting workers and gateways")
        workers = await self._start_role("worker", self._options.workers, lambda name, _: self._plan.worker(name, etcd))
        gateways = await self._start_role(
            "gateway",
            self._options.gateways,
            lambda name, first: self._plan.gateway(name, addresses, *((http_port, grpc_port) if first else (0, 0))),
        )
        await all_ready([*gateways, *workers])
        self._step("loading models")
        await self._until_served(gateways)

    async def _start_etcd(self) -> None:
        self._step("starting etcd")
        program = etcd_server.find_etcd()
        for attempt in range(1, _ETCD_TRIES + 1):
            client_port, peer_port = etcd_server.free_ports(2)
            command = etcd_server.etcd_command(program, self._options.data_dir / "etcd", client_port, peer_port)
            member = await self._launch("etcd", "etcd", command, ready_file=None)
            try:
                await _until_status(f"http://{HOST}:{client_port}/health", member)
                break
            except SetupError:
                # Somebody may have taken a port between our look and etcd's start.
                self._members.remove(member)
                if attempt == _ETCD_TRIES:
                    raise
        member.ports = {"port": client_port}
        self._write(etcd_endpoints=(f"{HOST}:{client_port}",))
        await etcd_server.forget_members(f"{HOST}:{client_port}")

    async def _start_role(
        self, role: Role, count: int, command: Callable[[str, bool], list[str]]
    ) -> list[RunningMember]:
        started = []
        for number in range(1, count + 1):
            name = f"{role}-{number}"
            ready_file = self._options.ready_dir / f"{name}.json"
            ready_file.unlink(missing_ok=True)
            started.append(await self._launch(name, role, command(name, number == 1), ready_file))
        return started

    async def _launch(self, name: str, role: Role, command: Sequence[str], ready_file: Path | None) -> RunningMember:
        member = RunningMember(name, role, command, self._options.log_dir / f"{name}.log", ready_file)
        self._members.append(member)
        await member.start()
        self._write()
        return member

    async def _until_served(self, gateways: Sequence[RunningMember]) -> None:
        """Wait until every gateway answers 200 on /ready: it has a leader and a model."""
        for gateway in gateways:
            url = f"http://{HOST}:{gateway.ports['http_port']}/ready"
            while await asyncio.to_thread(http_status, url, _PROBE_TIMEOUT_S) != 200:
                for member in self._members:
                    member.check_running()
                await asyncio.sleep(_POLL_S)
        first = gateways[0].ports
        self._write(http_url=f"http://{HOST}:{first['http_port']}", grpc_address=f"{HOST}:{first['grpc_port']}")

    async def _watch(self, member: RunningMember) -> None:
        status = await member.wait_exit()
        log.warning(
            "%s ended with status %d; the fleet goes on without it (log: %s)", member.name, status, member.log_path
        )

    async def _stop_all(self) -> None:
        for role, grace_s in self._grace_s.items():
            members = [member for member in self._members if member.role == role]
            await asyncio.gather(*(member.stop(grace_s) for member in members))
            self._members = [member for member in self._members if member not in members]

    def _step(self, step: str) -> None:
        self._report(step)
        self._write(step=step)

    def _write(self, **changes: object) -> None:
        members = tuple(member.describe() for member in self._members)
        self._state = msgspec.structs.replace(self._state, **{"members": members, **changes})
        write_state(self._options.data_dir, self._state)


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


def _edge_ports(options: FleetOptions) -> tuple[int, int]:
    return (
        edge_port(options.http_port, DEFAULT_HTTP_PORT, "--http-port"),
        edge_port(options.grpc_port, DEFAULT_GRPC_PORT, "--grpc-port"),
    )


def edge_port(wanted: int | None, default: int, flag: str) -> int:
    """The port to listen on; 0: any. A given one that is taken raises ConfigError, the default one gives way."""
    if wanted is None:
        return default if etcd_server.is_free(default) else 0
    if wanted and not etcd_server.is_free(wanted):
        raise ConfigError(f"port {wanted} on {HOST} is taken: choose another with {flag}, or 0 for any", param=flag)
    return wanted
