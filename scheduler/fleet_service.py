"""The Fleet service, for gateways, which pass on who asks: metadata `llmos-tenant` and `llmos-role`.

A caller without that metadata is a service that has checked for itself; with TLS only services can connect.
"""

from __future__ import annotations

from typing import Any

from llmos.clock import Clock
from llmos.errors import NotFound, PermissionDenied
from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler import events, views
from scheduler.directory import SchedulerDirectory
from scheduler.seat import ReignSeat
from scheduler.span_ring import SpanRing

_DEFAULT_ROWS = 1000


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Implements `llmos.v1.Fleet`. Every method raises NotLeader where this scheduler does not lead."""

    def __init__(
        self,
        seat: ReignSeat,
        directory: SchedulerDirectory,
        ring: SpanRing,
        record: registry_pb2.SchedulerRecord,
        clock: Clock,
    ) -> None:
        self._seat = seat
        self._directory = directory
        self._ring = ring
        self._record = record
        self._clock = clock

    async def ListNodes(self, request: fleet_pb2.ListNodesRequest, context: Any) -> fleet_pb2.ListNodesResponse:  # noqa: N802
        """See the contract."""
        reign = self._seat.leading()
        found = views.nodes(reign.core.state, self._directory.records(), self._record)
        return fleet_pb2.ListNodesResponse(nodes=found, term=reign.term)

    async def ListRequests(  # noqa: N802
        self, request: fleet_pb2.ListRequestsRequest, context: Any
    ) -> fleet_pb2.ListRequestsResponse:
        """See the contract."""
        state = self._seat.leading().core.state
        rows = views.requests(state, self._clock.monotonic(), request.limit or _DEFAULT_ROWS)
        return fleet_pb2.ListRequestsResponse(requests=rows)

    async def KillRequest(  # noqa: N802
        self, request: fleet_pb2.KillRequestRequest, context: Any
    ) -> fleet_pb2.KillRequestResponse:
        """See the contract. Raises PermissionDenied."""
        reign = self._seat.leading()
        live = reign.core.state.requests.get(request.request_id)
        if live is None:
            return fleet_pb2.KillRequestResponse(was_running=False)
        caller = dict(context.invocation_metadata() or ())
        tenant = caller.get("llmos-tenant")
        if tenant is not None and tenant != live.request.tenant and caller.get("llmos-role") != "operator":
            raise PermissionDenied("Only an operator may end another tenant's request.")
        await reign.loop.post(events.Killed(request.request_id))
        return fleet_pb2.KillRequestResponse(was_running=True)

    async def GetTrace(self, request: fleet_pb2.GetTraceRequest, context: Any) -> fleet_pb2.GetTraceResponse:  # noqa: N802
        """See the contract. Raises NotFound."""
        self._seat.leading()
        spans = self._ring.get(request.id)
        if not spans:
            raise NotFound("There is no trace of that id any more, or not yet.", param="id")
        return fleet_pb2.GetTraceResponse(spans=spans)
