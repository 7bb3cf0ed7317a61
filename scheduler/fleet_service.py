"""The Fleet service, for gateways, which pass on who asks: metadata `llmos-tenant` and `llmos-role`.

A caller without that metadata is a service that has checked for itself; with TLS only services can connect.
"""

from __future__ import annotations

from typing import Any

from llmos.clock import Clock
from llmos.errors import InvalidRequest, NotFound, PermissionDenied
from llmos.internal.v1 import registry_pb2, request_pb2
from llmos.v1 import fleet_pb2
from scheduler import events, load_view, views
from scheduler.allocation.service import LedgerService
from scheduler.callers import FleetCaller
from scheduler.directory import SchedulerDirectory
from scheduler.seat import ReignSeat
from scheduler.span_ring import SpanRing

_DEFAULT_ROWS = 1000
_CLASSES = frozenset(fleet_pb2.PriorityClass.values()) - {fleet_pb2.PRIORITY_CLASS_UNSPECIFIED}


class FleetService(LedgerService):
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
        if not FleetCaller.of(context).owns(live.request.tenant):
            raise PermissionDenied("Only an operator may end another tenant's request.")
        await reign.loop.post(events.Killed(request.request_id))
        return fleet_pb2.KillRequestResponse(was_running=True)

    async def SetRequestPriority(  # noqa: N802
        self, request: fleet_pb2.SetRequestPriorityRequest, context: Any
    ) -> fleet_pb2.SetRequestPriorityResponse:
        """See the contract. Raises InvalidRequest, NotFound, PermissionDenied."""
        reign = self._seat.leading()
        live = reign.core.state.requests.get(request.request_id)
        if request.priority not in _CLASSES:
            raise InvalidRequest("The new class must be interactive, standard or batch.", param="priority")
        if live is None:
            raise NotFound("No request of that id waits or runs.", param="request_id")
        caller, before = FleetCaller.of(context), views.priority_of(live)
        if not caller.owns(live.request.tenant) or (request.priority < before and not caller.operator):
            raise PermissionDenied("Only an operator may raise a request, or move another tenant's.")
        wanted = request_pb2.PriorityClass.ValueType(request.priority)
        await reign.loop.post(events.Reprioritized(request.request_id, wanted))
        return fleet_pb2.SetRequestPriorityResponse(before=before)

    async def DrainNode(  # noqa: N802
        self, request: fleet_pb2.DrainNodeRequest, context: Any
    ) -> fleet_pb2.DrainNodeResponse:
        """See the contract. Raises NotFound, PermissionDenied."""
        reign = self._seat.leading()
        FleetCaller.of(context).require_operator("drain a worker")
        worker = reign.core.state.workers.get(request.node_id)
        if worker is None:
            raise NotFound("There is no worker of that id.", param="node_id")
        await reign.loop.post(events.DrainOrdered(worker.id, request.undo))
        return fleet_pb2.DrainNodeResponse(running=len(worker.running))

    async def GetLoad(self, request: fleet_pb2.GetLoadRequest, context: Any) -> fleet_pb2.GetLoadResponse:  # noqa: N802
        """See the contract."""
        state = self._seat.leading().core.state
        nodes = views.nodes(state, self._directory.records(), self._record)
        return load_view.load(state, nodes, self._clock.monotonic())

    async def GetTrace(self, request: fleet_pb2.GetTraceRequest, context: Any) -> fleet_pb2.GetTraceResponse:  # noqa: N802
        """See the contract. Raises NotFound."""
        self._seat.leading()
        spans = self._ring.get(request.id)
        if not spans:
            raise NotFound("There is no trace of that id any more, or not yet.", param="id")
        return fleet_pb2.GetTraceResponse(spans=spans)
