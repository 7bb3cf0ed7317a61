"""A scheduler that says what a test tells it to: a real gRPC server on port 0 with a scripted Requests service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from llmos.config import TlsConfig
from llmos.internal.v1 import request_pb2, requests_pb2, requests_pb2_grpc
from llmos.rpc import RpcServer
from llmos.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
WAIT_S = 10.0


def echo_model(name: str = "echo", **changes: Any) -> requests_pb2.CatalogueModel:
    """A model without a tokenizer: one token per byte."""
    fields: dict[str, Any] = {
        "version": "v1",
        "context_length": 8192,
        "vocab_size": 256,
        "capabilities": ["chat", "completion"],
        "created_unix_s": 1_700_000_000,
    }
    return requests_pb2.CatalogueModel(name=name, **(fields | changes))


def output(
    request_id: str,
    index: int,
    text: str | Sequence[int] = "",
    *,
    choice: int = 0,
    epoch: tuple[int, int] = (1, 1),
    finish: int = 0,
    logprobs: Sequence[request_pb2.LogprobEntry] = (),
) -> request_pb2.Output:
    """A piece of output; a text stands for its bytes."""
    return request_pb2.Output(
        request_id=request_id,
        epoch=request_pb2.Epoch(term=epoch[0], attempt=epoch[1]),
        choice=choice,
        index=index,
        token_ids=list(text.encode()) if isinstance(text, str) else text,
        logprobs=logprobs,
        finish_reason=finish,  # type: ignore[arg-type]
    )


def resumed(request: request_pb2.Request, choice: int = 0) -> list[int]:
    """The tokens of a choice that a submission comes with."""
    return next((list(part.token_ids) for part in request.resume if part.choice == choice), [])


class FakeScheduler(requests_pb2_grpc.RequestsServicer, fleet_pb2_grpc.FleetServicer):
    """Records what gateways say, sends what the test says. `answer`, if set, is called with every submission."""

    def __init__(
        self,
        *,
        term: int = 1,
        leads: bool = True,
        leader_address: str = "",
        models: Iterable[requests_pb2.CatalogueModel] | None = None,
        blobs: Mapping[str, bytes] | None = None,
        answer: Callable[[FakeScheduler, request_pb2.Request], None] | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        self.tls = tls
        self.term = term
        self.leads = leads
        self.leader_address = leader_address
        self.models = list(models) if models is not None else [echo_model()]
        self.blobs = dict(blobs or {})
        self.answer = answer
        self.hellos: list[requests_pb2.GatewayHello] = []
        self.submits: list[request_pb2.Request] = []
        self.handles: list[requests_pb2.Submit] = []
        """Submissions with what came beside the request."""
        self.cancels: list[requests_pb2.Cancel] = []
        self.finishes: list[requests_pb2.Finish] = []
        self.spans: list[fleet_pb2.Span] = []
        self.acknowledged = 0
        self.asked = 0
        """How often a gateway asked whether this one leads."""
        self.running: list[fleet_pb2.RequestInfo] = []
        self.killed: list[str] = []
        self.traces: dict[str, list[fleet_pb2.Span]] = {}
        self.fetched: list[str] = []
        self._out: asyncio.Queue[requests_pb2.ExchangeResponse | None] | None = None
        self._sequence = 0
        self._changed = asyncio.Condition()
        self._server: RpcServer | None = None
        self._taken = 0

    async def start(self) -> str:
        """Serve; returns host:port."""
        self._server = RpcServer("127.0.0.1", 0, tls=self.tls)
        self._server.add(requests_pb2_grpc.add_RequestsServicer_to_server, self, "llmos.internal.v1.Requests")
        self._server.add(fleet_pb2_grpc.add_FleetServicer_to_server, self, "llmos.v1.Fleet")
        return f"127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        """End at once, as if killed."""
        if self._server is not None:
            await self._server.stop(0)

    @property
    def attached(self) -> bool:
        """A gateway listens."""
        return self._out is not None

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that a gateway's message brings about."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    async def next_submit(self) -> request_pb2.Request:
        """The next submission, in order of arrival."""
        await self.until(lambda: len(self.submits) > self._taken)
        self._taken += 1
        return self.submits[self._taken - 1]

    def send(
        self,
        *outputs: request_pb2.Output,
        failures: Sequence[request_pb2.Failure] = (),
        class_changes: Sequence[requests_pb2.ClassChange] = (),
        sequence: int | None = None,
    ) -> None:
        """Send one frame; `sequence` repeats or skips numbers."""
        self._sequence = self._sequence + 1 if sequence is None else sequence
        frame = requests_pb2.GatewayFrame(
            sequence=self._sequence, outputs=outputs, failures=failures, class_changes=class_changes
        )
        self._put(requests_pb2.ExchangeResponse(frame=frame))

    def push_catalogue(self, revision: int, *models: requests_pb2.CatalogueModel) -> None:
        """Send a catalogue."""
        self._put(requests_pb2.ExchangeResponse(catalogue=requests_pb2.Catalogue(revision=revision, models=models)))

    def resign(self, leader_address: str = "") -> None:
        """Lead no more, and say so."""
        self.leads, self.leader_address = False, leader_address
        self._put(requests_pb2.ExchangeResponse(not_leader=requests_pb2.NotLeader(leader_address=leader_address)))

    def drop(self) -> None:
        """End the stream, as a broken connection does."""
        if self._out is not None:
            self._out.put_nowait(None)

    def _put(self, message: requests_pb2.ExchangeResponse) -> None:
        assert self._out is not None, "no gateway listens"
        self._out.put_nowait(message)

    async def Exchange(  # noqa: N802
        self, request_iterator: AsyncIterator[requests_pb2.ExchangeRequest], context: Any
    ) -> AsyncIterator[requests_pb2.ExchangeResponse]:
        """See the contract."""
        await self._note(await anext(request_iterator))
        if not self.leads:
            yield requests_pb2.ExchangeResponse(not_leader=requests_pb2.NotLeader(leader_address=self.leader_address))
            return
        out: asyncio.Queue[requests_pb2.ExchangeResponse | None] = asyncio.Queue()
        self._out, self._sequence = out, 0
        reader = asyncio.create_task(self._listen(request_iterator))
        try:
            yield requests_pb2.ExchangeResponse(
                welcome=requests_pb2.Welcome(term=self.term, scheduler_id=f"s{self.term}")
            )
            first = requests_pb2.Catalogue(revision=1, models=self.models, loading=not self.models)
            yield requests_pb2.ExchangeResponse(catalogue=first)
            while (message := await out.get()) is not None:
                yield message
        finally:
            reader.cancel()
            if self._out is out:
                self._out = None

    async def Leads(self, request: requests_pb2.LeadsRequest, context: Any) -> requests_pb2.LeadsResponse:  # noqa: N802
        """See the contract."""
        self.asked += 1
        return requests_pb2.LeadsResponse(term=self.term if self.leads else 0)

    async def _listen(self, messages: AsyncIterator[requests_pb2.ExchangeRequest]) -> None:
        async for message in messages:
            await self._note(message)

    async def _note(self, message: requests_pb2.ExchangeRequest) -> None:
        match message.WhichOneof("message"):
            case "hello":
                self.hellos.append(message.hello)
            case "submit":
                self.submits.append(message.submit.request)
                self.handles.append(message.submit)
                if self.answer is not None:
                    self.answer(self, message.submit.request)
            case "cancel":
                self.cancels.append(message.cancel)
            case "finish":
                self.finishes.append(message.finish)
            case "ack":
                self.acknowledged = message.ack.sequence
            case "spans":
                self.spans.extend(message.spans.spans)
        async with self._changed:
            self._changed.notify_all()

    async def FetchBlob(  # noqa: N802
        self, request: requests_pb2.FetchBlobRequest, context: Any
    ) -> AsyncIterator[requests_pb2.FetchBlobResponse]:
        """See the contract; in small chunks."""
        self.fetched.append(request.sha256)
        content = self.blobs[request.sha256]
        for start in range(0, len(content), 1000):
            yield requests_pb2.FetchBlobResponse(data=content[start : start + 1000])

    async def ListNodes(self, request: Any, context: Any) -> fleet_pb2.ListNodesResponse:  # noqa: N802
        """This scheduler alone."""
        return fleet_pb2.ListNodesResponse(nodes=[fleet_pb2.Node(id=f"s{self.term}")], term=self.term)

    async def ListRequests(self, request: Any, context: Any) -> fleet_pb2.ListRequestsResponse:  # noqa: N802
        """What the test put into `running`."""
        return fleet_pb2.ListRequestsResponse(requests=self.running)

    async def KillRequest(self, request: Any, context: Any) -> fleet_pb2.KillRequestResponse:  # noqa: N802
        """Noted in `killed`."""
        self.killed.append(request.request_id)
        return fleet_pb2.KillRequestResponse(was_running=True)

    async def GetTrace(self, request: Any, context: Any) -> fleet_pb2.GetTraceResponse:  # noqa: N802
        """What the test put into `traces`."""
        return fleet_pb2.GetTraceResponse(spans=self.traces.get(request.id, []))
