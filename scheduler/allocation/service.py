"""The ledger's part of the Fleet service: allocations, and explanations."""

from __future__ import annotations

from typing import Any

from llmos.clock import Clock
from llmos.errors import Conflict, InvalidRequest, PermissionDenied
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler import explain
from scheduler.allocation.check import check
from scheduler.seat import ReignSeat

_LONGEST_ID = 512


class LedgerService(fleet_pb2_grpc.FleetServicer):
    """Implements a part of `llmos.v1.Fleet`. Every method raises NotLeader where this scheduler does not lead."""

    _seat: ReignSeat
    _clock: Clock

    async def Explain(self, request: fleet_pb2.ExplainRequest, context: Any) -> fleet_pb2.ExplainResponse:  # noqa: N802
        """See the contract. Raises NotFound."""
        if not 0 < len(request.id) <= _LONGEST_ID:
            raise InvalidRequest("Name a request, a model or an allocation.", param="id")
        return explain.explain(self._seat.leading().core.state, request.id, self._clock.monotonic())

    async def ListAllocations(  # noqa: N802
        self, request: fleet_pb2.ListAllocationsRequest, context: Any
    ) -> fleet_pb2.ListAllocationsResponse:
        """See the contract."""
        state, now = self._seat.leading().core.state, self._clock.monotonic()
        promises = [state.book.promises[name] for name in sorted(state.book.promises)]
        return fleet_pb2.ListAllocationsResponse(
            allocations=[explain.status(state, promise, now) for promise in promises]
        )

    async def SetAllocation(  # noqa: N802
        self, request: fleet_pb2.SetAllocationRequest, context: Any
    ) -> fleet_pb2.SetAllocationResponse:
        """See the contract. Raises InvalidRequest, ModelNotFound, Conflict, PermissionDenied, Unavailable."""
        only_operators(context)
        reign = self._seat.leading()
        state, wanted = reign.core.state, request.allocation
        known = state.book.promises.get(wanted.name)
        if wanted.revision and known is not None and wanted.revision != known.revision:
            raise Conflict("The allocation has changed meanwhile: read it again.", param="revision")
        check(state, wanted)
        return fleet_pb2.SetAllocationResponse(allocation=await reign.intent.set(wanted))

    async def DeleteAllocation(  # noqa: N802
        self, request: fleet_pb2.DeleteAllocationRequest, context: Any
    ) -> fleet_pb2.DeleteAllocationResponse:
        """See the contract. Raises PermissionDenied, Unavailable."""
        only_operators(context)
        reign = self._seat.leading()
        known = request.name in reign.core.state.book.promises
        if known:
            await reign.intent.delete(request.name)
        return fleet_pb2.DeleteAllocationResponse(was_there=known)


def only_operators(context: Any) -> None:
    """Raises PermissionDenied for a gateway's caller without the operator's role."""
    caller = dict(context.invocation_metadata() or ())
    if caller.get("llmos-tenant") is not None and caller.get("llmos-role") != "operator":
        raise PermissionDenied("Only an operator's key may change allocations.")
