"""A small scheduler: attaches to a worker over real gRPC, sends commands, checks every frame."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Self

import grpc

from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2, work_pb2_grpc
from llmos.rpc import error_from_rpc, open_channel
from llmos.v1 import fleet_pb2, inference_pb2
from worker.backends.echo import echo_token, prompt_digest

WAIT_S = 60.0
PROMPT = (72, 101, 108, 108, 111)


class SchedulerClient:
    """One stream. `async with` opens it; frames are acknowledged as they come unless `acknowledge` is False."""

    def __init__(self, address: str, *, term: int = 10, acknowledge: bool = True) -> None:
        self.term = term
        self.acknowledge = acknowledge
        self.report = work_pb2.WorkerReport()
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.finished: dict[tuple[str, int], int] = {}
        self.failures: list[request_pb2.Failure] = []
        self.models: dict[str, fleet_pb2.NodeModel] = {}
        self.spans: list[fleet_pb2.Span] = []
        self.frames: list[work_pb2.WorkFrame] = []
        self.error: Exception | None = None
        self._channel = open_channel(address)
        self._commands: asyncio.Queue[work_pb2.AttachRequest | None] = asyncio.Queue()
        self._news = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self._channel.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def open(self) -> None:
        """Attach. Raises the typed error of a refusal."""
        self.send(work_pb2.Command(hello=work_pb2.SchedulerHello(scheduler_id="test")))
        call = work_pb2_grpc.WorkStub(self._channel).Attach(self._requests())
        try:
            async with asyncio.timeout(WAIT_S):
                first = await call.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        assert first.HasField("report")
        self.report = first.report
        self.models.update({model.name: model for model in first.report.models})
        self._reader = asyncio.create_task(self._read(call))

    def send(self, *commands: work_pb2.Command, acknowledged: int = 0, term: int | None = None) -> None:
        """Send one batch."""
        self._commands.put_nowait(
            work_pb2.AttachRequest(term=term or self.term, commands=commands, acknowledged=acknowledged)
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds after some frame, or the stream ended."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: condition() or self.error is not None)
        assert condition(), self.error

    async def ended(self) -> Exception:
        """Wait for the stream's end; its error."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: self.error is not None)
        assert self.error is not None
        return self.error

    async def load(self, model: str = "echo", budget: int = 64 * 2**20) -> None:
        """Order a model and wait until it is loaded."""
        self.send(work_pb2.Command(load=work_pb2.LoadModel(model=model, memory_budget_bytes=budget)))
        await self.until(lambda: self.models[model].state == fleet_pb2.MODEL_STATE_LOADED)

    async def done(self, request_id: str, choices: int = 1) -> list[list[int]]:
        """Wait until every choice has finished; their tokens."""
        await self.until(lambda: all((request_id, choice) in self.finished for choice in range(choices)))
        return [self.tokens[request_id, choice] for choice in range(choices)]

    async def _requests(self) -> AsyncIterator[work_pb2.AttachRequest]:
        while (request := await self._commands.get()) is not None:
            yield request

    async def _read(self, call: grpc.aio.StreamStreamCall[work_pb2.AttachRequest, work_pb2.AttachResponse]) -> None:
        error: Exception = EOFError("the worker closed the stream")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                await self._take(response.frame)
        except grpc.aio.AioRpcError as refused:
            error = error_from_rpc(refused)
        except AssertionError as broken:
            error = broken
        async with self._news:
            self.error = error
            self._news.notify_all()

    async def _take(self, frame: work_pb2.WorkFrame) -> None:
        expected = self.frames[-1].sequence + 1 if self.frames else 1
        assert frame.sequence == expected
        for output in frame.outputs:
            received = self.tokens[output.request_id, output.choice]
            if not received and output.index:
                received.extend([-1] * output.index)
            assert output.index == len(received), "a gap or a repetition"
            received.extend(output.token_ids)
            if output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                self.finished[output.request_id, output.choice] = output.finish_reason
        self.failures.extend(frame.failures)
        self.models.update({model.name: model for model in frame.models})
        self.spans.extend(frame.spans)
        self.frames.append(frame)
        if self.acknowledge:
            self.send(acknowledged=frame.sequence)
        async with self._news:
            self._news.notify_all()


def dispatch(
    request_id: str,
    *,
    attempt: int = 1,
    term: int = 10,
    max_tokens: int = 16,
    choices: int = 1,
    model: str = "echo",
    seed: int = 7,
    resume: Mapping[int, Sequence[int]] | None = None,
    traceparent: str = "",
) -> work_pb2.Command:
    """An order to begin an attempt at `PROMPT`."""
    entries = [request_pb2.ChoiceResume(choice=c, token_ids=tokens) for c, tokens in (resume or {}).items()]
    request = request_pb2.Request(
        request_id=request_id,
        model=model,
        token_ids=PROMPT,
        sampling=request_pb2.Sampling(seed=seed, temperature=1.0, top_p=1.0, repetition_penalty=1.0),
        max_tokens=max_tokens,
        choices=choices,
        resume=entries,
    )
    epoch = request_pb2.Epoch(term=term, attempt=attempt)
    trace = request_pb2.TraceContext(traceparent=traceparent)
    return work_pb2.Command(dispatch=work_pb2.Dispatch(epoch=epoch, request=request, trace=trace))


def cancel(request_id: str, *, attempt: int = 1, term: int = 10) -> work_pb2.Command:
    """An order to stop a request's attempts up to this one."""
    epoch = request_pb2.Epoch(term=term, attempt=attempt)
    return work_pb2.Command(cancel=work_pb2.CancelAttempt(request_id=request_id, epoch=epoch))


def finish(request_id: str, choice: int, keep_until: int) -> work_pb2.Command:
    """An order to end a choice early."""
    return work_pb2.Command(finish=requests_pb2.Finish(request_id=request_id, choice=choice, keep_until=keep_until))


def expected(count: int, choice: int = 0, seed: int = 7) -> list[int]:
    """The first tokens of an echo stream for `PROMPT`."""
    digest = prompt_digest(PROMPT)
    return [echo_token(digest, seed, choice, index) for index in range(count)]
