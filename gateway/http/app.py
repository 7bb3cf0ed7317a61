"""The HTTP application: routes, error handlers and the edge around them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.http.api import Api
from gateway.http.attend import ClientGone
from gateway.http.edge import Edge, on_bug, on_client_gone, on_http_exception, on_llmos_error
from gateway.http.streams import StreamEndpoints
from gateway.http.tasks import TaskEndpoints
from gateway.tasks import Tasks
from llmos.clock import Clock
from llmos.errors import LlmosError


def build_app(api: Api, *, clock: Clock, new_id: Callable[[], str]) -> ASGIApp:
    """The application. `new_id` names requests whose client did not; it must be unguessable."""
    tasks = TaskEndpoints(Tasks(api.engine), api.authenticator, api.limits)
    streams = StreamEndpoints(api.engine, api.authenticator, api.limits)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/embeddings", tasks.embed, methods=["POST"]),
        Route("/v1/classify", tasks.classify, methods=["POST"]),
        Route("/v1/score", tasks.score, methods=["POST"]),
        Route("/v1/rerank", tasks.rerank, methods=["POST"]),
        Route("/rerank", tasks.rerank, methods=["POST"]),
        _take_up_route(streams),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{model:path}", api.model, methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/live", api.health, methods=["GET"]),
        Route("/ready", api.ready, methods=["GET"]),
        Route("/metrics", api.show_metrics, methods=["GET"]),
        Route("/version", api.show_version, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: on_http_exception,
            LlmosError: on_llmos_error,
            ClientGone: on_client_gone,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    return Edge(
        app,
        limits=api.limits,
        metrics=api.metrics,
        clock=clock,
        new_id=new_id,
        routes=frozenset(route.path for route in routes),
    )


def _take_up_route(streams: StreamEndpoints) -> Route:
    """Whoever gets a stream has it alone from then on: HEAD, which Starlette adds to GET, must not ask for it."""
    route = Route("/v1/streams/{id:path}", streams.take_up, methods=["GET"])
    assert route.methods is not None
    route.methods.discard("HEAD")
    return route
