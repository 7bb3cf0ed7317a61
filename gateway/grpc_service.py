"""The public Inference service: the same engine, validator and errors as over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from gateway import task_bodies, validate
from gateway.grpc_convert import (
    EventT,
    ResponseT,
    chat_body,
    completion_body,
    gather,
    served_model,
    stream_event,
)
from gateway.grpc_edge import Caller
from gateway.grpc_tasks import classify_response, embed_response, score_response
from gateway.schemas import MAX_CHOICES
from gateway.tasks import Call, Results, Tasks
from gateway.types import Authenticator, Engine, Generation, GenerationRequest, Held
from llmos.errors import InvalidRequest
from llmos.v1 import inference_pb2 as pb
from llmos.v1 import inference_pb2_grpc

_Validate = Callable[[Mapping[str, object]], GenerationRequest]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Stateless: a call lives as long as its stream, and takes the computation with it when its client goes."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._tasks = Tasks(engine)
        self._authenticator = authenticator

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.ChatResponse:  # noqa: N802
        """See the contract."""
        return await self._whole(lambda: chat_body(request), validate.chat_request, context, pb.ChatResponse)

    async def StreamChat(  # noqa: N802
        self, request: pb.StreamChatRequest, context: Any
    ) -> AsyncIterator[pb.StreamChatResponse]:
        """See the contract."""
        generation = await self._start(lambda: chat_body(request), validate.chat_request, context)
        async with aclosing(_messages(generation, pb.StreamChatResponse)) as messages:
            async for message in messages:
                yield message

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:  # noqa: N802
        """See the contract."""
        return await self._whole(
            lambda: completion_body(request), validate.completion_request, context, pb.CompleteResponse
        )

    async def StreamComplete(  # noqa: N802
        self, request: pb.StreamCompleteRequest, context: Any
    ) -> AsyncIterator[pb.StreamCompleteResponse]:
        """See the contract."""
        generation = await self._start(lambda: completion_body(request), validate.completion_request, context)
        async with aclosing(_messages(generation, pb.StreamCompleteResponse)) as messages:
            async for message in messages:
                yield message

    async def ResumeStream(  # noqa: N802
        self, request: pb.ResumeStreamRequest, context: Any
    ) -> AsyncIterator[pb.ResumeStreamResponse]:
        """See the contract."""
        caller = Caller(context, self._authenticator)
        held, deadline_s = _held(request), caller.deadline_s
        try:
            found = await self._engine.take_up(
                request.request_id, caller.identity, held, trace=caller.trace, deadline_s=deadline_s
            )
        except InvalidRequest as error:  # of a position that nobody can have, which has another name over HTTP
            raise InvalidRequest(error.message, param="held") from error
        await _name(found.generation, context)
        async with aclosing(_messages(found.generation, pb.ResumeStreamResponse)) as messages:
            async for message in messages:
                yield message

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:  # noqa: N802
        """See the contract."""
        caller = Caller(context, self._authenticator)
        if not request.request_id:
            raise InvalidRequest("'request_id' is required.", param="request_id")
        return pb.CancelResponse(was_running=await self._engine.cancel(request.request_id, caller.identity))

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """See the contract."""
        call = self._call(context)
        ask = task_bodies.embedding({"model": request.model, "input": list(request.inputs)})
        return embed_response(await _named(self._tasks.embed(ask, call), context))

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        """See the contract."""
        call = self._call(context)
        ask = task_bodies.classification({"model": request.model, "input": list(request.inputs)})
        return classify_response(await _named(self._tasks.classify(ask, call), context))

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802
        """See the contract."""
        call = self._call(context)
        body = {"model": request.model, "text_1": request.query, "text_2": list(request.texts)}
        return score_response(await _named(self._tasks.score(task_bodies.score(body), call), context))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """See the contract."""
        Caller(context, self._authenticator)
        return pb.ListModelsResponse(models=[served_model(model) for model in self._engine.models()])

    async def _start(self, body: Callable[[], Mapping[str, object]], check: _Validate, context: Any) -> Generation:
        caller = Caller(context, self._authenticator)
        request = replace(check(body()), deadline_s=caller.deadline_s)
        generation = await self._engine.generate(
            request, caller.identity, request_id=caller.request_id, trace=caller.trace
        )
        await _name(generation, context)
        return generation

    async def _whole(
        self,
        body: Callable[[], Mapping[str, object]],
        check: _Validate,
        context: Any,
        kind: type[ResponseT],
    ) -> ResponseT:
        generation = await self._start(body, check, context)
        try:
            return await gather(generation.events(), kind)
        finally:
            await generation.aclose()

    def _call(self, context: Any) -> Call:
        caller = Caller(context, self._authenticator)
        return Call(caller.identity, caller.request_id, caller.trace, caller.deadline_s)


def _held(request: pb.ResumeStreamRequest) -> tuple[Held, ...]:
    """What the client has. Raises InvalidRequest."""
    if not request.request_id:
        raise InvalidRequest("'request_id' is required.", param="request_id")
    held = tuple(Held(one.choice, one.tokens, one.text_chars, one.finished) for one in request.held)
    if len({one.choice for one in held}) != len(held) or any(one.choice >= MAX_CHOICES for one in held):
        raise InvalidRequest("'held' names each choice once at most.", param="held")
    return held


async def _name(generation: Generation, context: Any) -> None:
    """Tell the client its request's id ahead of everything else."""
    try:
        await context.send_initial_metadata((("x-request-id", generation.request_id),))
    except BaseException:
        await generation.aclose()
        raise


async def _named(work: Coroutine[Any, Any, Results], context: Any) -> Results:
    """The results, once the call has got its id."""
    results = await work
    await context.send_initial_metadata((("x-request-id", results.request_id),))
    return results


async def _messages(generation: Generation, kind: type[EventT]) -> AsyncGenerator[EventT, None]:
    try:
        async for event in generation.events():
            yield stream_event(event, kind)
    finally:
        await generation.aclose()
