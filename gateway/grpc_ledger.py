"""The ledger's part of the public Fleet service: allocations, and explanations of what is not running."""

from __future__ import annotations

from typing import Any

from gateway import request_id as request_ids
from gateway.grpc_edge import Caller
from gateway.leader import LeaderClient
from gateway.types import Authenticator
from llmos.errors import InvalidRequest, NotFound, PermissionDenied
from llmos.v1 import fleet_pb2 as pb
from llmos.v1 import fleet_pb2_grpc

_LONGEST_ID = 512


class LedgerServicer(fleet_pb2_grpc.FleetServicer):
    """Stateless. Reading needs any key, changes need an operator's."""

    _leader: LeaderClient
    _authenticator: Authenticator

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:  # noqa: N802
        """See the contract. A request is found under the id that its client knows, too."""
        identity = Caller(context, self._authenticator).identity
        if not 0 < len(request.id) <= _LONGEST_ID:
            raise InvalidRequest("Name a request, a model or an allocation.", param="id")
        try:
            answer: pb.ExplainResponse = await self._leader.call("Explain", request)
        except NotFound as unknown:
            inside = pb.ExplainRequest(id=request_ids.inside(request.id, identity.tenant))
            try:
                answer = await self._leader.call("Explain", inside)
            except NotFound:
                raise unknown from None  # in the words of who asked
        return answer

    async def ListAllocations(  # noqa: N802
        self, request: pb.ListAllocationsRequest, context: Any
    ) -> pb.ListAllocationsResponse:
        """See the contract."""
        Caller(context, self._authenticator)
        answer: pb.ListAllocationsResponse = await self._leader.call("ListAllocations", request)
        return answer

    async def SetAllocation(  # noqa: N802
        self, request: pb.SetAllocationRequest, context: Any
    ) -> pb.SetAllocationResponse:
        """See the contract."""
        self._only_operators(context)
        answer: pb.SetAllocationResponse = await self._leader.call("SetAllocation", request)
        return answer

    async def DeleteAllocation(  # noqa: N802
        self, request: pb.DeleteAllocationRequest, context: Any
    ) -> pb.DeleteAllocationResponse:
        """See the contract."""
        self._only_operators(context)
        answer: pb.DeleteAllocationResponse = await self._leader.call("DeleteAllocation", request)
        return answer

    def _only_operators(self, context: Any) -> None:
        if Caller(context, self._authenticator).identity.role != "operator":
            raise PermissionDenied("Only an operator's key may change allocations.")
