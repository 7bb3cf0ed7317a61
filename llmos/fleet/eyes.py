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
_DECIDED_S = 5.0
"""A worker that has loaded nothing for so long is not told to any more: orders come within half a second."""
_LOADED, _LOADING = fleet_pb2.MODEL_STATE_LOADED, fleet_pb2.MODEL_STATE_LOADING


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
        if before:
            await self._until_loaded(member.id, before)

    async def _until_loaded(self, worker_id: str, before: frozenset[str]) -> None:
        """Wait for the models that it had, for as long as it loads any. What nobody has it load any more by then the
        ledger has moved elsewhere, or let go: the new worker is none the worse for it."""
        idle_s = 0.0
        while idle_s < _DECIDED_S:
            node = await self._node(worker_id)
            if node is not None and before <= _in_state(node, _LOADED):
                return
            busy = node is None or bool(_in_state(node, _LOADING))
            idle_s = 0.0 if busy else idle_s + _POLL_S
            await asyncio.sleep(_POLL_S)

    async def _loaded(self, worker_id: str) -> frozenset[str]:
        node = await self._node(worker_id)
        return _in_state(node, _LOADED) if node is not None else frozenset()

    async def _node(self, node_id: str) -> fleet_pb2.Node | None:
        """By the leader's word; a scheduler that does not lead does not say."""
        for scheduler in self._of("scheduler"):
            for node in await _nodes(scheduler.ports["port"]):
                if node.id == node_id:
                    return node
        return None

    def _of(self, role: str) -> list[RunningMember]:
        return [member for member in self._members() if member.role == role and member.ports]


def _in_state(node: fleet_pb2.Node, state: fleet_pb2.ModelState.ValueType) -> frozenset[str]:
    return frozenset(model.name for model in node.models if model.state == state)


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
