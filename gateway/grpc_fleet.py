"""The public Fleet service: asks the leading scheduler, after checking what the key allows."""

from __future__ import annotations

from typing import Any

from gateway import request_id as request_ids
from gateway.grpc_edge import Caller
from gateway.grpc_ledger import LedgerServicer
from gateway.leader import LeaderClient
from gateway.types import Authenticator, Identity
from llmos.errors import InvalidRequest, NotFound, PermissionDenied
from llmos.v1 import fleet_pb2 as pb

_ALL_REQUESTS = 100_000
_CLASSES = frozenset(pb.PriorityClass.values()) - {pb.PRIORITY_CLASS_UNSPECIFIED}


class FleetServicer(LedgerServicer):
    """Stateless. Reading needs any key, steering what is not the tenant's own an operator's."""

    def __init__(self, leader: LeaderClient, authenticator: Authenticator) -> None:
        self._leader = leader
        self._authenticator = authenticator

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:  # noqa: N802
        """See the contract."""
        Caller(context, self._authenticator)
        return await self._leader.list_nodes(request)

    async def ListRequests(  # noqa: N802
        self, request: pb.ListRequestsRequest, context: Any
    ) -> pb.ListRequestsResponse:
        """See the contract."""
        Caller(context, self._authenticator)
        return await self._leader.list_requests(request)

    async def KillRequest(self, request: pb.KillRequestRequest, context: Any) -> pb.KillRequestResponse:  # noqa: N802
        """See the contract."""
        identity = Caller(context, self._authenticator).identity
        if not request.request_id:
            raise InvalidRequest("'request_id' is required.", param="request_id")
        row = await self._find(request.request_id, identity)
        if row is None:
            return pb.KillRequestResponse(was_running=False)
        if identity.role != "operator" and row.tenant != identity.tenant:
            raise PermissionDenied("Only an operator's key may end another tenant's request.")
        return pb.KillRequestResponse(was_running=await self._leader.kill_request(row.request_id))

    async def SetRequestPriority(  # noqa: N802
        self, request: pb.SetRequestPriorityRequest, context: Any
    ) -> pb.SetRequestPriorityResponse:
        """See the contract. A tenant may move its own requests to a lower class."""
        identity = Caller(context, self._authenticator).identity
        if not request.request_id:
            raise InvalidRequest("'request_id' is required.", param="request_id")
        if request.priority not in _CLASSES:
            raise InvalidRequest("'priority' must be interactive, standard or batch.", param="priority")
        row = await self._find(request.request_id, identity)
        if row is None:
            raise NotFound(f"No request {request.request_id[:128]!r} waits or runs.", param="request_id")
        if identity.role != "operator" and (row.tenant != identity.tenant or request.priority < row.priority):
            raise PermissionDenied("Only an operator's key may raise a request, or move another tenant's.")
        inner = pb.SetRequestPriorityRequest(request_id=row.request_id, priority=request.priority)
        return await self._leader.set_request_priority(inner)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:  # noqa: N802
        """See the contract."""
        if Caller(context, self._authenticator).identity.role != "operator":
            raise PermissionDenied("Draining a worker needs an operator's key.")
        if not request.node_id:
            raise InvalidRequest("'node_id' is required.", param="node_id")
        return await self._leader.drain_node(request)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:  # noqa: N802
        """See the contract."""
        Caller(context, self._authenticator)
        return await self._leader.get_load(request)

    async def GetTrace(self, request: pb.GetTraceRequest, context: Any) -> pb.GetTraceResponse:  # noqa: N802
        """See the contract."""
        identity = Caller(context, self._authenticator).identity
        if not request.id:
            raise InvalidRequest("'id' is required.", param="id")
        for name in (request.id, request_ids.inside(request.id, identity.tenant)):
            spans = await self._spans(name)
            if spans:
                return pb.GetTraceResponse(spans=spans)
        raise NotFound(f"There is no trace of {request.id[:128]!r} any more, or not yet.", param="id")

    async def _spans(self, name: str) -> list[pb.Span]:
        try:
            return await self._leader.get_trace(name)
        except NotFound:
            return []

    async def _find(self, name: str, identity: Identity) -> pb.RequestInfo | None:
        """The running request that the caller means: one of its own tenant's if names are equal."""
        listing = await self._leader.list_requests(pb.ListRequestsRequest(limit=_ALL_REQUESTS))
        rows = [row for row in listing.requests if request_ids.names(name, row.request_id, row.tenant)]
        own = [row for row in rows if row.tenant == identity.tenant]
        return next(iter([*own, *rows]), None)
