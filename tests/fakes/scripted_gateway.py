"""A gateway's public gRPC API with canned answers, on a real server at port 0; it notes what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from llmos.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2, inference_pb2_grpc

NODES = [
    fleet_pb2.Node(id="s1", role=fleet_pb2.NODE_ROLE_SCHEDULER, pid=10, host="h", address="127.0.0.1:1", state=2),
    fleet_pb2.Node(
        id="w1",
        role=fleet_pb2.NODE_ROLE_WORKER,
        pid=11,
        host="h",
        address="127.0.0.1:2",
        backend="echo",
        state=fleet_pb2.NODE_STATE_READY,
        models=[
            fleet_pb2.NodeModel(
                name="m", version="v", state=fleet_pb2.MODEL_STATE_LOADED, total_blocks=9, free_blocks=8
            )
        ],
        capacity=fleet_pb2.Capacity(
            devices=[fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, name="CPU", memory_bytes=2**30)],
            cpu_cores=2,
            memory_bytes=2**30,
            disk_bytes=2**33,
        ),
    ),
]
REQUESTS = [
    fleet_pb2.RequestInfo(
        request_id="r1",
        state=fleet_pb2.REQUEST_STATE_DECODE,
        model="m",
        tenant="t",
        worker="w1",
        attempt=1,
        tokens_in=3,
        tokens_out=4,
        age_ms=1500,
        priority=fleet_pb2.PRIORITY_CLASS_STANDARD,
        trace_id="0" * 32,
    )
]
LOAD = fleet_pb2.GetLoadResponse(
    term=7,
    nodes=NODES,
    queues=[
        fleet_pb2.QueueLoad(
            priority=fleet_pb2.PRIORITY_CLASS_INTERACTIVE,
            tenant="t",
            waiting=2,
            waiting_tokens=3000,
            running=1,
            tokens_per_s=41.5,
            weight=4,
        )
    ],
    models=[
        fleet_pb2.ModelLoad(
            name="m",
            version="v",
            replicas=1,
            wanted=2,
            waiting=2,
            running=1,
            tokens_per_s=40,
            ttft=fleet_pb2.Percentiles(p50_ms=5.5, p95_ms=20, p99_ms=30),
        )
    ],
    workers=[fleet_pb2.WorkerLoad(node_id="w1", running=1, tokens_per_s=40, steps_per_s=20)],
    counters={"migrations": 3},
)
SPANS = [
    fleet_pb2.Span(
        trace_id=b"t" * 16, span_id=b"a" * 8, name="chat m", service="gateway", start_unix_ns=0, end_unix_ns=10**9
    ),
    fleet_pb2.Span(
        trace_id=b"t" * 16,
        span_id=b"b" * 8,
        parent_span_id=b"a" * 8,
        name="queue",
        service="scheduler",
        start_unix_ns=0,
        end_unix_ns=10**9,
        attributes={"llmos.request_id": "r1"},
    ),
]


class ScriptedGateway:
    """State of one fake gateway. `models` may be changed between calls."""

    def __init__(self) -> None:
        self.address = ""
        self.asked: list[Any] = []
        self.keys: list[str] = []
        self.models = [inference_pb2.ServedModel(name="m", version="v", capabilities=["chat", "completion"])]
        self.pieces = ["Par", "is"]
        self.running = 0
        """Requests on the worker, one less each time that somebody looks."""
        self.breaks = 0
        """So many streams break off after at most one more piece, as if the gateway had died."""
        self.forgets = False
        """It knows nothing of streams that broke off."""
        self.may_finish = threading.Event()
        """Streams wait for this after their pieces."""
        self.may_finish.set()
        self.ended = threading.Event()
        """Set when a stream has ended, by itself or because the client cancelled it."""

    def note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.asked.append(request)
        self.keys += [str(value) for key, value in context.invocation_metadata() if key == "authorization"]


class _Fleet(fleet_pb2_grpc.FleetServicer):
    def __init__(self, gateway: ScriptedGateway) -> None:
        self._gateway = gateway

    def ListNodes(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        nodes = [NODES[0], fleet_pb2.Node()]
        nodes[1].CopyFrom(NODES[1])
        nodes[1].running = self._gateway.running
        self._gateway.running = max(0, self._gateway.running - 1)
        return fleet_pb2.ListNodesResponse(nodes=nodes, term=7)

    def GetLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        return LOAD

    def SetRequestPriority(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        if request.request_id != "r1":
            code = ("llmos-error-code", "not_found")
            context.set_trailing_metadata((code,))
            context.abort(grpc.StatusCode.NOT_FOUND, "No request of that id waits or runs.")
        return fleet_pb2.SetRequestPriorityResponse(before=fleet_pb2.PRIORITY_CLASS_STANDARD)

    def DrainNode(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        if request.node_id != "w1":
            context.set_trailing_metadata((("llmos-error-code", "not_found"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no worker of that id.")
        return fleet_pb2.DrainNodeResponse(running=self._gateway.running)

    def ListRequests(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        return fleet_pb2.ListRequestsResponse(requests=REQUESTS)

    def KillRequest(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        return fleet_pb2.KillRequestResponse(was_running=request.request_id == "r1")

    def GetTrace(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.note(request, context)
        return fleet_pb2.GetTraceResponse(spans=SPANS if request.id == "r1" else [])


class _Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, gateway: ScriptedGateway) -> None:
        self._gateway = gateway

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        return inference_pb2.ListModelsResponse(models=self._gateway.models)

    def StreamChat(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        yield from self._stream(request, context, inference_pb2.StreamChatResponse)

    def StreamComplete(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        yield from self._stream(request, context, inference_pb2.StreamCompleteResponse)

    def ResumeStream(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self._gateway.note(request, context)
        if self._gateway.forgets:
            context.set_trailing_metadata((("llmos-error-code", "not_found"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "Nothing is remembered of such a stream.")
        yield from self._rest(sum(one.tokens for one in request.held), context, inference_pb2.ResumeStreamResponse)

    def _stream(self, request: Any, context: Any, event: Any) -> Iterator[Any]:
        self._gateway.note(request, context)
        if request.params.max_tokens == 13:
            extra = (("llmos-error-code", "overloaded"), ("retry-after", "1"))
            context.set_trailing_metadata(extra)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        yield from self._rest(sum(len(choice.token_ids) for choice in request.resume.choices), context, event)

    def _rest(self, held: int, context: Any, event: Any) -> Iterator[Any]:
        # Here: a client that leaves after the last piece may stop this generator before its next line.
        context.add_callback(self._gateway.ended.set)
        yield event(start=inference_pb2.StreamStart(request_id="r1", model="m", model_version="v", seed=5))
        rest = list(enumerate(self._gateway.pieces))[held:]
        for index, piece in rest[:1] if self._gateway.breaks else rest:
            yield event(delta=inference_pb2.Delta(index=index, text=piece, token_ids=[index]))
        if self._gateway.breaks:
            self._gateway.breaks -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        while context.is_active() and not self._gateway.may_finish.wait(0.02):
            continue
        yield event(delta=inference_pb2.Delta(index=2, finish_reason=inference_pb2.FINISH_REASON_STOP))
        yield event(usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2))


@contextmanager
def scripted_gateway(certificate: tuple[bytes, bytes] | None = None) -> Iterator[ScriptedGateway]:
    """Serves in threads of its own, so that a command's event loop can run in the test's.

    `certificate` is (key, certificate chain), PEM; None: no TLS.
    """
    gateway = ScriptedGateway()
    with futures.ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        fleet_pb2_grpc.add_FleetServicer_to_server(_Fleet(gateway), server)
        inference_pb2_grpc.add_InferenceServicer_to_server(_Inference(gateway), server)
        if certificate is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate]))
        gateway.address = f"127.0.0.1:{port}"
        server.start()
        yield gateway
        server.stop(None).wait(10)
