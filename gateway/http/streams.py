"""GET /v1/streams/{id}: a client comes back to a stream that it lost, at this gateway or any other."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from gateway import validate
from gateway.config import HttpLimits
from gateway.http.api import trace_of
from gateway.http.attend import attended
from gateway.http.generation import GenerationResponse
from gateway.http.shapes import shape_of
from gateway.types import Authenticator, Engine, Generation


@dataclass(frozen=True, slots=True)
class StreamEndpoints:
    """Each method is one of them."""

    engine: Engine
    authenticator: Authenticator
    limits: HttpLimits

    async def take_up(self, request: Request) -> ASGIApp:
        """GET /v1/streams/{id}: what the client lacks of an answer, in the form in which it was asked for."""
        identity = self.authenticator.authenticate(request.headers.get("authorization"))
        held = validate.last_event_id(request.headers.get("last-event-id", ""))
        timeout = request.headers.get("x-request-timeout")
        found = await attended(
            self.engine.take_up(
                request.path_params["id"],
                identity,
                held,
                trace=trace_of(request),
                deadline_s=None if timeout is None else validate.timeout_s(timeout),
            ),
            request.receive,
        )
        wants_events = bool(held) or "text/event-stream" in request.headers.get("accept", "")
        shape = shape_of(found.kind, found.view)
        shape.take_up(held)

        def start() -> Coroutine[Any, Any, Generation]:
            return _already(found.generation)

        return GenerationResponse(start, shape, self.limits, stream=found.view.stream or wants_events)


async def _already(generation: Generation) -> Generation:
    """It runs."""
    return generation
