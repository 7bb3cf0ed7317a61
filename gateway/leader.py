"""Single calls to the leading scheduler, beside the stream: blobs, and the fleet as `llmos ps` and its kin show it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmos.errors import FleetError, LlmosError, Unavailable
from llmos.internal.v1 import journal_pb2, requests_pb2, requests_pb2_grpc
from llmos.rpc import error_from_rpc
from llmos.sealed import sealed
from llmos.v1 import fleet_pb2, fleet_pb2_grpc

_CALL_TIMEOUT_S = 5.0
_BLOB_TIMEOUT_S = 30.0
_BLOB_LIMIT = 128 * 1024 * 1024


@contextlib.contextmanager
def _typed_errors() -> Iterator[None]:
    """Errors of the tree instead of gRPC's; nothing that only services may see."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        typed = error_from_rpc(error)
        raise (Unavailable("The scheduler is changing; try again.") if _is_internal(typed) else typed) from error
    except asyncio.CancelledError:
        # A channel that is closed cancels whoever waits on it. Only a cancelled task may pass for cancelled.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable("The scheduler was lost; try again.", retry_after_s=1.0) from None


def _is_internal(error: LlmosError) -> bool:
    return isinstance(error, FleetError) or type(error) is LlmosError


def _readable(answer: Any) -> Any:
    """`answer`; gRPC gives None for bytes that are no such message."""
    if answer is None:
        raise Unavailable("The scheduler's answer arrived damaged; try again.", retry_after_s=1.0)
    return answer


async def answers(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Whether a process answers there within `timeout_s`, whatever it says. A frozen one doesn't; TCP can't tell."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code() not in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    return True


async def leads(channel: grpc.aio.Channel, timeout_s: float) -> int:
    """The term in which the scheduler there leads; 0 if it does not, or does not answer within `timeout_s`."""
    stub: Any = requests_pb2_grpc.RequestsStub(channel)
    try:
        answer: requests_pb2.LeadsResponse | None = await stub.Leads(requests_pb2.LeadsRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError:
        return 0
    return 0 if answer is None else int(answer.term)  # None: bytes that are no such message


class LeaderClient:
    """Calls whoever leads now. Every method raises LlmosError, Unavailable if nobody does."""

    def __init__(self, channel: Callable[[], grpc.aio.Channel]) -> None:
        """`channel` gives the leader's channel, or raises Unavailable (`Link.leader_channel`)."""
        self._channel = channel

    async def fetch_blob(self, sha256: str) -> bytes:
        """A blob of the catalogue by its hash, at most 128 MiB, unverified."""
        stub: Any = requests_pb2_grpc.RequestsStub(self._channel())
        chunks: list[bytes] = []
        size = 0
        with _typed_errors():
            async for answer in stub.FetchBlob(requests_pb2.FetchBlobRequest(sha256=sha256), timeout=_BLOB_TIMEOUT_S):
                size += len(_readable(answer).data)
                if size > _BLOB_LIMIT:
                    raise Unavailable("A file of the model is larger than this gateway takes.")
                chunks.append(answer.data)
        return b"".join(chunks)

    async def take_up(self, tenant: str, origin_ids: Sequence[str]) -> journal_pb2.JournalEntry:
        """What is remembered of a stream of that tenant, with a claim to it. Raises NotFound."""
        stub: Any = requests_pb2_grpc.RequestsStub(sealed(self._channel()))
        request = requests_pb2.TakeUpRequest(tenant=tenant, origin_ids=origin_ids)
        with _typed_errors():
            answer: requests_pb2.TakeUpResponse = _readable(await stub.TakeUp(request, timeout=_CALL_TIMEOUT_S))
        return answer.entry

    async def list_nodes(self, request: fleet_pb2.ListNodesRequest) -> fleet_pb2.ListNodesResponse:
        """Every node of the fleet."""
        answer: fleet_pb2.ListNodesResponse = await self.call("ListNodes", request)
        return answer

    async def list_requests(self, request: fleet_pb2.ListRequestsRequest) -> fleet_pb2.ListRequestsResponse:
        """Requests that wait or run, of all tenants."""
        answer: fleet_pb2.ListRequestsResponse = await self.call("ListRequests", request)
        return answer

    async def kill_request(self, request_id: str) -> bool:
        """Cancel a request by its internal id; whether it waited or ran."""
        answer = await self.call("KillRequest", fleet_pb2.KillRequestRequest(request_id=request_id))
        return bool(answer.was_running)

    async def set_request_priority(
        self, request: fleet_pb2.SetRequestPriorityRequest
    ) -> fleet_pb2.SetRequestPriorityResponse:
        """Move a request, by its internal id, to another class."""
        answer: fleet_pb2.SetRequestPriorityResponse = await self.call("SetRequestPriority", request)
        return answer

    async def drain_node(self, request: fleet_pb2.DrainNodeRequest) -> fleet_pb2.DrainNodeResponse:
        """Empty a worker, or take it back."""
        answer: fleet_pb2.DrainNodeResponse = await self.call("DrainNode", request)
        return answer

    async def get_load(self, request: fleet_pb2.GetLoadRequest) -> fleet_pb2.GetLoadResponse:
        """Who waits, who runs, how fast."""
        answer: fleet_pb2.GetLoadResponse = await self.call("GetLoad", request)
        return answer

    async def get_trace(self, trace_or_request_id: str) -> list[fleet_pb2.Span]:
        """Finished spans of a request or trace; empty if the ring has none."""
        return list((await self.call("GetTrace", fleet_pb2.GetTraceRequest(id=trace_or_request_id))).spans)

    async def call(self, method: str, request: Any) -> Any:
        """Any method of the leader's Fleet service."""
        stub = fleet_pb2_grpc.FleetStub(self._channel())
        with _typed_errors():
            return _readable(await getattr(stub, method)(request, timeout=_CALL_TIMEOUT_S))
