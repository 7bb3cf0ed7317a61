"""How a supervisor looks at its members: does one answer, and does it serve again what it served before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmos.fleet.member import RunningMember
from llmos.fleet.options import HOST
from llmos.fleet.probe import http_status
from llmos.rpc import open_channel
from llmos.v1 import fleet_pb2, fleet_pb2_grpc

_READY_TIMEOUT_S = 2.0
_POLL_S = 0.1


class Eyes(Protocol):
    """What a keeper needs to see."""

    async def alive(self, member: RunningMember, timeout_s: float) -> bool:
        """Whether it answers anything at all in time."""
        ...

    async def standing(self, member: RunningMember) -> frozenset[str]:
        """Names of what it serves now, to be compared after a restart; empty if that cannot be told."""
        ...

    async def settled(self, member: RunningMember, before: frozenset[str] | None) -> None:
        """Wait until this new member serves; with `before`, until the fleet serves with it as it did with the old one.
        The caller bounds the wait."""
        ...


class ServiceEyes:
    """Implements `Eyes` by the services' own interfaces. `members` lists those that run now."""

    def __init__(self, members: Callable[[], Iterable[RunningMember]]) -> None:
        self._members = members

    async def alive(self, member: RunningMember, timeout_s: float) -> bool:
        """See `Eyes`. etcd and gateways over HTTP, the others by gRPC's health service; any answer will do."""
        if member.role == "etcd":
            return await _http(member.ports["port"], "/health", timeout_s) is not None
        if member.role == "gateway":
            return await _http(member.ports["http_port"], "/live", timeout_s) is not None
        return await _health(member.ports["port"], timeout_s)

    async def standing(self, member: RunningMember) -> frozenset[str]:
        """See `Eyes`: the models that a worker has loaded."""
        return await self._loaded(member.id) if member.role == "worker" else frozenset()

    async def settled(self, member: RunningMember, before: frozenset[str] | None) -> None:
        """See `Eyes`: every gateway is ready, and a worker has loaded what its forerunner had."""
        if member.role == "etcd":
            await _until_ok(member.ports["port"], "/health")
        if before is None:
            return
        for gateway in self._of("gateway"):
            await _until_ok(gateway.ports["http_port"], "/ready")
        while not before <= await self.standing(member):  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(_POLL_S)

    async def _loaded(self, worker_id: str) -> frozenset[str]:
        """By the leader's word; a scheduler that does not lead does not say."""
        for scheduler in self._of("scheduler"):
            for node in await _nodes(scheduler.ports["port"]):
                if node.id == worker_id:
                    loaded = fleet_pb2.MODEL_STATE_LOADED
                    return frozenset(model.name for model in node.models if model.state == loaded)
        return frozenset()

    def _of(self, role: str) -> list[RunningMember]:
        return [member for member in self._members() if member.role == role and member.ports]


async def _http(port: int, path: str, timeout_s: float) -> int | None:
    return await asyncio.to_thread(http_status, f"http://{HOST}:{port}{path}", timeout_s)


async def _until_ok(port: int, path: str) -> None:
    while await _http(port, path, _READY_TIMEOUT_S) != 200:  # noqa: ASYNC110 - another process decides
        await asyncio.sleep(_POLL_S)


async def _health(port: int, timeout_s: float) -> bool:
    async with open_channel(f"{HOST}:{port}") as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
    return True


async def _nodes(port: int) -> list[fleet_pb2.Node]:
    """Every node, if this scheduler leads."""
    async with open_channel(f"{HOST}:{port}") as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        try:
            return list((await stub.ListNodes(fleet_pb2.ListNodesRequest(), timeout=_READY_TIMEOUT_S)).nodes)
        except grpc.aio.AioRpcError:
            return []
