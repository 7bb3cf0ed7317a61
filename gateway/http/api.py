"""The endpoints: who asks, what for, and which response answers it."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway import validate
from gateway.config import HttpLimits
from gateway.http.body import read_json
from gateway.http.generation import GenerationResponse
from gateway.http.merge import start_all
from gateway.http.shapes import shape_of
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.schemas import GenerationBody
from gateway.tiers import Tier, class_of, granted, tier_of
from gateway.types import Authenticator, Engine, Generation, GenerationRequest, Identity, ModelInfo, TraceHeaders, View
from llmos.errors import ModelNotFound, PermissionDenied, Unavailable


@dataclass(frozen=True, slots=True)
class Api:
    """Everything the endpoints need; each method is one of them."""

    engine: Engine
    authenticator: Authenticator
    metrics: Metrics
    limits: HttpLimits
    version: str
    open_metrics: bool = False

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        identity = self._identify(request)
        body = validate.chat_body(await read_json(request.receive, request.headers, self.limits))
        return self._answer(request, identity, body, [validate.chat_request(body)])

    async def complete(self, request: Request) -> ASGIApp:
        """POST /v1/completions"""
        identity = self._identify(request)
        body = validate.completion_body(await read_json(request.receive, request.headers, self.limits))
        return self._answer(request, identity, body, list(validate.completion_requests(body)))

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        self._identify(request)
        return _json({"object": "list", "data": [_model(model) for model in self.engine.models()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}"""
        self._identify(request)
        return _json(_model(self._find(request.path_params["model"])))

    async def health(self, request: Request) -> Response:
        """GET /live and /health: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: a leader is connected, a model is served, and this gateway is not about to leave."""
        if not self.engine.ready():
            raise Unavailable("Not ready: no scheduler leads, or no model is served yet.", retry_after_s=1.0)
        return _json({"status": "ready"})

    async def show_version(self, request: Request) -> Response:
        """GET /version"""
        return _json({"version": self.version})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus's text format. With keys, for operators."""
        if not self.open_metrics and self._identify(request).role != "operator":
            raise PermissionDenied("Metrics need an operator's key.")
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    def _answer(
        self,
        request: Request,
        identity: Identity,
        body: GenerationBody,
        inner: list[GenerationRequest],
    ) -> GenerationResponse:
        timeout = request.headers.get("x-request-timeout")
        deadline_s = None if timeout is None else validate.timeout_s(timeout)
        view = View(
            stream=bool(body.stream),
            include_usage=body.wants_usage,
            tier=_tier(body, identity),
            always_reason=body.wants_reasons,
            logprobs=inner[0].params.logprobs is not None,
        )
        inner = [replace(one, deadline_s=deadline_s, view=view) for one in inner]
        request_id, trace = request.scope["state"]["client_request_id"], trace_of(request)

        def start() -> Coroutine[Any, Any, Generation]:
            return start_all(self.engine, inner, identity, request_id=request_id, trace=trace)

        return GenerationResponse(start, shape_of(inner[0].kind, view), self.limits, stream=view.stream)

    def _identify(self, request: Request) -> Identity:
        return self.authenticator.authenticate(request.headers.get("authorization"))

    def _find(self, name: str) -> ModelInfo:
        for model in self.engine.models():
            if model.name == name:
                return model
        raise ModelNotFound(f"The model '{name[:200]}' is not served here; list the models.", param="model")


def trace_of(request: Request) -> TraceHeaders:
    """The trace that the client wants its request to be a part of."""
    return TraceHeaders(request.headers.get("traceparent", ""), request.headers.get("tracestate", ""))


def _tier(body: GenerationBody, identity: Identity) -> Tier | None:
    """The tier that the request gets, if it asked for any."""
    if body.service_tier is None:
        return None
    return tier_of(granted(identity.priority, class_of(body.service_tier)))


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "llmos",
        "max_model_len": model.context_length,
        "version": model.version,
        "capabilities": sorted(model.capabilities),
        "root": model.name,
        "parent": model.base_model or None,
        **({"labels": model.labels} if model.labels else {}),
        **({"dimensions": model.dimensions} if model.dimensions else {}),
    }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
