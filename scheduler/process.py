"""A scheduler's life: serve, campaign, lead for a while or for ever, leave."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from llmos.addresses import host_port
from llmos.clock import Clock
from llmos.config import TlsConfig
from llmos.errors import LlmosError
from llmos.etcd import EtcdClient, EtcdConfig
from llmos.internal.v1 import journal_pb2_grpc, registry_pb2, requests_pb2_grpc
from llmos.ready import write_ready
from llmos.rpc import RpcServer, open_channel
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.directory import SchedulerDirectory
from scheduler.fleet_service import FleetService
from scheduler.following import JournalFollower
from scheduler.journal_service import JournalService
from scheduler.leadership import Leadership
from scheduler.reign import Reign, ReignContext
from scheduler.requests_service import RequestsService
from scheduler.seat import ReignSeat
from scheduler.span_ring import SpanRing

log = logging.getLogger(__name__)

_GRACE_S = 1.0
_HAND_OVER_S = 1.0
"""How long a leader that leaves waits for its successor to show itself."""
_SPANS_S = 0.1


@dataclass(frozen=True, slots=True)
class Wires:
    """How a scheduler is reached and reaches others; a simulation brings its own."""

    server: Callable[[str, int, TlsConfig], RpcServer] = lambda host, port, tls: RpcServer(host, port, tls=tls)
    channel: Callable[[str, TlsConfig], grpc.aio.Channel] = open_channel
    etcd: Callable[[EtcdConfig, Clock, random.Random], EtcdClient] = EtcdClient
    telemetry: Callable[[SchedulerConfig, str, Clock], Telemetry] = lambda config, name, clock: Telemetry(
        "scheduler", name, clock=clock, otlp_endpoint=config.otlp_endpoint, sample_ratio=config.sample_ratio
    )


class SchedulerProcess:
    """One scheduler. `serve` is its whole life."""

    def __init__(self, config: SchedulerConfig, clock: Clock, rng: random.Random, wires: Wires | None = None) -> None:
        self.id = config.id or f"scheduler-{secrets.token_hex(4)}"
        self.port = 0
        """Known once it serves."""
        self.seat = ReignSeat(self._begin)
        self._config = config
        self._clock = clock
        self._rng = rng
        self.ring = SpanRing()
        """Finished spans of the fleet."""
        self.leadership: Leadership | None = None
        """This scheduler's part in the election, while it serves."""
        self._challenge = asyncio.Event()
        self._wires = wires or Wires()
        policy = config.core_policy()
        self.follower = JournalFollower(
            self.id,
            lambda: self.seat.leader_address,
            self._connect,
            clock,
            policy.journal_ttl_s,
            policy.tombstone_ttl_s,
        )
        self._telemetry = self._wires.telemetry(config, self.id, clock)
        self._etcd = self._wires.etcd(config.etcd(), clock, rng)

    async def serve(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, then hand over to a standby. Raises SetupError, EtcdAuthFailed."""
        try:
            async with self._etcd:
                await self._serve(stop)
        finally:
            await asyncio.to_thread(self._telemetry.shutdown, _GRACE_S)

    async def _serve(self, stop: asyncio.Event) -> None:
        config = self._config
        server = self._wires.server(config.host, config.port, config.tls)
        record = registry_pb2.SchedulerRecord(scheduler_id=self.id, host=socket.gethostname(), pid=os.getpid())
        directory = SchedulerDirectory(self._etcd)
        requests = RequestsService(self.seat, self._challenge.set)
        fleet = FleetService(self.seat, directory, self.ring, record, self._clock)
        server.add(requests_pb2_grpc.add_RequestsServicer_to_server, requests, "llmos.internal.v1.Requests")
        journal = JournalService(self.seat, self._challenge.set)
        server.add(journal_pb2_grpc.add_JournalServicer_to_server, journal, "llmos.internal.v1.Journal")
        server.add(fleet_pb2_grpc.add_FleetServicer_to_server, fleet, "llmos.v1.Fleet")
        self.port = await server.start()
        record.address = config.advertise or host_port(config.host, self.port)
        leadership = self.leadership = Leadership(self._etcd, record, config.lease_ttl_s, self.seat)
        try:
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(leadership.run(), name="leadership"),
                    group.create_task(self._heed_challenges(leadership), name="challenges"),
                    group.create_task(directory.run(), name="directory"),
                    group.create_task(self.follower.run(), name="journal"),
                    group.create_task(self._collect_spans(), name="spans"),
                    group.create_task(self.seat.failure(), name="reign-failure"),
                ]
                log.info("scheduler %s serves on port %d", self.id, self.port)
                write_ready(config.ready_file, self.id, port=self.port)
                await stop.wait()
                others = [one for one in directory.records() if one.scheduler_id != self.id]
                await leadership.hand_over(_HAND_OVER_S if others else 0.0)
                for task in background:
                    task.cancel()
        except ExceptionGroup as failures:
            raise _first_typed(failures) from failures
        finally:
            await self.seat.close()
            await server.stop(_GRACE_S)

    def _begin(self, term: int) -> Reign:
        context = ReignContext(
            scheduler_id=self.id,
            policy=self._config.core_policy(),
            links=self._config.links(),
            gateway_buffer_bytes=self._config.gateway_buffer_bytes,
            etcd=self._etcd,
            connect=self._connect,
            telemetry=self._telemetry,
            keep_spans=self.ring.add,
            refused=self._challenge.set,
            clock=self._clock,
            rng=self._rng,
            inheritance=self.follower.inheritance,
        )
        return Reign(term, context)

    def _connect(self, address: str) -> grpc.aio.Channel:
        return self._wires.channel(address, self._config.tls)

    async def _heed_challenges(self, leadership: Leadership) -> None:
        while True:
            await self._challenge.wait()
            self._challenge.clear()
            await leadership.challenged()

    async def _collect_spans(self) -> None:
        while True:
            self.ring.add(self._telemetry.drain())
            await asyncio.sleep(_SPANS_S)


def _first_typed(failures: ExceptionGroup[Exception]) -> Exception:
    """What the person at the keyboard should see of a group: the typed error in it, if there is one."""
    errors: Iterable[Exception] = failures.exceptions
    for error in errors:
        found = _first_typed(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, LlmosError):
            return found
    return failures
