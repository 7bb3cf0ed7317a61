"""What every public gRPC call goes through: who calls, under which id and deadline, and whether it can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from gateway import validate
from gateway.types import Authenticator, Identity, TraceHeaders
from llmos.errors import InvalidRequest
from llmos.rpc import trailing_metadata

_FOREVER_S = 86_400.0


class Caller:
    """What a call's metadata says."""

    def __init__(self, context: Any, authenticator: Authenticator) -> None:
        """Raises Unauthenticated, or InvalidRequest where the request id is malformed."""
        values = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        self.identity: Identity = authenticator.authenticate(values.get("authorization"))
        given = values.get("x-request-id", "")
        self.request_id = validate.request_id(given) if given else ""
        self.trace = TraceHeaders(values.get("traceparent", ""), values.get("tracestate", ""))
        left = context.time_remaining()
        self.deadline_s: float | None = None if left is None or left > _FOREVER_S else left


class _Unreadable:
    """Stands for a request whose bytes are no message of its type."""


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # protobuf's error type differs between its implementations
            return _Unreadable()

    return read


async def _refuse(context: Any) -> None:
    error = InvalidRequest("The request can't be read: it is no protobuf message of this method.")
    await context.abort(error.grpc_status, error.message, trailing_metadata(error))


class UnreadableInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Answers bytes that can't be read, invalid UTF-8 included, with INVALID_ARGUMENT; gRPC itself says INTERNAL."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio. Methods whose requests are streamed are left alone."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        wrap, make = (
            (_guard_stream, grpc.unary_stream_rpc_method_handler)
            if handler.response_streaming
            else (_guard_unary, grpc.unary_unary_rpc_method_handler)
        )
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(wrap(behaviour), _lenient(handler.request_deserializer), handler.response_serializer)


def _guard_unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        if isinstance(request, _Unreadable):
            await _refuse(context)
        return await behaviour(request, context)

    return call


def _guard_stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        if isinstance(request, _Unreadable):
            await _refuse(context)
        answers = behaviour(request, context)
        if not hasattr(answers, "__aiter__"):  # a handler that writes through its context, such as health's
            await answers
            return
        try:
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()

    return call
